"""What a pruned run must equal: the untouched model in which dropped columns are hidden, layer by layer."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.adapter import find_adapter
from vlprune.trace import Trace


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder stack of any family, found the way the adapters do."""
    return find_adapter(model).decoder  # type: ignore[attr-defined]


def hidden_columns(trace: Trace, num_layers: int) -> list[Tensor]:
    """For each layer (B, L) bool: columns that were dropped before it."""
    layout = trace.layout
    assert layout is not None
    gone = torch.zeros(layout.num_rows, layout.length, dtype=torch.bool)
    by_layer: dict[int, list[Any]] = {}
    for record in trace.points:
        if record.point.startswith("vision:"):
            continue                                                     # see `tower_columns`
        layer = 0 if record.point == "before_llm" else int(record.point.partition(":")[2])
        by_layer.setdefault(layer, []).append(record)
    result = []
    for layer in range(num_layers):
        for record in by_layer.get(layer, []):
            for item, kept in zip(record.items, record.kept, strict=True):
                stays = torch.zeros(item.num_tokens, dtype=torch.bool)
                stays[kept.cpu()] = True
                gone[item.row, item.positions[~stays]] = True
        result.append(gone.clone())
    return result


def tower_columns(trace: Trace | None, model: nn.Module) -> dict[nn.Module, Any]:
    """For each block of a vision tower that is cut inside, (pictures, S): columns that were dropped before its attention, or the bias on them."""
    records = [record for record in trace.points if record.point.startswith("vision:")] if trace is not None else []
    if not records:
        return {}
    result = {}
    for number, block in enumerate(find_adapter(model).blocks):  # type: ignore[attr-defined]
        gone: Any = None
        for record in records:
            layer, _, inside = record.point.partition(":")[2].partition(".")
            if number == int(layer) - 1 and record.key_bias is not None:
                gone = record.key_bias                                   # of the block in front of a drop over a video's frames
            if int(layer) + bool(inside) > number:
                continue
            if record.columns is not None:
                gone = ~record.columns
                continue
            rows = []
            for item, kept in zip(record.items, record.kept, strict=True):
                row = torch.zeros(int(item.positions[-1]) + 1, dtype=torch.bool)
                row[item.positions] = True
                row[item.positions[kept.cpu()]] = False
                rows.append(row)
            gone = rows if hasattr(block, "attn") else torch.stack(rows)      # one sequence of pictures of any size, or a batch
        if gone is not None:
            result[block] = gone
    return result


def hide_tower(columns: dict[nn.Module, Any]) -> list[Any]:
    """Hooks that hide columns from the attention of tower blocks, or add a bias on them."""

    def make(gone: Tensor) -> Any:
        def hook(module: nn.Module, args: Any, call: dict[str, Any]) -> Any:
            states = args[0] if args else call["hidden_states"]
            bias = gone if gone.is_floating_point() else torch.zeros(gone.shape, dtype=states.dtype).masked_fill(gone, torch.finfo(states.dtype).min)
            return args[:1], {**call, "attention_mask": bias[:, None, None, :].expand(-1, 1, gone.shape[1], -1)}

        return hook

    return [block.register_forward_pre_hook(make(gone), with_kwargs=True) for block, gone in columns.items() if isinstance(gone, Tensor)]


class PackedTowerHidden:
    """Qwen's packed tower with columns hidden: every block's attention written out, with one mask for segments and dropped tokens."""

    def __init__(self, tower: nn.Module, columns: dict[nn.Module, Any]) -> None:
        self.tower, self.columns, self.windows = tower, columns, None

    def __enter__(self) -> None:
        if hasattr(self.tower, "permute_input_for_window_attn"):
            permute = self.tower.permute_input_for_window_attn

            def note(tensor: Tensor, window_index: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                self.windows = window_index
                return permute(tensor, window_index, *args, **kwargs)

            self.tower.permute_input_for_window_attn = note
        for block, gone in self.columns.items():
            block.attn.forward = self._forward(block.attn, torch.cat(gone))

    def __exit__(self, *error: Any) -> None:
        vars(self.tower).pop("permute_input_for_window_attn", None)
        for block in self.columns:
            vars(block.attn).pop("forward", None)

    def _forward(self, attn: Any, gone: Tensor) -> Any:
        rotate = sys.modules[type(attn).__module__].apply_rotary_pos_emb_vision

        def forward(hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any = None, **kwargs: Any) -> Tensor:
            length = hidden_states.shape[0]
            tokens = gone if self.windows is None else gone[self.windows]
            hidden = tokens.repeat_interleave(length // tokens.numel())
            segment = torch.bucketize(torch.arange(length), cu_seqlens[1:], right=True)
            queries, keys, values = attn.qkv(hidden_states).reshape(length, 3, attn.num_heads, -1).unbind(1)
            queries, keys = rotate(queries, keys, *position_embeddings)
            logits = torch.einsum("qhd,khd->hqk", queries, keys) * queries.shape[-1] ** -0.5
            logits = logits.masked_fill((segment[:, None] != segment) | hidden, torch.finfo(logits.dtype).min)
            return attn.proj(torch.einsum("hqk,khd->qhd", logits.softmax(dim=-1), values).reshape(length, -1))

        return forward


def masked_run(
    model: nn.Module,
    inputs: dict[str, Any],
    hidden: list[Tensor],
    extra_ids: Tensor | None = None,
    generated_type: int = 0,
    tower: dict[nn.Module, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """One full-length forward of the untouched model with columns hidden from layer on; ``extra_ids`` are appended to the prompt.

    ``tower``: columns hidden in the vision tower, from `tower_columns`.
    """
    inputs = dict(inputs)
    if extra_ids is not None and extra_ids.shape[1]:
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.full_like(extra_ids, generated_type)], dim=1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], extra_ids], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(extra_ids)], dim=1)
    length = inputs["input_ids"].shape[1]
    real = inputs["attention_mask"].bool()
    handles = hide_tower(tower or {})

    def make(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, call: dict[str, Any]) -> Any:
            mask = call.get("attention_mask")
            if isinstance(mask, Tensor) and mask.dim() == 4:
                allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            else:
                allowed = torch.ones(length, length).tril().bool()[None, None] & real[:, None, None, :]
            gone = torch.zeros_like(real)
            gone[:, : hidden[layer].shape[1]] = hidden[layer]
            allowed = allowed & ~gone[:, None, None, :]
            states = args[0] if args else call["hidden_states"]
            bias = torch.zeros(allowed.shape, dtype=states.dtype).masked_fill(~allowed, torch.finfo(states.dtype).min)
            return args, {**call, "attention_mask": bias}

        return hook

    try:
        for layer, module in enumerate(decoder_of(model).layers):  # type: ignore[arg-type]
            handles.append(module.register_forward_pre_hook(make(layer), with_kwargs=True))
        packed = {block: gone for block, gone in (tower or {}).items() if isinstance(gone, list)}
        with torch.no_grad(), PackedTowerHidden(find_adapter(model).tower, packed) if packed else nullcontext():  # type: ignore[attr-defined]
            return model(**inputs, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Hooks, class and instance attributes of every module, to prove that nothing is left behind."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        state = vars(module)
        found[name] = (
            type(module),
            sorted(key for key in state if not key.startswith("_output_capturing")),
            {kind: list(state[kind].values()) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")},
        )
    return found


def text_positions(inputs: dict[str, Tensor], ids: tuple[int, ...]) -> Tensor:
    """(B, L) bool: real tokens that are not visual."""
    mask = inputs["attention_mask"].bool()
    for number in ids:
        mask = mask & (inputs["input_ids"] != number)
    return mask

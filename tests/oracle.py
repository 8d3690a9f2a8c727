"""What a pruned run must equal: the untouched model in which dropped columns are hidden, layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlprune.trace import Trace


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder stack of any family, found the way the adapters do."""
    from vlprune.adapter import find_adapter

    return find_adapter(model).decoder  # type: ignore[attr-defined]


def hidden_columns(trace: Trace, num_layers: int) -> list[Tensor]:
    """For each layer (B, L) bool: columns that were dropped before it."""
    layout = trace.layout
    assert layout is not None
    gone = torch.zeros(layout.num_rows, layout.length, dtype=torch.bool)
    by_layer: dict[int, list[Any]] = {}
    for record in trace.points:
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


def masked_run(model: nn.Module, inputs: dict[str, Any], hidden: list[Tensor], extra_ids: Tensor | None = None, generated_type: int = 0, **kwargs: Any) -> Any:
    """One full-length forward of the untouched model with columns hidden from layer on; ``extra_ids`` are appended to the prompt."""
    inputs = dict(inputs)
    if extra_ids is not None and extra_ids.shape[1]:
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.full_like(extra_ids, generated_type)], dim=1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], extra_ids], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(extra_ids)], dim=1)
    length = inputs["input_ids"].shape[1]
    real = inputs["attention_mask"].bool()
    handles = []

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
        with torch.no_grad():
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

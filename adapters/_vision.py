"""Signals from inside a vision tower: attention received, the CLS row, keys, states. One computation per block, whatever the kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.adapters import _attention
from vlprune.hooks import HookSet
from vlprune.protocols import Tap
from vlprune.pruner import Pruner

#: ``(attention module, states, kwargs) -> (queries, keys, segment lengths or None)``, heads second.
QueryKey = Callable[[nn.Module, Tensor, dict[str, Any]], tuple[Tensor, Tensor, "list[int] | None"]]


def plain_query_key(attn: nn.Module, states: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, list[int] | None]:
    """Queries and keys of a tower without rotary positions (CLIP, SigLIP, plain ViT)."""
    return _attention.project(attn, states, "q"), _attention.project(attn, states, "k"), None


#: Kinds that are computed from the queries and keys of a block, from what it hands on, and elsewhere (by the adapter).
ATTENTION_KINDS = frozenset({"column_mean", "cls_row", "cls_row_heads", "cls_row_wide", "received_from", "vision_keys", "vision_keys_all"})
STATE_KINDS = frozenset({"vision_states", "cls_state"})
CLS_KINDS = frozenset({"cls_row", "cls_row_heads", "cls_row_wide", "cls_state"})


class VisionTaps:
    """Collects vision signals of one tower call into ``pruner.vision``, keyed by tap: (sequences, tokens, ...) float32, prefix included.

    Args:
        attentions: the attention module of every block, in order.
        query_key: how to get rotated queries and keys from a module's input.
        blocks: the blocks themselves, for signals made of their outputs.
    """

    def __init__(self, attentions: list[nn.Module], pruner: Pruner, query_key: QueryKey = plain_query_key, blocks: Sequence[nn.Module] = ()) -> None:
        self.attentions, self.pruner, self.query_key, self.blocks = attentions, pruner, query_key, list(blocks)

    def attach(self, hooks: HookSet) -> None:
        """Hook the blocks that somebody asked about."""
        attention: dict[int, list[Tap]] = {}
        states: dict[int, list[Tap]] = {}
        for tap in self.pruner.taps("vision"):
            if tap.kind in ATTENTION_KINDS:
                attention.setdefault(tap.layer, []).append(tap)
            elif tap.kind in STATE_KINDS:
                states.setdefault(tap.layer, []).append(tap)
        for layer, taps in attention.items():
            hooks.after(self.attentions[layer], self._hook(taps))
        for layer, taps in states.items():
            hooks.after(self.blocks[layer], self._states_hook(taps))

    def _states_hook(self, taps: list[Tap]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            states = states if states.dim() == 3 else states[None]
            for tap in taps:                                             # with gradients: merging methods train through them
                self.pruner.vision[tap] = states[:, :1].expand_as(states) if tap.kind == "cls_state" else states

        return hook

    def _hook(self, taps: list[Tap]) -> Callable[..., Any]:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            with self.pruner.timed():
                queries, keys, lengths = self.query_key(module, states, kwargs)
                scale = _attention.scale_of(module, queries.shape[-1])
                self.pruner.vision.update({tap: signal(tap, queries, keys, scale, lengths) for tap in taps})
            pairs = queries.shape[0] * queries.shape[2] ** 2 if lengths is None else sum(length**2 for length in lengths)
            self.pruner.vision["flops"] = self.pruner.vision.get("flops", 0.0) + signal_flops(taps, states.shape[-1], queries, pairs)

        return hook


def signal_flops(taps: Sequence[Tap], width: int, queries: Tensor, pairs: int) -> float:
    """Matrix products of one look at (B, H, S, d) queries: projections anew, and products over ``pairs`` of tokens or one row each."""
    batch, heads, tokens, head_dim = queries.shape
    each = {"column_mean": pairs, "received_from": 2 * pairs, **dict.fromkeys(("cls_row", "cls_row_heads", "cls_row_wide"), batch * tokens)}
    rows = sum(2.0 * heads * head_dim * each.get(tap.kind, 0) for tap in taps)
    sides = 2 if any(tap.kind in each for tap in taps) else 1            # keys alone need no queries
    return 2.0 * sides * batch * tokens * width * heads * head_dim + rows


def signal(tap: Tap, queries: Tensor, keys: Tensor, scale: float, lengths: list[int] | None, bias: Tensor | None = None) -> Tensor:
    """One signal from (B, H, S, d) queries and keys: (B, S) or (B, S, C). ``bias`` (B, S) is added to the logits onto each key."""
    if tap.kind in ("column_mean", "received_from"):
        if bias is not None:                                             # one more feature, with which every query asks for the bias
            wide = bias[:, None, :, None].expand(-1, keys.shape[1], -1, 1).float()
            queries, keys = (torch.cat([part.float(), more], dim=-1) for part, more in ((queries, torch.full_like(wide, 1 / scale)), (keys, wide)))
        if tap.kind == "column_mean":
            return _attention.column_mean(queries, keys, scale, lengths)
        share, how = tap.options
        return _attention.received_from(queries, keys, scale, lengths, share, how)
    if tap.kind in ("cls_row", "cls_row_heads"):
        logits = (queries[:, :, :1].float() * scale) @ keys.float().transpose(-1, -2)    # (B, H, 1, S)
        rows = (logits if bias is None else logits + bias[:, None, None]).softmax(dim=-1)
        return rows.mean(dim=1).squeeze(1) if tap.kind == "cls_row" else rows.squeeze(2).mT
    if tap.kind == "cls_row_wide":                                       # heads side by side are one wide head
        query, wide = queries[:, :, 0].flatten(1).float(), keys.transpose(1, 2).flatten(2).float()
        logits = (wide @ query[..., None]).squeeze(-1).mul(query.shape[1] ** -0.5)
        return (logits if bias is None else logits + bias).softmax(dim=-1)
    if tap.kind == "vision_keys_all":
        return keys.transpose(1, 2).flatten(2).float()
    assert tap.kind == "vision_keys"
    return keys.float().mean(dim=1)

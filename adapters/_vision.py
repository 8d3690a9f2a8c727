"""Signals from inside a vision tower: attention received, the CLS row, mean keys. One computation per block, whatever the kernel."""

from __future__ import annotations

from collections.abc import Callable
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


class VisionTaps:
    """Collects vision signals of one tower call into ``pruner.vision``, keyed by tap: (sequences, tokens) float32, prefix included.

    Args:
        attentions: the attention module of every block, in order.
        query_key: how to get rotated queries and keys from a module's input.
    """

    def __init__(self, attentions: list[nn.Module], pruner: Pruner, query_key: QueryKey = plain_query_key) -> None:
        self.attentions, self.pruner, self.query_key = attentions, pruner, query_key

    def attach(self, hooks: HookSet) -> None:
        """Hook the blocks that somebody asked about."""
        wanted: dict[int, list[Tap]] = {}
        for tap in self.pruner.taps("vision"):
            wanted.setdefault(tap.layer, []).append(tap)
        for layer, taps in wanted.items():
            hooks.after(self.attentions[layer], self._hook(taps))

    def _hook(self, taps: list[Tap]) -> Callable[..., Any]:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            with self.pruner.timed():
                queries, keys, lengths = self.query_key(module, states, kwargs)
                scale = _attention.scale_of(module, queries.shape[-1])
                self.pruner.vision.update({tap: signal(tap, queries, keys, scale, lengths) for tap in taps})
            self.pruner.vision["flops"] = self.pruner.vision.get("flops", 0.0) + self._flops(taps, states, queries, lengths)

        return hook


    @staticmethod
    def _flops(taps: list[Tap], states: Tensor, queries: Tensor, lengths: list[int] | None) -> float:
        """Matrix products of one look: queries and keys anew, and their products."""
        batch, heads, tokens, width = queries.shape
        pairs = batch * tokens**2 if lengths is None else sum(length**2 for length in lengths)
        rows = sum(2.0 * heads * width * (pairs if tap.kind == "column_mean" else batch * tokens) for tap in taps if tap.kind != "vision_keys")
        return 4.0 * batch * tokens * states.shape[-1] * heads * width + rows


def signal(tap: Tap, queries: Tensor, keys: Tensor, scale: float, lengths: list[int] | None) -> Tensor:
    """One signal from (B, H, S, d) queries and keys: (B, S) or, for keys, (B, S, d)."""
    if tap.kind == "column_mean":
        return _attention.column_mean(queries, keys, scale, lengths)
    if tap.kind == "cls_row":
        logits = (queries[:, :, :1].float() * scale) @ keys.float().transpose(-1, -2)
        return logits.softmax(dim=-1).mean(dim=1).squeeze(1)
    return keys.float().mean(dim=1)

"""Layers that run while decoding: how many, and what `keep` means for methods that count layers instead of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import KV_POLICIES, LayerSkip


@dataclass(frozen=True)
class InDecoding:
    """A `LayerSkip.run` for one layer: prompts run it, decoding steps as ``layers(step)`` says."""

    layer: int
    layers: Callable[[int], frozenset[int]]

    def __call__(self, phase: str, step: int, position: int) -> bool:
        """Whether the layer runs."""
        return phase == "prefill" or self.layer in self.layers(step)


def num_layers(keep: Keep, depth: int, rounding: str = "round") -> int:
    """How many of ``depth`` layers a share or a number leaves; a number above the depth is all of them."""
    budget = Budget(keep, rounding)
    return depth if isinstance(keep, int) and keep >= depth else budget.num_keep(depth)


def decoding_skips(depth: int, layers: Callable[[int], frozenset[int]], kv: str, horizon: int) -> tuple[LayerSkip, ...]:
    """One skip for each layer that some step leaves out."""
    if kv not in KV_POLICIES[1:]:
        raise OptionError(f"kv={kv!r}: one of {', '.join(map(repr, KV_POLICIES[1:]))}")
    always = frozenset.intersection(*(layers(step) for step in range(horizon)))
    return tuple(LayerSkip(layer, InDecoding(layer, layers), kv, horizon) for layer in range(depth) if layer not in always)


def given_count(name: str, value: Any, lowest: int, what: str) -> int:
    """A whole number from the user."""
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise OptionError(f"{name}={value!r}: a whole number from {lowest}, {what}")
    return value

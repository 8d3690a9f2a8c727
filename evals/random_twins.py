"""Random twins: a method with its choices among tokens made at random, at the same places and of the same sizes, so that nothing but the choice differs.

The twin of an adaptive method, whose counts are in the data, has the counts that the method had: `twin_of` gives the method with a count of what it keeps, and
its twin once it has run.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from vlprune.adapter import find_adapter
from vlprune.api import build_method
from vlprune.budget import Budget
from vlprune.errors import VlpruneError
from vlprune.fitting import Fit
from vlprune.kernels.top_attention import most_of
from vlprune.method import PruningMethod
from vlprune.methods.random_drop import RandomScore
from vlprune.protocols import HeadChoice, HeadInputs, ScoreInputs, Selection, Selector, Tap
from vlprune.selectors import TopK


@dataclass(frozen=True)
class RandomChoice:
    """Random keys while decoding, drawn anew at every step."""

    seed: int = 0

    def __call__(self, attention: Tensor, most: int) -> Tensor:
        """(B, most) places of keys that are there."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.rand(attention.shape, generator=generator).to(attention.device)
        return drawn.masked_fill(attention == -math.inf, -1.0).topk(most, dim=-1).indices


@dataclass(frozen=True)
class RandomKeys:
    """Random keys for every head at every decoding step, as many as a budget says, the newest among them; for batches without padding."""

    budget: Budget
    seed: int = 0

    def __call__(self, inputs: HeadInputs) -> HeadChoice | None:
        """Keys (B, Hkv, K); ``None`` in prompts, and where the budget is all of them."""
        batch, heads, total = inputs.keys.shape[:3]
        most = most_of(self.budget, total)
        if inputs.phase == "prefill" or most >= total:
            return None
        generator = torch.Generator().manual_seed(hash((self.seed, inputs.layer, total)))
        drawn = torch.rand(batch, heads, total, generator=generator)
        drawn[..., -1] = 2.0
        return HeadChoice(keys=drawn.topk(most, dim=-1).indices.sort(dim=-1).values.to(inputs.keys.device))


def random_beside(model: Any, one: Fit, keep: float, extra: Mapping[str, Any] | None = None) -> PruningMethod | None:
    """The random baseline of a method: what its option ``ranking`` or ``router`` makes of it, or the same places with random choices.

    ``extra``: options that the method was given. ``None`` for adaptive ones, whose counts are in the data: see `twin_of`.
    """
    if one.card.adaptive:
        return None
    options = signature(one.card.build).parameters
    for name, value in (("ranking", "random"), ("router", "random")):
        if name in options and not (name == "router" and "ranking" in options):
            try:
                return build_method(one.card, find_adapter(model).facts, keep, {**(extra or {}), name: value})[0]
            except VlpruneError:
                continue                                                 # it knows no such value
    return random_like(one.method)


def random_like(method: PruningMethod, seed: int = 0) -> PruningMethod | None:
    """The same method with random choices; ``None`` where it makes none among tokens."""
    stages = tuple(replace(stage, scorer=RandomScore(seed), selector=TopK()) for stage in method.stages)
    bypasses = tuple(replace(b, scorer=RandomScore(seed), selector=None) if b.budget is not None and b.scorer is not None else b for b in method.bypasses)
    selects = tuple(replace(select, choose=RandomChoice(seed), reuse=None) for select in method.decode_selects)
    budgets = [getattr(attend.choose, "budget", None) if attend.phase == "decode" else None for attend in method.attends]
    heads = tuple(a if budget is None else replace(a, choose=RandomKeys(budget, seed)) for a, budget in zip(method.attends, budgets, strict=True))
    chooses = bool(stages or selects) or heads != method.attends or any(b.budget is not None and b.scorer is not None for b in method.bypasses)
    return replace(method, name="random", stages=stages, bypasses=bypasses, attends=heads, decode_selects=selects) if chooses else None


# adaptive methods


@dataclass(frozen=True)
class Counting:
    """A selector that notes how many tokens it keeps, item by item."""

    selector: Selector
    kept: deque[int] = field(default_factory=deque)
    one_by_one: bool = True

    @property
    def needs(self) -> tuple[Tap, ...]:
        """The selector's."""
        return self.selector.needs

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """What the selector keeps."""
        selection = self.selector(scores, inputs)
        self.kept.append(selection.keep_indices.shape[1])
        return selection


@dataclass(frozen=True)
class AsMany:
    """Best first, as many of each item as a list says."""

    kept: deque[int]
    one_by_one: bool = True

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Nothing."""
        return ()

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """(1, n) indices; the list is used up by one."""
        return Selection(scores.topk(self.kept.popleft(), dim=-1).indices.sort(dim=-1).values)


def twin_of(model: Any, one: Fit, keep: float, extra: Mapping[str, Any] | None = None) -> tuple[PruningMethod, Callable[[], PruningMethod | None]]:
    """A method to run, and what gives its random twin for the same run afterwards (``None``: it chooses no tokens).

    Args:
        model: that it is for.
        one: the method.
        keep: that it was built with.
        extra: options to build it with.
    """
    method = build_method(one.card, find_adapter(model).facts, keep, dict(extra))[0] if extra else one.method
    if not one.card.adaptive or not method.stages:
        return method, lambda: random_beside(model, one, keep, extra)
    counting = [Counting(stage.selector) for stage in method.stages]
    watched = replace(method, stages=tuple(replace(stage, selector=selector) for stage, selector in zip(method.stages, counting, strict=True)))

    def twin() -> PruningMethod:
        stages = (replace(stage, scorer=RandomScore(), selector=AsMany(selector.kept)) for stage, selector in zip(method.stages, counting, strict=True))
        return replace(method, name="random", stages=tuple(stages))

    return watched, twin

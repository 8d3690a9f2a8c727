"""Blend: two scores, each scaled to sum to one over the item's tokens, then weighted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlprune.errors import OptionError
from vlprune.protocols import ScoreInputs, Scorer, Tap

EPS = 1e-8


def sum_to_one(scores: Tensor) -> Tensor:
    """Divide non-negative scores (B, N) by their sum over the item; all-zero scores stay zero."""
    return scores / (scores.abs().sum(dim=-1, keepdim=True) + EPS)


@dataclass(frozen=True)
class Blend:
    """``weight * first + (1 - weight) * second``, each summing to one over the tokens still there."""

    first: Scorer
    second: Scorer
    weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight <= 1.0:
            raise OptionError(f"a weight between two scores must lie in [0, 1], got {self.weight!r}")

    @property
    def needs(self) -> tuple[Tap, ...]:
        """What either part needs."""
        return tuple(dict.fromkeys((*self.first.needs, *self.second.needs)))

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N)."""
        first, second = sum_to_one(self.first(inputs).float()), sum_to_one(self.second(inputs).float())
        return self.weight * first + (1 - self.weight) * second

"""Scaled: another score brought to [0, 1] between its smallest and its largest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.kernels.groups import group_spans
from vlprune.protocols import ScoreInputs, Scorer, Tap


@dataclass(frozen=True)
class Scaled:
    """``(score - smallest + lift) / (largest - smallest + eps)`` over an item, or over each tile or frame.

    Where all are equal they become 1. Separators do not count and become 0.

    Attributes:
        scorer: gives the score.
        apart: scale each tile or frame by itself.
        lift: keeps the smallest above 0.
        eps: keeps the divisor above 0.
    """

    scorer: Scorer
    apart: bool = False
    lift: float = 0.0
    eps: float = 1e-8

    @property
    def needs(self) -> tuple[Tap, ...]:
        """What the scorer needs."""
        return self.scorer.needs

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N)."""
        scores = self.scorer(inputs).float()
        if inputs.grid is None:
            real, group = torch.ones_like(scores, dtype=torch.bool), torch.zeros_like(scores, dtype=torch.int64)
        else:
            real = inputs.grid[..., 1] >= 0
            group = group_spans(inputs.grid[..., 0])[0] if self.apart else torch.zeros_like(inputs.grid[..., 0])
        low = _extreme(scores.masked_fill(~real, torch.inf), group, "amin")
        high = _extreme(scores.masked_fill(~real, -torch.inf), group, "amax")
        scaled = torch.where(high > low, (scores - low + self.lift) / (high - low + self.eps), 1.0)
        return scaled.masked_fill(~real, 0.0)


def _extreme(scores: Tensor, group: Tensor, which: str) -> Tensor:
    """(B, N) the smallest or largest score of each token's group."""
    empty = torch.full_like(scores, torch.inf if which == "amin" else -torch.inf)
    return empty.scatter_reduce(1, group, scores, which).gather(1, group)

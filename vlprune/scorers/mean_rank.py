"""MeanRank: how far up a token stands by attention, head by head, and the mean of that over the heads.

Reference: TCA, arXiv:2410.14729, which ranks so that no head's few large weights decide for all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.protocols import ScoreInputs, Tap


@dataclass(frozen=True)
class MeanRank:
    """Mean rank of a signal (B, N, H), 0 for the smallest of each head; the earlier of two equal ones stands lower."""

    tap: Tap

    @property
    def needs(self) -> tuple[Tap, ...]:
        """The signal."""
        return (self.tap,)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N); NaN where any head is."""
        values = inputs.signal(self.tap).float()
        order = values.argsort(dim=1, stable=True)
        places = torch.arange(values.shape[1], device=values.device, dtype=torch.float32)[None, :, None].expand_as(values)
        ranks = torch.empty_like(values).scatter_(1, order, places)
        return (ranks + values * 0).mean(dim=-1)

"""SignalSum: a signal of several layers, added up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.protocols import ScoreInputs, Tap


@dataclass(frozen=True)
class SignalSum:
    """Score tokens by the sum of (B, N) signals, e.g. of the attention received in every layer so far."""

    taps: tuple[Tap, ...]

    @property
    def needs(self) -> tuple[Tap, ...]:
        """The signals."""
        return self.taps

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N)."""
        return torch.stack([inputs.signal(tap) for tap in self.taps]).sum(dim=0)

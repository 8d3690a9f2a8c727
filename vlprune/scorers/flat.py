"""Flat: every token is worth the same; for selectors that look at a signal themselves, so that a signal that is not finite is still noticed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlprune.protocols import ScoreInputs, Tap


@dataclass(frozen=True)
class Flat:
    """Zero, and NaN where the signal is not finite."""

    tap: Tap

    @property
    def needs(self) -> tuple[Tap, ...]:
        """The signal."""
        return (self.tap,)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N)."""
        values = inputs.signal(self.tap).float() * 0
        return values.sum(dim=-1) if values.dim() == 3 else values

"""SignalScore: one tapped signal, taken as it is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlprune.protocols import ScoreInputs, Tap


@dataclass(frozen=True)
class SignalScore:
    """Score tokens by a (B, N) signal, e.g. attention received in one layer."""

    tap: Tap

    @property
    def needs(self) -> tuple[Tap, ...]:
        """The signal."""
        return (self.tap,)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N)."""
        return inputs.signal(self.tap)

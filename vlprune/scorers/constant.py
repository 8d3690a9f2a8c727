"""Constant: every token is worth the same; for selectors that look at the tokens themselves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlprune.protocols import ScoreInputs, Tap


@dataclass(frozen=True)
class Constant:
    """Scores of zero."""

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Nothing."""
        return ()

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N) zeros."""
        return inputs.tokens.new_zeros(inputs.tokens.shape[:2]).float()

"""Drop: the tokens that are not kept leave, the others are unchanged."""

from __future__ import annotations

from dataclasses import dataclass

from vlprune.protocols import Reduced, ScoreInputs, Selection


@dataclass(frozen=True)
class Drop:
    """Remove what was not selected."""

    @property
    def exact(self) -> bool:
        """Kept tokens are unchanged."""
        return True

    def __call__(self, inputs: ScoreInputs, selection: Selection) -> Reduced:
        """Nothing is folded into the kept tokens."""
        return Reduced()

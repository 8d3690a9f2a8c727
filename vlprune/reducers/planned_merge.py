"""PlannedMerge: tokens that the selector put together become their size-weighted mean."""

from __future__ import annotations

from dataclasses import dataclass

from vlprune.protocols import Reduced, ScoreInputs, Selection
from vlprune.reducers.merge import grouped_mean


@dataclass(frozen=True)
class PlannedMerge:
    """Means of what `vlprune.selectors.matching.Matching` put together; sizes are tracked."""

    @property
    def exact(self) -> bool:
        """Kept tokens change."""
        return False

    def __call__(self, inputs: ScoreInputs, selection: Selection) -> Reduced:
        """(B, K, D) means and (B, K) sizes."""
        return grouped_mean(inputs.tokens.float(), selection.plan, selection.keep_indices.shape[1], inputs.sizes)

"""Condense: clusters become their weighted means, the rest one attention-weighted sum (TCA). The weights of the sum do not sum to one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlprune.kernels.k_center import cluster_sums
from vlprune.protocols import Reduced, ScoreInputs, Selection, Tap, gather_tokens
from vlprune.reducers.fuse import weighted_sum
from vlprune.selectors.condense import Parts


@dataclass(frozen=True)
class CondenseParts:
    """Make the new tokens of `vlprune.selectors.condense.Condense`.

    Attributes:
        weights: signal that weighs what becomes one token.
    """

    weights: Tap

    @property
    def needs(self) -> tuple[Tap, ...]:
        """The weights."""
        return (self.weights,)

    @property
    def exact(self) -> bool:
        """Up to five tokens are new."""
        return False

    def __call__(self, inputs: ScoreInputs, selection: Selection) -> Reduced:
        """(B, K, D) tokens."""
        parts: Parts = selection.plan
        tokens = inputs.tokens.float()
        fused = weighted_sum(gather_tokens(tokens, parts.rest), inputs.signal(self.weights).float().gather(1, parts.rest))
        new = torch.cat([cluster_sums(gather_tokens(tokens, parts.pool), parts.clusters), fused], dim=1) if parts.pool.shape[1] else fused
        return Reduced(gather_tokens(tokens, selection.keep_indices).scatter(1, parts.places[..., None].expand_as(new), new))

"""Fuse: what leaves becomes one token, the sum of it weighted by attention (EViT). The weights do not sum to one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.protocols import Reduced, ScoreInputs, Selection, Tap, gather_tokens


@dataclass(frozen=True)
class Fuse:
    """Put the weighted sum of all that leaves in the place that `vlprune.selectors.summary.Summary` left for it.

    Attributes:
        weights: signal that weighs the tokens.
    """

    weights: Tap

    @property
    def needs(self) -> tuple[Tap, ...]:
        """The weights."""
        return (self.weights,)

    @property
    def exact(self) -> bool:
        """One token is new."""
        return False

    def __call__(self, inputs: ScoreInputs, selection: Selection) -> Reduced:
        """(B, K, D) tokens."""
        keep, roles = selection.keep_indices, selection.roles
        assert roles is not None
        weights, new = inputs.signal(self.weights).float(), roles == len(selection.role_names) - 1
        weights = weights.scatter(1, keep, weights.gather(1, keep) * new)                # what stays as it is has no part in the sum
        fused = weighted_sum(inputs.tokens, weights)
        return Reduced(torch.where(new[..., None], fused, gather_tokens(inputs.tokens.float(), keep)))


def weighted_sum(tokens: Tensor, weights: Tensor) -> Tensor:
    """(B, 1, D) sum of tokens (B, N, D) times weights (B, N), one product an item."""
    return torch.stack([one[None] @ item.float() for one, item in zip(weights, tokens, strict=True)])

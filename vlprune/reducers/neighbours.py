"""Neighbours: every kept token takes in the tokens nearest to it, and one place holds a summary of all that leaves (PruMerge).

With attention a and features x: a kept token becomes x plus the sum of a_j x_j over the tokens j whose keys are nearest to its own, kept or not,
itself excluded. The summary is the sum of a_j x_j over all tokens that leave. Weights are the attention itself: they do not sum to one. Nearest
tokens are of the same tile or frame; with several of them, the summary is the mean of their sums, since each has attention of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.errors import OptionError
from vlprune.kernels.similarity import cosine
from vlprune.protocols import Reduced, ScoreInputs, Selection, Tap, gather_tokens
from vlprune.reducers.features import mergeable
from vlprune.selectors.places import frames_of, real_tokens, together


@dataclass(frozen=True)
class Neighbours:
    """Fold neighbours into kept tokens, and what leaves into the place that `Summary` chose.

    Attributes:
        attention: signal (B, N), the weights.
        keys: signal (B, N, C) whose cosine says what is near.
        features: signal that is merged before the projector.
        count: neighbours of a token.
    """

    attention: Tap
    keys: Tap
    features: Tap
    count: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 0:
            raise OptionError(f"neighbours={self.count!r}: how many tokens near a kept one are folded into it, a whole number from 0")

    @property
    def exact(self) -> bool:
        """Kept tokens change."""
        return False

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Weights, keys, features."""
        return (self.attention, self.keys, self.features)

    def __call__(self, inputs: ScoreInputs, selection: Selection) -> Reduced:
        """(B, K, D) tokens and (B, K) sizes."""
        keep, roles = selection.keep_indices, selection.roles
        assert roles is not None
        features, project = mergeable(inputs, self.features)
        attention, summary = inputs.signal(self.attention), roles == 2
        near = self._near(inputs, keep)                                                             # (B, K, N) zeros and ones
        near = near.scatter(2, keep[..., None], 0.0) * attention[:, None]
        itself = torch.zeros_like(near).scatter(2, keep[..., None], 1.0)
        leaves = torch.ones_like(attention).scatter(1, keep, summary.to(attention.dtype)) * real_tokens(inputs)
        weights = torch.where(summary[..., None], (leaves * attention / _frames(inputs))[:, None], itself + near)
        sizes = torch.where(summary, (keep.new_full(keep.shape[:1], features.shape[1] - keep.shape[1] + 1))[:, None], 1).float()
        return Reduced(project(weights.to(features.dtype) @ features), sizes)

    def _near(self, inputs: ScoreInputs, keep: Tensor) -> Tensor:
        """(B, K, N) one where token n is among the nearest of kept token k, else zero."""
        keys, same = inputs.signal(self.keys), together(inputs, keep)
        likeness = cosine(gather_tokens(keys, keep), keys).masked_fill(~same, -torch.inf).scatter(2, keep[..., None], -torch.inf)
        nearest = likeness.topk(min(self.count, likeness.shape[2] - 1), dim=-1).indices
        return torch.zeros_like(likeness).scatter(2, nearest, 1.0) * same


def _frames(inputs: ScoreInputs) -> Tensor:
    """(B, 1) number of tiles or frames."""
    return frames_of(inputs).amax(dim=-1, keepdim=True) + 1

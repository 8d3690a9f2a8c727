"""StillMeans: every kept token becomes the mean of its cluster, or a mixture of what stands at its place and of the rest of the cluster.

Reference: PruneVid, arXiv:2412.16117; HoliTom, arXiv:2505.21334. The clusters are those of `vlprune.selectors.still_and_moving.StillAndMoving`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.errors import OptionError
from vlprune.protocols import Reduced, ScoreInputs, Selection
from vlprune.selectors.still_and_moving import Clusters
from vlprune.selectors.windows import check_between


@dataclass(frozen=True)
class StillMeans:
    """Means of clusters.

    Attributes:
        centre: weight of what stands at the kept token's own place (its mean over the window); the rest of its cluster has the others. Never less than
            its share of the cluster's tokens: with 0 the token is the plain mean.
    """

    centre: float = 0.0

    def __post_init__(self) -> None:
        check_between("centre", self.centre, 0.0, 1.0, "weight of the centre in the mean of its cluster")

    @property
    def exact(self) -> bool:
        """Kept tokens change."""
        return False

    def __call__(self, inputs: ScoreInputs, selection: Selection) -> Reduced:
        """(B, K, D) tokens and (B, K) sizes."""
        if not isinstance(selection.plan, Clusters):
            raise OptionError("StillMeans goes on with the clusters of the selector StillAndMoving; put the two into one stage")
        owner, core = selection.plan
        number = selection.keep_indices.shape[1]
        weights = torch.ones_like(owner, dtype=torch.float32) if inputs.sizes is None else inputs.sizes.float()
        tokens = inputs.tokens.float()
        own, at_place = _sums(tokens, torch.where(core, owner, number), weights, number)
        rest, around = _sums(tokens, torch.where(core, number, owner), weights, number)
        share = (at_place / (at_place + around)).clamp(min=self.centre)
        share = torch.where(around > 0, share, 1.0)[..., None]
        merged = share * own / at_place[..., None] + (1 - share) * rest / around.clamp(min=1e-6)[..., None]
        return Reduced(merged, at_place + around)


def _sums(tokens: Tensor, owner: Tensor, weights: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Weighted sums (B, K, D) of the tokens (B, N, D) of each owner, and the weights' sums (B, K); owner K is nobody."""
    total = weights.new_zeros(owner.shape[0], number + 1).scatter_add(1, owner, weights)
    places = owner[..., None].expand_as(tokens)
    summed = tokens.new_zeros(owner.shape[0], number + 1, tokens.shape[2]).scatter_add(1, places, tokens * weights[..., None])
    return summed[:, :-1], total[:, :-1]

"""Merge: every token that leaves is averaged into the kept token most like it, weighted by how many tokens each stands for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlprune.kernels.bipartite import group_means
from vlprune.protocols import Reduced, ScoreInputs, Selection, gather_tokens


@dataclass(frozen=True)
class Merge:
    """Kept tokens become the size-weighted mean of themselves and the tokens assigned to them; sizes are tracked.

    Likeness is the cosine of the hidden states. With ``PruningMethod.size_bias`` attention counts a merged token by its size
    (log of the size on its key, as in ToMe's proportional attention).
    """

    @property
    def exact(self) -> bool:
        """Kept tokens change."""
        return False

    def __call__(self, inputs: ScoreInputs, selection: Selection) -> Reduced:
        """(B, K, D) means and (B, K) sizes."""
        tokens, keep = inputs.tokens.float(), selection.keep_indices
        unit = F.normalize(tokens.detach(), dim=-1)
        owner = (unit @ gather_tokens(unit, keep).mT).argmax(dim=-1)                     # (B, N) the kept token most like each
        owner = owner.scatter(1, keep, torch.arange(keep.shape[1], device=keep.device).expand_as(keep))
        return grouped_mean(tokens, owner, keep.shape[1], inputs.sizes)


def grouped_mean(tokens: Tensor, owner: Tensor, num_groups: int, sizes: Tensor | None) -> Reduced:
    """Size-weighted means of the tokens (B, N, D) that share an ``owner`` (B, N) in 0..num_groups-1."""
    weights = torch.ones_like(owner, dtype=tokens.dtype) if sizes is None else sizes.to(tokens.dtype)
    return Reduced(*group_means(tokens, owner, num_groups, weights))

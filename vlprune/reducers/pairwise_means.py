"""PairwiseMeans: what leaves is averaged, one after the other, into the kept token most like it.

Reference: HoliTom, arXiv:2505.21334 (inside the LLM). Official code: https://github.com/cokeshao/HoliTom

The program visits dropped tokens in raster order and replaces the kept token by the mean of itself and the visited one, so that later ones weigh more. Likeness
is the cosine before any averaging. With m tokens d_1 ... d_m to take in, a token x becomes ``x / 2^m + sum_i d_i / 2^(m - i + 1)``, which needs no loop.
Separators take in nothing and are not taken in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.kernels.allotment import rank_in_groups
from vlprune.kernels.similarity import cosine
from vlprune.protocols import Reduced, ScoreInputs, Selection, gather_tokens
from vlprune.selectors.places import real_tokens


@dataclass(frozen=True)
class PairwiseMeans:
    """Fold dropped tokens into kept ones, in raster order, half and half."""

    @property
    def exact(self) -> bool:
        """Kept tokens change."""
        return False

    def __call__(self, inputs: ScoreInputs, selection: Selection) -> Reduced:
        """(B, K, D) tokens and (B, K) sizes."""
        tokens, keep = inputs.tokens.float(), selection.keep_indices
        number = keep.shape[1]
        owner = _owners(inputs, keep)                                                    # (B, N), K for none
        later = rank_in_groups(owner, torch.arange(owner.shape[1], device=owner.device, dtype=torch.float32).expand(owner.shape))
        weights = torch.exp2(-(later + 1).to(tokens.dtype))
        taken = torch.zeros(keep.shape[0], number + 1, dtype=tokens.dtype, device=keep.device)
        counts = taken.scatter_add(1, owner, torch.ones_like(weights))[:, :number]
        added = tokens.new_zeros(*taken.shape, tokens.shape[2]).scatter_add(1, owner[..., None].expand_as(tokens), tokens * weights[..., None])[:, :number]
        own = torch.ones_like(weights) if inputs.sizes is None else inputs.sizes.to(tokens.dtype)
        sizes = own.gather(1, keep) + taken.scatter_add(1, owner, own)[:, :number]
        return Reduced(gather_tokens(tokens, keep) * torch.exp2(-counts)[..., None] + added, sizes)


def _owners(inputs: ScoreInputs, keep: Tensor) -> Tensor:
    """(B, N) number among the kept of the token that takes in each; K for those that stay, and for separators."""
    real, tokens = real_tokens(inputs), inputs.tokens.detach()
    likeness = cosine(tokens, gather_tokens(tokens, keep)).masked_fill(~real.gather(1, keep)[:, None], -torch.inf)
    best, owner = likeness.max(dim=2)
    owner = torch.where(real & best.isfinite(), owner, keep.shape[1])
    return owner.scatter(1, keep, keep.shape[1])

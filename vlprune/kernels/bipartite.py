"""Bipartite soft matching: some tokens (sources) each go into the token most like them among others (targets); the likest pairs do.

Which tokens are sources and which targets is the method's business (`Split`). One round takes away at most half of the tokens; where fewer shall stay,
the next round goes on with what the first one made: size-weighted means of the metric, and of the scores those of the tokens that stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vlprune.kernels.similarity import cosine
from vlprune.protocols import gather_tokens

#: ``(scores (B, n), number to merge) -> sources (B, a), targets (B, b)``: different tokens of the n, at least as many sources as shall be merged.
Split = Callable[[Tensor, int], tuple[Tensor, Tensor]]


class MergePlan(NamedTuple):
    """Which tokens stay, (B, K) rising, and which of these K each of the N goes into, (B, N); those that stay go into themselves."""

    keep: Tensor
    owner: Tensor


@torch.no_grad()
def merge_plan(metric: Tensor, scores: Tensor, num_keep: int, split: Split, sizes: Tensor | None = None) -> MergePlan:
    """Match until K tokens are left.

    Args:
        metric: (B, N, C) what likeness is the cosine of.
        scores: (B, N) for ``split``.
        num_keep: K, from 1 to N.
        split: who may go into whom.
        sizes: (B, N) how many tokens each stands for; one each if ``None``.
    """
    count = scores.shape[1]
    keep = torch.arange(count, device=scores.device).expand(scores.shape)
    owner = keep
    metric = metric.float()
    weights = torch.ones_like(scores) if sizes is None else sizes.float()
    while count > num_keep:
        number = min(count - num_keep, count // 2)
        into, stays = match(metric, *split(scores, number), number)
        count -= number
        slots = stays.cumsum(dim=1) - 1
        left = stays.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
        groups = slots.gather(1, into)
        owner, keep = groups.gather(1, owner), keep.gather(1, left)
        if count > num_keep:
            metric, weights = group_means(metric, groups, count, weights)
            scores = scores.gather(1, left)
    return MergePlan(keep, owner)


def match(metric: Tensor, sources: Tensor, targets: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """One round: (B, N) the token that each goes into, itself if it stays; (B, N) bool, which stay."""
    likeness, best = cosine(gather_tokens(metric, sources), gather_tokens(metric, targets)).max(dim=2)
    first = likeness.argsort(dim=1, descending=True, stable=True)[:, :number]
    merged, into = sources.gather(1, first), targets.gather(1, best.gather(1, first))
    itself = torch.arange(metric.shape[1], device=metric.device).expand(metric.shape[:2])
    stays = torch.ones_like(itself, dtype=torch.bool).scatter(1, merged, False)
    return itself.scatter(1, merged, into), stays


def group_means(x: Tensor, owner: Tensor, num_groups: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted means (B, K, C) of what (B, N, C) shares an ``owner`` (B, N) in 0..K-1, and the sums of ``weights`` (B, K)."""
    total = weights.new_zeros(owner.shape[0], num_groups).scatter_add(1, owner, weights)
    summed = x.new_zeros(*total.shape, x.shape[-1]).scatter_add(1, owner[..., None].expand_as(x), x * weights[..., None])
    return summed / total.clamp(min=1e-6)[..., None], total

"""Allotment: a number of places shared out over groups of tokens, exactly, on the device, whatever sizes the data give the groups.

The rule of largest remainders: with quota q of a group, its j-th token (from 0) has the key j - q, and the tokens with the smallest keys get the places.
Every group has its quota rounded down before any gets one more, the largest fractions come first, no group gets more than it has, and what one cannot use
goes to the others. Quotas are compared in steps of 1 / 65536, so that rounding noise decides nothing; of equal keys the one at the earlier token is first.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 1 << 16
LAST = 1 << 50


def rank_in_groups(groups: Tensor, scores: Tensor) -> Tensor:
    """(B, N) how many tokens of its group come before each: a higher score, or the same and an earlier place."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, groups.gather(1, order).argsort(dim=1, stable=True))                     # by group, then by score
    first = torch.searchsorted(groups.gather(1, order).contiguous(), groups.contiguous())           # where each one's group starts
    return order.argsort(dim=1) - first


def allot_keys(rank: Tensor, quotas: Tensor) -> Tensor:
    """(B, N) whole numbers, the smaller the earlier served, for ranks and the quota of each token's group (B, N)."""
    return rank * STEPS - (quotas.float() * STEPS).round().long()


def allot(groups: Tensor, quotas: Tensor, number: int) -> Tensor:
    """(B, G) places that each group gets.

    Args:
        groups: (B, N) group of every token, -1 for none.
        quotas: (B, G), not negative.
        number: places in all; where there are fewer tokens in groups, all of them get one.
    """
    num_groups = quotas.shape[1]
    inside = groups >= 0
    keys = allot_keys(rank_in_groups(groups, torch.zeros_like(quotas[:, :1]).expand_as(groups)), quotas.gather(1, groups.clamp(min=0)))
    served = keys.masked_fill(~inside, LAST).argsort(dim=1, stable=True)[:, :number]
    where = groups.masked_fill(~inside, num_groups).gather(1, served)
    counts = torch.zeros(groups.shape[0], num_groups + 1, dtype=torch.int64, device=groups.device)
    return counts.scatter_add(1, where, torch.ones_like(where))[:, :num_groups]


def sizes_of(groups: Tensor, num_groups: int) -> Tensor:
    """(B, G) tokens of each group; ``groups`` (B, N) with -1 for none."""
    where = groups.masked_fill(groups < 0, num_groups)
    counts = torch.zeros(groups.shape[0], num_groups + 1, dtype=torch.int64, device=groups.device)
    return counts.scatter_add(1, where, torch.ones_like(where))[:, :num_groups]

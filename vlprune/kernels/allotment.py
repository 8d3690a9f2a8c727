"""Allotment: a number of places shared out over groups of tokens, exactly, on the device, whatever sizes the data give the groups.

Programs give a group the number ``round(share * weight)``, or its floor or ceiling, and their total follows. Here the total is given, and every group gets
that number for the one share that leads to it (the divisor methods of apportionment): the j-th token of a group (from 0) would be served from the share
``(j + offset) / weight`` on, with offset 1 for rounding down, 1/2 to the nearest, 0 up, and the tokens with the lowest of these are served. So with a
program's own total the numbers are the program's. No group gets more than it has; of equals the one at the earlier token is first.
"""

from __future__ import annotations

import torch
from torch import Tensor

DOWN, NEAREST, UP = 1.0, 0.5, 0.0


def rank_in_groups(groups: Tensor, scores: Tensor) -> Tensor:
    """(B, N) how many tokens of its group come before each: a higher score, or the same and an earlier place."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, groups.gather(1, order).argsort(dim=1, stable=True))                     # by group, then by score
    first = torch.searchsorted(groups.gather(1, order).contiguous(), groups.contiguous())           # where each one's group starts
    return order.argsort(dim=1) - first


def served_from(rank: Tensor, weights: Tensor, offset: Tensor | float) -> Tensor:
    """(B, N) the share from which on each token is served; ranks, and its group's weight and offset, are (B, N)."""
    return (rank + offset) / weights.float()


def allot(groups: Tensor, weights: Tensor, number: int, offsets: Tensor | float = DOWN) -> Tensor:
    """(B, G) places that each group gets.

    Args:
        groups: (B, N) group of every token, -1 for none.
        weights: (B, G), not negative; groups with infinite weight are served first.
        number: places in all; where there are fewer tokens in groups, all of them get one.
        offsets: (B, G) or one for all: `DOWN`, `NEAREST` or `UP`.
    """
    num_groups = weights.shape[1]
    inside, at = groups >= 0, groups.clamp(min=0)
    rank = rank_in_groups(groups, torch.zeros_like(groups))
    shares = served_from(rank, weights.gather(1, at), offsets.gather(1, at) if isinstance(offsets, Tensor) else offsets)
    shares = shares.nan_to_num(nan=torch.finfo(torch.float32).max)                                   # 0 / 0: a group without weight
    served = shares.masked_fill(~inside, torch.inf).argsort(dim=1, stable=True)[:, :number]
    where = groups.masked_fill(~inside, num_groups).gather(1, served)
    counts = torch.zeros(groups.shape[0], num_groups + 1, dtype=torch.int64, device=groups.device)
    return counts.scatter_add(1, where, torch.ones_like(where))[:, :num_groups]


def sizes_of(groups: Tensor, num_groups: int) -> Tensor:
    """(B, G) tokens of each group; ``groups`` (B, N) with -1 for none."""
    where = groups.masked_fill(groups < 0, num_groups)
    counts = torch.zeros(groups.shape[0], num_groups + 1, dtype=torch.int64, device=groups.device)
    return counts.scatter_add(1, where, torch.ones_like(where))[:, :num_groups]

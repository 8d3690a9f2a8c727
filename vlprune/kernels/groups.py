"""Groups of tokens (tiles, frames) of any size within an item: where each starts in group order, and how many of its tokens stay."""

from __future__ import annotations

import torch
from torch import Tensor


def group_spans(group: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N) number of tokens in smaller groups, which names the group by a number below N, and (B, N) its size; ``group`` (B, N) int."""
    ordered = group.sort(dim=1).values
    start = torch.searchsorted(ordered, group.contiguous())
    return start, torch.searchsorted(ordered, group.contiguous(), right=True) - start


def shared_quotas(group: Tensor, real: Tensor, num_keep: int) -> Tensor:
    """How many of each token's group stay, (B, N) int64, when ``num_keep`` are shared out in proportion to the groups' sizes.

    The whole part of each share, and one more for the largest fractions, the smaller group number first. Tokens that are not ``real`` (B, N) bool must be
    groups of their own; they get what is left when every real token stays.
    """
    start, size = group_spans(group)
    total = real.sum(dim=1, keepdim=True)
    shared = total.clamp(max=num_keep)
    share = shared * size
    whole, part = share // total.clamp(min=1), share % total.clamp(min=1)
    order = group.argsort(dim=1, stable=True)
    first = (start == order.argsort(dim=1)) & real                                   # one token a group speaks for it
    missing = shared - (whole * first).sum(dim=1, keepdim=True)
    fraction = torch.where(first, part, -1).gather(1, order)                         # in the groups' order, so that equal ones go by number
    rank = fraction.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    more = ((rank < missing) & (fraction >= 0)).to(whole.dtype)
    return torch.where(real, whole + more.gather(1, start), num_keep - shared)

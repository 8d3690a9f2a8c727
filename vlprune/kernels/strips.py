"""Strips: runs of neighbouring tokens, each a whole number of which makes up a frame; and how much the tokens of a strip differ in likeness.

Strips are told by the place of their first token. Sums over a strip are taken through windows of its greatest length, so that no scattered addition
(whose order is left to chance on a GPU) decides anything.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 512
EPS = 1e-6


def strip_starts(frame: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cut every frame into ``count`` runs of tokens; where that does not come out even, the first ones are one token longer.

    Args:
        frame: (B, N) frame of each token, rising.
        count: runs a frame; a frame of fewer tokens has runs of one.

    Returns:
        (B, N) place of the first token of each token's run, and (B, N) number of tokens in it.
    """
    places = torch.arange(frame.shape[1], device=frame.device).expand_as(frame)
    frame = frame.contiguous()
    first = torch.searchsorted(frame, frame)                                                       # of the frame
    size = torch.searchsorted(frame, frame, right=True) - first
    short, longer = size // count, size % count
    rank, bound = places - first, longer * (short + 1)
    head, tail = rank // (short + 1), (rank - bound) // short.clamp(min=1)
    early = rank < bound
    start = torch.where(early, head * (short + 1), bound + tail * short)
    return first + start, torch.where(early, short + 1, short.clamp(min=1))


def strip_sums(values: Tensor, start: Tensor, longest: int) -> Tensor:
    """(B, N): at the first token of every run the sum of ``values`` (B, N) over the run, elsewhere 0."""
    windows, owners = (F.pad(x, (0, longest - 1), value=-1).unfold(1, longest, 1) for x in (values, start))    # (B, N, longest)
    places = torch.arange(start.shape[1], device=start.device)
    return torch.where(owners == places[:, None], windows, 0).sum(dim=-1)


def strip_variance(features: Tensor, start: Tensor, size: Tensor, longest: int) -> Tensor:
    """(B, N) variance of each token's cosines with the tokens of its run.

    The token itself counts as a cosine of 0, and sums are divided by the number of the others, as HoloV's program does.

    Args:
        features: (B, N, D).
        start: first token of each token's run, from `strip_starts`.
        size: tokens in it, likewise.
        longest: upper bound of ``size``.
    """
    length = features.shape[1]
    found = []
    with torch.autocast(features.device.type, enabled=False):
        unit = features.float()
        unit = unit / (unit.norm(dim=-1, keepdim=True) + EPS)
        for begin in range(0, length, ROWS):
            end = min(begin + ROWS, length)
            left, right = max(0, begin - longest + 1), min(length, end + longest - 1)
            near = torch.stack([item[begin:end] @ item[left:right].mT for item in unit])           # one product an item: the same bits in any batch
            inside = start[:, begin:end, None] == start[:, None, left:right]
            itself = torch.arange(begin, end, device=start.device)[:, None] == torch.arange(left, right, device=start.device)
            near = near.masked_fill(~inside | itself, 0.0)
            number, others = size[:, begin:end], (size[:, begin:end] - 1).clamp(min=1)
            mean = near.sum(dim=-1) / others
            squares = near.square().sum(dim=-1) - 2 * mean * near.sum(dim=-1) + number * mean.square()
            found.append(squares / others)
    return torch.cat(found, dim=1)

"""Cells: tokens of a picture in square cells, and how many to leave single so that singles and occupied cells count to K.

Of N tokens ranked by importance the first m stay single; the others share the cells that they lie in, one token a cell. Taking one token
out of the shared ones either leaves its cell occupied (one token more) or empties it (the same number), so m plus the number of occupied
cells rises with m in steps of 0 or 1, from the number of all cells to N. Every K in between is reached exactly, whatever the picture, and
without reading anything back to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cell_numbers(grid: Tensor, side: float) -> Tensor:
    """Number the cells of ``side`` rows and columns that tokens with a ``grid`` (B, N, 3) lie in.

    Returns:
        (B, N) int64, 0 up to at most N - 1, the same for tokens of one cell; tiles and frames share none. Separators: -1.
    """
    frame, row, column = grid.unbind(dim=-1)
    down, right = (torch.floor(axis.double() / side).long() for axis in (row, column))
    down, right = down + 1, right + 1
    place = (frame * (down.amax(dim=1, keepdim=True) + 1) + down) * (right.amax(dim=1, keepdim=True) + 1) + right
    ordered, order = place.masked_fill(row < 0, -1).sort(dim=1, stable=True)
    steps = torch.zeros_like(ordered)
    steps[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]) & (ordered[:, :-1] >= 0)
    numbers = torch.zeros_like(ordered).scatter(1, order, steps.cumsum(dim=1))
    return numbers.masked_fill(row < 0, -1)


def rank(scores: Tensor) -> Tensor:
    """0 for the best token of each item, N - 1 for the worst; of equals, the earlier is better."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def num_single(ranks: Tensor, cells: Tensor, num_keep: int) -> Tensor:
    """(B,) the largest m with m singles and the cells of the rest at most ``num_keep``; 0 where the cells alone are more."""
    items, count = ranks.shape
    slots = torch.where(cells < 0, count, cells)                                         # separators lie in no cell
    worst = torch.full((items, count + 1), -1, device=ranks.device).scatter_reduce(1, slots, ranks, "amax")[:, :count]
    emptied = torch.zeros(items, count + 1, dtype=torch.int64, device=ranks.device)      # cells that empty when that rank turns single
    emptied = emptied.scatter_add(1, worst.clamp(min=0), (worst >= 0).long())
    occupied = emptied.flip(1).cumsum(dim=1).flip(1)                                     # (B, N + 1) cells left with m singles
    total = torch.arange(count + 1, device=ranks.device) + occupied
    return ((total <= num_keep).sum(dim=1) - 1).clamp(min=0)


def best_of_cells(ranks: Tensor, cells: Tensor, single: Tensor) -> Tensor:
    """(B, N) bool: the best token of every cell, among those whose rank is not below ``single`` (B,)."""
    count = ranks.shape[1]
    shared = (ranks >= single[:, None]) & (cells >= 0)
    slots = torch.where(shared, cells, count)
    best = torch.full((ranks.shape[0], count + 1), count, device=ranks.device).scatter_reduce(1, slots, ranks, "amin")
    return shared & (ranks == best.gather(1, slots))

"""Packing: pictures that kept different numbers of tokens share rows of one length, each attending to itself only.

First fit in descending order: the picture with the most tokens first, each into the first row that has room. How many each kept has to be
known on the host; everything else stays on the device and has gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the tokens of F pictures of S places each went: R rows of S places.

    Attributes:
        kept: (F, S) tokens that are in a row. context: (F, S) those of them that are there for the others to look at only.
        places: (F, S) where, counting through all rows; R S for those that are in none.
        segments: (R, S) the picture in each place, -1 in empty ones.
    """

    kept: Tensor
    context: Tensor
    places: Tensor
    segments: Tensor

    @property
    def mask(self) -> Tensor:
        """(R, 1, S, S) who may see whom. Empty places see each other: a row of nothing has no softmax."""
        return (self.segments[:, :, None] == self.segments[:, None, :])[:, None]

    def pack(self, tokens: Tensor) -> Tensor:
        """(F, S, D) to (R, S, D); empty places hold zeros."""
        rows, length = self.segments.shape
        flat = tokens.flatten(0, 1)
        source = torch.full((rows * length + 1,), flat.shape[0], device=tokens.device)
        source = source.scatter(0, self.places.flatten(), torch.arange(flat.shape[0], device=tokens.device))[:-1]
        filled = torch.cat([flat, flat.new_zeros(1, flat.shape[1])])
        return filled.index_select(0, source).reshape(rows, length, -1)

    def unpack(self, packed: Tensor, others: Tensor) -> Tensor:
        """(R, S, D) to (F, S, D); tokens that are in no row, or as context only, are taken from ``others`` (F, S, D)."""
        flat = packed.flatten(0, 1)
        back = flat.index_select(0, self.places.clamp(max=flat.shape[0] - 1).flatten()).reshape(*self.places.shape, -1)
        return torch.where((self.kept & ~self.context)[..., None], back, others.to(back))


def first_fit(counts: Sequence[int], room: int) -> tuple[list[int], list[int]]:
    """Row of each picture (-1 for those without tokens), and how many tokens stand before it there; on a tie the earlier picture goes first."""
    used: list[int] = []
    rows, starts = [-1] * len(counts), [0] * len(counts)
    for picture in sorted(range(len(counts)), key=lambda number: -counts[number]):
        count = counts[picture]
        if not count:
            continue
        row = next((number for number, taken in enumerate(used) if taken + count <= room), len(used))
        if row == len(used):
            used.append(0)
        rows[picture], starts[picture] = row, used[row]
        used[row] += count
    return rows, starts


def pack_pictures(kept: Tensor, counts: Sequence[int], *, refill: bool = False) -> Packing:
    """Plan the rows for the tokens ``kept`` (F, S), ``counts`` of each picture.

    Args:
        kept: which tokens stay.
        counts: how many of each picture, on the host.
        refill: a picture that is alone in its row keeps the others as context.
    """
    pictures, length = kept.shape
    rows, starts = first_fit(counts, length)
    number_of_rows = max(rows, default=-1) + 1
    alone = [row >= 0 and rows.count(row) == 1 for row in rows]
    row, start, whole = (torch.tensor(values).to(kept.device, non_blocking=True)[:, None] for values in (rows, starts, alone))
    present = kept | whole if refill else kept
    places = row * length + start + present.cumsum(dim=1) - 1
    places = torch.where(present, places, number_of_rows * length)
    numbers = torch.arange(pictures, device=kept.device)[:, None].expand(-1, length)
    segments = torch.full((number_of_rows * length + 1,), -1, device=kept.device).scatter(0, places.flatten(), numbers.flatten())[:-1]
    return Packing(present, present & ~kept, places, segments.reshape(number_of_rows, length))

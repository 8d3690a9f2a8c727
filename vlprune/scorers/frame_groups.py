"""FrameGroups: in every four frames of a video the first stays whole, the others keep what changed most.

Reference: DyCoke, arXiv:2411.15024 (stage 1, temporal token merging). Official code: https://github.com/KD-TAO/DyCoke (`dycole_ttm`)

In a group of frames i, i+1, i+2, i+3 a token is compared (cosine, same cell) with frame i, i, i and i+2. Scores are ranks, so that the K best are: all
whole frames, then the least similar token of every other frame, then the second of every other frame, and so on; every thinned frame keeps the same
number, give or take one. If K is less than the whole frames hold, these are thinned by the same rule, each against the whole frame before; the first
against the fifth, or the last of fewer.

``variant="code"`` repeats two slips of the program: where the number of frames is a multiple of four the third frame of the last group stays whole, and
the last of an odd number of frames leaves first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlprune.errors import OptionError
from vlprune.protocols import ScoreInputs, Tap, gather_tokens

VARIANTS = ("paper", "code")
NEW_CELL = -1.0     # the least that a cosine can be: the cell was not there before


@dataclass(frozen=True)
class FrameGroups:
    """Ranks of video tokens: whole frames, then change within each thinned frame."""

    variant: str = "paper"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise OptionError(f"variant={self.variant!r}: one of {', '.join(map(repr, VARIANTS))}")

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Nothing but the tokens and their grid."""
        return ()

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N) distinct whole numbers, the negated order of choice."""
        if inputs.grid is None:
            raise OptionError(
                "this method compares frames and needs the frame, row and column of every token, but this model gives no grid. "
                "Choose another method (see `vlprune methods`)."
            )
        frame = inputs.grid[..., 0]
        count = frame.amax(dim=1, keepdim=True) + 1                                      # (B, 1) frames
        place = frame % 4
        other = frame - torch.where(place == 0, 4, torch.where(place == 2, 2, 1))        # the frame to compare with
        other = torch.where(frame == 0, (count - 1).clamp(max=4), other)
        cell, cells = _cells(inputs.grid)
        rank = ranks_in_frame(frame, _similarity(inputs.tokens.float(), frame * cells + cell, other * cells + cell), cell)
        whole = place == 0
        if self.variant == "code":
            whole = whole | ((place == 2) & (frame - 2 >= count - 4))
        tier = torch.where(whole, 0, 1)
        if self.variant == "code":
            tier = torch.where((frame == count - 1) & (count % 2 == 1), 2, tier)
        order = (tier * inputs.tokens.shape[1] + rank) * count + frame
        return -order.argsort(dim=1).argsort(dim=1).float()


def ranks_in_frame(frame: Tensor, similarity: Tensor, cell: Tensor) -> Tensor:
    """(B, N) how many tokens of the same frame are less similar, or as similar and at an earlier cell."""
    order = cell.argsort(dim=1, stable=True)
    for key in (similarity, frame):                                                      # by frame, then similarity, then cell
        order = torch.gather(order, 1, torch.gather(key, 1, order).argsort(dim=1, stable=True))
    ordered = torch.gather(frame, 1, order).contiguous()
    return order.argsort(dim=1) - torch.searchsorted(ordered, frame.contiguous())


def _cells(grid: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N) number of each token's cell in its frame, separators are cell 0; and (B, 1) how many cells there are."""
    row, column = grid[..., 1] + 1, grid[..., 2] + 1
    columns = column.amax(dim=1, keepdim=True) + 1
    return row * columns + column, (row.amax(dim=1, keepdim=True) + 1) * columns


def _similarity(tokens: Tensor, places: Tensor, wanted: Tensor) -> Tensor:
    """(B, N) cosine of each token with the one whose place (B, N) is the wanted one (B, N)."""
    ordered, order = places.sort(dim=1, stable=True)
    at = torch.searchsorted(ordered, wanted).clamp(max=places.shape[1] - 1)
    found = torch.gather(ordered, 1, at) == wanted
    cosine = F.cosine_similarity(tokens, gather_tokens(tokens, torch.gather(order, 1, at)), dim=-1)
    return torch.where(found, cosine, NEW_CELL)

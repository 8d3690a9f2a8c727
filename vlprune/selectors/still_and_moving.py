"""StillAndMoving: a window's still cells become one set of tokens, every frame's moving cells another, and each set is thinned out to its share.

Reference: PruneVid, arXiv:2412.16117 (stage 1); HoliTom, arXiv:2505.21334 (before the LLM). `vlprune.reducers.still_means.StillMeans` makes the tokens.

A still cell's token stands for its window: the mean over the frames, at the cell in the window's first frame. Sets of the still are clustered around the
tokens that stay (DPC-kNN over the means); sets of the moving as well (``moving="merge"``), or their tokens with the highest scores stay as they are
(``"drop"``). How many stay in each set follows from the sets' sizes, which follow from the data; `vlprune.kernels.allotment` makes them K in all:

- ``"merge"``: sets of at most ``small`` tokens stay whole, the others in proportion to their sizes, rounded down. If that would leave less than ``ratio`` of
  the others, all numbers shrink in proportion from there;
- ``"drop"``: in proportion to the sizes, the moving rounded up, the still rounded to the nearest.

If the sets together hold fewer than K tokens, still tokens of later frames stay as they are, the least like their window's mean first, then separators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vlprune.errors import OptionError
from vlprune.kernels.allotment import DOWN, NEAREST, UP, allot, rank_in_groups, sizes_of
from vlprune.kernels.density_peaks import nearest_centre, peak_scores
from vlprune.kernels.frame_cells import FrameCells, video_cells
from vlprune.kernels.windows import extents
from vlprune.protocols import ScoreInputs, Selection, Tap
from vlprune.selectors.windows import Cutting, at_frames, check_between, window_means

ROLES = ("moving", "still")


class Clusters(NamedTuple):
    """Which kept token takes in each token.

    Attributes:
        owner: (B, N) number among the K kept, K for none.
        core: (B, N) bool: the token is part of what stands at its owner's place: the owner itself, or its cell in the other frames of the window.
    """

    owner: Tensor
    core: Tensor


@dataclass(frozen=True)
class StillAndMoving:
    """Keep tokens for still cells of windows and for moving cells of frames.

    Attributes:
        cutting: says what the windows are and what is still.
        moving: ``"merge"`` or ``"drop"``.
        neighbours: k of the clustering.
        ratio: for ``"merge"``.
        small: for ``"merge"``.
    """

    cutting: Cutting
    moving: str = "merge"
    neighbours: int = 7
    ratio: float = 0.5
    small: int = 14

    def __post_init__(self) -> None:
        if self.moving not in ("merge", "drop"):
            raise OptionError(f"moving={self.moving!r}: 'merge' or 'drop'")
        check_between("ratio", self.ratio, 0.0, 1.0, "share of a large set that stays")
        if isinstance(self.neighbours, bool) or not isinstance(self.neighbours, int) or self.neighbours < 1:
            raise OptionError(f"neighbours={self.neighbours!r}: tokens that the density is taken over, a whole number from 1")

    @property
    def needs(self) -> tuple[Tap, ...]:
        """No signals of its own."""
        return ()

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """(B, K) indices with roles, and what becomes of every token."""
        cells = video_cells(inputs)
        values = cells.of_tokens(inputs.tokens.detach().float())                         # (B, T, M, D)
        starts, still = self.cutting(values, cells.there)
        means = window_means(values, starts)
        still_at, frames = still & starts[..., None], torch.arange(starts.shape[1], device=still.device)[:, None]
        groups = torch.where(still_at, frames + starts.shape[1], torch.where(cells.there & ~still, frames, -1))
        counts = self._counts(groups, inputs.num_keep)
        features = torch.where(still_at[..., None], means, values)
        clustered = groups if self.moving == "merge" else groups.masked_fill(~still_at, -1)
        places = counts.gather(1, groups.clamp(min=0).flatten(1)).reshape(groups.shape)  # of each token's set
        peaks = peak_scores(features, clustered, self.neighbours, None if self.moving == "merge" else places.clamp(min=1))
        if self.moving == "drop":
            peaks = torch.where(still_at, peaks, cells.of_tokens(scores))
        rank = rank_in_groups(groups.flatten(1), peaks.flatten(1)).reshape(groups.shape)
        stays = (groups >= 0) & (rank < places)
        owner = nearest_centre(features, clustered, stays)
        alike = F.cosine_similarity(values, means, dim=-1)
        keep = _first(inputs.num_keep, cells.to_tokens(stays, False), cells.to_tokens(alike, 2.0), cells.place >= still[0].numel())
        roles = cells.to_tokens(still_at & stays, False).long().gather(1, keep)
        return Selection(keep, roles, ROLES, _clusters(cells, keep, starts, still, owner))

    def _counts(self, groups: Tensor, number: int) -> Tensor:
        """(B, 2 T) tokens that stay of the moving of every frame and of the still of the windows that start there."""
        frames, sets = groups.shape[1], groups.flatten(1)
        sizes = sizes_of(sets, 2 * frames)
        if self.moving == "drop":
            offsets = torch.full_like(sizes, NEAREST, dtype=torch.float32)
            offsets[:, :frames] = UP
            return allot(sets, sizes, number, offsets)
        large = sizes > self.small
        usual = torch.where(large, (sizes * self.ratio).floor(), sizes)
        scarce = usual.sum(dim=1, keepdim=True) >= number
        return allot(sets, torch.where(scarce, usual, torch.where(large, sizes, torch.inf)), number, DOWN)


def _first(number: int, stays: Tensor, alike: Tensor, separator: Tensor) -> Tensor:
    """(B, K) tokens in raster order: those that stay, others from the least alike on, separators."""
    order = alike.argsort(dim=1, stable=True)
    tier = torch.where(stays, 0, torch.where(separator, 2, 1)).gather(1, order)
    return order.gather(1, tier.argsort(dim=1, stable=True))[:, :number].sort(dim=1).values


def _clusters(cells: FrameCells, keep: Tensor, starts: Tensor, still: Tensor, owner: Tensor) -> Clusters:
    """From the owner (B, T, M), a cell of the same frame, of moving cells and of still ones in their window's first frame."""
    items, num_tokens = cells.place.shape
    none = keep.shape[1]
    slot = torch.full((items, num_tokens), none, device=keep.device).scatter(1, keep, torch.arange(none, device=keep.device).expand_as(keep))
    first = extents(starts)[0]
    frames = torch.arange(starts.shape[1], device=keep.device).expand_as(first)
    source = torch.where(still, first[..., None], frames[..., None])                     # frame whose row says who the owner is
    taken = torch.where(still, at_frames(owner, first), owner)
    places = (source * still.shape[2] + taken.clamp(min=0)).flatten(1)
    number = cells.token.flatten(1).gather(1, places)
    by_cell = slot.gather(1, number).masked_fill((taken < 0).flatten(1), none).reshape(taken.shape)
    core = still & (taken == torch.arange(still.shape[2], device=keep.device))
    ours = slot < none                                                                   # what is kept is its own owner
    return Clusters(torch.where(ours, slot, cells.to_tokens(by_cell, none)), ours | cells.to_tokens(core, False))

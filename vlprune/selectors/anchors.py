"""Anchors: salient tokens of every frame stay as they are, and anchors in some frames of a segment stand for everything else in it (FastVID).

Reference: FastVID, arXiv:2503.11187. `vlprune.reducers.anchor_means.AnchorMeans` folds the rest into the anchors.

A video of T frames is cut between frames where the cosine of their features is among the ``cuts`` lowest, or below a threshold. K is shared out like this:
with r = round(K / T) tokens a frame (not more than K / T of them salient), ``r - int(r d)`` of each frame are salient, those with the highest scores. The
others are anchors. They stand in every p-th frame of a segment, counted back from its last; a segment's number is proportional to its frames, and its
frames with anchors have equal numbers, rounded down (`vlprune.kernels.allotment`). A frame's anchors are its tokens with the highest density times
distance (DPC-kNN) among those that are not salient. Where the frames with anchors have too few tokens, the best-scored of the other frames stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vlprune.errors import OptionError
from vlprune.kernels.allotment import DOWN, allot, rank_in_groups, sizes_of
from vlprune.kernels.density_peaks import peak_scores
from vlprune.kernels.frame_cells import FrameCells, video_cells
from vlprune.kernels.windows import extents
from vlprune.protocols import ScoreInputs, Selection, Tap
from vlprune.selectors.places import separators_last
from vlprune.selectors.windows import check_between

ROLES = ("salient", "anchor")


class Pools(NamedTuple):
    """Which tokens the anchors of a frame take in.

    Attributes:
        pool: (B, N) number of the tokens' pool, -1 for tokens that no anchor takes in; every anchor belongs to the pool that it draws on.
        frame: (B, N) frame of each token.
        frames: how many frames there are.
        most: anchors of an item, at most.
    """

    pool: Tensor
    frame: Tensor
    frames: int
    most: int


@dataclass(frozen=True)
class Anchors:
    """Keep salient tokens and anchors.

    Attributes:
        frames: signal (B, N, C) whose mean over a frame is the frame's feature; ``None``: the tokens.
        cuts: lowest cosines between neighbouring frames at which to cut in any case.
        threshold: cosine below which to cut, too.
        context: share d of a frame's tokens that are anchors.
        every: p, every how many frames of a segment there are anchors.
        neighbours: k of the density.
    """

    frames: Tap | None = None
    cuts: int = 7
    threshold: float = 0.9
    context: float = 0.4
    every: int = 4
    neighbours: int = 4

    def __post_init__(self) -> None:
        check_between("threshold", self.threshold, -1.0, 1.0, "the cosine of neighbouring frames below which a segment ends")
        check_between("context", self.context, 0.0, 1.0, "the share of a frame's tokens that are anchors")
        for name, value, low in (("segments", self.cuts + 1, 1), ("every", self.every, 1), ("neighbours", self.neighbours, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise OptionError(f"{name}={value!r}: a whole number from {low}")

    @property
    def needs(self) -> tuple[Tap, ...]:
        """The frames' features, if they are no means of tokens."""
        return () if self.frames is None else (self.frames,)

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """(B, K) indices with roles, and what each anchor draws on."""
        cells = video_cells(inputs)
        frames, number = cells.there.shape[1], inputs.num_keep
        first, last = extents(self.starts(inputs, cells))
        frame = (cells.place // cells.there.shape[2]).masked_fill(cells.place >= cells.there[0].numel(), -1)
        scores = separators_last(scores, inputs)
        salient = self._salient(frame, scores, frames, number)
        places = number - frames * self._per_frame(frames, number)

        steps = (last - torch.arange(frames, device=last.device)) % self.every           # 0: a frame with anchors
        weights = (last - first + 1).float() / ((last - first) // self.every + 1)
        groups = torch.where((steps == 0).gather(1, frame.clamp(min=0)) & (frame >= 0) & ~salient, frame, -1)
        counts = allot(groups, weights, places, DOWN)
        left = cells.there & ~(cells.of_tokens(salient))
        features = cells.of_tokens(inputs.tokens.detach().float())
        peaks = cells.to_tokens(peak_scores(features, torch.where(left, 0, -1), self.neighbours), -torch.inf)
        anchor = (groups >= 0) & (rank_in_groups(groups, peaks) < counts.gather(1, groups.clamp(min=0)))

        order = scores.argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, torch.where(salient | anchor, 0, torch.where(frame < 0, 2, 1)).gather(1, order).argsort(dim=1, stable=True))
        keep = order[:, :number].sort(dim=1).values
        kept = torch.zeros_like(salient).scatter(1, keep, True)
        alone = (last - first) // self.every == last - first                             # as many frames with anchors as frames
        pool = torch.where(alone, frames + torch.arange(frames, device=first.device), first).gather(1, frame.clamp(min=0))
        pool = pool.masked_fill((kept & ~anchor) | (frame < 0), -1)
        return Selection(keep, anchor.long().gather(1, keep), ROLES, Pools(pool, frame, frames, places))

    def _per_frame(self, frames: int, number: int) -> int:
        """Salient tokens of a frame."""
        each = round(number / frames)
        return min(each - int(each * self.context), number // frames)

    def _salient(self, frame: Tensor, scores: Tensor, frames: int, number: int) -> Tensor:
        """(B, N) bool."""
        counts = sizes_of(frame, frames).clamp(max=self._per_frame(frames, number))
        return (frame >= 0) & (rank_in_groups(frame, scores) < counts.gather(1, frame.clamp(min=0)))

    def starts(self, inputs: ScoreInputs, cells: FrameCells) -> Tensor:
        """(B, T) bool: where a segment starts."""
        values = cells.of_tokens((inputs.tokens if self.frames is None else inputs.signal(self.frames)).detach().float())
        features = values.sum(dim=2) / cells.there.sum(dim=2)[..., None].clamp(min=1)
        alike = F.cosine_similarity(features[:, 1:], features[:, :-1], dim=-1)
        rank = alike.argsort(dim=1, stable=True).argsort(dim=1)
        return F.pad((rank < self.cuts) | (alike < self.threshold), (1, 0), value=True)

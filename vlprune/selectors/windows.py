"""Two ways to cut a video into windows of frames and to say which cells stand still in each.

`ClusteredFrames` (PruneVid, arXiv:2412.16117): frames are clustered by the mean of their tokens, labels are made contiguous, and a cell is still if the mean
cosine between its tokens in the frames of the window is above a threshold. `StillestWindows` (HoliTom, arXiv:2505.21334): a cell is still if it changes little
from each frame to the next, and the windows are those in which still cells save the most tokens. In a window of one frame nothing is still.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from vlprune.errors import OptionError
from vlprune.kernels.density_peaks import nearest_centre, peak_scores
from vlprune.kernels.windows import best_windows, contiguous_labels, extents, starts_of, still_gains


class Windows(NamedTuple):
    """Where windows start, (B, T) bool, and which cells are still in the window of each frame, (B, T, M) bool."""

    starts: Tensor
    still: Tensor


class Cutting(Protocol):
    """Cuts videos into windows, from features (B, T, M, D) of their cells and ``there`` (B, T, M), which of these exist."""

    def __call__(self, features: Tensor, there: Tensor) -> Windows:
        """The windows."""
        ...


@dataclass(frozen=True)
class ClusteredFrames:
    """Windows of frames that are alike.

    Attributes:
        share: clusters of frames, as a share of their number; rounded down, at least one.
        neighbours: k of the clustering.
        threshold: mean cosine above which a cell is still.
    """

    share: float = 0.25
    neighbours: int = 7
    threshold: float = 0.8

    def __post_init__(self) -> None:
        check_between("segments", self.share, 0.0, 1.0, "clusters of frames as a share of their number")
        check_between("threshold", self.threshold, -1.0, 1.0, "the mean cosine above which a cell is still")

    def __call__(self, features: Tensor, there: Tensor) -> Windows:
        """The windows."""
        labels = cluster_labels(features.sum(dim=2) / there.sum(dim=2)[..., None].clamp(min=1), max(1, int(features.shape[1] * self.share)), self.neighbours)
        starts = starts_of(contiguous_labels(labels, features.shape[1]))
        first, last = extents(starts)
        number = (last - first + 1)[..., None]
        means = window_means(F.normalize(features, dim=-1), starts)
        pairs = number * number * means.square().sum(dim=-1) - number                    # cosines of all pairs of different frames
        alike = pairs / (number * (number - 1)).clamp(min=1) > self.threshold
        return Windows(starts, alike & (number > 1) & always_there(there, starts))


@dataclass(frozen=True)
class StillestWindows:
    """Windows in which as many tokens as possible stand still.

    Attributes:
        threshold: cosine with the frame before above which a cell has not changed.
        longest: frames of a window, at most.
    """

    threshold: float = 0.8
    longest: int = 1024

    def __post_init__(self) -> None:
        check_between("threshold", self.threshold, -1.0, 1.0, "the cosine with the frame before above which a cell is still")
        if isinstance(self.longest, bool) or not isinstance(self.longest, int) or self.longest < 1:
            raise OptionError(f"longest={self.longest!r}: frames of a window, a whole number from 1")

    def __call__(self, features: Tensor, there: Tensor) -> Windows:
        """The windows."""
        alike = F.cosine_similarity(features[:, 1:], features[:, :-1], dim=-1) > self.threshold
        alike = alike & there[:, 1:] & there[:, :-1]                                     # (B, T - 1, M)
        starts = best_windows(still_gains(alike), self.longest)
        first, last = extents(starts)
        changes = F.pad((~alike).long().cumsum(dim=1), (0, 0, 1, 0))                     # up to each frame
        since = at_frames(changes, last) - at_frames(changes, first)
        return Windows(starts, (since == 0) & (last > first)[..., None])


def cluster_labels(features: Tensor, clusters: int, neighbours: int) -> Tensor:
    """(B, T) cluster of each of the features (B, T, D), numbered from the most central."""
    groups = torch.zeros(features.shape[0], 1, features.shape[1], dtype=torch.int64, device=features.device)
    order = peak_scores(features[:, None], groups, neighbours)[:, 0].argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    owner = nearest_centre(features[:, None], groups, (rank < clusters)[:, None])[:, 0]
    return rank.gather(1, owner)


def window_means(values: Tensor, starts: Tensor) -> Tensor:
    """(B, T, ...) mean of values (B, T, ...) over the window of each frame; one product an item."""
    window = starts.long().cumsum(dim=1)
    same = (window[:, :, None] == window[:, None]).to(values.dtype)
    weights = same / same.sum(dim=2, keepdim=True)
    with torch.autocast(values.device.type, enabled=False):
        return torch.stack([weight @ value.flatten(1) for weight, value in zip(weights, values, strict=True)]).reshape(values.shape)


def always_there(there: Tensor, starts: Tensor) -> Tensor:
    """(B, T, M) whether a cell exists in every frame of the window."""
    first, last = extents(starts)
    missing = F.pad((~there).long().cumsum(dim=1), (0, 0, 1, 0))
    return at_frames(missing, last + 1) == at_frames(missing, first)


def at_frames(values: Tensor, frames: Tensor) -> Tensor:
    """(B, T, M) rows ``frames`` (B, T) of ``values`` (B, R, M)."""
    return values.gather(1, frames[..., None].expand(-1, -1, values.shape[2]))


def check_between(name: str, value: float, low: float, high: float, meaning: str) -> None:
    """Say what is wrong with a number that must lie between two others."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise OptionError(f"{name}={value!r}: {meaning}, between {low:g} and {high:g}")

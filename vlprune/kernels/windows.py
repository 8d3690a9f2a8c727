"""Cutting a video into windows of frames: by labels of frames, or so that as much as possible stands still. On the device; loops over frames only.

A cutting is told as (B, T) bool: where a window starts. The first frame always starts one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def starts_of(labels: Tensor) -> Tensor:
    """(B, T) bool: where a run of equal labels (B, T) starts."""
    starts = torch.ones_like(labels, dtype=torch.bool)
    starts[:, 1:] = labels[:, 1:] != labels[:, :-1]
    return starts


def extents(starts: Tensor) -> tuple[Tensor, Tensor]:
    """First and last frame (B, T) of the window that each frame is in."""
    frames = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape)
    first = torch.where(starts, frames, 0).cummax(dim=1).values
    ends = torch.ones_like(starts)
    ends[:, :-1] = starts[:, 1:]
    last = torch.where(ends, frames, starts.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    return first, last


def contiguous_labels(labels: Tensor, num_labels: int) -> Tensor:
    """Make labels (B, T) of frames contiguous (PruneVid).

    A label's longest runs stay, all of them if several are as long, unless they are single frames. From left to right every other frame joins the run beside
    it that is longer, the left one if both are as long; the left one's length counts what has joined it. With no run left, all frames have one label.
    """
    first, last = extents(starts_of(labels))
    length = last - first + 1
    longest = torch.zeros(labels.shape[0], num_labels, dtype=torch.int64, device=labels.device).scatter_reduce(1, labels, length, "amax")
    stays = (length == longest.gather(1, labels)) & (length > 1)
    count = labels.shape[1]
    frames = torch.arange(count, device=labels.device).expand(labels.shape)
    following = torch.where(stays, frames, count).flip(1).cummin(dim=1).values.flip(1)               # the next frame that stays; T: none
    there, at = following < count, following.clamp(max=count - 1)
    right_label = torch.where(there, labels.gather(1, at), 0)
    right_length = torch.where(there, length.gather(1, at), 0)
    label, size = right_label[:, 0], torch.zeros_like(right_label[:, 0])
    result = []
    for frame in range(count):
        left = (size >= right_length[:, frame]) & (size > 0) & ~stays[:, frame]
        now = torch.where(left, label, right_label[:, frame])
        size = torch.where(now == label, size + 1, 1)
        label = now
        result.append(now)
    return torch.stack(result, dim=1)


def still_gains(still: Tensor) -> Tensor:
    """What each window saves (HoliTom).

    Args:
        still: (B, T - 1, M) bool: cells that do not change from a frame to the next.

    Returns:
        (B, T, T) at s, e: cells that stand still from frame s to e, times e - s; 0 for e <= s.
    """
    items, steps, _ = still.shape
    frames = torch.arange(steps + 1, device=still.device)
    changed = torch.cat([torch.ones_like(still[:, :1]), ~still], dim=1)
    run = frames[:, None] - torch.where(changed, frames[:, None], 0).cummax(dim=1).values            # (B, T, M) steps that each cell has stood still for
    counts = torch.zeros(items, steps + 1, steps + 2, dtype=torch.int64, device=still.device).scatter_add(2, run, torch.ones_like(run))
    at_least = counts.flip(2).cumsum(dim=2).flip(2)                                                  # (B, e, d) cells still for d steps or more
    back = (frames[None] - frames[:, None]).clamp(min=0)                                             # (s, e)
    return at_least.gather(2, back.mT.expand(items, -1, -1)).mT * back


def best_windows(gains: Tensor, longest: int) -> Tensor:
    """(B, T) starts of the windows of at most ``longest`` frames with the largest sum of ``gains`` (B, T, T); of equals, the shorter last window."""
    items, count, _ = gains.shape
    best = torch.zeros(items, count + 1, dtype=gains.dtype, device=gains.device)                    # of the first e frames
    first = torch.zeros(items, count, dtype=torch.int64, device=gains.device)                       # where the window that ends at e starts
    for end in range(count):
        lowest = max(0, end - longest + 1)
        sums = (best[:, lowest : end + 1] + gains[:, lowest : end + 1, end]).flip(1)                # starts at end, end - 1, ...
        best[:, end + 1] = sums.amax(dim=1)
        first[:, end] = end - (sums == best[:, end + 1, None]).int().argmax(dim=1)                  # the first of equals
    starts = torch.zeros(items, count, dtype=torch.bool, device=gains.device)
    frame = torch.full((items, 1), count - 1, dtype=torch.int64, device=gains.device)
    for _ in range(count):
        frame = first.gather(1, frame)
        starts.scatter_(1, frame, True)
        frame = (frame - 1).clamp(min=0)
    return starts

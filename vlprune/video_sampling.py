"""Which frames of a video to read: evenly spread ones, so many a second, or key frames."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vlprune.errors import OptionError
from vlprune.video_index import FrameIndex

SAMPLINGS = ("uniform", "fps", "keyframes")


def choose(
    index: FrameIndex, sampling: str, num_frames: int, fps: float | None, max_frames: int, start: float | None = None, end: float | None = None
) -> tuple[list[int], str]:
    """The numbers of the frames to read, increasing, and a note where they are not quite what was asked for.

    Args:
        index: the frames that there are.
        sampling: ``"uniform"``: the middle frames of ``num_frames`` equal parts; ``"fps"``: the frames nearest to the times k / ``fps`` after the start;
            ``"keyframes"``: ``num_frames`` key frames, evenly spread over all of them.
        num_frames: for ``"uniform"`` and ``"keyframes"``, where there are as many.
        fps: frames a second, for ``"fps"``.
        max_frames: at most so many with ``"fps"``; more are thinned out evenly.
        start: seconds; the frame that is shown then is the first that counts.
        end: seconds; frames first shown before it count.
    """
    first, last = window(index, start, end)
    if sampling == "uniform":
        return [first + place for place in spread(last - first, num_frames)], ""
    if sampling == "keyframes":
        keys = index.keys[(index.keys >= first) & (index.keys < last)]
        if not len(keys):
            raise OptionError(f"there is no key frame between {index.times[first]:g} s and {index.times[last - 1]:g} s; sampling='uniform' needs none")
        return [int(keys[place]) for place in spread(len(keys), num_frames)], ""
    assert fps is not None
    chosen = first + nearest(index.times[first:last] - (start or 0.0), fps)
    notes = []
    if len(chosen) == last - first > 1 and fps > index.fps * 1.01:
        notes.append(f"the file has {index.fps:.4g} frames a second, not {fps:g}: all are taken")
    if len(chosen) > max_frames:
        notes.append(f"{len(chosen)} frames at {fps:g} a second are more than max_frames={max_frames}: every {len(chosen) / max_frames:.3g}th of them is taken")
        chosen = chosen[spread(len(chosen), max_frames)]
    return chosen.tolist(), "; ".join(notes)


def window(index: FrameIndex, start: float | None, end: float | None) -> tuple[int, int]:
    """The first frame on screen between the times, and the first after it that is not."""
    length = index.duration
    if (start is not None and not 0 <= start < length) or (end is not None and not (start or 0) < end):
        raise OptionError(f"start={start}, end={end}: 0 <= start < end is needed, and start before the file ends at {length:.2f} s")
    first = 0 if start is None else int(np.searchsorted(index.times, start + 1e-6, "right")) - 1
    last = len(index) if end is None else int(np.searchsorted(index.times, end - 1e-6, "left"))
    return max(first, 0), max(last, first + 1)


def spread(count: int, wanted: int) -> list[int]:
    """The middle places of ``wanted`` equal parts of ``count`` places, or all places where there are fewer."""
    parts = min(wanted, count)
    return [(2 * part + 1) * count // (2 * parts) for part in range(parts)]


def nearest(times: NDArray[np.float64], fps: float) -> NDArray[np.int64]:
    """Places of the times nearest to 0, 1 / fps, 2 / fps ... up to the last time; the earlier of two equally near ones, each once.

    A time is chosen if a point of that grid lies between the middles on either side of it: this costs no more for a very fine grid.
    """
    edges = np.append((times[1:] + times[:-1]) / 2, times[-1])
    points = np.floor(edges * fps + 1e-6)       # the last point of the grid up to each edge; 1e-6 is for rounding
    points = np.maximum(points, -1.0)           # there is none before 0
    return np.flatnonzero(np.diff(points, prepend=-1.0) > 0)

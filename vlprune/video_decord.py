"""Decode chosen frames with decord, where it can be trusted with them.

decord 0.6 finds a frame by counting from the nearest key frame, in the order of the file. With open groups of pictures (the default of x265, and common
in MPEG-4 and MPEG-2), with an edit list or without exact seeking (transport streams) that count is off, and it silently returns other frames. All
of this shows in the index, so such files are refused before any frame is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlprune.video_index import FrameIndex
from vlprune.video_pictures import Size, picture

if TYPE_CHECKING:
    from PIL.Image import Image

SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv", "avi")


class DecordRefusedError(Exception):
    """Why decord is not asked, or what it said."""


def read_with_decord(path: Path, index: FrameIndex, wanted: Sequence[int], resize: Size) -> list[Image]:
    """The wanted frames. Raises DecordRefusedError with the reason where decord fails, or would return other frames.

    One frame at a time: a batch of large frames would fill the memory before they are made smaller.
    """
    try:
        import decord
    except ImportError as error:
        raise DecordRefusedError(f"{error.name or 'it'} is not installed") from error
    if index.damage:
        raise DecordRefusedError(f"not asked, since {index.damage}")
    if index.container not in SEEKABLE:
        raise DecordRefusedError(f"it does not seek exactly in the format {index.container}")
    if not index.exact:
        raise DecordRefusedError("the file has no timestamps by which it could seek")
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        doubt = mismatch(reader, index)
        if not doubt:
            return [picture(_array(reader[place]), resize) for place in wanted]
    except Exception as error:      # decord raises its own and plain runtime errors, with C++ traces in the text
        raise DecordRefusedError(f"{plain(error)} (codec {index.codec})") from error
    raise DecordRefusedError(doubt)


def mismatch(reader: Any, index: FrameIndex) -> str:
    """Where decord's index of the file differs from the true one."""
    if len(reader) != len(index):
        return f"it counts {len(reader)} frames where {len(index)} are shown"
    times = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)
    room = 1e-3 + index.times * 2.0**-22        # decord's times are float32
    if not (np.abs(times - times[0] - index.times) <= room).all():
        return "its timestamps are not those of the file"
    if list(reader.get_key_indices()) != index.keys.tolist():
        return "it misplaces the key frames of this file and would return other frames"
    return ""


def why_not(path: Path) -> str:
    """What decord says of a file that cannot be opened."""
    try:
        import decord

        decord.VideoReader(str(path), num_threads=1)
    except ImportError as error:
        return f"{error.name or 'it'} is not installed"
    except Exception as error:
        return plain(error)
    return "it opens the file, which is not enough to place its frames"


def plain(error: Exception) -> str:
    """A decord message without its C++ place and time stamp."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    line = re.sub(r"\[.*?\] |\S+\.cc:\d+: |Check failed: (.* vs\. \S+\) )?|ERROR |Error: ", "", line)
    return line.strip().rstrip(".")[:160] or "unknown reason"


def _array(frame: Any) -> Any:
    """NumPy pixels, whatever array library the user told decord to bridge to."""
    return frame.asnumpy() if hasattr(frame, "asnumpy") else np.asarray(frame)

"""What frames a video file has and when each is shown, from its packets and without decoding.

PyAV reads the packets, whichever library decodes the frames afterwards, so both see the same frames with the same times. decord's own index does not
do: its times are float32, some AVI files have none in it, and it counts key frames in the order of the file instead of the order on the screen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class FrameIndex:
    """The N frames of the best video stream of a file, in the order in which they are shown.

    Attributes:
        times: (N,) seconds at which each is shown first, counted from the first frame.
        pts: (N,) the file's own timestamps, in ticks; empty without ``exact``.
        order: (N,) the place of each frame in the file, where frames lie in the order of decoding.
        keys: (M,) key frames, by their place on the screen.
        exact: whether the timestamps are sound; if not, ``times`` are index over frame rate.
        fps: mean frames per second.
        duration: seconds from the first frame to the end of the last.
        container: format of the file, in FFmpeg's word.
        codec: of the stream.
        damage: what is wrong with the file, or nothing.
    """

    times: NDArray[np.float64]
    pts: NDArray[np.int64]
    order: NDArray[np.int64]
    keys: NDArray[np.int64]
    exact: bool
    fps: float
    duration: float
    container: str
    codec: str
    damage: str = ""
    places: dict[int, int] = field(default_factory=dict)     # of timestamps

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.times)


class UnreadableError(Exception):
    """What PyAV says of a file that it cannot read."""


@contextmanager
def pyav_speaks() -> Iterator[None]:
    """Turn the errors of PyAV into one kind, in its words but without numbers and places."""
    import av

    try:
        yield
    except (av.error.FFmpegError, OSError, ValueError, RuntimeError) as error:
        raise UnreadableError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


def open_stream(path: Path) -> tuple[Any, Any]:
    """The container and its best video stream; closing the container is up to the caller."""
    import av

    container = av.open(str(path), metadata_errors="replace")
    stream = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        container.close()
        raise ValueError("it has no video stream" if stream is None else "there is no decoder for its video stream")
    return container, stream


def read_index(path: Path) -> FrameIndex:
    """Read every packet of the best video stream. Raises UnreadableError."""
    with pyav_speaks():
        return _read(path)


def _read(path: Path) -> FrameIndex:
    import av

    container, stream = open_stream(path)
    with container:     # nothing of the stream may be touched once it is closed
        rows, damage, last, partial = [], "", 0, False
        try:
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:     # an edit list hides frames that are only there to be decoded from
                    rows.append((packet.pts, packet.dts, packet.is_keyframe))
                    last, partial = packet.duration or 0, packet.is_corrupt
        except av.error.FFmpegError as error:
            damage = f"reading stops: {error.strerror}"
        rate, base = stream.average_rate or stream.guessed_rate, stream.time_base
        announced, seconds = stream.frames, (container.duration or 0) / av.time_base
        name, codec = container.format.name, stream.codec_context.codec.canonical_name
    if not rows:
        raise ValueError(damage or "its video stream has no frames")
    key = np.array([row[2] for row in rows], bool)
    sound = all(pts is not None for pts, _, _ in rows)
    if sound and name == "avi":     # an AVI file stores no order of showing: what stands there is guessed, and wrong where frames are reordered
        sound = all(pts == dts for pts, dts, _ in rows)
    pts = np.array([row[0] for row in rows], np.int64) if sound else np.empty(0, np.int64)
    order = np.argsort(pts, kind="stable") if sound else np.arange(len(rows))
    pts = pts[order] if sound else pts
    if sound and (np.diff(pts) <= 0).any():
        sound, pts, order = False, np.empty(0, np.int64), np.arange(len(rows))
    fps = float(rate) if rate else 25.0
    if sound:
        times = (pts - pts[0]) * float(base)
        if not rate and len(rows) > 1:
            fps = (len(rows) - 1) / float(times[-1])
    else:
        times = np.arange(len(rows)) / fps
    duration = float(times[-1]) + (last * float(base) if sound and last else 1 / fps)
    if partial or (cut_short(path, name) and (announced > len(rows) or seconds > duration + 1)):
        damage = damage or "it is cut short" + (f" ({announced} frames are announced)" if announced else "")
    places = {int(stamp): place for place, stamp in enumerate(pts)}
    return FrameIndex(times, pts, order, np.flatnonzero(key[order]), sound, fps, duration, name, codec, damage, places)


def cut_short(path: Path, container: str) -> bool:
    """Whether an MP4 or Matroska file is shorter than its outermost sizes say."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if "mp4" in container:
            place = 0
            while place + 8 <= size:
                file.seek(place)
                head = file.read(16)
                length = int.from_bytes(head[:4], "big")
                length = int.from_bytes(head[8:16], "big") if length == 1 else length
                if length < 8:     # 0: up to the end of the file
                    return False
                place += length
            return place > size
        if "matroska" in container:
            head = file.read(4096)
            place = head.find(b"\x18\x53\x80\x67") + 4     # the segment, then its length: as many bytes as the first has leading zeros, and one
            if place < 4 or place >= len(head) or not head[place]:
                return False
            width = 9 - head[place].bit_length()
            length = int.from_bytes(head[place : place + width], "big") & ((1 << 7 * width) - 1)
            return length != (1 << 7 * width) - 1 and place + width + length > size     # all ones: unknown
    return False

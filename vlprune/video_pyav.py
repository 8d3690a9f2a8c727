"""Decode chosen frames with PyAV: seek to the key frame before each, decode up to it, and know it by its timestamp."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlprune.video_index import FrameIndex, UnreadableError, open_stream, pyav_speaks
from vlprune.video_pictures import Size, picture

if TYPE_CHECKING:
    from PIL.Image import Image

THREADS = min(4, os.cpu_count() or 1)


class DamagedFrameError(Exception):
    """A frame that cannot be decoded.

    Attributes:
        place: its number.
        until: the frames from the key frame before the damage up to this number, exclusive, are sound.
        again: the next key frame after the damage, if there is one.
    """

    def __init__(self, reason: str, place: int, until: int, again: int | None) -> None:
        """Keep what FFmpeg says, and the places."""
        super().__init__(reason)
        self.place, self.until, self.again = place, until, again


def read_with_pyav(path: Path, index: FrameIndex, wanted: Sequence[int], resize: Size) -> list[Image]:
    """The wanted frames, whose numbers increase. Raises DamagedFrameError for the first that cannot be decoded, else UnreadableError."""
    try:
        return _read(path, index, wanted, resize, THREADS)
    except (DamagedFrameError, UnreadableError):
        # Several threads report an error late; one tells which packet is bad, and so which frames need it.
        return _read(path, index, wanted, resize, 1)


def _read(path: Path, index: FrameIndex, wanted: Sequence[int], resize: Size, threads: int) -> list[Image]:
    with pyav_speaks(), closing(Decoder(path, index, threads)) as decoder:
        return [picture(decoder.frame(place), resize) for place in wanted]


class Decoder:
    """A file read forwards, with jumps to key frames. At most a few frames are in memory at any time."""

    def __init__(self, path: Path, index: FrameIndex, threads: int) -> None:
        """Open the file."""
        self.path, self.index, self.threads = path, index, threads
        self.container: Any = None
        self.open()

    def open(self) -> None:
        """Start over at the first packet."""
        self.close()
        self.container, self.stream = open_stream(self.path)
        self.stream.thread_type, self.stream.codec_context.thread_count = "AUTO", self.threads
        self._restart(-1)

    def close(self) -> None:
        """Let go of the file."""
        if self.container is not None:
            self.frames.close()
            self.container.close()
            self.container = None

    def _restart(self, seen: int) -> None:
        self.seen, self.broken, self.frames = seen, dict[int, str](), self._decode()

    def frame(self, place: int) -> Any:
        """(height, width, 3) pixels of a frame; numbers must increase from call to call.

        Containers seek by the time of decoding, which can lead past the frame, and not all are good at it. Then the key frame before and one far before
        are tried, and at last the file is read from its start.
        """
        before: Any = self.index.keys[self.index.keys <= place][::-1] if self.index.exact else ()
        found = self._forward(place) if not len(before) or before[0] <= self.seen + 1 else None
        for key in dict.fromkeys(int(before[back]) for back in (0, 1, 8) if back < len(before)):
            if found is None:
                self.container.seek(int(self.index.pts[key]), stream=self.stream)
                self._restart(key - 1)
                found = self._forward(place)
        if found is None:
            self.open()
            found = self._forward(place)
        if found is None:
            raise self._damaged(place)
        return found

    def _forward(self, place: int) -> Any:
        """The frame, or None where it does not come or is made from broken data."""
        for number, frame in self.frames:
            self.seen = number
            if number >= place:
                return upright(frame) if number == place and not self._suspect(place) else None
        return None

    def _decode(self) -> Generator[tuple[int, Any], None, None]:
        """Frames with their numbers."""
        import av

        count = order = -1
        for packet in self.container.demux(self.stream):
            order = self._order(packet.pts, order + 1)
            try:
                frames = self.stream.decode(packet)
            except av.error.FFmpegError as error:
                self.broken[order] = error.strerror or str(error)
                frames = []
            for frame in frames:
                count += 1
                number = self.index.places.get(frame.pts) if self.index.exact else count
                if number is not None:
                    yield number, frame

    def _order(self, pts: int | None, otherwise: int) -> int:
        place = self.index.places.get(pts) if pts is not None else None
        return otherwise if place is None else int(self.index.order[place])

    def _suspect(self, place: int) -> bool:
        """Whether a frame comes after broken data, without a key frame in between; without timestamps its number is then unknown."""
        if not self.index.exact or self.threads > 1:
            return bool(self.broken)
        order = self.index.order[place]
        keys = self.index.order[self.index.keys]
        return any(bad <= order and not ((keys > bad) & (keys <= order)).any() for bad in self.broken)

    def _damaged(self, place: int) -> DamagedFrameError:
        if not self.broken or not self.index.exact:
            reason = next(iter(self.broken.values()), "the decoder gives no such frame")
            return DamagedFrameError(reason, place, place if not self.broken else max(0, min(self.broken) - 1), None)
        keys = self.index.keys[np.argsort(self.index.order[self.index.keys])]
        orders = self.index.order[keys]
        bad = max((bad for bad in self.broken if bad <= self.index.order[place]), default=min(self.broken))
        after = keys[orders > bad]
        stop = self.index.order[after[0]] if len(after) else len(self.index)
        until = int(np.flatnonzero((self.index.order >= bad) & (self.index.order < stop)).min(initial=place))
        return DamagedFrameError(self.broken[bad], place, until, int(after[0]) if len(after) else None)


def upright(frame: Any) -> Any:
    """RGB pixels of a frame, turned as the file says that it is to be shown (as decord does)."""
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4       # counterclockwise
    return np.rot90(pixels, turns) if turns else pixels

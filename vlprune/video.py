"""Frames of a video file, with their exact times, read with decord; and a small writer for examples and tests."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlprune.errors import OptionError, VlpruneError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Clip:
    """Frames sampled from a video file.

    Attributes:
        frames: pictures, in order.
        times: seconds at which each is shown first, from the file's own timestamps.
        exact: whether the file has sound timestamps; if not (some AVI files), ``times`` are index over frame rate.
        indices: their numbers in the file.
        fps: mean frames per second of the file.
        num_frames: frames in the file.
    """

    path: Path
    frames: list[Image]
    times: list[float]
    indices: list[int]
    fps: float
    num_frames: int
    exact: bool = True

    @property
    def captions(self) -> list[str]:
        """The times, for pictures."""
        return [f"{'' if self.exact else '~'}{time:.2f} s" for time in self.times]


def read_video(path: str | Path, num_frames: int = 8) -> Clip:
    """Sample ``num_frames`` frames uniformly: the middle frames of that many equal parts.

    A file with fewer frames gives all of them.

    Raises:
        OptionError: the file does not exist, or cannot be decoded; the message names it.
    """
    file = Path(path)
    if num_frames < 1:
        raise OptionError(f"num_frames={num_frames}: at least one frame is needed")
    if not file.is_file():
        raise OptionError(f"there is no video file {str(file)!r}")
    try:
        import decord
        from PIL import Image as image_module
    except ImportError as error:
        raise VlpruneError(f"reading a video needs {error.name}, which is not installed: pip install 'vlprune[video,draw]'") from error
    try:
        reader = decord.VideoReader(str(file), num_threads=1)
        total = len(reader)
        count = min(num_frames, total)
        indices = [(2 * part + 1) * total // (2 * count) for part in range(count)]
        pixels = reader.get_batch(indices).asnumpy()
        fps = float(reader.get_avg_fps())
        stamps = reader.get_frame_timestamp(range(total))[:, 0].astype(float)
    except Exception as error:      # decord raises its own and plain runtime errors, with C++ traces in the text
        reason = str(error).strip().splitlines() or [type(error).__name__]
        hint = "Is it damaged, or in a codec that decord lacks (AV1)?"
        raise OptionError(f"decord cannot read the video file {str(file)!r}: {_plain(reason[0])}. {hint}") from error
    if not indices or not pixels.size:
        raise OptionError(f"the video file {str(file)!r} has no frames")
    exact = bool(np.isfinite(stamps).all() and stamps[0] >= 0 and (np.diff(stamps) > 0).all())
    times = stamps if exact else np.arange(total) / fps
    frames = [image_module.fromarray(frame) for frame in pixels]
    return Clip(file, frames, [float(times[index]) for index in indices], indices, fps, total, exact)


def _plain(line: str) -> str:
    """A decord message without its C++ place and time stamp."""
    return line.split("] ")[-1].split("Check failed: ")[-1].strip().rstrip(".")[:160] or "unknown reason"


def write_video(path: str | Path, frames: Sequence[Any], fps: int = 8, quality: int = 92) -> Path:
    """Write a Motion-JPEG AVI file: every player and decord read it, and Pillow is all it takes.

    Args:
        path: of the file, usually ``*.avi``.
        frames: PIL images or uint8 arrays, all of one size.
        fps: frames per second.
        quality: of the JPEG pictures.
    """
    from PIL import Image as image_module

    pictures = [frame if isinstance(frame, image_module.Image) else image_module.fromarray(np.asarray(frame)) for frame in frames]
    if not pictures or any(picture.size != pictures[0].size for picture in pictures):
        raise OptionError("a video needs at least one frame, and all of one size")
    width, height = pictures[0].size
    data = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, "JPEG", quality=quality, subsampling=0)
        data.append(buffer.getvalue())
    largest = max(map(len, data))
    header = struct.pack("<14I", 1_000_000 // fps, largest * fps, 0, 0x10, len(data), 0, 1, largest, width, height, 0, 0, 0, 0)
    stream = b"vidsMJPG" + struct.pack("<10I", 0, 0, 0, 1, fps, 0, len(data), largest, 0xFFFFFFFF, 0) + struct.pack("<4H", 0, 0, width, height)
    form = struct.pack("<IiiHH4sIiiII", 40, width, height, 1, 24, b"MJPG", width * height * 3, 0, 0, 0, 0)
    movie, index, offset = b"movi", b"", 4
    for picture in data:
        chunk = _chunk(b"00dc", picture)
        index += b"00dc" + struct.pack("<3I", 0x10, offset, len(picture))
        movie += chunk
        offset += len(chunk)
    lists = _list(b"hdrl", _chunk(b"avih", header) + _list(b"strl", _chunk(b"strh", stream) + _chunk(b"strf", form)))
    body = b"AVI " + lists + _chunk(b"LIST", movie) + _chunk(b"idx1", index)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(_chunk(b"RIFF", body))
    return target


def _chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def _list(name: bytes, data: bytes) -> bytes:
    return _chunk(b"LIST", name + data)

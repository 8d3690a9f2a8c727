"""Write frames as a Motion-JPEG AVI file, for examples and tests: every player reads it, and Pillow is all it takes."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlprune.errors import OptionError


def write_video(path: str | Path, frames: Sequence[Any], fps: int = 8, quality: int = 92) -> Path:
    """Write a Motion-JPEG AVI file.

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

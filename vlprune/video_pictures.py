"""Decoded pixels as pictures of the wanted size, one by one, so that large frames do not pile up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vlprune.errors import OptionError

if TYPE_CHECKING:
    from PIL.Image import Image

Size = int | tuple[int, int] | None


def picture(pixels: Any, resize: Size) -> Image:
    """An image of (height, width, 3) uint8 pixels.

    Args:
        pixels: of one frame.
        resize: the longest side at most, or (height, width).
    """
    from PIL import Image as image_module

    image = image_module.fromarray(np.ascontiguousarray(pixels))
    size = target(image.size, resize)
    return image if size == image.size else image.resize(size, image_module.Resampling.BICUBIC)


def target(size: tuple[int, int], resize: Size) -> tuple[int, int]:
    """(Width, height) of a frame of that size once resized."""
    if resize is None:
        return size
    if isinstance(resize, tuple):
        return resize[1], resize[0]
    scale = min(1.0, resize / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def check_resize(resize: Any) -> None:
    """One clear line for a size that cannot be."""
    sides = resize if isinstance(resize, tuple) and len(resize) == 2 else (resize,)
    if resize is not None and not all(isinstance(side, int) and side > 0 for side in sides):
        raise OptionError(f"resize={resize!r}: the longest side in pixels, or a tuple (height, width)")

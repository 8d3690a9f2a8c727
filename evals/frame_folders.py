"""A video that is published as a folder of frames: numbered pictures at a known rate, read like a video file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vlprune.errors import OptionError
from vlprune.video import Clip
from vlprune.video_index import FrameIndex
from vlprune.video_pictures import check_resize, picture
from vlprune.video_sampling import choose

ENDINGS = (".jpg", ".jpeg", ".png")


def read_frames(
    folder: Path, num_frames: int, rate: float, *, sampling: str = "uniform", fps: float | None = None, start: float | None = None, end: float | None = None,
    resize: Any = None,
) -> Clip:  # fmt: skip
    """Some frames of a folder, as `vlprune.video.read_video` chooses them; every frame counts as a key frame.

    Args:
        folder: with the frames, in the order of their names.
        num_frames: how many.
        rate: frames a second that the folder was made with.
        sampling: as there.
        fps: as there.
        start: seconds; as there.
        end: seconds; as there.
        resize: as there.

    Raises:
        OptionError: no frames, or one that cannot be opened.
    """
    from PIL import Image

    check_resize(resize)
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS)
    if not files:
        raise OptionError(f"the folder {str(folder)!r} holds no frames: none with the ending {', '.join(ENDINGS)}")
    count = len(files)
    places = np.arange(count)
    index = FrameIndex(places / rate, places, places, places, True, rate, count / rate, "folder", "pictures")
    wanted, note = choose(index, sampling, num_frames, fps, count, start, end)
    frames = []
    for place in wanted:
        try:
            with Image.open(files[place]) as image:
                frames.append(picture(np.asarray(image.convert("RGB")), resize))
        except (OSError, ValueError, SyntaxError) as error:
            raise OptionError(f"cannot open the frame {str(files[place])!r}: {error}") from error
    return Clip(folder, frames, [place / rate for place in wanted], wanted, rate, count, True, count / rate, "pictures", note)

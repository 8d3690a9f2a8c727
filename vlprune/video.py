"""Read frames of a video file with their exact times: decord decodes them, or PyAV where decord cannot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlprune.errors import OptionError, VlpruneError
from vlprune.video_clip import Clip
from vlprune.video_decord import DecordRefusedError, read_with_decord, why_not
from vlprune.video_index import FrameIndex, UnreadableError, read_index
from vlprune.video_pictures import Size, check_resize
from vlprune.video_pyav import DamagedFrameError, read_with_pyav
from vlprune.video_sampling import SAMPLINGS, choose, window
from vlprune.video_writing import write_video

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Clip", "read_video", "write_video"]

BACKENDS = ("auto", "decord", "pyav")
MAX_FRAMES = 768      # as in the processors of Qwen2-VL and its successors


def read_video(
    path: str | Path,
    num_frames: int = 8,
    *,
    sampling: str = "uniform",
    fps: float | None = None,
    max_frames: int = MAX_FRAMES,
    start: float | None = None,
    end: float | None = None,
    resize: Size = None,
    backend: str = "auto",
) -> Clip:
    """Read some frames of a video file.

    However long the file, only the frames that are returned are kept, resized at once.

    Args:
        path: of the file.
        num_frames: how many, for ``"uniform"`` and ``"keyframes"``. A file with fewer gives all of them.
        sampling: ``"uniform"``: the middle frames of that many equal parts; ``"fps"``: the frames nearest to 0, 1 / fps, 2 / fps ... seconds;
            ``"keyframes"``: key frames, evenly spread over all of them.
        fps: frames a second, for ``sampling="fps"``.
        max_frames: at most so many with ``sampling="fps"``; more are thinned out evenly, which ``note`` says.
        start: seconds from which on; the first frame is the one shown then.
        end: seconds up to which, exclusive.
        resize: the longest side of the frames in pixels, at most; or (height, width).
        backend: ``"decord"``, ``"pyav"``, or ``"auto"``: decord, and PyAV where decord cannot open the file or would return other frames.

    Raises:
        OptionError: the file does not exist, is damaged or cannot be decoded; the message names it. Or an option cannot work.
        VlpruneError: the packages for video are not installed.
    """
    file = Path(path)
    _check(file, num_frames, sampling, fps, max_frames, backend)
    check_resize(resize)
    index = _index(file, backend)
    wanted, note = choose(index, sampling, num_frames, fps, max_frames, start, end)
    if index.damage and window(index, start, end)[1] == len(index):
        there = f"{len(index)} frames are there, the last one (perhaps in part) at {index.times[-1]:.3f} s: end={index.times[-1]:.3f} reads those before it"
        raise OptionError(f"the video file {str(file)!r} is damaged: {index.damage}. {there}.")
    refused = ""
    used = "pyav"
    frames: list[Image] = []
    if backend != "pyav":
        try:
            used, frames = "decord", read_with_decord(file, index, wanted, resize)
        except DecordRefusedError as error:
            if backend == "decord":
                raise OptionError(f"decord cannot read the video file {str(file)!r}: {error}. backend='auto' lets PyAV try.") from error
            used, refused = "pyav", f"decord: {error}"
    if used == "pyav":
        frames = _with_pyav(file, index, wanted, resize, refused)
    note = "; ".join(part for part in (f"read with PyAV ({refused})" if refused else "", note) if part)
    times = [float(index.times[place]) for place in wanted]
    return Clip(file, frames, times, wanted, index.fps, len(index), index.exact, index.duration, used, note)


def _check(file: Path, num_frames: int, sampling: str, fps: float | None, max_frames: int, backend: str) -> None:
    """One clear line for what cannot work."""
    for name, value, known in (("sampling", sampling, SAMPLINGS), ("backend", backend, BACKENDS)):
        if value not in known:
            raise OptionError(f"{name}={value!r}: one of {', '.join(map(repr, known))} is needed")
    for name, number in (("num_frames", num_frames), ("max_frames", max_frames)):
        if number < 1:
            raise OptionError(f"{name}={number}: at least one frame is needed")
    if (sampling == "fps") != (fps is not None) or (fps is not None and not 0 < fps < float("inf")):
        raise OptionError(f"sampling={sampling!r}, fps={fps}: sampling='fps' needs fps, the frames a second, and nothing else takes it")
    if not file.is_file():
        raise OptionError(f"there is no video file {str(file)!r}")


def _index(file: Path, backend: str) -> FrameIndex:
    """The frames of the file; where PyAV cannot open it, what both libraries say."""
    try:
        return read_index(file)
    except ImportError as error:
        raise VlpruneError(f"reading a video needs {error.name}, which is not installed: pip install 'vlprune[video]'") from error
    except UnreadableError as error:
        reasons = [f"PyAV: {error}"]
        if backend != "pyav":
            reasons.insert(0, f"decord: {why_not(file)}")
        raise OptionError(f"cannot read the video file {str(file)!r}: {'; '.join(reasons)}. Is it a video, and whole?") from error


def _with_pyav(file: Path, index: FrameIndex, wanted: Sequence[int], resize: Size, refused: str) -> list[Image]:
    """Its frames, or an error that tells which one is damaged and what can be read."""
    before = f"{refused}; " if refused else ""
    try:
        return read_with_pyav(file, index, wanted, resize)
    except DamagedFrameError as error:
        times, rest = index.times, []
        if error.until:
            rest.append(f"end={times[error.until]:.3f} reads up to frame {error.until - 1}")
        if error.again is not None:
            rest.append(f"start={times[error.again]:.3f} reads from frame {error.again} on")
        place = f"frame {error.place} of {len(index)}, at {times[error.place]:.2f} s, cannot be decoded"
        raise OptionError(f"the video file {str(file)!r} is damaged: {place} ({before}PyAV: {error}). {'; '.join(rest) or 'Nothing before it can'}.") from error
    except UnreadableError as error:
        raise OptionError(f"cannot read the video file {str(file)!r}: {before}PyAV: {error}") from error

"""Frames sampled from a video file, with what models want to know about their times."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Clip:
    """Frames sampled from a video file.

    Attributes:
        frames: pictures, in order.
        times: seconds at which each is shown first, from the file's own timestamps, counted from the first frame of the file.
        exact: whether the file has sound timestamps; if not (some AVI files), ``times`` are index over frame rate.
        indices: their numbers in the file, in the order of showing.
        fps: mean frames per second of the file.
        num_frames: frames in the file.
        duration: seconds from the first frame of the file to the end of its last.
        backend: who decoded the frames, ``"decord"`` or ``"pyav"``.
        note: what the user should know: why it was not decord, or why there are fewer frames than asked for.
    """

    path: Path
    frames: list[Image]
    times: list[float]
    indices: list[int]
    fps: float
    num_frames: int
    exact: bool = True
    duration: float = 0.0
    backend: str = "decord"
    note: str = ""

    @property
    def captions(self) -> list[str]:
        """The times, for pictures."""
        return [f"{'' if self.exact else '~'}{time:.2f} s" for time in self.times]

    @property
    def seconds_per_frame(self) -> float:
        """Mean seconds from one sampled frame to the next. Qwen2.5-VL's ``second_per_grid_ts`` is this times its ``temporal_patch_size``."""
        if len(self.times) < 2:
            return self.duration
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)

    def metadata(self) -> dict[str, Any]:
        """The frames' times as transformers takes them: ``videos_kwargs={"do_sample_frames": False, "video_metadata": [clip.metadata()]}``.

        Processors know no times. They compute the time of a frame as its index over ``fps`` (Qwen3-VL, GLM-4V, SmolVLM ...), and the seconds between frames
        as ``total_num_frames / fps`` over the number of frames (Qwen2.5-VL): ``VideoMetadata.timestamps`` and ``.sampled_fps``. Both come out right here.
        So for a file with a varying frame rate ``fps`` is 1000 and the indices are milliseconds, and for a part of a file, or frames that are not spread over
        all of it, ``total_num_frames`` counts the frames that the sampled ones stand for.
        """
        count, fps, indices, total = len(self.frames), self.fps, list(self.indices), self.num_frames
        if any(abs(index / fps - time) > 1e-3 for index, time in zip(indices, self.times, strict=True)):
            fps, indices, total = 1000.0, [round(1000 * time) for time in self.times], round(1000 * self.duration)
        covered = count * self.seconds_per_frame * fps
        if count > 1 and abs(covered - total) > count / (count - 1) * fps / self.fps:       # more than from rounding to whole frames
            total = round(covered)
        width, height = self.frames[0].size
        return {
            "total_num_frames": total, "fps": fps, "duration": self.duration, "frames_indices": indices, "width": width, "height": height,
            "video_backend": self.backend,
        }  # fmt: skip

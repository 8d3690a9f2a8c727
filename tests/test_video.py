"""Frames come from where they should, with the times that the file says; a file that cannot be read is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vlprune.errors import OptionError
from vlprune.video import read_video, write_video

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "videos"


def grey(path: Path, count: int, fps: int = 8) -> Path:
    """Frame i is grey 20 + 10 i."""
    return write_video(path, [np.full((48, 64, 3), 20 + 10 * number, np.uint8) for number in range(count)], fps=fps)


@pytest.mark.parametrize(("count", "wanted"), [(11, 4), (8, 8), (5, 9), (1, 1), (20, 1)])
def test_uniform_frames_with_exact_times(tmp_path: Path, count: int, wanted: int) -> None:
    """The middle frames of equal parts; their pixels and times are those of their numbers."""
    clip = read_video(grey(tmp_path / "grey.avi", count), wanted)
    number = min(count, wanted)
    assert clip.indices == [(2 * part + 1) * count // (2 * number) for part in range(number)]
    assert clip.num_frames == count
    assert clip.exact
    np.testing.assert_allclose(clip.times, np.array(clip.indices) / 8, atol=1e-6)
    for frame, index in zip(clip.frames, clip.indices, strict=True):
        assert frame.size == (64, 48)
        assert abs(float(np.asarray(frame).mean()) - (20 + 10 * index)) < 2


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Missing, not a video, cut off: one line each."""
    with pytest.raises(OptionError, match=r"no video file '.*gone\.mp4'"):
        read_video(tmp_path / "gone.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(OptionError, match=r"cannot read the video file '.*text\.mp4'"):
        read_video(tmp_path / "text.mp4")
    whole = grey(tmp_path / "whole.avi", 5).read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[:150])
    with pytest.raises(OptionError, match=r"cut\.avi"):
        read_video(tmp_path / "cut.avi")
    with pytest.raises(OptionError, match="at least one frame"):
        read_video(tmp_path / "whole.avi", 0)
    with pytest.raises(OptionError, match="all of one size"):
        write_video(tmp_path / "none.avi", [])


@pytest.mark.skipif(not REAL.is_dir(), reason="shared/data/videos is not here")
def test_real_files() -> None:
    """Numbered frames of an H.265 file, and a damaged file."""
    clip = read_video(REAL / "torchcodec_h265_video.mp4", 5)
    assert clip.indices == [1, 3, 5, 7, 9]
    np.testing.assert_allclose(clip.times, [0.1, 0.3, 0.5, 0.7, 0.9], atol=1e-3)
    with pytest.raises(OptionError, match="decord_corrupted"):
        read_video(REAL / "decord_corrupted.mp4", 8)
    guessed = read_video(REAL / "mmaction2_test.avi", 4)                 # its timestamps are nonsense
    assert not guessed.exact
    np.testing.assert_allclose(guessed.times, np.array(guessed.indices) / guessed.fps)

"""`python -m vlprune.evals.clips`: a line for every file, errors by name, and going on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("sklearn")

from vlprune.evals import clip_reading, clips, costs
from vlprune.evals.asking import Frames
from vlprune.evals.worker import ModelSpec, Plan, Worker
from vlprune.loading import ASSETS
from vlprune.video import write_video

if not (ASSETS / "model.safetensors").exists():
    pytest.skip("the embedded model is not there", allow_module_level=True)

PLAN = Plan(ModelSpec("embedded"), ("vidcom2",), ("1/4",), frames=Frames(2))


def with_sound(path: Path, codec: str = "mpeg4") -> Path:
    """Twelve frames and a second of silence."""
    import av

    with av.open(str(path), "w") as container:
        video, audio = container.add_stream(codec, rate=12), container.add_stream("aac", rate=16000)
        video.width, video.height, video.pix_fmt, audio.layout = 64, 48, "yuv420p", "mono"
        for number in range(12):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * number, np.uint8))))
        container.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A silent clip, one with sound, one cut off, one that is none, and no clip."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    whole = write_video(folder / "deep" / "grey.avi", [np.full((48, 64, 3), 20 * number, np.uint8) for number in range(6)], fps=8)
    with_sound(folder / "sound.mp4")
    (folder / "cut.avi").write_bytes(whole.read_bytes()[:300])
    (folder / "text.MP4").write_text("no video")
    (folder / "notes.txt").write_text("not even called one")
    return folder


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker(PLAN)


@pytest.fixture(scope="module")
def found(folder: Path, worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(costs, "ROUNDS", 1)
        return out, clips.measure(folder, out, PLAN, worker=worker, command="the command")


def test_a_line_for_every_file(found: tuple[Path, dict[str, Any]]) -> None:
    out, results = found
    rows = {row["id"]: row for row in results["clips"]}
    assert list(rows) == ["cut.avi", "deep/grey.avi", "sound.mp4", "text.MP4"]
    grey, sound = rows["deep/grey.avi"], rows["sound.mp4"]
    assert (grey["codec"], grey["frames"], grey["width"], grey["height"], grey["sound"], grey["taken"]) == ("mjpeg", 6, 64, 48, False, 2)
    assert (sound["codec"], sound["frames"], sound["sound"]) == ("mpeg4", 12, True)
    for row in (grey, sound):
        assert row["backend"] in ("decord", "pyav")
        assert row["per_second"] == pytest.approx(1e3 * row["taken"] / row["read_ms"])
        assert list(row["runs"]) == ["dense", "random@1/4"]              # this model takes pictures: a method for videos is left out
        assert row["runs"]["random@1/4"]["kept"] == row["runs"]["random@1/4"]["asked"] == 2 * 64
        assert row["runs"]["random@1/4"]["kv_bytes_stored"] < row["runs"]["dense"]["kv_bytes_stored"]
    for name in ("cut.avi", "text.MP4"):
        assert name in rows[name]["error"]
        assert "runs" not in rows[name]
    assert results["summary"] == {**results["summary"], "files": 4, "read": 2, "silent": 1 + (rows["cut.avi"].get("sound") is False)}
    table = (out / "results.md").read_text()
    assert table.count("**cannot be read**") == 2
    assert "| deep/grey.avi | mjpeg | no | 6 | 64x48 |" in table
    assert "- text.MP4: cannot read the video file" in table
    assert json.dumps(json.loads((out / "results.json").read_text())) == json.dumps(results)


def test_it_goes_on_where_it_was(found: tuple[Path, dict[str, Any]], folder: Path, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is not there is read; another plan is refused."""
    out, results = found
    lines = (out / "clips.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "config.json").write_bytes((out / "config.json").read_bytes())
    (tmp_path / "clips.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    read: list[str] = []
    real = clips.read
    monkeypatch.setattr(clips, "read", lambda file, frames: read.append(file.name) or real(file, frames))
    again = clips.measure(folder, tmp_path, PLAN, worker=worker, command="the command")
    assert read == ["text.MP4"]
    assert again["clips"][:3] == results["clips"][:3]
    with pytest.raises(clips.OptionError, match=r"question was .* and is 'what \?'"):
        clips.measure(folder, tmp_path, PLAN, worker=worker, question="what ?")


def test_memory_of_reading_is_measured() -> None:
    """Forty megabytes are seen, and forgotten."""
    clip_reading.start_peak()
    if clip_reading.peak() is None:
        pytest.skip("this system does not say how much memory a process had at most")
    pixels = np.ones(40_000_000, np.uint8)
    assert (clip_reading.peak() or 0) > 35_000_000
    del pixels
    clip_reading.start_peak()
    assert (clip_reading.peak() or 0) < 20_000_000


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2."""
    for arguments, words in ((["--methods", "vidcom"], "Did you mean 'vidcom2'"), (["--keep", "many"], "keep 'many'"), ([], "no videos there"),
                             (["--frames", "0"], "--frames 0: at least one")):  # fmt: skip
        assert clips.main(["--data", str(tmp_path), *arguments]) == 2
        assert words in capsys.readouterr().err

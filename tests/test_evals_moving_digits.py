"""Moving digit clips, and the script that trains STTS on them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vlprune
from vlprune.evals import digits
from vlprune.evals import moving_digits as M
from vlprune.loading import ASSETS
from vlprune.scorers.spatio_temporal import SpatioTemporalNet

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def clips() -> list[M.DigitClip]:
    return [M.clip(split, index) for split in digits.SPLITS for index in range(12)]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("train_stts", ROOT / "examples" / "train_stts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_same_arguments_same_pixels() -> None:
    one, two = M.clip("heldout", 3, seed=1), M.clip("heldout", 3, seed=1)
    assert np.array_equal(one.frames, two.frames)
    assert one.actors == two.actors
    assert not np.array_equal(one.frames, M.clip("heldout", 3, seed=2).frames)
    assert not np.array_equal(one.frames, M.clip("train", 3, seed=1).frames)


def test_answers_follow_from_the_pictures(clips: list[M.DigitClip]) -> None:
    """Digits are where they should be when they should be there, and each question has the answer that follows from that."""
    for clip in clips:
        asked = {question.kind: question.answer for question in M.questions(clip)}
        assert tuple(asked) == M.KINDS
        assert len({actor.digit for actor in clip.actors}) == len({actor.colour for actor in clip.actors}) == 4
        moving, first, last, still = clip.actors
        assert 1 <= first.frames[0] < last.frames[0] < M.FRAMES
        assert len(first.frames) == len(last.frames) == 1
        assert still.frames == moving.frames == tuple(range(M.FRAMES))
        (x0, y0, *_), (x1, y1, *_) = moving.boxes[0], moving.boxes[-1]
        right, down = x1 - x0, y1 - y0
        assert {"left": right < -40, "right": right > 40, "up": down < -40, "down": down > 40}[asked["way"]]
        for actor in clip.actors:
            for frame, (left, top, end, bottom) in zip(actor.frames, actor.boxes, strict=True):
                window = clip.frames[frame, top:bottom, left:end].astype(float)
                near = np.abs(window - np.array(digits.COLOURS[actor.colour])).max(axis=2) < 80
                assert near.mean() > 0.1, (actor, frame)


def test_what_appears_is_gone_in_other_frames(clips: list[M.DigitClip]) -> None:
    for clip in clips:
        actor = clip.actors[1]
        left, top, end, bottom = actor.boxes[0]
        colour = np.array(digits.COLOURS[actor.colour])
        share = [(np.abs(frame[top:bottom, left:end].astype(float) - colour).max(axis=2) < 80).mean() for frame in clip.frames]
        assert int(np.argmax(share)) == actor.frames[0]


def test_every_word_has_a_number(script: Any, clips: list[M.DigitClip]) -> None:
    words = script.Words()
    for clip in clips:
        for question in M.questions(clip):
            assert len(words.encode(question.answer)) == 1
            prompt = words.prompt(question.text)
            assert prompt.count(words.video) == 64 * M.FRAMES


@pytest.mark.skipif(not (ASSETS / "model.safetensors").exists(), reason="the tiny model has not been exported")
def test_the_script_trains_resumes_and_measures(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps a stage; a second start finds everything done; the file serves another process' model."""
    options = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--base-clips", "2", "--scorer-clips", "2", "--batch", "1"]
    script.main([*options, "--stage", "base"])
    script.main([*options, "--stage", "scorer"])
    script.main([*options, "--n", "4", "--keeps", "0.34"])
    printed = capsys.readouterr().out
    assert "base: done already" in printed
    assert "scorer: done already" in printed
    trained, untrained = (SpatioTemporalNet.load(tmp_path / "work" / f"{name}.safetensors") for name in ("scorer", "untrained"))
    assert trained.layer == script.LAYER
    assert all(not torch.equal(a, b) for a, b in zip(trained.mlp.parameters(), untrained.mlp.parameters(), strict=True))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    on_base = ["dense", "random", "uniform", "evs", "stts, untrained", "stts"]
    assert [row["method"] for row in results["rows"]] == [*on_base, "dense", "random", "stts", "dense", "random", "evs"]
    assert [row["model"] for row in results["rows"]] == ["base"] * 6 + ["scorer"] * 3 + ["rival"] * 3
    curve = results["stages"]["scorer"]["curve"]
    assert [entry["step"] for entry in curve] == [1, 2]
    assert all(entry["task_loss"] > 0 and entry["temporal_loss"] > 0 for entry in curve)
    assert (tmp_path / "out" / "curve.png").stat().st_size > 1000
    model = script.load(tmp_path / "work", "scorer").eval()
    clip, question = M.heldout_questions(1)[0]
    ids = torch.tensor([script.Words().prompt(question.text)])
    with torch.no_grad(), vlprune.apply(model, "stts", keep=1 / 3, weights=tmp_path / "work" / "scorer.safetensors") as handle:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values_videos=script.pixels(clip)[None])
    assert [record.visual_kept for record in handle.report().points] == [128, 128]


def test_an_interrupted_stage_goes_on(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the third of six steps, it starts again behind the second, the last checkpoint."""
    words, folder = script.Words(), tmp_path / "run"
    seen: list[int] = []
    original = script.Clips.__getitem__

    def watched(self: Any, index: int) -> Any:
        seen.append(index)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return original(self, index)

    monkeypatch.setattr(script.Clips, "__getitem__", watched)
    data = script.Clips(words, 0, 6)
    with pytest.raises(KeyboardInterrupt):
        script.train(script.Answers(script.video_model(words).train()), data, folder, batch=1, lr=1e-3, warmup=1)
    done = int(sorted(folder.glob("checkpoint-*"))[-1].name.partition("-")[2])
    assert done >= 1
    seen.append(-1)
    curve = script.train(script.Answers(script.video_model(words).train()), data, folder, batch=1, lr=1e-3, warmup=1)
    assert [entry["step"] for entry in curve] == [1, 2, 3, 4, 5, 6]
    assert len(seen) - seen.index(-1) - 1 == 6 - done                    # clips of the steps before are not drawn again

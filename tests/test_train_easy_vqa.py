"""``examples/train_easy_vqa.py`` on a few pictures: what it writes is a model that knows the new words."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from vlprune.loading import ASSETS, load_model

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ASSETS / "model.safetensors").exists(), reason="the embedded model has not been exported")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train_easy_vqa.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "examples" / "train_easy_vqa.py"), run_name="__main__")


def data(folder: Path) -> Path:
    folder.mkdir()
    (folder / "answers.txt").write_text("teal\ngray\nyes\nno\n")
    for split in ("train", "test"):
        (folder / split / "images").mkdir(parents=True)
        asked = []
        for number, colour in enumerate(((0, 128, 128), (128, 128, 128))):
            Image.new("RGB", (64, 64), colour).save(folder / split / "images" / f"{number}.png")
            asked += [["what color is the shape?", "teal" if number == 0 else "gray", number], ["is there a teal shape?", "no" if number else "yes", number]]
        (folder / split / "questions.json").write_text(json.dumps(asked))
    return folder


def test_a_model_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--data", data(tmp_path / "data"), "--out", tmp_path / "model", "--batch", 2]
    run(monkeypatch, *given, "--steps", 4, "--lr", 3e-3)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["steps"] == 4
    loaded = load_model(str(tmp_path / "model"))
    assert loaded.processor.tokenizer.convert_tokens_to_ids("teal") >= 65
    inputs = loaded.inputs("what color is the shape?", [Image.new("RGB", (64, 64), (0, 128, 128))])
    assert loaded.processor.tokenizer.unk_token_id not in inputs["input_ids"]
    said = loaded.model.generate(**inputs, max_new_tokens=1)[0, inputs["input_ids"].shape[1] :]
    assert said.tolist()[0] < len(loaded.processor.tokenizer)
    assert json.loads((tmp_path / "model" / "SETTINGS.json").read_text())["steps"] == 4


def test_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--data", tmp_path)
    assert "there is no train/questions.json" in capsys.readouterr().err

"""The examples and the README run, and the README's tables are up to date."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vlprune
from vlprune import loading, tables

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = {
    "quickstart": ([], ["visual tokens before, 64 after", "prefill FLOPs", "what stayed"]),
    "video_question": ([], ["16 frames; read [2, 6, 10, 14] at ['0.25 s', '0.75 s', '1.25 s', '1.75 s']", "answer 4:", "1024", "256"]),
    "clip_zero_shot": ([], ["vision:3", "64", "32"]),
    "write_a_scorer": ([], ["contrast", "llm:2"]),
    "pipeline": ([], ["dense:", "pruned:", "before_llm: 64 of 256 visual tokens kept"]),
    "compare_on_my_clips": (["--no-costs", "--methods", "random"], ["My clips", "8 of 8 samples", "random@1/4", "results.md", "index.html"]),
    "compare_methods": (["2", "0.25"], [*vlprune.list_methods()[:3], "hiprune", "256 -> 64"]),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs as a script in an empty folder and prints what it promises."""
    arguments, wanted = EXAMPLES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    before = vlprune.list_methods()
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for part in wanted:
        assert part in printed
    assert vlprune.list_methods() == before
    for path in re.findall(r"what stayed: (\S+)", printed):
        with Image.open(path) as picture:
            assert picture.width > 200


def test_every_example_is_tested() -> None:
    """The training scripts have tests of their own."""
    training = {"train_tiny_vlm", "train_tiny_video_vlm", "train_tiny_recall", "train_easy_vqa", "train_stts", "tokenskip_lora"}
    training |= {"train_videollm_mod", "train_swiftkv", "train_ftp_router"}
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} - training == set(EXAMPLES)


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its Python block, as it stands, with a picture called photo.jpg; on a stand-in where the trained weights are missing."""
    if not (loading.ASSETS / "model.safetensors").exists():
        stand_in = loading._stand_in()
        stand_in.model.save_pretrained(tmp_path / "model")
        stand_in.processor.save_pretrained(tmp_path / "model")
        monkeypatch.setattr(loading, "ASSETS", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)).save("photo.jpg")
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    exec(compile(block[1], "README.md", "exec"), {})
    assert "before_llm 256 -> 64" in capsys.readouterr().out


def test_the_readme_is_fresh() -> None:
    """`python -m vlprune.tables README.md` would change nothing."""
    assert tables.main([str(ROOT / "README.md"), "--check"]) == 0, "run: python -m vlprune.tables README.md"


def test_a_stale_table_is_found(tmp_path: Path) -> None:
    """And made anew."""
    stale = tmp_path / "README.md"
    stale.write_text((ROOT / "README.md").read_text().replace("| `hiprune` |", "| `hipruned` |"))
    assert tables.main([str(stale), "--check"]) == 1
    assert tables.main([str(stale)]) == 0
    assert stale.read_text() == (ROOT / "README.md").read_text()


def test_files_that_the_readme_names_exist() -> None:
    """Links and pictures in README and CONTRIBUTING; the cover is small."""
    for document in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text()):
            if not target.startswith("http"):
                assert (ROOT / target).exists(), f"{document} links to {target}"
    assert (ROOT / "docs" / "kept.png").stat().st_size < 300_000


def test_ones_own_clips_with_choices_times_and_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Open questions and choices by letter or by text; a clip that is not there is its question's failure."""
    from vlprune.video import write_video

    clips = tmp_path / "clips"
    write_video(clips / "grey.avi", [np.full((128, 128, 3), 20 * number, np.uint8) for number in range(8)], fps=8)
    rows = ["which digit moves ?,1|2,,,", "which digit moves ?,B,one|two,0,0.5", "which digit moves ?,two,one|two,,"]
    lines = ["file,question,answer,choices,start,end", *(f"grey.avi,{row}" for row in rows), "gone.avi,what ?,1,,,"]
    (clips / "questions.csv").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    arguments = ["--clips", str(clips), "--methods", "random", "--no-costs", "--out", "out"]
    monkeypatch.setattr(sys, "argv", ["compare_on_my_clips.py", *arguments])
    runpy.run_path(str(ROOT / "examples" / "compare_on_my_clips.py"), run_name="__main__")
    found = json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"]["my-clips"]
    assert (found["samples"], found["counted"]) == (4, 3)
    assert "gone.avi" in next(iter(found["failed"].values()))
    assert set(found["rows"][0]["kinds"]) == {"open", "choices"}
    records = [json.loads(line) for line in (tmp_path / "out" / "answers" / "my-clips.jsonl").read_text().splitlines()]
    assert len({record["id"] for record in records}) == 4
    assert (tmp_path / "out" / "index.html").exists()
    assert "knows questions about moving digits only" in capsys.readouterr().out

    (clips / "questions.csv").write_text("\n".join([lines[0], "grey.avi,what ?,C,one|two,,"]))
    with pytest.raises(vlprune.VlpruneError, match="row 1: the right answer 'C' is none of the choices 'one', 'two'"):
        runpy.run_path(str(ROOT / "examples" / "compare_on_my_clips.py"), run_name="__main__")

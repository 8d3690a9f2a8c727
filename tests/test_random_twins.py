"""Random twins keep as many tokens as their methods, at the same places; the quality script on a few texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vlprune
from tests.tiny_text import text_families
from vlprune.evals import text_quality
from vlprune.evals.random_twins import random_beside, twin_of
from vlprune.fitting import fitting


def kept(model: Any, inputs: dict[str, torch.Tensor], method: vlprune.PruningMethod) -> list[list[int]]:
    """Which tokens stay at each place, row by row."""
    with vlprune.apply(model, method) as handle, torch.no_grad():
        model(**inputs)
        trace: Any = handle.trace
        return [[int(place) for place in row] for stage in (*trace.points, *trace.bypasses) for row in stage.kept]


@pytest.mark.parametrize("name", ["ltp", "spts", "ftp", "random_text", "spatten"])
def test_a_twin_keeps_as_many_others(name: str) -> None:
    """Of two rows of different lengths; an adaptive method's counts, too, which differ between rows and layers."""
    tiny = text_families()["llama"]
    model, inputs = tiny.build(), tiny.prompt([[40], [29]])
    one = fitting(model, [name], 0.4, "text")[0][0]
    method, twin = twin_of(model, one, 0.4)
    ours = kept(model, inputs, method)
    chance = twin()
    assert chance is not None
    others = kept(model, inputs, chance)
    assert [len(row) for row in ours] == [len(row) for row in others]
    assert ours == kept(model, inputs, one.method)                       # counting changes nothing
    assert (ours == others) == (name == "random_text")
    if name == "ltp":
        assert len({len(row) for row in ours}) > 2
        assert random_beside(model, one, 0.4) is None


def test_what_chooses_no_tokens_has_no_twin() -> None:
    model = text_families()["llama"].build()
    for name in ("unified_layer_skip", "ffn_skip", "swiftkv"):
        for one in fitting(model, [name], 0.5, "text")[0]:
            assert twin_of(model, one, 0.5)[1]() is None


def test_the_quality_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stories of a tiny model: rows, table and plot; a second call measures nothing anew."""
    tiny = text_families()["llama"]
    tiny.build().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(text_quality, "CONTEXT", 24)
    monkeypatch.setattr(text_quality, "PROMPT", 12)
    monkeypatch.setattr(text_quality, "ASSETS", tmp_path / "none")
    given = ["--stories", str(tmp_path / "model"), "--count", "2", "--keep", "0.5", "--methods", "ltp,recent,fasa,ffn_skip", "--out", str(tmp_path / "out")]
    text_quality.main(given)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["method"] for row in found["rows"]] == ["ltp", "recent", "fasa", "ffn_skip"]
    assert [row["random"] is None for row in found["rows"]] == [False, False, False, True]
    for row in found["rows"][:2]:
        assert row["numbers"]["kv share"] == row["random"]["kv share"]
        assert row["numbers"]["loss"] != row["random"]["loss"]
    assert "Behind the same with random choices" in (tmp_path / "out" / "results.md").read_text()
    assert (tmp_path / "out" / "quality.png").stat().st_size > 10_000
    monkeypatch.setattr(text_quality, "follow", lambda *args: (_ for _ in ()).throw(AssertionError("measured again")) if args[2] else OLD(*args))
    text_quality.main(given)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == found["rows"]


OLD = text_quality.follow

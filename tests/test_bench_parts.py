"""The table of the parts: its clocks count what they should, bars are told, what does not fit is listed."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vlprune import bench_parts
from vlprune.bench import SHAPES, Rig
from vlprune.cli import app
from vlprune.fitting import fit, fitting
from vlprune.protocols import ScoreInputs


@pytest.fixture(scope="module")
def rig() -> Rig:
    return Rig(SHAPES["tiny"], video=False, batch=1, device="cpu", decode_steps=0)


class Slow:
    """Another part, made to take its time."""

    def __init__(self, part: object, seconds: float) -> None:
        self.part, self.seconds = part, seconds

    def __call__(self, *arguments: object) -> object:
        time.sleep(self.seconds)
        return self.part(*arguments)  # type: ignore[operator]

    def __getattr__(self, name: str) -> object:
        return getattr(self.part, name)


def test_clocks_count_each_part(rig: Rig) -> None:
    """What a scorer takes is the scorer's, what a selector takes the selector's, and neither is a signal."""
    method = fit(rig.model, "hiprune", 1 / 9).method
    stage = replace(method.stages[0], scorer=Slow(method.stages[0].scorer, 0.05), selector=Slow(method.stages[0].selector, 0.1))  # type: ignore[arg-type]
    spent = bench_parts.once(rig, replace(method, stages=(stage,)))
    assert 0.05 <= spent["scorer"] < 0.1
    assert 0.1 <= spent["selector"] < 0.2
    assert spent["calls"] == 2
    assert spent["scorer"] + spent["selector"] <= spent["all"] < 0.3


def test_merging_is_counted(rig: Rig) -> None:
    method = fit(rig.model, "visionzip", 1 / 9).method
    stage = replace(method.stages[0], reducer=Slow(method.stages[0].reducer, 0.05))  # type: ignore[arg-type]
    spent = bench_parts.once(rig, replace(method, stages=(stage,)))
    assert spent["reducer"] >= 0.05
    assert spent["calls"] == 3


def test_the_model_is_itself_again(rig: Rig) -> None:
    """The prefill is broken off behind the last part, and nothing is left of it."""
    with torch.no_grad():
        before = rig.model(**rig.inputs, logits_to_keep=1).logits
        bench_parts.once(rig, fit(rig.model, "fastv", 0.3).method)
        assert torch.equal(rig.model(**rig.inputs, logits_to_keep=1).logits, before)


def test_every_stage_is_reached(rig: Rig) -> None:
    """The end comes behind the last of several stages, not before."""
    method = fit(rig.model, "pyramiddrop", 1 / 9).method
    assert bench_parts.once(rig, method)["calls"] == 2 * len(method.stages)


def test_greedy_parts_are_known() -> None:
    from vlprune.selectors import TopK
    from vlprune.selectors.diversity import Diversity

    assert bench_parts.is_greedy(Diversity())
    assert not bench_parts.is_greedy(TopK())


def test_bars() -> None:
    row = bench_parts.MethodRow("a", "llm:2", 1, 1, 1, 0, 5, 100, 0.03, 0.03)
    assert not row.missed
    assert replace(row, share=0.031).missed
    greedy = bench_parts.GreedyRow("max-sum", 10, 4, 6, anew_s=4.0, ours_s=1.0, half_s=0.5, same_picks=True)
    assert not greedy.missed
    assert replace(greedy, anew_s=3.9).missed
    assert replace(greedy, half_s=0.4).missed
    assert replace(greedy, same_picks=False).missed
    assert bench_parts.ColumnRow(10, 1.0, 1.1, 0, 0).missed


def test_what_does_not_fit_is_said(rig: Rig) -> None:
    """Methods for videos on an image, methods without their weights unless random ones will do; those of training act here."""
    fits, left_out = fitting(rig.model, ["random", "evs", "dynamicvit", "aclip"], 0.3)
    assert [one.name for one in fits] == ["random", "aclip"]
    assert fits[1].options == "when='always'"
    assert left_out["evs"] == "works on videos only"
    assert "trained predictors" in left_out["dynamicvit"]
    deeper = Rig(replace(SHAPES["tiny"], tower=12, tower_width=16, visual=16, decoder=2, width=32), video=False, batch=1, device="cpu", decode_steps=0)
    assert fit(deeper.model, "dynamicvit", 0.3, untrained=True).options == "predictor=untrained"


def test_command(tmp_path: Path) -> None:
    """All three tables, on the screen and in both files."""
    arguments = ["bench", "--parts", "--shape", "tiny", "--rounds", "1", "--methods", "todre,evs", "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "new" / "p.json"), "--markdown", str(tmp_path / "p.md")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "new" / "p.json").read_text())
    assert [row["method"] for row in found["methods"]] == ["random", "todre", "evs"]
    todre = found["methods"][1]
    parts = sum(todre[f"{kind}_ms"] for kind in bench_parts.KINDS)
    assert todre["share"] == pytest.approx(parts / todre["dense_ms"])
    assert todre["bar"] == bench_parts.GREEDY_BAR
    assert [row["rule"] for row in found["greedy"]] == list(bench_parts.RULES)
    assert all(row["same_picks"] for row in found["greedy"])
    assert [row["num_tokens"] for row in found["columns"]] == list(bench_parts.TINY_COLUMNS)
    text = (tmp_path / "p.md").read_text()
    assert sum(line.startswith("| ---") for line in text.splitlines()) == 3
    assert "Measured on" in text
    assert "max-min" in result.output


def test_column_means_hold_less_than_the_map() -> None:
    """Memory of the chunked kernel grows with N, eager attention's with N squared."""
    shape = replace(SHAPES["tiny"], tower_width=64, tower_heads=4)
    small, large = bench_parts.column_rows(shape, (600, 1800), 1, "cpu", lambda text: None)
    assert large.eager_bytes > 8 * small.eager_bytes
    assert large.ours_bytes < 3.2 * small.ours_bytes


def test_inputs_are_as_the_method_sees_them() -> None:
    """A clocked part is called with what it was called with, and its attributes are its own."""
    from vlprune.selectors import TopK

    seen: list[float] = []
    part = bench_parts.Clocked(TopK(), time.perf_counter, seen.append)
    scores = torch.tensor([[1.0, 3.0, 2.0]])
    assert part(scores, ScoreInputs(scores[..., None], 2)).keep_indices.tolist() == [[1, 2]]
    assert part.needs == ()
    assert len(seen) == 1

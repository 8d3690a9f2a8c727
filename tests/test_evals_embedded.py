"""The accuracy table on a handful of questions."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import vlprune

pytest.importorskip("sklearn")
if not (Path(vlprune.__file__).parent / "assets" / "tiny_vlm" / "model.safetensors").exists():
    pytest.skip("the embedded model is not there", allow_module_level=True)

from vlprune.evals import embedded


def test_rows_of_a_small_table() -> None:
    """Dense and random first; counts, gains and losses fit together."""
    left_out: dict[str, str] = {}
    rows = embedded.measure(24, [Fraction(1, 3)], ["hiprune", "evs"], progress=lambda row: None, left_out=left_out)
    assert [row["method"] for row in rows] == ["dense", "random", "hiprune"]
    assert [row["kept_last"] for row in rows] == [256, 85, 85]
    assert rows[0]["accuracy"] > 0.8
    assert rows[0]["agreement"] == 1
    assert all(row["accuracy"] == pytest.approx(rows[0]["accuracy"] + (row["gained"] - row["lost"]) / 24) for row in rows)
    assert all(row["accuracy"] == pytest.approx(sum(map(int, row["right"])) / row["draws"] / 24) for row in rows)
    assert rows[2]["flops_share"] < 0.7
    assert left_out == {"evs": "works on videos only"}
    table = embedded.markdown(rows, left_out)
    assert "- evs left out: works on videos only" in table
    ahead, error = embedded.ahead(rows[2], rows[1])
    assert f"| {100 * ahead:+.1f} ± {100 * error:.1f} |" in table


def test_every_method_has_a_random_of_its_own() -> None:
    """At the same points with the same counts; methods that share them share it."""
    from vlprune.loading import load_embedded

    names = ["fastv", "pyramiddrop", "todre", "hiprune", "skipvit"]
    plans, left_out = embedded.make_plans(load_embedded().model, [Fraction(1, 3)], names, 2)
    assert not left_out
    chance = [settings["places"] for settings, _ in plans if settings["method"] == "random"]
    assert [place[0] for place in chance[0]] == ["before_llm"]
    assert len(chance) == len({json.dumps(place) for place in chance}) == 4       # hiprune and todre have the first one
    for settings, runs in plans:
        assert settings["places"] in chance
        if settings["method"] == "random":
            assert [run.stages[0].scorer.seed for run in runs] == [0, 1]  # type: ignore[attr-defined]
            assert [stage.point.label for stage in runs[0].stages][: len(settings["places"])] == [place[0] for place in settings["places"]]
    assert next(settings for settings, _ in plans if settings["method"] == "skipvit")["places"][0][2] is not None


def test_the_default_is_every_method_that_fits() -> None:
    from vlprune.loading import load_embedded

    plans, left_out = embedded.make_plans(load_embedded().model, [Fraction(1, 3), Fraction(1, 9)], vlprune.list_methods("visual"), 1)
    there = {settings["method"] for settings, _ in plans}
    assert there | set(left_out) | {"dense"} == set(vlprune.list_methods("visual"))
    assert not there & set(left_out)
    assert all(left_out.values())


def test_a_second_call_goes_on_where_the_first_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are there are not measured again, unless the settings changed."""
    arguments = ["--n", "6", "--keep", "1/3", "--methods", "hiprune,fastv,evs", "--draws", "1", "--out", str(tmp_path)]
    measured: list[str] = []
    original = embedded.numbers

    def numbers(loaded: Any, pairs: Any, truth: Any, dense: Any, runs: Any) -> dict[str, Any]:
        measured.append(runs[0].name)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return original(loaded, pairs, truth, dense, runs)

    monkeypatch.setattr(embedded, "numbers", numbers)
    with pytest.raises(KeyboardInterrupt):
        embedded.main(arguments)
    assert [row["method"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]] == ["dense", "random", "random"]
    embedded.main(arguments)
    assert measured == ["dense", "random", "random", "hiprune", "hiprune", "fastv"]
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in found["rows"]] == ["dense", "random", "random", "hiprune", "fastv"]
    assert found["left_out"] == {"evs": "works on videos only"}
    page = (tmp_path / "results.md").read_text()
    assert page.startswith("`python -m vlprune.evals.embedded --n 6")
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
    embedded.main(arguments)
    assert len(measured) == 6
    embedded.main([argument if argument != "6" else "7" for argument in arguments])
    assert len(measured) == 11

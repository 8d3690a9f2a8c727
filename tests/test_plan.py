"""Plan files: written and read without loss, put on the right model only, and one clear error for everything else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vlprune
from tests.tiny import families
from vlprune.errors import OptionError, UnknownNameError
from vlprune.plan import Plan, load_plan, save_plan

MODEL = {"class": "LlavaForConditionalGeneration", "decoder_layers": 4, "vision_layers": 4}
PLAN = Plan("vflowopt", (0.5, 0.4, 0.25), MODEL, {"t": 0.75, "cell": 2.5, "pixel_range": (-1.0, 1.0)}, {"score": 0.1 + 0.2})


@pytest.fixture(scope="module")
def model() -> Any:
    return families()["llava"].build()


def test_round_trip(tmp_path: Path) -> None:
    """To the last bit, in a folder that is made, without a left-over beside it."""
    path = save_plan(PLAN, tmp_path / "new" / "plan.json")
    assert load_plan(path) == replace(PLAN, version=vlprune.__version__)
    assert [entry.name for entry in path.parent.iterdir()] == ["plan.json"]
    for keep in (3, 0.25, 1.0, "25%", (0.5, 0.25)):
        again = load_plan(save_plan(replace(PLAN, keep=keep), path)).keep
        assert again == keep
        assert type(again) is type(keep)


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = save_plan(PLAN, tmp_path / "plan.json")
    before = path.read_text()
    for wrong in ({"t": torch.ones(1)}, {"t": float("nan")}):
        with pytest.raises(OptionError, match="cannot be written"):
            save_plan(replace(PLAN, options=wrong), path)
    with pytest.raises(OptionError, match="lacks class, decoder_layers, vision_layers"):
        save_plan(replace(PLAN, model={}), path)
    assert path.read_text() == before


def test_apply_does_what_the_numbers_by_hand_do(model: Any, tmp_path: Path) -> None:
    """From a file, as text and as a path, and from a plan in memory; ``positions`` stays the user's."""
    path = save_plan(PLAN, tmp_path / "plan.json")
    inputs = families()["llava"].prompt([[3, "image", 4]])
    with torch.no_grad():
        with vlprune.apply(model, "vflowopt", keep=PLAN.keep, **PLAN.options) as handle:
            wanted, kept = model(**inputs).logits, [record.visual_kept for record in handle.report().points]
        assert kept == [18, 14, 9]
        for plan in (path, str(path), PLAN, load_plan(path)):
            with vlprune.apply(model, plan=plan) as handle:
                assert torch.equal(model(**inputs).logits, wanted)
                assert handle.keep == PLAN.keep
        with vlprune.apply(model, plan=path, positions="renumber"):
            assert not torch.equal(model(**inputs).logits, wanted)


@pytest.mark.parametrize("given", [{"method": "vflowopt"}, {"keep": 0.5}, {"t": 2.0}])
def test_nothing_beside_a_plan(model: Any, given: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"leave out {next(iter(given))}, or leave out plan"):
        vlprune.apply(model, plan=PLAN, **given)


def test_another_model(model: Any) -> None:
    """Class and depths must fit; the error says how to go on. Nothing is applied."""
    with pytest.raises(OptionError, match=r"another model: class 'LlavaForConditionalGeneration' \(here 'LlavaNextForConditionalGeneration'\)"):
        vlprune.apply(families()["llava_next"].build(), plan=PLAN)
    deeper = replace(PLAN, model={**MODEL, "decoder_layers": 32})
    with pytest.raises(OptionError, match=r"decoder_layers 32 \(here 4\).*vlprune tune --method vflowopt.*keep=\(0.5, 0.4, 0.25\), t=0.75"):
        vlprune.apply(model, plan=deeper)
    vlprune.apply(model, "dense").remove()


def test_wrong_names_in_a_plan(model: Any) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'vflowopt'"):
        vlprune.apply(model, plan=replace(PLAN, method="vflowop"))
    with pytest.raises(UnknownNameError, match="option of vflowopt 'cel'"):
        vlprune.apply(model, plan=replace(PLAN, options={"cel": 2.0}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kepp": 1}, "unknown key.*'kepp'.*Did you mean 'keep'"),
        ({"keep": None}, "'keep' a number"),
        ({"keep": True}, "'keep' a number"),
        ({"keep": []}, "'keep' a number"),
        ({"keep": [0.5, "a"]}, "'keep' a number"),
        ({"method": 3}, "'method' is a name"),
        ({"options": []}, "'options' must be a JSON object"),
        ({"model": "llava"}, "'model' must be a JSON object"),
        ({"model": {"class": "A", "decoder_layers": 3}}, "'model' lacks vision_layers"),
        ({"model": {**MODEL, "layers": 3}}, "unknown key.*'layers'"),
    ],
)
def test_damaged_entries(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = save_plan(PLAN, tmp_path / "plan.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises((OptionError, UnknownNameError), match=says):
        load_plan(path)


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read: No such file"):
        load_plan(tmp_path / "nothing.json")
    with pytest.raises(OptionError, match="cannot be read: Is a directory"):
        load_plan(tmp_path)
    for content, says in ((b"{", "no plan file"), (b"\xff\xfe\x00", "no plan file"), (b"[1]", "must be a JSON object"), (b"{}", "lacks vlprune, method, keep")):
        (tmp_path / "plan.json").write_bytes(content)
        with pytest.raises(OptionError, match=says):
            load_plan(tmp_path / "plan.json")

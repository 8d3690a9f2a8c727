"""``vlprune calibrate``: what it measures, that it goes on where it was stopped, and what it says to mistakes."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import vlprune
from tests.oracle import decoder_of, snapshot
from tests.tiny_text import text_families
from vlprune.cli import app
from vlprune.errors import OptionError, UnknownNameError
from vlprune.skipping import CALIBRATIONS
from vlprune.skipping.calibrate import calibrate, calibration_of, option_of, parse_options
from vlprune.skipping.ffn_probe import load_probes
from vlprune.skipping.running_sums import RunningSums
from vlprune.skipping.saturation import load_saturation, saturation
from vlprune.skipping.texts import TextModel, read_texts

TINY = text_families()["llama"]


@pytest.fixture(scope="module")
def model() -> Any:
    return TINY.build()


def texts(count: int = 20) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": TINY.prompt([[12 + number % 3]], seed=number)["input_ids"]} for number in range(count)]


class Stop(Exception):
    """Somebody pressed a key."""


def test_sums_go_on_where_they_were_stopped(tmp_path: Path) -> None:
    """Killed in the middle, the same call adds up the same; other texts and other setups are refused."""
    path, setup = tmp_path / "sums.safetensors", {"what": "lengths"}

    def add(sums: RunningSums, calls: Any, stop: int | None = None) -> int:
        seen = 0
        for number, call in enumerate(sums.over(calls)):
            if number == stop:
                raise Stop
            sums.add("length", float(call["input_ids"].shape[1]))
            seen += 1
        return seen

    with pytest.raises(Stop):
        add(RunningSums(path, setup, every=4), texts(), stop=10)
    again = RunningSums(path, setup, every=4)
    assert again.done == 8
    assert add(again, iter(texts())) == 12, "eight were in the file"
    assert float(again.tensors["length"]) == sum(call["input_ids"].shape[1] for call in texts())
    for calls, about, words in ((texts()[::-1], setup, "other texts"), (texts(3), setup, "these are 3"), (texts(), {"what": "x"}, "something else")):
        with pytest.raises(OptionError, match=words):
            add(RunningSums(path, about), calls)
    assert RunningSums(path, {"what": "x"}, resume=False).done == 0
    path.write_bytes(b"torn")
    with pytest.raises(OptionError, match="cannot be read"):
        RunningSums(path, setup)


@pytest.mark.parametrize("method", ["spts", "ffn_skip"])
def test_a_stopped_calibration_ends_as_one_that_was_not(method: str, model: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"width": 16, "rank": 4} if method == "spts" else {}
    state = snapshot(model)

    def stop(done: int, total: int, what: str) -> None:
        assert (total, what) == (20, "texts")
        if done == 13:
            raise Stop

    with pytest.raises(Stop):
        calibrate(method, model, texts(), tmp_path / "a", progress=stop, **options)
    assert snapshot(model) == state, "hooks come off"
    told: list[tuple[int, int, str]] = []
    calibrate(method, model, texts(), tmp_path / "a", progress=lambda *news: told.append(news), **options)
    assert told[0] == (8, 20, "texts")
    calibrate(method, model, texts(), tmp_path / "b", **options)
    names = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "sums.safetensors" not in names, "what was added up is gone when it is used"
    for name in names:
        one, other = (load_file(tmp_path / folder / name) for folder in "ab")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    silent: list[Any] = []
    calibrate(method, model, texts(), tmp_path / "a", progress=lambda *news: silent.append(news), **options)
    assert silent == [], "a finished one is left as it is"
    named = option_of(method)
    assert named is not None
    prompt = TINY.prompt([[20]])
    with torch.no_grad(), vlprune.apply(model, method, **{named: tmp_path / "a"}):
        assert bool(torch.isfinite(model(**prompt).logits).all())


def test_a_full_probe_is_the_mlp_and_a_small_one_is_not(model: Any, tmp_path: Path) -> None:
    """At full width and rank the true norms; at rank 2 others, whose ranking is still near."""
    calibrate("spts", model, texts(), tmp_path / "full", width=10_000, rank=10_000)
    calibrate("spts", model, texts(), tmp_path / "small", width=24, rank=2)
    states = torch.randn(1, 8, 32)
    for number, layer in enumerate(decoder_of(model).layers):  # type: ignore[arg-type, var-annotated]
        with torch.no_grad():
            true = layer.mlp(states).norm(dim=-1)
        full, small = (load_probes(tmp_path / name, 4)[number](states).norm(dim=-1) for name in ("full", "small"))
        torch.testing.assert_close(full, true, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(small, true, rtol=1e-2)


def test_cold_regions_come_from_the_measurement(model: Any, tmp_path: Path) -> None:
    """What lies outside the longest saturated run always runs its MLP."""
    path = calibrate("ffn_skip", model, texts(), tmp_path)
    cosines = load_saturation(path, 4)
    assert cosines == pytest.approx(saturation(model, list(decoder_of(model).layers), texts()), abs=1e-6)  # type: ignore[arg-type]
    facts = vlprune.method.ModelFacts(decoder_layers=4)
    tau = sorted(cosines)[-1]
    best = cosines.index(tau)
    built = vlprune.get_method("ffn_skip").build(facts, 0.5, tau=tau - 1e-6, saturation=path)
    assert {bypass.layer for bypass in built.bypasses} == ({best} if best else set())
    with pytest.raises(OptionError, match="holds 4 layers, and this model has 5"):
        load_saturation(path, 5)
    with pytest.raises(OptionError, match="give one of them"):
        vlprune.get_method("ffn_skip").build(facts, 0.5, cold=(1, 1), saturation=path)
    with pytest.raises(OptionError, match="cannot be read"):
        load_saturation(tmp_path / "nothing", 4)


@pytest.mark.parametrize("method", sorted(CALIBRATIONS))
def test_every_calibration_is_there_and_names_its_option(method: str) -> None:
    function, named = calibration_of(method), option_of(method)
    assert callable(function)
    assert {"model", "inputs", "out", "progress", "resume"} <= set(inspect.signature(function).parameters)
    assert named in inspect.signature(vlprune.get_method(method).build).parameters


def test_mistakes_in_the_function(model: Any, tmp_path: Path) -> None:
    for method, options, words in (
        ("recent", {}, "recent is not calibrated; these are: "), ("spts", {"rank": 0}, "rank=0"), ("spts", {"share": 2}, "share=2"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=words):
            calibrate(method, model, texts(2), tmp_path, **options)
    with pytest.raises(UnknownNameError, match="ranks"):
        calibrate("spts", model, texts(2), tmp_path, ranks=3)
    with pytest.raises(OptionError, match="no texts"):
        calibrate("spts", model, [], tmp_path, rank=2, width=4)
    with pytest.raises(OptionError, match=r"model\.eval\(\)"):
        calibrate("spts", TINY.build().train(), texts(2), tmp_path)
    assert parse_options(["rank=3", "a=[1,2]", "b=word"]) == {"rank": 3, "a": [1, 2], "b": "word"}
    with pytest.raises(OptionError, match="NAME=VALUE"):
        parse_options(["rank"])


def test_texts_from_files(model: Any, tmp_path: Path) -> None:
    """Pieces of a text file, lines of a list, spread evenly and cut; each mistake names its line."""

    class Words:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1 + len(word) for word in text.split()]}

    loaded = TextModel(model, Words(), "tiny")
    plain = tmp_path / "story.txt"
    plain.write_text("a bb ccc dddd eeeee f gg")
    assert [call["input_ids"].tolist() for call in read_texts(plain, loaded, length=3)] == [[[2, 3, 4]], [[5, 6, 2]]], "one token alone is no text"
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"input_ids": list(range(1, 3 + number))}) + "\n" for number in range(6)))
    assert [call["input_ids"].shape[1] for call in read_texts(lines, loaded, most=3, length=5)] == [2, 4, 5]
    nothing = TextModel(model, None, "tiny")
    wrong = (("{", "lines.jsonl:1 is no JSON"), ('{"image": 1}', '"text" or "input_ids"'), ('{"input_ids": [1, 5000]}', "0 to 127"), ("", "no text"))
    for content, words in wrong:
        lines.write_text(content)
        with pytest.raises(OptionError, match=words):
            read_texts(lines, loaded)
    with pytest.raises(OptionError, match="no tokenizer"):
        read_texts(plain, nothing)


def test_the_command(tmp_path: Path) -> None:
    """On a folder with a model, from the first text to a prompt that is pruned with what was written; each mistake is one line."""
    folder, samples = tmp_path / "model", tmp_path / "texts.jsonl"
    TINY.build().save_pretrained(folder)  # type: ignore[operator]
    samples.write_text("".join(json.dumps({"input_ids": call["input_ids"][0].tolist()}) + "\n" for call in texts(5)))

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])

    good = ("--method", "spts", "--model", folder, "--samples", samples, "--out", tmp_path / "probes", "--option", "rank=4", "--option", "width=16")
    result = run(*good)
    assert result.exit_code == 0, result.output
    assert "spts on" in result.output
    assert "probe=" in result.output
    assert len(list((tmp_path / "probes").glob("layer_*.safetensors"))) == 4
    assert run(*good).exit_code == 0, "once more: nothing to do"
    for arguments, words in (
        (("--method", "spts", "--model", folder), "give --samples"),
        (("--method", "spts", "--model", folder, "--samples", tmp_path / "no.txt"), "there is no such"),
        (("--method", "recent", "--model", folder, "--samples", samples), "is not calibrated"),
        (("--method", "spts", "--model", tmp_path / "no", "--samples", samples), "no model folder"),
        ((*good, "--option", "rank=8"), "choose another folder"),
    ):
        failed = run(*arguments)
        assert failed.exit_code == 2, failed.output
        assert words in " ".join(failed.stderr.split())
        assert "Traceback" not in failed.output

"""lmms-eval, without lmms-eval: what its `--model_args` say, what is counted, the classes on a stand-in. Real runs: `tests/test_lmms_runs.py`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vlprune
from vlprune.errors import OptionError, UnknownNameError, UnsupportedCallError
from vlprune.integrations import lmms_eval, lmms_models
from vlprune.integrations.lmms_arguments import Pruning, method_names, parse_keep, split_arguments
from vlprune.integrations.lmms_counts import Counts, write_report
from vlprune.integrations.lmms_huggingface import Processor
from vlprune.integrations.lmms_models import Pruned
from vlprune.loading import Loaded, load_embedded

WRAPPED = ("pretrained", "device", "batch_size")


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load_embedded()


def split(**given: Any) -> Pruning:
    return split_arguments({"pretrained": "somewhere", **given}, WRAPPED, "vlprune_hf")[0]


def pictures(count: int) -> list[Any]:
    from PIL import Image

    return [Image.effect_noise((128, 128), 80 + number).convert("RGB") for number in range(count)]


# Arguments


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("hiprune", ("hiprune",)),
        ("hiprune++", ("hiprune++",)),
        ("visionzip+transprune", ("visionzip", "transprune")),
        ("hiprune+++transprune", ("hiprune++", "transprune")),
        ("prumerge++fastv", ("prumerge+", "fastv")),
        ("fastv+prumerge+", ("fastv", "prumerge+")),
    ],
)
def test_methods_are_joined_by_plus(text: str, names: tuple[str, ...]) -> None:
    assert method_names(text) == names


def test_wrong_methods() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown method 'hiprun'.*'hiprune'"):
        method_names("hiprun")
    with pytest.raises(UnknownNameError, match="unknown method 'fastvv'"):
        method_names("visionzip+fastvv")
    with pytest.raises(OptionError, match="each of them once"):
        method_names("fastv+fastv")


@pytest.mark.parametrize(
    ("given", "keep"), [(1, 1.0), (1.0, 1.0), ("1/1", 1.0), ("1/4", 0.25), (0.5, 0.5), (64, 64), ("[0.9,0.5]", (0.9, 0.5)), ("late", "late"), (None, None)]
)
def test_keep(given: Any, keep: Any) -> None:
    assert parse_keep(given) == keep
    assert type(parse_keep(given)) is type(keep)


@pytest.mark.parametrize("keep", [0, -0.5, 1.5, "3/2", "[0.9"])
def test_keeps_that_cannot_work(keep: Any) -> None:
    with pytest.raises(OptionError):
        parse_keep(keep)


def test_arguments_are_split() -> None:
    given = {"pretrained": "x", "device": "cpu", "batch_size": 1, "method": "random", "keep": "1/3", "seed": 7, "report": "out/tokens.json"}
    pruning, passed_on = split_arguments(given, WRAPPED, "vlprune_hf")
    assert pruning == Pruning(("random",), 1 / 3, {"seed": 7}, report=Path("out/tokens.json"))
    assert passed_on == {"pretrained": "x", "device": "cpu", "batch_size": 1}


def test_options_of_several_methods() -> None:
    pruning = split(method="random+fastv", keep=0.25, **{"random.seed": 3, "fastv.keep": "1/2"})
    assert pruning.options == {"random": {"seed": 3}, "fastv": {"keep": 0.5}}
    assert split(method="random", **{"random.seed": 3}).options == {"seed": 3}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "hiprune", "kep": 0.5}, "unknown argument of vlprune_hf 'kep'. Did you mean 'keep'"),
        ({"seed": 3}, "unknown argument of vlprune_hf 'seed'"),
        ({"method": "random+fastv", "seed": 3}, r"seed=3 with several methods: say whose it is, such as random.seed=3"),
        ({"method": "random", "fastv.layer": 3}, r"unknown method in fastv.layer=3: 'fastv'"),
        ({"method": "random", "random.sed": 3}, "unknown option of random 'sed'. Did you mean 'seed'"),
        ({"method": "random", "plan": "plan.json"}, "leave out plan"),
        ({"keep": 0.5, "plan": "plan.json"}, "leave out plan"),
    ],
)
def test_wrong_arguments(given: dict[str, Any], words: str) -> None:
    with pytest.raises((UnknownNameError, OptionError), match=words):
        split(**given)


def test_everything_at_keep_1_is_the_dense_model() -> None:
    assert split(method="fastv", keep=1).dense
    assert split(keep=1).dense
    assert split(plan="plan.json", keep=1).dense
    assert split(method="dense").dense
    assert not split(method="fastv", keep=0.99).dense
    assert not split(method="fastv").dense
    assert Pruning(keep=1.0).apply(nn.Linear(2, 2)) is None


# Entry points


def test_entry_point_is_declared() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert re.search(r'\[project.entry-points."lmms_eval.models"\]\nvlprune = "vlprune.integrations.lmms_eval:manifests"\n', project)
    assert set(lmms_eval.IDS) == {"vlprune_hf", "vlprune_qwen2_5_vl", "vlprune_llava_hf"}
    named = {name for one in lmms_eval.IDS.values() for name in (one.chat, one.simple) if name}
    assert named == set(lmms_models.CLASSES)
    with pytest.raises(AttributeError, match="its classes are"):
        lmms_models.VlpruneNothing  # noqa: B018


def test_manifests(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("lmms_eval.models.registry_v2")
    module.ModelManifest = types.SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    found = {one.model_id: one for one in lmms_eval.manifests()}
    assert found["vlprune_llava_hf"].chat_class_path == "vlprune.integrations.lmms_models.VlpruneLlavaHf"
    assert found["vlprune_llava_hf"].simple_class_path == "vlprune.integrations.lmms_models.VlpruneLlavaHfSimple"
    assert found["vlprune_hf"].simple_class_path is None


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = "import sys, vlprune.integrations.lmms_models; print([name for name in sys.modules if name in ('lmms_eval', 'transformers', 'loguru')])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"


def test_tasks_ask_as_they_ask_the_wrapped_id(monkeypatch: pytest.MonkeyPatch) -> None:
    class ConfigurableTask:
        def __init__(self, model_name: str) -> None:
            self.model_name = model_name
            self._prepare_model_specific_config()

        def _prepare_model_specific_config(self) -> None:
            self.asked = self.model_name

    module = types.ModuleType("lmms_eval.api.task")
    module.ConfigurableTask = ConfigurableTask  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    lmms_eval.use_plain_prompts()
    first = ConfigurableTask._prepare_model_specific_config
    lmms_eval.use_plain_prompts()
    assert ConfigurableTask._prepare_model_specific_config is first
    assert [ConfigurableTask(name).asked for name in ("vlprune_qwen2_5_vl", "vlprune_hf", "qwen2_vl")] == ["qwen2_5_vl", "huggingface", "qwen2_vl"]


# Counts


def ask(loaded: Loaded, counts: Counts, handle: Any, rows: int, **options: Any) -> None:
    inputs = loaded.batch(["how many ?"] * rows, pictures(rows)) if rows > 1 else loaded.inputs("how many ?", pictures(1))
    loaded.model.generate(**inputs, max_new_tokens=2, do_sample=False, **options)
    counts.add(inputs["input_ids"], handle)


def counts_for(loaded: Loaded) -> Counts:
    return Counts((loaded.model.config.image_token_id,))


def test_counts(loaded: Loaded) -> None:
    counts = counts_for(loaded)
    with vlprune.apply(loaded.model, ["hiprune", "fastv"], keep=0.25) as handle:
        ask(loaded, counts, handle, 1)
        ask(loaded, counts, handle, 1, num_beams=2)
        counts.add(torch.tensor([[1, 5, 6]]), handle)                    # a prompt without a picture
    found = counts.summary()
    assert counts.prompt == [256, 256, 0]
    assert counts.kept == [64, 64, 0]
    assert (found["samples"], found["samples_with_visual_tokens"]) == (3, 2)
    assert found["visual_tokens"] == {"prompt": {"mean": 256, "min": 256, "max": 256}, "kept": {"mean": 64, "min": 64, "max": 64}, "share": 0.25}
    assert [(one["point"], one["before"], one["kept"]) for one in found["points"]] == [("before_llm", 256, 128), ("llm:2", 128, 64)]
    report = handle.report()
    assert found["prefill"]["flops_dense"] > found["prefill"]["flops_pruned"] > 0
    assert found["prefill"]["kv_bytes_dense"] == report.kv_bytes_dense / 2                             # the last call had two beams
    assert counts.line() == "visual tokens a sample: 256.0 in the prompt, 64.0 kept (25.0%), 2 samples"


def test_counts_of_the_dense_model(loaded: Loaded) -> None:
    counts = counts_for(loaded)
    ask(loaded, counts, None, 1)
    assert counts.prompt == counts.kept == [256]
    assert counts.summary()["visual_tokens"]["share"] == 1
    assert Counts(()).line() == "no visual tokens in 0 samples"


def test_report_of_each_process(tmp_path: Path) -> None:
    first, second = (write_report(tmp_path / "new" / "tokens.json", {"rank": rank}, rank) for rank in (0, 1))
    assert (first.name, second.name) == ("tokens.json", "tokens.rank1.json")
    assert [json.loads(path.read_text())["rank"] for path in (first, second)] == [0, 1]
    assert sorted(path.name for path in first.parent.iterdir()) == ["tokens.json", "tokens.rank1.json"]


# The classes, on a stand-in for lmms-eval's


class Base:
    """Goes on after every error, as lmms-eval's class for LLaVA does."""

    given: Loaded

    def __init__(self, pretrained: str, device: str = "cpu") -> None:
        self._model = self.given.model

    @property
    def model(self) -> Any:
        return self._model

    def generate_until(self, requests: list[dict[str, Any]]) -> list[str]:
        answers = []
        for request in requests:
            dtype = self.model.dtype
            try:
                inputs = self.given.inputs("how many ?", pictures(1))
                answers.append(str(self.model.generate(**inputs, max_new_tokens=1, **request)[0, -1].item()) + f" {dtype}")
            except Exception:
                answers.append("")
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [(0.0, True) for _ in requests]

    def clean(self) -> None:
        del self._model


def made(loaded: Loaded, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> Any:
    """The mixin on the stand-in."""
    monkeypatch.setattr(Base, "given", loaded, raising=False)
    body = {"model_id": "vlprune_base", "wraps": "tests.Base", "accepts": frozenset({"pretrained", "device"})}
    return type("Both", (Pruned, Base), body)(pretrained="embedded", **arguments)


def test_pruned_and_reported(loaded: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = types.ModuleType("lmms_eval.models.model_utils.gen_metrics")
    logged: list[dict[str, Any]] = []
    metrics.log_metrics = lambda **entries: logged.append(entries)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, metrics.__name__, metrics)
    lm = made(loaded, monkeypatch, method="random", keep=32, seed=5, report=str(tmp_path / "tokens.json"))
    answers = lm.generate_until([{}, {}])
    assert [answer.split()[1] for answer in answers] == ["torch.float32"] * 2
    found = json.loads((tmp_path / "tokens.json").read_text())
    assert found["visual_tokens"]["kept"] == {"mean": 32, "min": 32, "max": 32}
    assert (found["method"], found["keep"], found["asked"]["options"], found["samples"], found["failed_calls"]) == ("random", 32, {"seed": 5}, 2, 0)
    handle = lm.handle
    lm.clean()
    assert not handle.is_applied
    assert logged[0]["additional_metrics"] == {"visual_tokens_prompt": 256.0, "visual_tokens_kept": 32.0}
    assert "vlprune: random keep=32: visual tokens a sample: 256.0 in the prompt, 32.0 kept (12.5%), 2 samples" in capsys.readouterr().out
    with vlprune.apply(loaded.model, "random", keep=0.5):                # it can be pruned again
        pass


def test_a_refused_call_ends_the_run(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of empty answers, which would count as wrong."""
    for requests in ([{"output_attentions": True, "return_dict_in_generate": True}], [{"output_attentions": True, "return_dict_in_generate": True}, {}]):
        lm = made(loaded, monkeypatch, method="random", keep=0.5)
        try:
            with pytest.raises(UnsupportedCallError, match="output_attentions"):
                lm.generate_until(requests)
            assert lm.counts.failed == 1
        finally:
            lm.handle.remove()


def test_other_errors_are_counted(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = made(loaded, monkeypatch, method="random", keep=0.5)
    assert lm.generate_until([{"nonsense": 3}, {}])[0] == ""
    lm.handle.remove()
    assert (lm.counts.failed, lm.counts.prompt) == (1, [256])
    assert "nonsense" in lm.counts.error
    assert "1 calls FAILED" in lm.counts.line()


def test_log_likelihoods_of_the_dense_model_only(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    assert made(loaded, monkeypatch, keep=1).loglikelihood([1]) == [(0.0, True)]
    lm = made(loaded, monkeypatch, method="random", keep=0.5)
    with pytest.raises(UnsupportedCallError, match=r"generate_until\), or keep=1"):
        lm.loglikelihood([1])
    lm.handle.remove()


def test_what_processors_get() -> None:
    calls: list[dict[str, Any]] = []

    class Inner:
        tokenizer, name = types.SimpleNamespace(padding_side="right"), "inner"

        def __call__(self, **given: Any) -> None:
            calls.append(given)

    processor = Processor(Inner(), 4)
    assert processor.name == "inner"
    assert processor.tokenizer.padding_side == "left"
    processor(text=["a"], images=["picture"], videos=[], audios=[], padding=True)
    processor(text=["a"], images=[], videos=[[1, 2]], audios=["sound"])
    assert calls == [{"text": ["a"], "images": ["picture"], "padding": True}, {"text": ["a"], "audio": ["sound"], "videos": [[1, 2]]}]

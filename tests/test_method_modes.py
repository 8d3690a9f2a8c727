"""MoDES and the mask on routed experts, on a tiny Qwen3-VL-MoE, for every way of computing experts, against a loop over tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import vlprune
from tests.families.qwen_vl import MOE
from tests.oracle import decoder_of, snapshot
from tests.test_text_laws import TOLERANCE, generate, longer
from tests.tiny import IMAGE, VIDEO, families, tiny_llama
from vlprune.adapter import find_adapter
from vlprune.errors import OptionError, UnsupportedModelError, UnsupportedPointError
from vlprune.method import ModelFacts
from vlprune.methods.modes import modes
from vlprune.skipping.calibrate import calibrate
from vlprune.skipping.expert_importance import FILE, ExpertImportance, load_importance

BACKENDS = ("eager", "batched_mm", "grouped_mm")
ROWS: list[list[Any]] = [[3, "image", 9], [17]]
TAUS = {"text": (0.1, 0.0), "visual": (0.0, 0.1), "both": (0.07, 0.11)}


def build(backend: str = "eager") -> Any:
    model: Any = MOE.build()
    model.set_experts_implementation(backend)
    with torch.no_grad():
        for layer in decoder_of(model).layers:  # type: ignore[union-attr]
            layer.mlp.experts.gate_up_proj *= 7                          # as large as other matrices: the tests have to see what experts do
            layer.mlp.experts.down_proj *= 6
    return model


@contextmanager
def by_hand(model: Any, text: float, visual: float, *, most: int = 99, at_least: int = 0, importance: tuple[float, ...] = (0.25,) * 4) -> Iterator[None]:
    """The model with its MLPs computed token by token, expert by expert; visual tokens are those with a placeholder."""
    ids: list[Tensor] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        ids[:] = [kwargs["input_ids"]]

    def loop(number: int) -> Any:
        def hook(mlp: Any, args: Any, output: Tensor) -> Tensor:
            states, flat = args[0].reshape(-1, args[0].shape[-1]), ids[0].reshape(-1)
            result = torch.zeros_like(states)
            for token, state in enumerate(states):
                limit = visual if int(flat[token]) in (IMAGE, VIDEO) else text
                probabilities = (mlp.gate.weight @ state).softmax(0)
                best = probabilities.topk(mlp.gate.top_k)
                for rank, (probability, expert) in enumerate(zip(best.values, best.indices, strict=True)):
                    if rank >= at_least and (importance[number] * probability < limit or rank >= most):
                        continue
                    gate, up = (mlp.experts.gate_up_proj[expert] @ state).chunk(2)
                    result[token] += probability / best.values.sum() * (mlp.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
            return result.view_as(output)

        return hook

    handles = [model.model.register_forward_pre_hook(look, with_kwargs=True)]
    handles += [layer.mlp.register_forward_hook(loop(number)) for number, layer in enumerate(decoder_of(model).layers)]  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("which", TAUS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill_and_decoding_equal_a_loop(backend: str, which: str) -> None:
    """Text and visual tokens by their own thresholds; decoded ones are text."""
    model, inputs, tau = build(backend), MOE.prompt(ROWS), TAUS[which]
    with vlprune.apply(model, "modes", tau=tau) as handle:
        out = generate(model, inputs)
        report = handle.report()
    new = out.sequences[:, inputs["input_ids"].shape[1] : -1]
    whole, kwargs = longer(MOE, model, inputs, new)
    with by_hand(model, *tau):
        expected = model(**whole, **kwargs).logits[:, inputs["input_ids"].shape[1] - 1 :]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, **TOLERANCE)
    with torch.no_grad():
        assert not torch.allclose(model(**whole, **kwargs).logits[:, inputs["input_ids"].shape[1] - 1 :], expected, atol=1e-2)
    assert 0 < report.experts["prefill"] < 1
    assert (report.experts["decode"] == 1) == (which == "visual")
    assert "experts that ran" in str(report)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_skipped_is_dense_bit_for_bit(backend: str) -> None:
    """No threshold, one that all scores reach, numbers that all tokens have, and everything."""
    model, inputs = build(backend), MOE.prompt(ROWS)
    with torch.no_grad():
        dense = model(**inputs).logits
        state = snapshot(model)
        for keep, options in ((0.5, {"tau": (0, 0)}), (0.5, {"tau": (1e-9, 1e-9)}), (2, {}), (10_000, {}), (1.0, {"tau": (0.5, 0.5)})):
            with vlprune.apply(model, "modes", keep=keep, **options):
                assert torch.equal(model(**inputs).logits, dense)
            assert snapshot(model) == state


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_may_lose_all_their_experts(backend: str) -> None:
    """Then the MLP gives them nothing, whatever stands in memory; with ``at_least`` their likeliest expert stays."""
    model, inputs = build(backend), MOE.prompt(ROWS)
    handles = [layer.mlp.register_forward_hook(lambda m, a, o: torch.zeros_like(o)) for layer in decoder_of(model).layers]  # type: ignore[union-attr]
    with torch.no_grad():
        expected = model(**inputs).logits
        for handle in handles:
            handle.remove()
        with vlprune.apply(model, "modes", tau=(1.0, 1.0)) as pruned:
            torch.testing.assert_close(model(**inputs).logits, expected)
            assert pruned.report().experts == {"prefill": 0.0}
        with vlprune.apply(model, "modes", tau=(1.0, 1.0), at_least=1):
            one = model(**inputs).logits
        with vlprune.apply(model, "modes", keep=1):
            torch.testing.assert_close(model(**inputs).logits, one)
    with by_hand(model, 1.0, 1.0, at_least=1):
        torch.testing.assert_close(one, model(**inputs).logits, **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_compute_only_what_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own loop or product is given the pairs that run, each with an expert that exists."""
    model, inputs = build(backend), MOE.prompt(ROWS)
    experts = decoder_of(model).layers[1].mlp.experts  # type: ignore[union-attr, index]
    given: list[Tensor] = []
    original = experts.forward
    monkeypatch.setattr(experts, "forward", lambda states, index, weights: given.append(index) or original(states, index, weights))
    with vlprune.apply(model, "modes", tau=(0.07, 0.11)) as handle, torch.no_grad():
        model(**inputs)
        ran, routed, _ = handle.trace.experts[1]  # type: ignore[union-attr]
    assert given[0].shape == (ran, 1)
    assert routed == 2 * inputs["input_ids"].numel()
    assert bool(((given[0] >= 0) & (given[0] < 4)).all())


def test_flops_are_counted() -> None:
    """What was skipped, by hand; and dense counts k experts a token."""
    model, inputs = build(), MOE.prompt([[20]])
    text = model.config.text_config
    each = 2 * 3 * text.hidden_size * text.moe_intermediate_size
    with torch.no_grad(), vlprune.apply(model, "modes", tau=(0.1, 0.1)) as handle:
        model(**MOE.prompt(ROWS[:1]))
        report, trace = handle.report(), handle.trace
    assert trace is not None
    skipped = sum(routed - ran for ran, routed, _ in trace.experts.values())
    assert skipped > 0
    assert report.parts["decoder_dense"] - report.parts["decoder"] == pytest.approx(skipped * each)
    shape = find_adapter(model).dimensions()["decoder"]
    assert shape.mlp_flops(1) == 2 * each
    assert inputs["input_ids"].shape[1] == 20


@pytest.mark.parametrize("with_drop", ["fastv", "videollm_mod"])
def test_with_dropped_or_bypassed_tokens(with_drop: str) -> None:
    """Kinds of tokens go by what is there: rows alone and in a batch agree, and thresholds for visual tokens count only where some are."""
    model = build("grouped_mm")
    options: dict[str, Any] = {"fastv": {"keep": 0.4}} if with_drop == "fastv" else {"videollm_mod": {"router": "random", "keep": 0.4}}
    with torch.no_grad(), vlprune.apply(model, [with_drop, "modes"], modes={"tau": (0.0, 0.1)}, **options):
        together = model(**MOE.prompt(ROWS)).logits
        for number, row in enumerate(ROWS):
            alone = model(**MOE.prompt([row], row_numbers=[number])).logits
            torch.testing.assert_close(together[number, -alone.shape[1] :], alone[0], **TOLERANCE)
    with torch.no_grad(), vlprune.apply(model, with_drop, **options[with_drop]):
        torch.testing.assert_close(together[1, -17:], model(**MOE.prompt(ROWS)).logits[1, -17:], **TOLERANCE)


def test_rows_beams_and_exceptions() -> None:
    """Laws 4 and 5, and beams."""
    model, inputs = build(), MOE.prompt(ROWS)
    generate(model, inputs)
    state = snapshot(model)
    options = {"num_beams": 3, "num_return_sequences": 2, "output_logits": False}
    with vlprune.apply(model, "modes", tau=(0.07, 0.11)):
        first = torch.stack(generate(model, inputs).logits)
        both = generate(model, inputs, **options).sequences
        for number, row in enumerate(ROWS):
            alone = MOE.prompt([row], row_numbers=[number])
            torch.testing.assert_close(first[:, number], torch.stack(generate(model, alone).logits)[:, 0], **TOLERANCE)
            assert torch.equal(both[2 * number : 2 * number + 2, -5:], generate(model, alone, **options).sequences[:, -5:])

        def fail(*_: Any) -> None:
            raise RuntimeError("on purpose")

        bomb = decoder_of(model).layers[2].mlp.gate.register_forward_hook(fail)  # type: ignore[union-attr, index]
        with pytest.raises(RuntimeError, match="on purpose"):
            generate(model, inputs)
        bomb.remove()
        assert torch.equal(torch.stack(generate(model, inputs).logits), first)
    assert snapshot(model) == state


def test_text_only_mixtures_of_experts() -> None:
    torch.manual_seed(0)
    changes = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1, "norm_topk_prob": True}
    model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**tiny_llama(), **changes})).eval()
    ids = torch.randint(3, 90, (2, 12))
    with vlprune.apply(model, "modes", tau=(0.07, 0.11)) as handle, torch.no_grad():
        pruned = model(input_ids=ids).logits
        assert 0 < handle.report().experts["prefill"] < 1
    with by_hand(model, 0.07, 0.0):
        torch.testing.assert_close(pruned, model(input_ids=ids).logits, **TOLERANCE)


def samples(count: int = 4) -> list[dict[str, Tensor]]:
    return [MOE.prompt([ROWS[number % 2]], seed=number) for number in range(count)]


def test_importance_is_the_divergence_without_the_experts(tmp_path: Path) -> None:
    """Of one layer by hand; a layer whose experts give nothing has none; histograms count every chosen expert."""
    model = build()
    layers: Any = decoder_of(model).layers
    with torch.no_grad():
        layers[2].mlp.experts.down_proj.zero_()
    folder = calibrate("modes", model, samples(), tmp_path / "experts")
    found = load_importance(folder)
    kl = torch.zeros(4)
    for call in samples():
        with torch.no_grad():
            dense = model(**call).logits[:, -1].log_softmax(-1)
            for number, layer in enumerate(layers):
                handle = layer.mlp.register_forward_hook(lambda m, a, o: torch.zeros_like(o))
                other = model(**call).logits[:, -1].log_softmax(-1)
                handle.remove()
                kl[number] += torch.nn.functional.kl_div(other, dense, log_target=True, reduction="sum")
    assert found.alpha == pytest.approx((kl / kl.sum()).tolist(), abs=1e-5)
    assert found.alpha[2] == 0
    tokens = sum(call["input_ids"].numel() for call in samples())
    visual = sum(int((call["input_ids"] == IMAGE).sum()) for call in samples())
    assert found.counts.sum(dim=2).tolist() == [[2 * (tokens - visual)] * 4, [2 * visual] * 4]


@pytest.mark.parametrize("keep", [0.75, 0.5, 0.2])
def test_the_share_that_runs_is_the_one_asked_for(tmp_path: Path, keep: float) -> None:
    """On what was measured, up to the width of a bin; a pair that was searched, too."""
    model, calls = build(), samples()
    for name, keeps in (("plain", []), ("searched", [keep])):
        folder = calibrate("modes", model, calls, tmp_path / name, keeps=keeps, points=5)
        ran = routed = 0
        with vlprune.apply(model, "modes", keep=keep, importance=folder) as handle, torch.no_grad():
            for call in calls:
                model(**call)
                experts = handle.trace.experts.values()  # type: ignore[union-attr]
                ran, routed = ran + sum(part[0] for part in experts), routed + sum(part[1] for part in experts)
        assert ran / routed == pytest.approx(keep, abs=0.06), name


def test_the_search_takes_the_best_pair(tmp_path: Path) -> None:
    """Of the pairs on the frontier, each measured by hand."""
    model, calls = build(), samples()
    folder = calibrate("modes", model, calls, tmp_path / "experts", keeps=[0.5], points=4)
    found = load_importance(folder)
    tried = found.frontier(0.5, 4)
    losses = []
    for pair in tried:
        total = 0.0
        for call in calls:
            with torch.no_grad():
                dense = model(**call).logits[:, -1].log_softmax(-1)
                with vlprune.apply(model, "modes", importance=found, tau=pair):
                    other = model(**call).logits[:, -1].log_softmax(-1)
            total += float(torch.nn.functional.kl_div(other, dense, log_target=True, reduction="sum"))
        losses.append(total)
    assert len({round(loss, 4) for loss in losses}) > 1
    assert found.thresholds(0.5) == pytest.approx(tried[losses.index(min(losses))])


def test_a_stopped_calibration_goes_on(tmp_path: Path) -> None:
    """Inputs that were done are not done again, and the result is the same."""
    model, calls = build(), samples(10)
    whole = load_importance(calibrate("modes", model, calls, tmp_path / "whole"))

    def stop(done: int, total: int, what: str) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate("modes", model, calls, tmp_path / "parts", progress=stop)
    assert not (tmp_path / "parts" / FILE).exists()
    told: list[int] = []
    again = load_importance(calibrate("modes", model, calls, tmp_path / "parts", progress=lambda done, total, what: told.append(done)))
    assert told[0] == 8
    assert again.alpha == pytest.approx(whole.alpha)
    assert torch.equal(again.counts, whole.counts)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    llava, model = families()["llava"].build(), build()
    with pytest.raises(UnsupportedPointError, match=r"router \(mlp.gate\) with its experts \(mlp.experts\)"):
        vlprune.apply(llava, "modes", tau=(0.1, 0.1))
    with pytest.raises(UnsupportedModelError, match="no decoder layer with a router"):
        calibrate("modes", llava, samples(1), tmp_path / "experts")
    facts = ModelFacts(decoder_layers=4, expert_layers=(0, 1, 2, 3))
    for match, options in {
        "has to be measured": {"keep": 0.5},
        "two numbers from 0": {"tau": (0.1,)},
        "cannot be read": {"importance": tmp_path / "none"},
        "importance=dict": {"importance": {}},
        "more than keep=1": {"keep": 1, "at_least": 2},
        "measured in layers": {"importance": ExpertImportance((1, 3), (0.5, 0.5), torch.zeros(2, 2, 600))},
    }.items():
        with pytest.raises(OptionError, match=match):
            modes(facts, **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="shares between 0 and 1"):
        calibrate("modes", model, samples(1), tmp_path / "experts", keeps=[1.5])
    decoder_of(model).layers[1].mlp.experts._is_expert_parallel = True  # type: ignore[union-attr, index]
    with pytest.raises(UnsupportedModelError, match="without expert parallelism"):
        vlprune.apply(model, "modes", tau=(0.1, 0.1))

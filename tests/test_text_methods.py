"""What each method for text says by itself: published numbers and schedules, calibration, routers, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vlprune
from tests.oracle import decoder_of
from tests.test_text_laws import STEPS, build, generate
from tests.tiny import families
from tests.tiny_text import text_families
from vlprune.errors import OptionError
from vlprune.method import ModelFacts
from vlprune.methods.ffn_skip import Saturated
from vlprune.methods.ima_skip import eligible_layers
from vlprune.methods.skipdecode import Falling
from vlprune.methods.unified_layer_skip import kept_layers
from vlprune.protocols import GenerationState, Step
from vlprune.scorers.low_rank_ffn import factor
from vlprune.scorers.token_router import RouterScore, TokenRouter, load_router, router_features, save_router
from vlprune.skipping.ffn_probe import channel_importance, load_probes, make_probes
from vlprune.skipping.saturation import cold_regions, saturation

TEXT = [name for name in vlprune.list_methods() if vlprune.get_method(name).tokens != "visual"]


def facts(depth: int = 32, text: bool = True) -> ModelFacts:
    return ModelFacts(decoder_layers=depth, token_sets=("text", "all") if text else ("visual", "text", "all"))


def test_published_layer_schedules() -> None:
    """Computed from the released rule."""
    assert kept_layers(30, 15) == (*range(0, 27, 2), 29)
    assert kept_layers(30, 10) == (*range(0, 25, 3), 29)
    assert kept_layers(30, 6) == (0, 6, 12, 18, 24, 29)
    assert kept_layers(32, 16) == (*range(0, 29, 2), 31)
    assert kept_layers(28, 14) == (*range(0, 25, 2), 27)
    for depth, share, number in ((30, 1 / 2, 15), (30, 1 / 3, 10), (30, 1 / 5, 6), (32, 1 / 2, 16)):
        method = vlprune.get_method("unified_layer_skip").build(facts(depth), share)
        assert {skip.layer for skip in method.layer_skips} == set(range(depth)) - set(kept_layers(depth, number))
        assert all(skip.run("prefill", 0, 0) and not skip.run("decode", 0, 9) for skip in method.layer_skips)
    assert eligible_layers(32) == tuple(range(2, 31, 2))
    assert len(eligible_layers(32, 4)) == 13
    assert eligible_layers(32, 4)[0] == 6, "the start is exclusive"
    assert eligible_layers(32, end=31, interval=4) == (4, 8, 12, 16, 20, 24, 28)


def test_layers_of_skipdecode_fall_and_nest() -> None:
    rule = Falling(depth=32, most=32, least=10, warmup=2, length=100)
    counts = [rule.count(step) for step in range(150)]
    assert counts[0] == 32
    assert counts[50] == 21
    assert counts[100:] == [10] * 50
    assert counts == sorted(counts, reverse=True)
    for step in range(149):
        assert rule(step + 1) <= rule(step)
        assert len(rule(step)) == counts[step]
    assert rule(120) == frozenset((0, 1, *range(24, 32)))
    method = vlprune.get_method("skipdecode").build(facts(), 10, warmup=2, length=100)
    ran = [layer for layer in range(32) if all(skip.run("decode", 120, 300) for skip in method.layer_skips if skip.layer == layer)]
    assert ran == sorted(rule(120))


def test_ffn_skip_counts_what_it_skips() -> None:
    """After a saturated layer the next ``skip`` go without; each row by itself; nothing before the warm-up."""
    rule = Saturated(tau=0.9, skip=2, warmup=1, most=3)
    same, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    states = torch.stack([same, same])                                   # (2, 1, 2): two rows
    turned = torch.stack([same, other])                                  # the first stays, the second turns
    state = GenerationState()

    def at(layer: int, after: Tensor | None = None, ran: tuple[bool, ...] | None = None) -> Step:
        return Step(layer, "mlp", states, state, after, ran)

    state.begin("decode", 5)
    rule.see(at(3, states))
    assert rule.runs(at(4)) is True, "warm-up"
    state.begin("decode", 6)
    rule.see(at(3, turned))
    assert rule.runs(at(4)) == [False, True]
    rule.see(at(4, states, ran=(False, True)))
    assert rule.runs(at(5)) == [False, False]
    assert rule.runs(at(6)) == [True, False]
    assert rule.runs(at(7)) == [True, True]
    state.begin("decode", 7)
    assert rule.runs(at(4)) is True, "every step starts anew"
    rule.see(at(4, states))
    assert [rule.runs(at(layer)) for layer in (5, 6, 7)] == [[False, False], [False, False], [True, True]]
    rule.see(at(7, states))
    assert [rule.runs(at(layer)) for layer in (8, 9)] == [[False, False], [True, True]], "three of a token's MLPs at most"


def test_saturation_is_the_cosine_around_each_mlp() -> None:
    tiny = text_families()["gemma2"]
    model = tiny.build("eager")
    inputs = tiny.prompt([[12], [7]])
    layers = list(decoder_of(model).layers)  # type: ignore[arg-type]
    found = saturation(model, layers, [inputs])
    before: dict[int, Tensor] = {}
    hooks = [
        layer.pre_feedforward_layernorm.register_forward_pre_hook(lambda m, args, n=n: before.__setitem__(n, args[0])) for n, layer in enumerate(layers)
    ]  # type: ignore[union-attr]
    after: dict[int, Tensor] = {}
    hooks += [layer.register_forward_hook(lambda m, args, out, n=n: after.__setitem__(n, out)) for n, layer in enumerate(layers)]
    with torch.no_grad():
        model(**inputs)  # type: ignore[operator]
    for hook in hooks:
        hook.remove()
    real = inputs["attention_mask"].bool()
    for number, value in enumerate(found):
        expected = torch.cosine_similarity(before[number][real], after[number][real], dim=-1).mean()
        assert value == pytest.approx(float(expected), abs=1e-5)
    assert cold_regions([0.1, 0.2, 0.95, 0.97, 0.96, 0.5, 0.99], 0.9) == (2, 2)
    assert cold_regions([0.1, 0.2], 0.9) == (2, 0)
    with pytest.raises(OptionError, match="no texts"):
        saturation(model, layers, [])


def test_ima_skip_by_phase_part_and_tokens() -> None:
    """What runs where, in prompts and while decoding, on a model that sees and one that does not."""
    tiny = families()["llava"]
    model, inputs = tiny.build(), tiny.prompt([[9, "image", 12]])
    for phase, prompt_skips, decode_skips in (("prefill", True, False), ("decode", False, True), ("both", True, True)):
        with vlprune.apply(model, "ima_skip", phase=phase, kv="copy_prev_layer") as handle:
            generate(model, inputs)
            report = handle.report()
        records = [(record.point, record.tokens, record.visual_before, record.visual_kept) for record in report.bypasses]
        assert records == ([("llm:2.block", "visual", 36, 0)] if prompt_skips else [])
        assert report.decoding.get("attn_skipped", 0.0) == (0.25 if decode_skips else 0.0)
    text = text_families()["llama"].build()
    with torch.no_grad(), vlprune.apply(text, "ima_skip", part="mlp") as handle:
        text(**text_families()["llama"].prompt([[20]]))  # type: ignore[operator]
        records = [(record.point, record.tokens, record.visual_before, record.visual_kept) for record in handle.report().bypasses]
        assert records == [("llm:2.mlp", "text", 20, 1)]


# spts


def test_published_budgets_of_spts() -> None:
    """Llama-3.1-8B: stages, counts, and the share of the cache that is left of 32K."""
    method = vlprune.get_method("spts").build(facts(), 2 * 1024)
    attention = {bypass.layer: bypass.budget.keep for bypass in method.bypasses if bypass.part == "attn"}
    assert sorted(attention) == list(range(10, 32))
    counts = [attention[layer] // 1024 for layer in range(10, 32)]
    assert counts == [9] * 4 + [7] * 5 + [4] * 5 + [2] * 8
    assert [stage.point.label for stage in method.stages] == ["llm:14", "llm:19", "llm:24", "llm:29"]
    assert [stage.budget.num_keep(32 * 1024) // 1024 for stage in method.stages] == [31, 30, 29, 28]
    kept = (10 * 32 + sum(counts)) / (32 * 32)
    assert 1 - kept == pytest.approx(0.586, abs=0.01), "the paper's KV saving"


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_a_share_is_the_average_over_the_layers(keep: float) -> None:
    method = vlprune.get_method("spts").build(facts(), keep)
    shares = {bypass.layer: bypass.budget.keep for bypass in method.bypasses if bypass.part == "attn"}
    assert sum(shares.values()) / 22 == pytest.approx(keep, abs=1e-6)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    random = vlprune.get_method("spts").build(facts(), keep, ranking="random")
    assert [bypass.budget for bypass in random.bypasses] == [bypass.budget for bypass in method.bypasses], "the same budgets"
    assert not any(bypass.needs for bypass in random.bypasses)


def test_a_probe_at_full_width_and_rank_gives_the_true_norms(tmp_path: Path) -> None:
    for name in ("llama", "gemma2"):
        tiny = text_families()[name]
        model = tiny.build("eager")
        layers = list(decoder_of(model).layers)  # type: ignore[arg-type]
        inputs = [tiny.prompt([[14], [9]], seed=seed) for seed in range(2)]
        make_probes(model, layers, inputs, tmp_path / name, width=10_000, rank=10_000)
        states = torch.randn(1, 6, 32)
        for layer, net in zip(layers, load_probes(tmp_path / name, 4), strict=True):
            with torch.no_grad():
                expected = layer.mlp(states).norm(dim=-1)  # type: ignore[operator]
            torch.testing.assert_close(net(states).norm(dim=-1), expected, rtol=1e-3, atol=1e-4)
            assert net.flops(6) > 0


def test_probes_go_on_and_their_channels_are_the_largest(tmp_path: Path) -> None:
    tiny = text_families()["llama"]
    model = tiny.build()
    layers = list(decoder_of(model).layers)  # type: ignore[arg-type]
    inputs = [tiny.prompt([[14], [9]])]
    importance = channel_importance(model, layers, inputs, [1], share=0.25)[1]
    seen: dict[str, Tensor] = {}
    hook = layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.update(hidden=args[0]))  # type: ignore[union-attr, operator]
    with torch.no_grad():
        model(**inputs[0])  # type: ignore[operator]
    hook.remove()
    values = seen["hidden"].abs()[inputs[0]["attention_mask"].bool()]
    torch.testing.assert_close(importance, values.sort(dim=0, descending=True).values[: round(0.25 * 23)].mean(0), rtol=1e-5, atol=1e-6)
    told: list[tuple[int, int, str]] = []

    def tell(*news: Any) -> None:
        told.append(news)  # type: ignore[arg-type]

    make_probes(model, layers, inputs, tmp_path, width=16, rank=4, progress=tell)
    (tmp_path / "layer_2.safetensors").unlink()
    stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    make_probes(model, layers, inputs, tmp_path, width=16, rank=4, progress=tell)
    assert told[-2:] == [(1, 1, "texts"), (1, 1, "layers")]
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in stamps} == stamps, "what is there is not made again"
    assert load_probes(tmp_path, 4)[3].gate[0].shape == (32, 4)
    with pytest.raises(OptionError, match="width and rank 16, 4"):
        make_probes(model, layers, inputs, tmp_path, width=8, rank=4)
    with pytest.raises(OptionError, match=r"no layer_4\.safetensors"):
        load_probes(tmp_path, 5)
    prompt = tiny.prompt([[30], [11]])
    with torch.no_grad():
        for probe in (tmp_path, None):
            with vlprune.apply(model, "spts", keep=0.4, probe=probe, queries=1) as handle:
                logits = model(**prompt).logits  # type: ignore[operator]
                chosen = [[kept.tolist() for kept in record.kept] for record in handle.trace.bypasses if record.point.endswith("mlp")]  # type: ignore[union-attr]
                flops = handle.trace.scorer_flops  # type: ignore[union-attr]
            if probe is not None:
                with_probe = (logits, chosen, flops)
    assert not torch.equal(with_probe[0], logits)
    assert with_probe[1] != chosen
    assert with_probe[2] > flops
    left, right = factor(torch.eye(5), 5)
    torch.testing.assert_close(left @ right, torch.eye(5))


# ftp and switchable


def test_rankings_of_ftp() -> None:
    """The static order, the shares, and a callable."""
    tiny = text_families()["llama"]
    model, inputs = tiny.build(), tiny.prompt([[20]])
    with torch.no_grad(), vlprune.apply(model, "ftp", keep=8, start=1) as handle:
        model(**inputs)  # type: ignore[operator]
        records = handle.trace.bypasses  # type: ignore[union-attr]
    assert [record.point for record in records] == ["llm:1.block", "llm:2.block", "llm:3.block"]
    for record in records:                                               # the first and the last token are protected; of the others, the last six
        assert record.kept[0].tolist() == [12, 13, 14, 15, 16, 17]
        assert record.visual_kept == 8
    method = vlprune.get_method("ftp").build(facts(), 0.7)
    shares = [1.0] * 2 + [bypass.budget.keep for bypass in method.bypasses]
    assert sum(shares) / 32 == pytest.approx(0.7)
    budgets = [1.0, 0.5, 0.25, 6]
    assert [bypass.budget.keep for bypass in build("ftp", model, budgets=budgets).bypasses] == budgets[1:]

    def even_places(inputs: vlprune.ScoreInputs) -> Tensor:
        assert inputs.original is not None
        return -(inputs.original % 2).float()

    with torch.no_grad(), vlprune.apply(model, "ftp", keep=7, start=1, ranking=even_places) as handle:
        model(**inputs)  # type: ignore[operator]
        assert all(place % 2 == 0 for place in handle.trace.bypasses[0].kept[0].tolist())  # type: ignore[union-attr]


def test_routers_are_kept_and_can_be_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    router = TokenRouter(16)
    path = save_router(router, tmp_path / "router.safetensors", steps=3)
    again = load_router(path)
    inputs = vlprune.ScoreInputs(torch.randn(1, 6, 4), 3, num_original=6)
    features = router_features(inputs, torch.tensor([[0.1, 0.3, 0.05, 0.2, 0.25, 0.1]]))
    assert features[0, :, 0].tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert features[0, :, 2].tolist() == pytest.approx([0.2, 1.0, 0.0, 0.6, 0.8, 0.4])
    assert features[0, 0, 3] == 0.5
    torch.testing.assert_close(again(features), router(features))
    tiny = text_families()["llama"]
    model, prompt = tiny.build(), tiny.prompt([[20]])
    with torch.no_grad():
        with vlprune.apply(model, "ftp", keep=8, start=1, router=path):
            from_file = model(**prompt).logits  # type: ignore[operator]
        with vlprune.apply(model, "ftp", keep=8, start=1, router=router):
            assert torch.equal(model(**prompt).logits, from_file)  # type: ignore[operator]
    score = RouterScore(router, 1)
    scored = vlprune.ScoreInputs(inputs.tokens, 3, num_original=6, signals={score.needs[0]: torch.rand(1, 6)})
    score(scored).sum().backward()
    assert all(parameter.grad is not None for parameter in router.parameters())
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    with pytest.raises(OptionError, match="cannot be read"):
        load_router(tmp_path / "no.safetensors")


def test_any_policy_switches_any_part() -> None:
    tiny = text_families()["llama"]
    model, prompt = tiny.build(), tiny.prompt([[20], [12]])

    def norm(inputs: vlprune.ScoreInputs) -> Tensor:
        return inputs.tokens.float().norm(dim=-1)

    outs = []
    with torch.no_grad():
        for part in ("attn", "mlp", "block", "tokens"):
            with vlprune.apply(model, "switchable", keep=0.5, policy=norm, part=part, layers=[2]) as handle:
                outs.append(model(**prompt).logits)  # type: ignore[operator]
                report = handle.report()
            (record,) = report.points if part == "tokens" else report.bypasses
            assert (record.visual_before, record.visual_kept) == (32, 16)
        with vlprune.apply(model, "switchable", keep=1.0, decode=lambda step: step.layer != 2) as handle:
            generate(model, prompt)
            assert handle.report().decoding == {"steps": STEPS - 1, "attn_skipped": 0.0, "mlp_skipped": 0.25}
    assert not any(torch.equal(a, b) for n, a in enumerate(outs) for b in outs[:n])


@pytest.mark.parametrize(
    ("method", "keep", "options", "words"),
    [
        ("random_text", 0.5, {"point": "vision:1"}, "text is in the decoder"),
        ("random_text", 0.5, {"tokens": "visual"}, "'text', or 'all'"),
        ("random_text", 0.5, {"protect": (1, 0)}, "the last one has to"),
        ("random_text", 0.5, {"seed": "a"}, "an int"),
        ("recent", 0.5, {"sinks": 0}, "from 1"),
        ("unified_layer_skip", 1, {}, "the first and the last always run"),
        ("unified_layer_skip", 0.5, {"kv": "full"}, "kv='full'"),
        ("skipdecode", 2, {"warmup": 3}, "3 always run"),
        ("skipdecode", 0.5, {"length": 0}, "length=0"),
        ("ffn_skip", 0.5, {"tau": 2}, "a cosine"),
        ("ima_skip", 0.5, {"part": "head"}, "part='head'"),
        ("ima_skip", 0.5, {"interval": 0}, "interval=0"),
        ("switchable", [0.5, 0.5], {"layers": [1]}, "one for each of the 1"),
        ("switchable", 0.5, {"part": "tokens", "decode": bool}, "do so in the prompt"),
        ("ftp", 0.01, {}, "give more, or a smaller start"),
        ("ftp", 0.5, {"ranking": "best"}, "or a callable"),
        ("ftp", 0.5, {"budgets": [0.5]}, "one for each of the 32 layers"),
        ("spts", [0.5], {}, "one for each of the 5 stages"),
        ("spts", 0.5, {"ends": [9]}, "from 10 to 31"),
        ("spts", 0.5, {"drop": 1}, "from 0 to below 1"),
        ("spts", 0.5, {"mlp": "never"}, "'probe', 'dense'"),
    ],
)
def test_what_does_not_fit_is_an_error(method: str, keep: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        vlprune.get_method(method).build(facts(), keep, **options)


@pytest.mark.parametrize("method", TEXT)
def test_cards_say_what_they_do(method: str) -> None:
    card = vlprune.get_method(method)
    assert card.summary
    assert card.tokens in ("text", "all")
    for depth in (1, 2, 3, 4, 12, 28, 32, 80):
        try:
            built = card.build(facts(depth), card.default_keep)
        except OptionError:                                              # what has to be trained or measured before comes without it
            try:
                built = card.build(facts(depth), card.default_keep, **card.test_options)
            except OptionError:
                assert depth < 4, "too shallow for the default"
                continue
        parts: tuple[Any, ...] = (*built.bypasses, *built.layer_skips, *built.observes)
        assert all(part.layer < depth for part in parts)
        assert all(stage.point.layer < depth for stage in built.stages)

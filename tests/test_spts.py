"""spts against a plain loop that computes everything and masks; its budgets, its caches, and what the last queries see."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import vlprune
from tests.oracle import decoder_of
from tests.test_text_laws import build, check_one_long_forward, generate, prompts
from tests.text_families.llama_like import TinyText
from tests.tiny_text import text_families
from vlprune.budget import Budget
from vlprune.errors import OptionError
from vlprune.evals import recall
from vlprune.evals.text_quality import ASSETS, recall_answers
from vlprune.method import Bypass, ModelFacts, PruningMethod
from vlprune.protocols import ScoreInputs, Tap
from vlprune.selectors import TopK
from vlprune.skipping.ffn_probe import make_probes

SIX = TinyText("llama", changes={"num_hidden_layers": 6})
START, BEGINS = 2, (3, 4, 5)                                             # 10, 14, 19, 24 and 29 of 32, for six layers
SHARES = {2: 0.8, 3: 0.7, 4: 0.5, 5: 0.3}


def facts(depth: int = 32) -> ModelFacts:
    return ModelFacts(decoder_layers=depth, token_sets=("text", "all"))


def active(method: PruningMethod, part: str = "attn") -> dict[int, Any]:
    return {bypass.layer: None if bypass.budget is None else bypass.budget.keep for bypass in method.bypasses if bypass.part == part}


# the whole of it, as a loop


def rms(x: Tensor, norm: Any) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight


def turned(x: Tensor, base: float) -> Tensor:
    """(L, d) rotated by its places: channel i with channel i + d/2."""
    length, width = x.shape
    angles = torch.arange(length)[:, None] * base ** (-torch.arange(0, width, 2) / width)
    first, second = x[:, : width // 2], x[:, width // 2 :]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1)


def best(scores: Tensor, among: Tensor, number: int, always: int) -> Tensor:
    """(L,) bool: the last ``always`` and the best others, ``number`` in all."""
    length = scores.shape[0]
    order = sorted((place for place in range(length - always) if among[place]), key=lambda place: -float(scores[place]))
    chosen = torch.zeros(length, dtype=torch.bool)
    chosen[[*order[: max(0, number - always)], *range(length - always, length)]] = True
    return chosen


def loop(
    model: Any, ids: Tensor, shares: dict[int, Any], *, drop: float = 1 / 32, probed: bool = False, dense_mlp: bool = False, queries: int = 1
) -> tuple[Tensor, list[int]]:
    """Logits (L, V) of one text (L,) under spts, and how many keys each layer leaves."""
    x, length, config = model.model.embed_tokens(ids), len(ids), model.config
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    base, causal = config.rope_parameters["rope_theta"], torch.ones(length, length).tril().bool()
    candidates, row, sizes = torch.ones(length, dtype=torch.bool), torch.zeros(length), []

    def count(share: Any) -> int:
        return min(length, share) if isinstance(share, int) else round(share * length)

    for number, layer in enumerate(model.model.layers):
        if number in BEGINS and drop:
            gone = round(drop * (1 + BEGINS.index(number)) * length)
            candidates = best(row, candidates, max(count(shares[number]), length - gone), queries)
        attn, given = layer.self_attn, rms(x, layer.input_layernorm)
        parts = [part(given).unflatten(-1, (-1, attn.head_dim)) for part in (attn.q_proj, attn.k_proj, attn.v_proj)]       # (L, heads, d)
        logits = torch.stack(
            [turned(parts[0][:, h], base) @ turned(parts[1][:, h // groups], base).T * attn.head_dim**-0.5 for h in range(heads)]
        )                                                                # (H, L, L)
        maps = logits.masked_fill(~(causal & candidates), -torch.inf).softmax(-1)
        row = maps[:, length - queries :].mean(dim=(0, 1))               # S_mha
        runs = best(row, candidates, count(shares[number]), queries) if number in shares else candidates
        seen = logits.masked_fill(~(causal & runs), -torch.inf).softmax(-1)
        answers = torch.stack([seen[h] @ parts[2][:, h // groups] for h in range(heads)], dim=1).flatten(1)
        x = torch.where(runs[:, None], x + attn.o_proj(answers), x)
        sizes.append(int(runs.sum()))
        given = rms(x, layer.post_attention_layernorm)
        moved = layer.mlp.down_proj(functional.silu(layer.mlp.gate_proj(given)) * layer.mlp.up_proj(given))
        if number in shares and not dense_mlp:
            runs = best(moved.norm(dim=-1) * row if probed else row, candidates, count(shares[number]), queries)
        else:
            runs = candidates
        x = torch.where(runs[:, None], x + moved, x)
    return model.lm_head(rms(x, model.model.norm)), sizes


@pytest.mark.parametrize("rows", [[40], [37, 22, 30]], ids=["one", "padded"])
@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({}, {"queries": 16}),
        ({"queries": 1}, {}),
        ({"queries": 1, "mlp": "dense"}, {"dense_mlp": True}),
        ({"queries": 1, "probe": True}, {"probed": True}),
        ({"queries": 1, "drop": 0.1}, {"drop": 0.1}),
        ({"queries": 1, "drop": 0}, {"drop": 0}),
        ({"queries": 5, "drop": 0.15}, {"queries": 5, "drop": 0.15}),
        ({"queries": 1, "keep": [30, 25, 12, 6]}, {}),
    ],
    ids=lambda part: ",".join(part) or "default",
)
@torch.no_grad()
def test_a_prompt_equals_the_loop(rows: list[int], options: dict[str, Any], asked: dict[str, Any], tmp_path: Path) -> None:
    """Logits at every place, and the keys that each layer keeps."""
    model: Any = SIX.build()
    inputs = SIX.prompt([[length] for length in rows])
    given = dict(options)
    keep = given.pop("keep", list(SHARES.values()))
    if given.pop("probe", False):                                        # full width and rank: its norms are the MLP's
        given["probe"] = make_probes(model, decoder_of(model).layers, [inputs], tmp_path, width=10_000, rank=10_000)  # type: ignore[arg-type]
    dense = model(**inputs).logits
    with vlprune.apply(model, "spts", keep=keep, **given) as handle:
        out = model(**inputs, use_cache=True)
        ran = handle.trace.ran
    shares, real = dict(zip(SHARES, keep, strict=True)), inputs["attention_mask"].bool()
    for number, length in enumerate(rows):
        expected, sizes = loop(model, inputs["input_ids"][number, -length:], shares, **asked)
        torch.testing.assert_close(out.logits[number, -length:], expected, rtol=1e-4, atol=2e-4)
        assert not torch.allclose(dense[number, -length:], expected, atol=1e-2)
        assert [int((ran[layer, "attn"] & real)[number].sum()) for layer in shares] == sizes[START:]
        if len(rows) == 1:                                               # rows of a batch are evened out in the cache
            assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == sizes


@torch.no_grad()
def test_the_loop_without_budgets_is_the_model() -> None:
    """So that the loop is right about everything else."""
    model: Any = SIX.build()
    inputs = SIX.prompt([[40]])
    logits, sizes = loop(model, inputs["input_ids"][0], {}, drop=0)
    torch.testing.assert_close(logits[None], model(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert sizes == [40] * 6


# budgets


def test_stages_begin_where_published() -> None:
    """Llama-3.1-8B by default, whatever the unit of ``keep``; Qwen2.5-7B and openPangu-1B by their numbers."""
    for keep in (0.3, 2048, [0.9, 0.7, 0.5, 0.3, 0.2]):
        shares = active(vlprune.get_method("spts").build(facts(), keep))
        begins = [10, 14, 19, 24, *([29] if isinstance(keep, list) else [])]                       # by default the layers behind the last stage keep its M
        assert [layer for layer in sorted(shares) if shares[layer] != shares.get(layer - 1)] == begins
    for depth, start, ends, thousands in ((28, 9, (12, 16, 20, 24), (13, 10, 7, 4)), (26, 11, (13, 16, 19, 22), (13, 10, 7, 4))):
        keep = [1024 * number for number in (*thousands, thousands[-1])]
        method = vlprune.get_method("spts").build(facts(depth), keep, start=start, ends=ends, drop=1 / 16)
        counts = active(method)
        widths = [end + 1 - begin for begin, end in zip((start, *(end + 1 for end in ends)), (*ends, depth - 1), strict=True)]
        assert [counts[layer] for layer in range(start, depth)] == list(itertools.chain(*([part] * width for part, width in zip(keep, widths, strict=True))))
        assert active(method, "mlp") == counts
        assert [stage.point.layer - 1 for stage in method.stages] == list(ends)
        assert [stage.budget.num_keep(32 * 1024) // 1024 for stage in method.stages] == [30, 28, 26, 24], "2K leave behind each stage"


def test_one_for_each_stage_counts_and_all() -> None:
    """Shares and numbers as given; a number for the last stage puts the others in proportion; what is everything is not bypassed."""
    spts = vlprune.get_method("spts").build
    assert active(spts(facts(6), [0.9, 40, 0.5, 7])) == {2: 0.9, 3: 40, 4: 0.5, 5: 7}
    assert active(spts(facts(6), 20)) == {2: 90, 3: 70, 4: 40, 5: 20}
    assert active(spts(facts(6), [1.0, 1.0, 0.5, 0.25])) == {4: 0.5, 5: 0.25}
    whole = spts(facts(6), 1.0)
    assert not any(bypass.in_prompts for bypass in whole.bypasses)
    assert not [stage for stage in whole.stages if not stage.budget.is_everything]
    assert [stage.budget.num_keep(100) for stage in spts(facts(6), [0.9, 0.99, 0.5, 0.25]).stages] == [99, 94, 91], "as many stay as run next"
    assert not spts(facts(6), 0.5, drop=0).stages
    assert set(active(spts(facts(6), 0.5, mlp="dense"), "mlp")) == set()


@torch.no_grad()
def test_random_ranking_spends_the_same_and_looks_at_nothing() -> None:
    model: Any = SIX.build()
    inputs = SIX.prompt([[33], [21]])
    found = {}
    for name, options in (("spts", {}), ("random", {"ranking": "random"}), ("other", {"ranking": "random", "seed": 1})):
        with vlprune.apply(model, "spts", keep=0.5, queries=1, **options) as handle:
            out = model(**inputs, use_cache=True)
            sizes = [layer.keys.shape[2] for layer in out.past_key_values.layers]
            found[name] = (sizes, [(r.point, r.visual_before, r.visual_kept) for r in handle.report().bypasses], out.logits, handle.trace.scorer_flops)
    assert found["spts"][:2] == found["random"][:2] == found["other"][:2]
    assert found["random"][3] == 0 < found["spts"][3]
    assert not torch.allclose(found["random"][2], found["spts"][2], atol=1e-2)
    assert not torch.allclose(found["random"][2], found["other"][2], atol=1e-2)


@torch.no_grad()
def test_candidates_only_shrink_and_only_they_run() -> None:
    """A token that a layer passes by may run in a later one; one that left does not."""
    model: Any = SIX.build()
    inputs = SIX.prompt([[48]])
    with vlprune.apply(model, "spts", keep=[0.5, 0.45, 0.4, 0.3], drop=0.15, queries=1) as handle:
        model(**inputs)
        trace = handle.trace
    candidates, back = torch.ones(48, dtype=torch.bool), False
    points = {int(record.point.partition(":")[2]): record for record in trace.points}
    assert sorted(points) == list(BEGINS)
    before: Tensor | None = None
    for layer in range(START, 6):
        if layer in points:
            record = points[layer]
            stays = candidates.clone()
            places = record.items[0].positions
            stays[places] = False
            stays[places[record.kept[0].cpu()]] = True
            assert not (stays & ~candidates).any()
            assert int((candidates & ~stays).sum()) == [7, 7, 8][layer - 3], "a share of the prompt, rounded in sum"
            candidates = stays
        for part in ("attn", "mlp"):
            assert not (trace.ran[layer, part][0] & ~candidates).any()
            assert int(trace.ran[layer, part].sum()) == round({2: 0.5, 3: 0.45, 4: 0.4, 5: 0.3}[layer] * 48)
        back = back or (before is not None and bool((trace.ran[layer, "attn"][0] & ~before).any()))
        before = trace.ran[layer, "attn"][0]
    assert back


# who is asked


@torch.no_grad()
def test_the_row_of_several_queries_is_the_mean_of_theirs() -> None:
    """Against the eager map, at the point and probed, for rows of a padded batch."""
    tiny = text_families()["llama"]
    model: Any = tiny.build("eager")
    inputs = tiny.prompt([[23], [17]])
    seen: list[Tensor] = []

    class Look:
        needs = (Tap("last_row", 2, (4,)),)

        def __call__(self, given: ScoreInputs) -> Tensor:
            seen.append(given.signal(self.needs[0]))
            return seen[-1]

    bypass = Bypass(2, "attn", kv="active_only", tokens="text", protect=(0, 4), budget=Budget(0.5), scorer=Look(), selector=TopK())
    with vlprune.apply(model, PruningMethod("l", bypasses=(bypass, replace(bypass, part="mlp", kv="full")))):
        model(**inputs)
    maps = model(**inputs, output_attentions=True).attentions[2]
    assert len(seen) == 4
    for values in seen:
        row, length = (0, 23) if values.shape[1] == 19 else (1, 17)
        torch.testing.assert_close(values[0], maps[row, :, -4:, -length:-4].mean(dim=(0, 1)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "llava", "qwen2_5_vl"])
def test_several_queries_on_every_kind_of_prompt(family: str) -> None:
    """Prefill and decoding equal one long forward; more queries than a row has text is all of its text, which then runs as a whole."""
    tiny = text_families()[family]
    model = tiny.build("eager" if family == "gemma2" else "sdpa")
    for options in ({"queries": 4}, *([{"queries": 14, "tokens": "all"}] if tiny.modalities else [])):
        check_one_long_forward(tiny, model, build("spts", model, 0.4, **options), prompts(tiny))
    inputs = tiny.prompt([[12]])
    with torch.no_grad():
        dense = model(**inputs).logits
        with vlprune.apply(model, "spts", keep=0.3, queries=40):
            assert torch.equal(model(**inputs).logits, dense)


def test_a_second_turn_shorter_than_the_queries() -> None:
    """The turn's own tokens are asked, and all run."""
    model: Any = SIX.build()
    first, second = SIX.prompt([[30]]), SIX.prompt([[5]], seed=1)
    with vlprune.apply(model, "spts", keep=0.4, queries=8):
        out = generate(model, first)
        turn = {"input_ids": torch.cat([out.sequences, second["input_ids"]], 1), "past_key_values": out.past_key_values}
        again = generate(model, turn)
    assert torch.isfinite(torch.stack(again.logits)).all()
    assert again.sequences.shape[1] == turn["input_ids"].shape[1] + 5


@pytest.mark.skipif(not ASSETS.is_dir(), reason="the recall model is not in this installation")
def test_later_questions_and_who_is_asked() -> None:
    """One query, which is the published choice, ranks what later questions need below chance where much is kept; the default does not (see the module)."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(ASSETS, dtype=torch.float32, local_files_only=True).eval()
    texts = [recall.text("heldout", index) for index in range(10)]
    right = {}
    for name, options in (("one", {"queries": 1}), ("default", {}), ("random", {"ranking": "random"})):
        answers, _ = recall_answers(model, texts, 8, vlprune.get_method("spts").build(facts(model.config.num_hidden_layers), 0.75, **options))
        right[name] = (float(answers[:, 0].float().mean()), float(answers[:, 1:].float().mean()))
    assert right["one"][0] >= 0.9
    assert right["default"][0] >= 0.9
    assert right["one"][1] < 0.8, "otherwise the head of the module and the results say too much"
    assert right["default"][1] > 0.9 > right["random"][1]


@pytest.mark.parametrize(
    ("keep", "options", "words"),
    [
        (0.5, {"queries": 0}, "queries=0: how many last text tokens are asked, a whole number from 1"),
        (0.5, {"queries": True}, "whole number from 1"),
        (0.5, {"queries": 2.0}, "whole number from 1"),
        (0.5, {"start": 32}, "start=32: a layer number from 0 to 31"),
        (0.5, {"ends": [20, 15]}, "rising layer numbers from 10 to 31"),
        (0.5, {"drop": True}, "from 0 to below 1"),
        (0.5, {"drop": -0.1}, "from 0 to below 1"),
        (0.5, {"ranking": "best"}, "'attention', 'random'"),
        (0.5, {"tokens": "visual"}, "'text', or 'all'"),
        (0.5, {"protect": (0, 0)}, "the last one has to"),
        (0.5, {"probe": "no/such/folder"}, r"no layer_0\.safetensors: make them for this model's 32 layers, with vlprune calibrate"),
        (1.5, {}, "1.5"),
        ([0.5, 0.4, 0.3, 0.2], {}, "begin at layers 10, 14, 19, 24, 29"),
        ([0.9, 0.7, 0.5, 0.3, 0], {}, "0"),
    ],
)
def test_wrong_options_say_what_would_do(keep: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        vlprune.get_method("spts").build(facts(), keep, **options)

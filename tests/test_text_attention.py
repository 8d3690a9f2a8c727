"""Attention that heads choose for themselves: Token Sparse Attention, FASA and kNN attention, each against a loop; calibration; what it costs."""

from __future__ import annotations

import copy
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
from tests.test_text_laws import STEPS, TOLERANCE, backend, build, check_one_long_forward, generate, prompts
from tests.tiny import families
from tests.tiny_text import text_families
from vlprune.bench import PeakMeter
from vlprune.budget import Budget
from vlprune.errors import OptionError, UnsupportedPointError
from vlprune.kernels import top_attention
from vlprune.kernels.chosen_attention import attend_heads, put_rows, take_rows
from vlprune.kernels.top_attention import top_places
from vlprune.method import Attend, ModelFacts, PruningMethod
from vlprune.methods.fasa import DominantKeys
from vlprune.methods.knn_attention import NearestKeys
from vlprune.methods.token_sparse_attention import SparseHeads, covered
from vlprune.protocols import HeadChoice, HeadInputs
from vlprune.skipping.calibrate import calibrate
from vlprune.skipping.drift import load_drift, still_layers
from vlprune.skipping.frequency_chunks import Chunks, agreement, chunk_pairs, chunk_scores, load_chunks

NAMES = ("token_sparse_attention", "fasa", "knn_attention")
FACTS = ModelFacts(decoder_layers=32, token_sets=("text", "all"))


def prefill(counts: list[int], length: int, *, heads: int = 4, shared: int = 2, width: int = 8, seed: int = 0) -> HeadInputs:
    """Random queries and keys of rows with ``counts`` real tokens, padded on the left."""
    torch.manual_seed(seed)
    batch = len(counts)
    real = torch.arange(length) >= length - torch.tensor(counts)[:, None]
    mask = torch.ones(length, length).tril().bool()[None, None] & real[:, None, None] if min(counts) < length else None
    sizes = [torch.randn(batch, number, length, width) for number in (heads, shared, shared)]
    return HeadInputs(0, "prefill", *sizes, mask, 0.4, tokens=real, real=real, real_counts=tuple(counts), counts=tuple(counts), plain=True)


def decode(total: int, *, batch: int = 2, heads: int = 4, shared: int = 2, width: int = 8, mask: Tensor | None = None, cap: float | None = None) -> HeadInputs:
    torch.manual_seed(1)
    queries, keys, values = torch.randn(batch, heads, 1, width), torch.randn(batch, shared, total, width), torch.randn(batch, shared, total, width)
    return HeadInputs(0, "decode", queries, keys, values, mask, 0.4, cap=cap)


# token sparse attention


def by_hand(inputs: HeadInputs, row: int, keep: int, window: int, pool: int) -> list[list[int]]:
    """Places that each head of a row keeps, as the paper's steps say."""
    assert inputs.real is not None
    places = torch.nonzero(inputs.real[row]).flatten().tolist()
    asking, before = places[-window:], places[:-window]
    found = []
    for head in range(inputs.queries.shape[1]):
        keys = inputs.keys[row, head // 2]
        rows = []
        for place in asking:
            seen = [other for other in places if other <= place]
            weights = (keys[seen] @ inputs.queries[row, head, place] * inputs.scale).softmax(0)
            rows.append({other: float(weight) for other, weight in zip(seen, weights, strict=True)})
        scores = torch.tensor([[sum(weights[place] for weights in rows) / len(rows) for place in before]])
        smooth = functional.avg_pool1d(scores, pool, 1, pool // 2)[0]
        best = smooth.argsort(descending=True)[: keep - window].tolist()
        found.append(sorted([before[i] for i in best] + asking))
    return found


@pytest.mark.parametrize("counts", [[30, 30], [30, 21]])
def test_each_head_keeps_what_the_window_looks_at(counts: list[int]) -> None:
    inputs = prefill(counts, 30)
    choice = SparseHeads(Budget(0.5), window=5, pool=3, coverage=None)(inputs)
    assert choice is not None
    assert choice.keys is choice.queries
    assert choice.keys is not None
    for row, count in enumerate(counts):
        keep = Budget(0.5).num_keep(count)
        expected = by_hand(inputs, row, keep, 5, 3)
        assert len({tuple(places) for places in expected}) > 1, "heads agree: the test shows nothing"
        for head in range(4):
            assert choice.keys[row, head, :keep].tolist() == expected[head]
            assert choice.keys[row, head, keep:].tolist() == [30] * (15 - keep), "filler"
    alone = SparseHeads(Budget(0.5), window=50, pool=3, coverage=None)(inputs)       # longer than half of what stays: half of it
    assert alone is not None
    assert alone.keys is not None
    assert alone.keys[0, 0, :15].tolist() == by_hand(inputs, 0, 15, 7, 3)[0]


def test_coverage_says_how_many_leave() -> None:
    scores = torch.tensor([[0.01, 0.5, 0.02, 0.03, 0.44, 9.0], [0.2, 0.2, 0.2, 0.2, 0.2, 9.0]])
    free = torch.tensor([[True] * 5 + [False]] * 2)
    assert covered(scores, free, 0.05).tolist() == [3, 0], "0.01 and 0.03 lie below; as in the paper one more leaves, and nobody where none does"
    assert covered(scores, free, 0.0).tolist() == [0, 0]
    assert covered(scores, free, 0.45).tolist() == [4, 3]
    inputs = prefill([40, 33], 40)
    rule = SparseHeads(Budget(12), window=4, pool=3, coverage=0.4)
    choice = rule(inputs)
    assert choice is not None
    assert choice.keys is not None
    kept = [int((choice.keys[row, 0] < 40).sum()) for row in range(2)]
    assert all(12 <= number < count for number, count in zip(kept, (40, 33), strict=True))
    assert kept[0] != kept[1]
    fewest = replace(rule, coverage=0.99)(inputs)
    assert fewest is not None
    assert fewest.keys is not None
    assert fewest.keys.shape[2] == 12
    assert replace(rule, coverage=0.0)(inputs) is None, "nothing leaves: dense"
    assert replace(rule, budget=Budget(40))(inputs) is None
    tiny = text_families()["llama"]
    model, prompt = tiny.build(), tiny.prompt(prompts(tiny))
    with torch.no_grad():
        plain = model(**prompt).logits  # type: ignore[operator]
        with vlprune.apply(model, "token_sparse_attention", keep=4, coverage=0.0, window=4):
            assert torch.equal(model(**prompt).logits, plain), "bit for bit"  # type: ignore[operator]
        with vlprune.apply(model, "token_sparse_attention", keep=4, coverage=0.3, window=4) as handle:
            assert not torch.equal(model(**prompt).logits, plain)  # type: ignore[operator]
            assert 8 <= handle.report().heads[0].kept < 37


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "qwen2_5_vl"])
def test_coverage_with_prompts_of_different_lengths(family: str) -> None:
    tiny = text_families()[family]
    model = tiny.build(backend(tiny))
    check_one_long_forward(tiny, model, build("token_sparse_attention", model, 6, coverage=0.3), prompts(tiny))


def test_no_mask_is_built_where_padding_is_all_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filler stands behind the real tokens, so attention among the chosen ones is causal; a sliding window needs its mask."""
    calls: list[tuple[int, bool]] = []
    plain = functional.scaled_dot_product_attention

    def watched(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append((query.shape[2], kwargs.get("attn_mask") is not None))
        return plain(query, *args, **kwargs)

    for name, masked in (("llama", False), ("mistral", True)):
        tiny = text_families()[name]
        model, inputs = tiny.build(), tiny.prompt(prompts(tiny))
        calls.clear()
        with monkeypatch.context() as patch, vlprune.apply(model, "token_sparse_attention", keep=12, window=4), torch.no_grad():
            patch.setattr("vlprune.kernels.chosen_attention.functional.scaled_dot_product_attention", watched)
            model(**inputs)  # type: ignore[operator]
        assert {has for rows, has in calls if rows == 12} == {masked}
        assert len([rows for rows, _ in calls if rows == 12]) >= 2


def test_masks_are_built_for_a_few_heads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = replace(prefill([20, 14], 20), plain=False)
    choice = SparseHeads(Budget(0.5), window=4, pool=3, coverage=None)(inputs)
    whole = attend_heads(inputs, choice)
    torch.testing.assert_close(attend_heads(replace(inputs, plain=True), choice)[inputs.real[:, None].expand(-1, 4, -1)],  # type: ignore[index]
                               whole[inputs.real[:, None].expand(-1, 4, -1)])  # type: ignore[index]  # fmt: skip
    monkeypatch.setattr("vlprune.kernels.chosen_attention.MASK_LIMIT", 1)
    torch.testing.assert_close(attend_heads(inputs, choice), whole)


def test_a_second_turn_is_dense_on_all_keys() -> None:
    tiny = text_families()["qwen3"]
    model, inputs = tiny.build(), tiny.prompt([[23]])
    more = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        with vlprune.apply(model, "token_sparse_attention", keep=0.4, window=4):
            cache = model(**inputs, use_cache=True).past_key_values  # type: ignore[operator]
            kept = copy.deepcopy(cache)
            assert all(layer.keys.shape[2] == 23 for layer in cache.layers)
            second = model(input_ids=more, past_key_values=cache).logits  # type: ignore[operator]
        assert torch.equal(second, model(input_ids=more, past_key_values=kept).logits)  # type: ignore[operator]


def test_heads_cost_what_the_report_says() -> None:
    tiny = text_families()["llama"]
    model, inputs = tiny.build(), tiny.prompt([[40]])
    with torch.no_grad(), vlprune.apply(model, "token_sparse_attention", keep=10, window=4) as handle:
        model(**inputs)  # type: ignore[operator]
        report = handle.report()
    saved = 2 * 4 * (40 * 41 / 2 - 10 * 11 / 2) * 32                         # two layers, 4 heads of 8
    assert report.parts["decoder_dense"] - report.parts["decoder"] == saved
    assert report.parts["scorer"] == 2 * 2 * 4 * 40 * 32
    assert report.kv_bytes_pruned == report.kv_bytes_dense
    assert [(head.point, head.before, head.kept) for head in report.heads] == [("llm:2.heads", 40, 10), ("llm:3.heads", 40, 10)]
    assert "llm:2.heads" in str(report)
    assert report.to_dict()["heads"][0]["run"] == 10
    assert "llm:2.heads" in repr(handle)
    with vlprune.apply(model, "fasa", keep=10) as handle:
        generate(model, inputs)
        assert handle.report().decoding["keys_seen"] == pytest.approx(sum([10] * 4) / sum(range(41, 45)))
        assert "looked at" in str(handle.report())
    with torch.no_grad(), vlprune.apply(model, "knn_attention", keep=10, phase="prefill") as handle:
        model(**inputs)  # type: ignore[operator]
        report = handle.report()
    pairs = 10 * 11 / 2 + 30 * 10
    assert report.parts["decoder_dense"] - report.parts["decoder"] == 4 * 4 * (820 - pairs) * 32
    assert report.parts["scorer"] == 4 * 2 * (820 - pairs) * 32, "logits of all pairs"


@pytest.mark.parametrize("tokens", ["text", "visual"])
def test_among_some_tokens_the_others_always_stay(tokens: str) -> None:
    tiny = families()["llava"]
    model, inputs = tiny.build(), tiny.prompt([[9, "image", 12], [30, "image", 3]])
    seen: list[HeadChoice] = []
    method = build("token_sparse_attention", model, 0.4, tokens=tokens)
    rule = method.attends[0].choose

    def look(given: HeadInputs) -> HeadChoice | None:
        assert rule is not None
        choice = rule(given)
        seen.extend([choice] if choice is not None else [])
        return choice

    with torch.no_grad(), vlprune.apply(model, replace(method, attends=(replace(method.attends[0], choose=look),))):
        model(**inputs)
    visual = inputs["input_ids"] == 97
    real = inputs["attention_mask"].bool()
    mine = visual if tokens == "visual" else real & ~visual
    assert seen[0].keys is not None
    for row, head in itertools.product(range(2), range(4)):
        stays = torch.zeros(real.shape[1] + 1, dtype=torch.bool)
        stays[seen[0].keys[row, head]] = True
        assert bool((stays[:-1] | mine[row] | ~real[row]).all()), "tokens outside the set stay"
        assert int((stays[:-1] & mine[row]).sum()) == Budget(0.4).num_keep(int(mine[row].sum()))


def test_random_ranking_has_the_same_budget_and_a_seed() -> None:
    tiny = text_families()["llama"]
    model, inputs = tiny.build(), tiny.prompt(prompts(tiny))
    outs = []
    for options in ({}, {"ranking": "random"}, {"ranking": "random"}, {"ranking": "random", "seed": 3}):
        with torch.no_grad(), vlprune.apply(model, "token_sparse_attention", keep=0.5, window=4, **options) as handle:
            outs.append(model(**inputs).logits)  # type: ignore[operator]
            assert [head.kept for head in handle.report().heads] == [19, 19]
    assert torch.equal(outs[1], outs[2])
    assert not any(torch.equal(outs[1], other) for other in (outs[0], outs[3]))
    method = build("token_sparse_attention", model, 0.5, ranking="random")
    check_one_long_forward(tiny, model, method, prompts(tiny))
    with vlprune.apply(model, method):
        together = generate(model, inputs)
        alone = generate(model, tiny.prompt(prompts(tiny)[1:], row_numbers=[1]))
    torch.testing.assert_close(torch.stack(together.logits)[:, 1], torch.stack(alone.logits)[:, 0], **TOLERANCE)


# drift


def test_the_paper_chooses_layers_by_drift(tmp_path: Path) -> None:
    assert still_layers([0.5, 0.1, 0.3, 0.2, 0.9], 0.5) == [1, 2, 3]
    assert still_layers([0.4, 0.1, 0.3, 0.2], 0.5) == [1, 3], "the quantile of four lies between two of them"
    assert [attend.layer for attend in vlprune.get_method("token_sparse_attention").build(FACTS, 0.5).attends] == list(range(15, 31))
    tiny = text_families()["gemma3_text"]
    model, inputs = tiny.build(), [tiny.prompt([[12], [7]], seed=seed) for seed in range(2)]
    folder = calibrate("token_sparse_attention", model, inputs, tmp_path / "drift")
    found = load_drift(folder, 4)
    states: dict[int, tuple[Tensor, Tensor]] = {}
    layers: Any = decoder_of(model).layers
    hooks = [layer.register_forward_hook(lambda m, args, out, n=n: states.__setitem__(n, (args[0], out))) for n, layer in enumerate(layers)]
    moved = torch.zeros(4)
    for call in inputs:
        with torch.no_grad():
            model(**call)  # type: ignore[operator]
        real = call["attention_mask"].bool()
        for number, (before, after) in states.items():
            moved[number] += ((after - before).norm(dim=-1) / before.norm(dim=-1))[real].sum() / 38
    for hook in hooks:
        hook.remove()
    assert found == pytest.approx(moved.tolist(), rel=1e-4)
    method = build("token_sparse_attention", model, 0.5, layers=str(folder))
    assert [attend.layer for attend in method.attends] == still_layers(found) != [2, 3] or len(method.attends) == 2
    assert len(build("token_sparse_attention", model, 0.5, layers=folder, quantile=1.0).attends) == 4
    with pytest.raises(OptionError, match="this model has 5"):
        load_drift(folder, 5)
    with pytest.raises(OptionError, match="cannot be read"):
        load_drift(tmp_path, 4)


# fasa


def test_scores_of_all_chunks_are_the_logits() -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(3, 2, 8), torch.randn(3, 7, 8)
    halves = torch.stack([torch.arange(4), torch.arange(4) + 4], dim=1)
    scores = chunk_scores(queries, keys, halves)
    assert scores.shape == (4, 3, 2, 7)
    torch.testing.assert_close(scores.sum(0), queries @ keys.transpose(-1, -2))
    everything = Chunks(torch.rand(1, 4, 4), halves)
    assert bool((everything.dominant(0, 4) == 1).all())
    assert everything.dominant(0, 1).sum(dim=1).tolist() == [2] * 4
    inputs = decode(40)
    some, every = (DominantKeys(Budget(9), numbers)(inputs) for numbers in (everything.dominant(0, 4), None))
    assert torch.equal(some.keys, every.keys)  # type: ignore[union-attr, arg-type]


def test_heads_with_more_good_chunks_rank_by_more() -> None:
    halves = torch.stack([torch.arange(4), torch.arange(4) + 4], dim=1)
    found = torch.tensor([[[0.9, 0.1, 0.8, 0.7], [0.2, 0.3, 0.1, 0.6]]])
    chunks = Chunks(found, halves)

    def those(*asked: Any) -> list[list[int]]:
        numbers = chunks.above(0, *asked)
        assert torch.equal(numbers[:, :4], numbers[:, 4:]), "both numbers of a pair"
        return [torch.nonzero(row[:4]).flatten().tolist() for row in numbers]

    assert those(0.5, 1, 4) == [[0, 2, 3], [3]], "half of the eight, where they are"
    assert those(0.5, 2, 2) == [[0, 2], [1, 3]], "idle where both bounds are one number"
    assert torch.equal(chunks.above(0, 0.5, 2, 2), chunks.dominant(0, 2))
    assert those(1.0, 1, 4) == [[0], [3]]
    assert those(0.0, 1, 4) == [[0, 1, 2, 3]] * 2
    assert those(0.0, 1, 3) == [[0, 2, 3], [0, 1, 3]]


def test_chunks_are_read_off_the_rotation() -> None:
    """Halves, neighbours, and parts that do not turn."""
    turned = 0.8 * torch.eye(8)
    halves, neighbours, part = (turned.clone() for _ in range(3))
    for i in range(4):
        halves[i, i + 4], halves[i + 4, i] = 0.6, -0.6
        neighbours[2 * i, 2 * i + 1], neighbours[2 * i + 1, 2 * i] = 0.6, -0.6
    part[0, 2], part[2, 0], part[1, 3], part[3, 1] = 0.6, -0.6, 0.6, -0.6
    assert chunk_pairs(halves).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert chunk_pairs(neighbours).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert chunk_pairs(part).tolist() == [[0, 2], [1, 3], [4, 5], [6, 7]]


def test_agreement_is_the_share_of_the_best_keys() -> None:
    torch.manual_seed(2)
    queries, keys, places = torch.randn(2, 3, 8), torch.randn(2, 20, 8), torch.tensor([11, 15, 19])
    pairs = torch.stack([torch.arange(4), torch.arange(4) + 4], dim=1)
    found = agreement(queries, keys, places, pairs, 5)
    for head, chunk in itertools.product(range(2), range(4)):
        shares = []
        for i, place in enumerate(places.tolist()):
            whole = (keys[head, : place + 1] @ queries[head, i]).argsort(descending=True)[:5].tolist()
            own = (keys[head, : place + 1, pairs[chunk]] @ queries[head, i, pairs[chunk]]).argsort(descending=True)[:5].tolist()
            shares.append(len(set(whole) & set(own)) / 5)
        assert float(found[head, chunk]) == pytest.approx(sum(shares) / 3)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2_5_vl"])
def test_chunks_are_measured_once_and_resumed(family: str, tmp_path: Path) -> None:
    tiny = text_families()[family]
    model = tiny.build()
    row = [12, "image", 9] if tiny.modalities else [30]
    inputs = [tiny.prompt([row, [11]], seed=seed) for seed in range(10)]
    folder = calibrate("fasa", model, inputs, tmp_path / "whole", top=6, queries=4)
    found = load_chunks(folder, 4)
    assert found.agreement.shape == (4, 4, 4)
    assert found.pairs.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert bool((found.agreement > 0).any())
    assert bool(((found.agreement >= 0) & (found.agreement <= 1)).all())

    def stopped() -> Any:
        for number, call in enumerate(inputs):
            if number == 9:
                raise KeyboardInterrupt
            yield call

    with pytest.raises(KeyboardInterrupt):
        calibrate("fasa", model, stopped(), tmp_path / "parts", top=6, queries=4)
    assert not (tmp_path / "parts" / "frequency_chunks.safetensors").exists()
    told: list[int] = []
    again = calibrate("fasa", model, inputs, tmp_path / "parts", top=6, queries=4, progress=lambda done, total, what: told.append(done))
    assert told[0] == 8, "goes on behind what was written"
    torch.testing.assert_close(load_chunks(again, 4).agreement, found.agreement)
    assert calibrate("fasa", model, inputs, tmp_path / "parts", top=6, queries=4) == again
    with pytest.raises(OptionError, match="other numbers"):
        calibrate("fasa", model, inputs, tmp_path / "parts", top=7, queries=4)
    for chunks in (1, 0.5):
        check_one_long_forward(tiny, model, build("fasa", model, 0.6, calibration=folder, chunks=chunks), prompts(tiny))
    adaptive = build("fasa", model, 0.6, calibration=folder, threshold_ratio=0.6)
    asked = [attend.choose.numbers.sum(dim=1) / 2 for attend in adaptive.attends]  # type: ignore[union-attr]
    for layer, number in enumerate(asked):
        passing = (found.agreement[layer] >= found.agreement[layer].flatten().quantile(0.6)).sum(dim=1)
        assert number.tolist() == passing.clamp(min=1).tolist()
    assert any(len(set(number.tolist())) > 1 for number in asked), "heads rank by as many chunks: the test shows nothing"
    check_one_long_forward(tiny, model, adaptive, prompts(tiny))
    with pytest.raises(OptionError, match="at least 3 and at most 2"):
        build("fasa", model, 0.6, calibration=folder, threshold_ratio=0.6, min_chunks=3, max_chunks=0.5)
    with pytest.raises(OptionError, match="give one of them"):
        build("fasa", model, 0.6, calibration=folder, threshold_ratio=0.6, chunks=2)
    with pytest.raises(OptionError, match="this model has 5"):
        load_chunks(folder, 5)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("keep", [6, 0.1, 0.5])
def test_dominant_chunks_choose_the_keys(keep: Any, shared: bool) -> None:
    """Against a loop: of what each row may see the best by the chunks, its own key always."""
    total = 40
    mask = (torch.arange(total) >= torch.tensor([0, 11])[:, None])[:, None, None]
    inputs = decode(total, mask=mask)
    numbers = torch.zeros(4, 8)
    numbers[:, [1, 5]] = 1
    budget = Budget(keep)
    choice = DominantKeys(budget, numbers, shared)(inputs)
    assert choice is not None
    assert (choice.keys is None) == (keep == 0.5), "many keys are hidden, few are copied"
    out = attend_heads(inputs, choice)
    for row, head in itertools.product(range(2), range(4)):
        free = torch.nonzero(mask[row, 0, 0]).flatten()
        mates = [other for other in range(4) if other // 2 == head // 2] if shared else [head]
        scores = sum(inputs.keys[row, head // 2, free][:, [1, 5]] @ inputs.queries[row, mate, 0, [1, 5]] for mate in mates)
        assert isinstance(scores, Tensor)
        scores[-1] = torch.inf
        best = free[scores.argsort(descending=True)[: budget.num_keep(free.numel())]]
        weights = (inputs.keys[row, head // 2, best] @ inputs.queries[row, head, 0] * 0.4).softmax(0)
        torch.testing.assert_close(out[row, head, 0], weights @ inputs.values[row, head // 2, best])


# knn


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("keep", [5, 0.1, 0.6])
def test_the_nearest_keys_while_decoding(keep: Any, cap: float | None) -> None:
    mask = (torch.arange(40) >= torch.tensor([0, 11])[:, None])[:, None, None]
    inputs = decode(40, mask=mask, cap=cap)
    choice = NearestKeys(Budget(keep))(inputs)
    assert choice is not None
    assert choice.out is not None
    for row, head in itertools.product(range(2), range(4)):
        free = torch.nonzero(mask[row, 0, 0]).flatten()
        logits = inputs.keys[row, head // 2, free] @ inputs.queries[row, head, 0] * 0.4
        logits = torch.tanh(logits / cap) * cap if cap else logits
        best = logits.argsort(descending=True)[: Budget(keep).num_keep(free.numel())]
        torch.testing.assert_close(choice.out[row, head, 0], logits[best].softmax(0) @ inputs.values[row, head // 2, free[best]])


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "qwen2_5_vl"])
@pytest.mark.parametrize("phase", ["prefill", "both"])
def test_the_nearest_keys_in_prompts(family: str, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows at a time, too; the answer is that of one long forward in which each query sees its best keys."""
    tiny = text_families()[family]
    model = tiny.build(backend(tiny))
    if family in ("llama", "gemma2"):
        monkeypatch.setitem(top_attention.LIMIT, "cpu", 500)
    for keep in (4, 0.4):
        check_one_long_forward(tiny, model, build("knn_attention", model, keep, phase=phase), prompts(tiny))


def test_memory_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(top_attention.LIMIT, "cpu", 1 << 12)
    peaks = []
    for length in (256, 512):
        inputs = replace(prefill([length], length, heads=2, shared=1), mask=None)
        with PeakMeter() as meter:
            NearestKeys(Budget(8))(inputs)
        peaks.append(meter.most)
    assert peaks[1] < 2.3 * peaks[0]
    assert peaks[1] < 4 * 512 * 512


def test_best_places_in_two_steps_are_those_of_one() -> None:
    torch.manual_seed(0)
    for total, number in ((64, 8), (67, 8), (1000, 9), (4099, 256), (10, 9)):
        scores = torch.randn(2, 3, total)
        expected = scores.topk(number, dim=-1)
        values, places = top_places(scores, number, True)
        assert torch.equal(values, expected.values)
        assert torch.equal(places, expected.indices)
        assert torch.equal(top_places(scores, number, False)[1].sort(-1).values, expected.indices.sort(-1).values)


# all of them


def test_rows_are_taken_and_put_back() -> None:
    x = torch.randn(2, 2, 9, 3)
    index = torch.tensor([0, 4, 8, 9]).expand(2, 4, -1)
    for table in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        taken = take_rows(table, index)
        for b, h, i in itertools.product(range(2), range(4), range(3)):
            assert torch.equal(taken[b, h, i], x[b, h // 2, index[b, h, i]])
    back = put_rows(take_rows(x, index[:, :2]), index[:, :2], 9)
    assert torch.equal(back[:, :, [0, 4, 8]], x[:, :, [0, 4, 8]])
    assert bool((back[:, :, [1, 2, 3, 5, 6, 7]] == 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_static_caches_and_embeddings(name: str) -> None:
    tiny = text_families()["llama"]
    model, inputs = tiny.build(), tiny.prompt(prompts(tiny))
    card = vlprune.get_method(name)
    with vlprune.apply(model, name, keep=0.6, **card.test_options), torch.no_grad():
        growing = torch.stack(generate(model, inputs).logits)
        static = torch.stack(generate(model, inputs, cache_implementation="static", disable_compile=True).logits)
        torch.testing.assert_close(static, growing, **TOLERANCE)
        right = tiny.prompt(prompts(tiny), padding="right")
        logits = model(**right).logits  # type: ignore[operator]
        for row, (part, whole) in enumerate(zip(prompts(tiny), right["attention_mask"].bool(), strict=True)):
            alone = model(**tiny.prompt([part], row_numbers=[row])).logits[0]  # type: ignore[operator]
            torch.testing.assert_close(logits[row, whole], alone, **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_stays_as_the_model_made_it(name: str) -> None:
    """Sliding windows keep their own layers, so decoding costs what it did."""
    tiny = text_families()["gemma3_text"]
    model, inputs = tiny.build(), tiny.prompt([[23]])
    attention: Any = decoder_of(model).layers[3].self_attn  # type: ignore[index, union-attr]
    config = attention.config
    dense = generate(model, inputs).past_key_values
    with vlprune.apply(model, name, keep=0.5, **vlprune.get_method(name).test_options):
        assert attention.config.hidden_size == config.hidden_size
        cache = generate(model, inputs).past_key_values
    assert [type(layer) for layer in cache.layers] == [type(layer) for layer in dense.layers]
    assert attention.config is config


def test_layers_without_rotation_are_the_models_own_business() -> None:
    """The module's forward runs as it is: SmolLM3 leaves some layers unrotated."""
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    torch.manual_seed(0)
    config = SmolLM3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=128, no_rope_layers=[1, 0, 1, 0],
        pad_token_id=0,
    )  # fmt: skip
    model = SmolLM3ForCausalLM(config).eval()
    ids = torch.randint(1, 90, (1, 20))

    def everything(given: HeadInputs) -> HeadChoice:
        return HeadChoice(keys=torch.arange(given.keys.shape[2]).expand(*given.queries.shape[:2], -1))

    attends = tuple(Attend(layer, choose=everything, tokens="all", stateless=True) for layer in range(4))
    with torch.no_grad():
        plain = model(ids).logits
        with vlprune.apply(model, PruningMethod("h", attends=attends)):
            torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-5)


def test_together_with_visual_pruning() -> None:
    """A text-side choice on what a visual method left; both are in the report."""
    tiny = families()["llava"]
    model, inputs = tiny.build(), tiny.prompt([[9, "image", 12], [14, "image", 3]])
    with torch.no_grad():
        with vlprune.apply(model, "hiprune", keep=0.5):
            alone = model(**inputs).logits
        with vlprune.apply(model, ["hiprune", "token_sparse_attention"], hiprune={"keep": 0.5}, token_sparse_attention={"keep": 200}):
            torch.testing.assert_close(model(**inputs).logits, alone)
        with vlprune.apply(model, ["hiprune", "token_sparse_attention", "fasa"], keep=0.5, token_sparse_attention={"window": 4}) as handle:
            out = generate(model, inputs)
            report = handle.report()
    assert out.sequences.shape[1] == inputs["input_ids"].shape[1] + STEPS
    assert report.points[0].tokens == "visual"
    assert [head.point for head in report.heads] == ["llm:2.heads", "llm:3.heads"]
    before = report.heads[0].before
    assert before == 36 + 38, "what the visual method left"
    assert report.decoding["keys_seen"] < 1


def test_two_choices_in_one_layer_are_refused() -> None:
    model = text_families()["llama"].build()
    rule = NearestKeys(Budget(4))
    twice = (Attend(2, choose=rule, tokens="all"), Attend(2, choose=rule, tokens="all"))
    with pytest.raises(UnsupportedPointError, match="twice in layer 2"):
        vlprune.apply(model, PruningMethod("t", attends=twice))
    with vlprune.apply(model, ["token_sparse_attention", "knn_attention"], knn_attention={"keep": 5}):
        pass


@pytest.mark.parametrize(
    ("method", "keep", "options", "words"),
    [
        ("token_sparse_attention", 0.5, {"window": 0}, "window=0"),
        ("token_sparse_attention", 0.5, {"pool": 4}, "an odd number"),
        ("token_sparse_attention", 0.5, {"coverage": 1}, "below 1"),
        ("token_sparse_attention", 0.5, {"tokens": "words"}, "'text', or 'all'"),
        ("token_sparse_attention", 0.5, {"ranking": "best"}, "'random'"),
        ("token_sparse_attention", 0.5, {"layers": [32]}, "from 0 to 31"),
        ("token_sparse_attention", 0.5, {"layers": "nowhere"}, "cannot be read"),
        ("fasa", 0.5, {"chunks": 4}, "measured first"),
        ("fasa", 0.5, {"calibration": "nowhere"}, "vlprune calibrate"),
        ("fasa", 0.5, {"threshold_ratio": 1.2}, "from 0"),
        ("fasa", 0.5, {"threshold_ratio": 0.8}, "a quantile of what was measured"),
        ("fasa", 0.5, {"min_chunks": 2}, "give it too"),
        ("fasa", 0.5, {"layers": [-1]}, "from 0 to 31"),
        ("knn_attention", 0.5, {"phase": "never"}, "'prefill', 'decode', 'both'"),
        ("knn_attention", 0, {}, "at least one"),
    ],
)
def test_what_does_not_fit_is_an_error(method: str, keep: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        vlprune.get_method(method).build(FACTS, keep, **options)

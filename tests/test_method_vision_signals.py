"""Methods before the language model that ask the vision tower: VisionZip, FasterVLM, VisPruner, PruMerge, HoloV, HiPrune++; worked out by hand."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch

import vlprune
from tests.tiny import families
from vlprune.errors import MissingSignalError, OptionError
from vlprune.kernels.similarity import cosine
from vlprune.kernels.strips import strip_starts, strip_sums, strip_variance
from vlprune.method import ModelFacts, Stage
from vlprune.methods.fastervlm import fastervlm
from vlprune.methods.hiprune import hiprune
from vlprune.methods.hiprune_plus_plus import hiprune_plus_plus
from vlprune.methods.holov import holov
from vlprune.methods.prumerge import prumerge
from vlprune.methods.prumerge_plus import prumerge_plus
from vlprune.methods.visionzip import visionzip
from vlprune.methods.vispruner import vispruner
from vlprune.protocols import ScoreInputs, Selection, Tap
from vlprune.scorers import SignalScore
from vlprune.selectors import TopK
from vlprune.selectors.dedup import Dedup
from vlprune.selectors.plus_text import TEXT, PlusText
from vlprune.selectors.portion import portion_of
from vlprune.selectors.strided import Strided
from vlprune.selectors.strips import Strips, quotas, within_strip
from vlprune.selectors.summary import Summary

CLIP = ModelFacts(32, 24, 22, tuple(range(24)), True)
SIGLIP = dataclasses.replace(CLIP, has_cls=False)
WINDOWED = ModelFacts(28, 32, 31, (7, 15, 23, 31), False)
KEYS, STATES, WIDE_KEYS, CLS = Tap("vision_keys", 22), Tap("vision_states", 22), Tap("vision_keys_all", 23), Tap("cls_state", 22)
BUILDS = {
    "visionzip": visionzip,
    "fastervlm": fastervlm,
    "vispruner": vispruner,
    "prumerge": prumerge,
    "prumerge+": prumerge_plus,
    "holov": holov,
    "hiprune++": hiprune_plus_plus,
}
WIDTHS = {"vision_keys": 6, "vision_keys_all": 10, "vision_states": 8, "cls_state": 8, "text_states": 8}


def raster(frames: int, rows: int, columns: int, newline: bool = False) -> torch.Tensor:
    """(N, 3); with a separator behind every row."""
    grid = [(f, r, c) for f in range(frames) for r in range(rows) for c in [*range(columns), *([-1] if newline else [])]]
    return torch.tensor([(f, r if c >= 0 else -1, c) for f, r, c in grid])


def inputs_for(stage: Stage, num_keep: int, grid: torch.Tensor, items: int = 3, seed: int = 0, project: bool = False) -> ScoreInputs:
    """Random items; separators have the lowest score and vectors of zeros, as the adapters give them."""
    generator, total = torch.Generator().manual_seed(seed), grid.shape[0]
    signals = {}
    for tap in stage.needs:
        length = 5 if tap.kind.startswith("text") else total
        width = WIDTHS.get(tap.kind)
        values = torch.rand(items, length, generator=generator).softmax(1) if width is None else torch.randn(items, length, width, generator=generator)
        if length == total:
            empty = grid[:, 1] < 0
            values[:, empty] = values[:, ~empty].amin() if width is None else 0.0
        signals[tap] = values
    return ScoreInputs(
        tokens=torch.randn(items, total, 8, generator=generator),
        num_keep=num_keep,
        grid=grid.expand(items, -1, -1),
        num_original=total,
        signals=signals,
        text_valid=torch.arange(5) < torch.tensor([[5], [2], [0]])[:items],
        project=(lambda features: 2 * features) if project else None,
    )


def choose(stage: Stage, inputs: ScoreInputs) -> Selection:
    return stage.selector(stage.scorer(inputs).float(), inputs)


def row(inputs: ScoreInputs, number: int) -> ScoreInputs:
    one = slice(number, number + 1)
    return dataclasses.replace(
        inputs,
        tokens=inputs.tokens[one],
        grid=None if inputs.grid is None else inputs.grid[one],
        text_valid=None if inputs.text_valid is None else inputs.text_valid[one],
        signals={tap: values[one] for tap, values in inputs.signals.items()},
    )


# all of them


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("num_keep", [1, 2, 3, 7, 16, 29, 30])
def test_exactly_k_in_rising_order_in_any_batch(name, num_keep):
    (stage,) = BUILDS[name](CLIP, num_keep).stages
    for grid in (raster(1, 5, 6), raster(3, 2, 5), raster(2, 3, 5, newline=True)[:30]):
        inputs = inputs_for(stage, num_keep, grid)
        equal = dataclasses.replace(inputs, signals={tap: torch.ones_like(values) for tap, values in inputs.signals.items()})
        for given in (inputs, equal, dataclasses.replace(inputs, grid=None)):
            selection = choose(stage, given)
            keep = selection.keep_indices
            assert keep.shape == (3, num_keep)
            assert keep.dtype == torch.int64
            assert (keep.diff(dim=1) > 0).all()
            assert keep.min() >= 0
            assert keep.max() < grid.shape[0]
            if selection.roles is not None:
                assert selection.roles.shape == keep.shape
                assert 0 <= int(selection.roles.min()) <= int(selection.roles.max()) < len(selection.role_names)
            reduced = stage.reducer(given, selection)
            assert reduced.tokens is None or reduced.tokens.shape == (3, num_keep, 8)
            for number in range(3):
                alone = choose(stage, row(given, number))
                assert torch.equal(alone.keep_indices[0], keep[number])
                if reduced.tokens is not None:
                    tokens = stage.reducer(row(given, number), alone).tokens
                    torch.testing.assert_close(tokens[0], reduced.tokens[number])


@pytest.mark.parametrize("name", ["visionzip", "prumerge", "prumerge+", "holov"])
def test_separators_stay_only_when_nothing_else_is_left(name):
    grid = raster(2, 3, 4, newline=True)                                 # 24 tokens, 6 separators
    for num_keep in (5, 12, 24, 26):
        (stage,) = BUILDS[name](CLIP, num_keep).stages
        inputs = inputs_for(stage, num_keep, grid)
        separators = (inputs.grid[..., 1] < 0).gather(1, choose(stage, inputs).keep_indices).sum(dim=1)
        assert separators.tolist() == [max(0, num_keep - 24)] * 3


@pytest.mark.parametrize("name", BUILDS)
def test_what_is_read_where(name):
    needs = {tap.kind: tap.layer for tap in BUILDS[name](CLIP).stages[0].needs}
    last = {"cls_row_wide": 23, "vision_keys_all": 23}
    assert all(layer == last.get(kind, {"text_states": 0}.get(kind, 22)) for kind, layer in needs.items() if kind != "column_mean")
    assert ("column_mean" in needs) == (name == "hiprune++")
    for facts in (SIGLIP, WINDOWED):
        found = {tap.kind: tap.layer for tap in BUILDS[name](facts).stages[0].needs}
        assert not any(kind.startswith("cls") for kind in found)
        assert found["column_mean"] in (facts.global_vision_layers or range(24))
    card = vlprune.get_method(name)
    assert set(card.needs) == set(needs)
    assert not BUILDS[name](CLIP, 1.0).stages[0].budget.num_keep(7) < 7


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("visionzip", {"variant": "sum"}),
        ("visionzip", {"contextual": 1.5}),
        ("visionzip", {"contextual": -1}),
        ("visionzip", {"contextual": True}),
        ("visionzip", {"contextual": "ten"}),
        ("vispruner", {"important": 1.5}),
        ("vispruner", {"important": True}),
        ("prumerge", {"keep": "adaptive"}),
        ("prumerge", {"neighbours": -1}),
        ("prumerge", {"neighbours": 2.5}),
        ("prumerge+", {"spread": 2.0}),
        ("prumerge+", {"keep": 0.0}),
        ("holov", {"strips": 0}),
        ("holov", {"strips": 4.0}),
        ("holov", {"variance": -1}),
        ("hiprune++", {"text": 1.1}),
        ("hiprune++", {"alpha": 2}),
        ("hiprune++", {"variant": "mine"}),
    ],
    ids=str,
)
def test_an_option_that_cannot_work_is_an_error(name, options):
    with pytest.raises(OptionError):
        BUILDS[name](CLIP, **options)


def test_a_number_above_k_is_an_error_and_shares_round():
    assert [portion_of("text", 0.1, num_keep) for num_keep in (1, 5, 64, 576)] == [0, 0, 6, 58]
    assert portion_of("text", 3, 3) == 3
    with pytest.raises(OptionError, match="text=4"):
        portion_of("text", 4, 3)
    (stage,) = visionzip(CLIP, 3, contextual=4).stages
    with pytest.raises(OptionError, match="contextual"):
        choose(stage, inputs_for(stage, 3, raster(1, 2, 4)))


def test_cosine_of_zero_is_zero_and_float32_under_autocast():
    a = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cosine(a, torch.tensor([[[4.0, 3.0]]]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([[[0.96], [0.0]]]))


# VisionZip


def test_visionzip_splits_as_published():
    assert [Strided().split(num_keep) for num_keep in (64, 128, 192, 1)] == [(54, 10), (108, 20), (162, 30), (1, 0)]
    assert Strided(cls_slot=True).split(64) == (53, 10)
    assert Strided(1.0, cls_slot=True).split(4) == (0, 3)


def small_zip(variant: str, grid: torch.Tensor | None = None, project: bool = True) -> tuple[Stage, ScoreInputs]:
    """Seven tokens, four kept, two of them contextual; features are 1, 2, 4, ... so that every sum tells its terms."""
    (stage,) = visionzip(CLIP, 4, contextual=2, variant=variant).stages
    features = (2.0 ** torch.arange(7))[None, :, None].expand(1, 7, 2).clone()
    keys = torch.tensor([[[1.0, 0], [0, 1], [1, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 0]]])
    signals = {Tap("cls_row", 22): torch.tensor([[0.0, 0.9, 0.1, 0.2, 0.0, 0.3, 0.8]]), KEYS: keys, STATES: features}
    signals[CLS] = torch.full((1, 7, 2), 1000.0)
    double = (lambda merged: 2 * merged) if project else None
    return stage, ScoreInputs(tokens=10 * features, num_keep=4, grid=None if grid is None else grid[None], signals=signals, project=double)


def test_visionzip_averages_by_hand():
    # Dominant 1 and 6; of 0, 2, 3, 4, 5 every second: targets 0 and 3. Tokens 2 goes to 0; 4 and 5 go to 3, whose key is a little like theirs.
    stage, inputs = small_zip("paper")
    selection = choose(stage, inputs)
    assert selection.keep_indices.tolist() == [[0, 1, 3, 6]]
    assert selection.roles.tolist() == [[1, 0, 1, 0]]
    reduced = stage.reducer(inputs, selection)
    expected = [2 * (1 + 4) / 2, 10 * 2.0, 2 * (8 + 16 + 32) / 3, 10 * 64.0]
    torch.testing.assert_close(reduced.tokens[0, :, 0], torch.tensor(expected))
    assert reduced.sizes.tolist() == [[2, 1, 3, 1]]


def test_visionzip_merges_projected_tokens_where_nothing_can_be_projected():
    stage, inputs = small_zip("paper", project=False)
    reduced = stage.reducer(inputs, choose(stage, inputs))
    torch.testing.assert_close(reduced.tokens[0, :, 0], torch.tensor([25.0, 20.0, 560 / 3, 640.0]))


def test_visionzip_as_released_by_hand():
    # CLS takes the place of the second dominant patch: 1 stays; of 0, 2, 3, 4, 5, 6 every third: targets 0 and 4; CLS stands at 6.
    stage, inputs = small_zip("code")
    selection = choose(stage, inputs)
    assert selection.keep_indices.tolist() == [[0, 1, 4, 6]]
    assert selection.roles.tolist() == [[1, 0, 1, 2]]
    reduced = stage.reducer(inputs, selection)
    expected = [2 * 1000.0, 10 * 2.0, 2 * (1 + (4 + 8 + 64) / 3), 2 * (16 + 32.0)]
    torch.testing.assert_close(reduced.tokens[0, :, 0], torch.tensor(expected))
    assert reduced.sizes.tolist() == [[1, 1, 4, 2]]
    with pytest.raises(OptionError, match="projector"):
        stage.reducer(dataclasses.replace(inputs, project=None), selection)
    assert visionzip(SIGLIP, 4, variant="code").stages[0].selector.split(64) == (54, 10)


def test_visionzip_merges_within_a_frame_and_never_separators():
    grid = torch.tensor([[0, 0, 0], [0, 0, 1], [0, -1, -1], [1, 0, 0], [1, 0, 1], [1, -1, -1], [1, 0, 2]])
    stage, inputs = small_zip("paper", grid)
    selection = choose(stage, inputs)                                    # the real rest is 0, 3, 4: targets 0 and 3
    assert selection.keep_indices.tolist() == [[0, 1, 3, 6]]
    reduced = stage.reducer(inputs, selection)
    torch.testing.assert_close(reduced.tokens[0, :, 0], torch.tensor([2.0, 20.0, 2 * (8 + 16) / 2, 640.0]))
    assert reduced.sizes.tolist() == [[1, 1, 2, 1]]


@pytest.mark.parametrize("build", [visionzip, prumerge])
def test_gradients_reach_tokens_and_features(build):
    (stage,) = build(CLIP, 6).stages
    for project in (True, False):
        inputs = inputs_for(stage, 6, raster(1, 4, 5), project=project)
        inputs.tokens.requires_grad_()
        inputs.signals[STATES].requires_grad_()
        selection = choose(stage, inputs)
        stage.reducer(inputs, selection).tokens.square().sum().backward()
        gradient = inputs.signals[STATES].grad if project else inputs.tokens.grad
        assert gradient is not None
        assert (gradient.abs().sum(dim=-1) > 0).sum() > 6 * 3            # also of tokens that left


# VisPruner


def thin_out(features: list[torch.Tensor], attention: list[float], num_keep: int, important: float, step: int) -> list[int]:
    """Loops over tokens, one pair at a time."""
    order = sorted(range(len(attention)), key=lambda token: -attention[token])
    best, rest = order[: int(num_keep * important)], order[int(num_keep * important) :]
    wanted = num_keep - len(best)
    while len(rest) > wanted and wanted:
        even, odd = rest[::2], rest[1::2]
        alike = {e: max(float(torch.cosine_similarity(features[e], features[o], dim=0)) for o in odd) for e in even}
        even.sort(key=lambda token, alike=alike: -alike[token])
        rest = even[min(step, len(rest) - wanted, len(even)) :] + odd
    return sorted(best + (rest if wanted else []))


@pytest.mark.parametrize(
    ("total", "num_keep", "important"), [(20, 7, 0.5), (21, 8, 0.5), (33, 5, 0.75), (30, 29, 0.0), (30, 1, 0.5), (9, 3, 1.0), (40, 2, 0.1)]
)
def test_dedup_equals_loops_over_pairs(total, num_keep, important):
    (stage,) = vispruner(CLIP, num_keep, important=important).stages
    inputs = inputs_for(stage, num_keep, raster(1, 1, total), seed=total)
    attention, features = inputs.signals[Tap("cls_row", 22)], inputs.signals[STATES]
    keep = choose(stage, inputs).keep_indices
    for number in range(3):
        assert keep[number].tolist() == thin_out(list(features[number]), attention[number].tolist(), num_keep, important, 8)


def test_dedup_removes_the_copy_at_an_even_place():
    features = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [-1, 0.2]]])      # attention falls: evens 0 and 2, odds 1 and 3
    inputs = ScoreInputs(tokens=torch.zeros(1, 4, 1), num_keep=3, signals={STATES: features})
    selection = Dedup(STATES, important=0.0)(torch.tensor([[4.0, 3, 2, 1]]), inputs)
    assert selection.keep_indices.tolist() == [[1, 2, 3]]
    assert selection.roles.tolist() == [[1, 1, 1]]
    with pytest.raises(OptionError, match="step"):
        Dedup(STATES, step=0)


# PruMerge


def test_prumerge_weights_by_hand():
    (stage,) = prumerge(CLIP, 3, neighbours=1).stages
    attention = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.2]])
    features = torch.tensor([[[1.0], [10], [100], [1000], [10000]]])
    keys = torch.tensor([[[1.0, 0], [1, 0.1], [0.1, 1], [0, 1], [1, 1]]])
    signals = {Tap("cls_row_wide", 23): attention, WIDE_KEYS: keys, STATES: features}
    inputs = ScoreInputs(tokens=torch.zeros(1, 5, 1), num_keep=3, signals=signals, project=lambda merged: merged)
    selection = choose(stage, inputs)
    assert selection.keep_indices.tolist() == [[1, 3, 4]]
    assert selection.roles.tolist() == [[0, 0, 2]]                       # 4 is the best that leaves
    reduced = stage.reducer(inputs, selection)
    expected = [10 + 0.1 * 1, 1000 + 0.05 * 100, 0.1 * 1 + 0.05 * 100 + 0.2 * 10000]
    torch.testing.assert_close(reduced.tokens[0, :, 0], torch.tensor(expected))
    assert reduced.sizes.tolist() == [[1, 1, 3]]


def test_prumerge_looks_for_neighbours_in_the_own_frame_and_averages_the_summary_over_frames():
    (stage,) = prumerge(CLIP, 2, neighbours=3).stages
    grid = torch.tensor([[[0, 0, 0], [0, 0, 1], [0, -1, -1], [1, 0, 0], [1, 0, 1]]])
    attention, features = torch.tensor([[0.5, 0.3, 0.1, 0.4, 0.2]]), torch.tensor([[[1.0], [10], [100], [1000], [10000]]])
    signals = {Tap("cls_row_wide", 23): attention, WIDE_KEYS: torch.ones(1, 5, 2), STATES: features}
    inputs = ScoreInputs(tokens=features, num_keep=2, grid=grid, signals=signals)
    reduced = stage.reducer(inputs, choose(stage, inputs))
    torch.testing.assert_close(reduced.tokens[0, :, 0], torch.tensor([1 + 0.3 * 10, (0.3 * 10 + 0.4 * 1000 + 0.2 * 10000) / 2]))


def test_auto_keeps_the_outliers_and_with_spread_a_grid():
    scores = torch.linspace(0, 1, 24)[None].clone()
    scores[0, 3], scores[0, 10] = 9.0, 8.0
    inputs = ScoreInputs(tokens=torch.zeros(1, 24, 1), num_keep=5)
    assert Summary(auto=True)(scores, inputs).keep_indices.tolist() == [[3, 10, 23]]         # 23 is the best that leaves
    spread = Summary(0.75, auto=True)(scores, inputs)                    # every int(int(24 / 2) / 3) = 4th
    assert spread.keep_indices.tolist() == [[0, 3, 4, 8, 10, 12, 16, 20, 23]]
    assert spread.roles.tolist() == [[1, 0, 1, 1, 0, 1, 1, 1, 2]]
    assert Summary(auto=True)(torch.zeros(1, 24), inputs).keep_indices.shape == (1, 1)
    with pytest.raises(OptionError, match="one item"):
        Summary(auto=True)(torch.cat((scores, torch.zeros(1, 24))), inputs)


def test_plus_spreads_three_quarters_over_the_rest():
    scores = torch.zeros(1, 12)
    scores[0, 5] = 1.0
    selection = Summary(0.75)(scores, ScoreInputs(tokens=torch.zeros(1, 12, 1), num_keep=5))
    assert selection.keep_indices[0][selection.roles[0] == 1].tolist() == [0, 3, 8]           # places 0, 11 // 3 and 22 // 3 of the rest
    assert selection.keep_indices[0][selection.roles[0] == 0].tolist() == [5]


@pytest.mark.parametrize("name", ["prumerge", "prumerge+"])
def test_auto_gives_every_picture_a_count_of_its_own(name):
    tiny = families()["llava"]
    model = tiny.build()
    rows = [[3, "image", 4], [2, "image", 5, "image", 6]]
    with torch.no_grad(), vlprune.apply(model, name, keep="auto") as handle:
        model(**tiny.prompt(rows))
        together = [kept.tolist() for kept in handle.report().points[0].keep_indices]
        for number, one in enumerate(rows):
            model(**tiny.prompt([one], row_numbers=[number]))
            assert [kept.tolist() for kept in handle.report().points[0].keep_indices] == [together[number]]
        record = handle.trace.points[0]
    assert all(1 <= kept.numel() < item.num_tokens for item, kept in zip(record.items, record.kept, strict=True))


# HoloV


def test_strips_are_cut_in_frames_and_the_first_are_longer():
    start, size = strip_starts(torch.tensor([[0] * 7 + [1] * 2]), 3)
    assert start.tolist() == [[0, 0, 0, 3, 3, 5, 5, 7, 8]]
    assert size.tolist() == [[3, 3, 3, 2, 2, 2, 2, 1, 1]]
    assert strip_sums(torch.arange(9.0)[None], start, 3).tolist() == [[3, 0, 0, 7, 0, 11, 0, 7, 8]]


def test_strip_variance_equals_loops():
    for total, count in ((11, 4), (1100, 7)):
        features = torch.randn(2, total, 5, generator=torch.Generator().manual_seed(total))
        start, size = strip_starts(torch.zeros(2, total, dtype=torch.int64), count)
        found = strip_variance(features, start, size, -(-total // count))
        for token in (0, 2, total // 2, total - 1):
            inside = [other for other in range(total) if start[1, other] == start[1, token]]
            cosines = [0.0 if other == token else float(torch.cosine_similarity(features[1, token], features[1, other], dim=0)) for other in inside]
            mean = sum(cosines) / (len(inside) - 1)
            expected = sum((value - mean) ** 2 for value in cosines) / (len(inside) - 1)
            assert float(found[1, token]) == pytest.approx(expected, rel=1e-4)


def test_a_strip_that_gets_more_than_it_has_hands_the_rest_to_the_others():
    # Two strips of four with nearly all attention on the first: it is given six, has four, so two come from the second.
    attention = torch.tensor([[0.2, 0.3, 0.25, 0.15, 0.01, 0.05, 0.0, 0.04]])
    inputs = ScoreInputs(tokens=torch.ones(1, 8, 2), num_keep=6)
    selector = Strips(2, variance=0.0)
    start, _ = strip_starts(torch.zeros(1, 8, dtype=torch.int64), 2)
    shares = torch.zeros(1, 8).scatter(1, torch.tensor([[0, 4]]), torch.tensor([[0.9, 0.1]]))
    assert quotas(shares, 6, start)[0, [0, 4]].tolist() == [6, 0]        # 5.4 and 0.6: the whole parts, one more for the largest
    assert within_strip(attention, start).tolist() == [[2, 0, 1, 3, 2, 0, 3, 1]]
    assert selector(attention, inputs).keep_indices.tolist() == [[0, 1, 2, 3, 5, 7]]


def test_variance_moves_the_budget_to_the_strip_whose_tokens_differ():
    attention = torch.full((1, 8), 0.125)
    tokens = torch.tensor([[[1.0, 0]] * 4 + [[1, 0], [-1, 0], [0, 1], [1, 0.1]]])
    inputs = ScoreInputs(tokens=tokens, num_keep=4)
    assert (Strips(2, variance=0.0)(attention, inputs).keep_indices < 4).sum() == 2
    assert (Strips(2, variance=10.0)(attention, inputs).keep_indices < 4).sum() < 2


# HiPrune++


def test_text_tokens_take_part_of_the_budget():
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1]])
    tokens = torch.tensor([[[1.0, 0], [1, 0], [1, 0], [1, 0], [0, 1], [1, 1]]])
    text = torch.tensor([[[0.0, 3], [0, 5], [100, 0]]])
    inputs = ScoreInputs(tokens=tokens, num_keep=4, signals={TEXT: text}, text_valid=torch.tensor([[True, True, False]]))
    selection = PlusText(TopK(), 2)(scores, inputs)
    assert selection.keep_indices.tolist() == [[0, 1, 4, 5]]
    assert [selection.role_names[role] for role in selection.roles[0]] == ["kept", "kept", "text", "text"]
    silent = dataclasses.replace(inputs, text_valid=torch.zeros(1, 3, dtype=torch.bool))
    assert PlusText(TopK(), 2)(scores, silent).keep_indices.tolist() == [[0, 1, 2, 3]]
    assert PlusText(TopK(), 4)(scores, inputs).role_names == ("kept", "text")


def test_without_text_tokens_it_is_hiprune():
    (plain,), (plus,) = hiprune(CLIP, 9, alpha=0.6).stages, hiprune_plus_plus(CLIP, 9, alpha=0.6, text=0).stages
    inputs = inputs_for(plus, 9, raster(1, 5, 6))
    assert torch.equal(choose(plain, inputs).keep_indices, choose(plus, inputs).keep_indices)
    (some,) = hiprune_plus_plus(CLIP, 9, alpha=0.6, text=3).stages
    selection = choose(some, inputs)
    assert selection.role_names == ("anchor", "buffer", "register", "text")
    assert (selection.roles == 3).sum(dim=1).tolist() == [3, 3, 3]


# the rest


def test_fastervlm_is_the_top_of_the_cls_row():
    (stage,) = fastervlm(CLIP, 2).stages
    assert stage.scorer == SignalScore(Tap("cls_row", 22))
    inputs = ScoreInputs(tokens=torch.zeros(1, 4, 1), num_keep=2, signals={Tap("cls_row", 22): torch.tensor([[0.1, 0.4, 0.2, 0.3]])})
    assert choose(stage, inputs).keep_indices.tolist() == [[1, 3]]
    with pytest.raises(MissingSignalError, match="cls_row"):
        choose(stage, dataclasses.replace(inputs, signals={}))


def test_defaults_are_in_the_cards():
    for name, build in BUILDS.items():
        assert inspect.signature(build).parameters["keep"].default == vlprune.get_method(name).default_keep

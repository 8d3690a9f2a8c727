"""The parts of HiPrune, ToDRE, TransPrune, FastV and EVS, on examples small enough to work out by hand."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vlprune.errors import OptionError
from vlprune.kernels import RULES, greedy_select
from vlprune.method import ModelFacts
from vlprune.methods.evs import evs
from vlprune.methods.fastv import fastv
from vlprune.methods.hiprune import hiprune
from vlprune.methods.todre import todre
from vlprune.methods.transprune import stage_layers, transprune
from vlprune.protocols import ScoreInputs, Tap, gather_tokens
from vlprune.scorers import (
    Blend,
    Centrality,
    SignalScore,
    TemporalDissimilarity,
    TransitionVariation,
    transition_statistics,
)
from vlprune.scorers.transition import transition_variation
from vlprune.selectors import Diversity, Hierarchy, TopK
from vlprune.selectors.hierarchy import neighbours

CLIP = ModelFacts(
    32,
    24,
    22,
    tuple(range(24)),
    True,
    frozenset({"column_mean", "cls_row", "last_row", "text_rows", "text_mass", "transition"}),
)
QWEN = ModelFacts(
    28, 32, 31, (7, 15, 23, 31), False, frozenset({"column_mean", "last_row", "text_rows", "text_mass", "transition"})
)
TINY = ModelFacts(4, 3, 1, tuple(range(3)), True, CLIP.signals)
OBJECT, DEEP = Tap("column_mean", 8), Tap("column_mean", 22)


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def raster(frames: int, rows: int, columns: int) -> torch.Tensor:
    """(N, 3)."""
    return torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns))


def random_inputs(
    num_items: int, num_keep: int, needs=(), *, frames=1, rows=4, columns=5, width=8, seed=0, modality="image"
) -> ScoreInputs:
    generator, num_tokens = seeded(seed), frames * rows * columns
    signals = {}
    for tap in needs:
        shape = (num_items, num_tokens, 6) if tap.kind == "transition" else (num_items, num_tokens)
        signals[tap] = torch.rand(shape, generator=generator) + 0.1
    return ScoreInputs(
        tokens=torch.randn(num_items, num_tokens, width, generator=generator),
        num_keep=num_keep,
        grid=raster(frames, rows, columns).expand(num_items, -1, -1),
        original=torch.arange(num_tokens).expand(num_items, -1),
        num_original=num_tokens,
        modality=modality,
        signals=signals,
    )


def take(inputs: ScoreInputs, items=None, order=None) -> ScoreInputs:
    """Some items of a batch, or their tokens in another order (N,)."""

    def cut(x):
        if x is None:
            return None
        x = x if items is None else x[items]
        return x if order is None else x[:, order]

    signals = {tap: cut(x) for tap, x in inputs.signals.items()}
    return dataclasses.replace(
        inputs, tokens=cut(inputs.tokens), grid=cut(inputs.grid), original=cut(inputs.original), signals=signals
    )


METHODS = {
    "hiprune": hiprune(CLIP, 7, alpha=0.7),
    "hiprune-paper": hiprune(CLIP, 7, alpha=0.7, variant="paper"),
    "fastv": fastv(CLIP, 7),
    "transprune": transprune(CLIP, 7),
    "transprune-paper": transprune(CLIP, 7, variant="paper"),
    "todre": todre(CLIP, 7),
    "todre-maxmin-mean": todre(QWEN, 7, rule="maxmin"),
    "evs": evs(CLIP, 7),
}
FIRST_STAGES = [
    pytest.param(method.stages[0], "video" if name == "evs" else "image", id=name) for name, method in METHODS.items()
]


def choose(stage, inputs):
    return stage.selector(stage.scorer(inputs), inputs)


# every method


@pytest.mark.parametrize(("stage", "modality"), FIRST_STAGES)
@pytest.mark.parametrize("num_keep", [1, 2, 7, 19, 20])
def test_exactly_k_in_rising_order_whatever_the_scores(stage, modality, num_keep):
    random = random_inputs(3, num_keep, stage.needs, frames=2, rows=2, modality=modality)
    equal = dataclasses.replace(
        random,
        tokens=torch.ones_like(random.tokens),
        signals={tap: torch.ones_like(x) for tap, x in random.signals.items()},
    )
    for inputs in (random, equal, dataclasses.replace(random, grid=random.grid if modality == "video" else None)):
        selection = choose(stage, inputs)
        keep = selection.keep_indices
        assert keep.dtype == torch.int64
        assert keep.shape == (3, num_keep)
        assert (keep.diff(dim=1) > 0).all()
        assert keep.min() >= 0
        assert keep.max() < 20
        assert selection.roles is None or selection.roles.shape == keep.shape


@pytest.mark.parametrize(("stage", "modality"), FIRST_STAGES)
def test_permuted_tokens_give_permuted_scores_and_choice(stage, modality):
    inputs = random_inputs(2, 7, stage.needs, frames=2, rows=2, columns=3, modality=modality)
    order = torch.randperm(12, generator=seeded(3))
    shuffled = take(inputs, order=order)
    torch.testing.assert_close(stage.scorer(shuffled), stage.scorer(inputs)[:, order])
    kept = order[choose(stage, shuffled).keep_indices].sort(dim=1).values
    assert torch.equal(kept, choose(stage, inputs).keep_indices)


@pytest.mark.parametrize(("stage", "modality"), FIRST_STAGES)
def test_an_item_does_not_depend_on_its_batch(stage, modality):
    inputs = random_inputs(4, 7, stage.needs, frames=2, modality=modality)
    together = choose(stage, inputs)
    for item in range(4):
        alone = choose(stage, take(inputs, slice(item, item + 1)))
        assert torch.equal(alone.keep_indices[0], together.keep_indices[item])
        assert torch.equal(stage.scorer(take(inputs, slice(item, item + 1)))[0], stage.scorer(inputs)[item])


@pytest.mark.parametrize(("stage", "modality"), FIRST_STAGES)
def test_scores_are_float32_and_nothing_is_modified(stage, modality):
    inputs = random_inputs(2, 7, stage.needs, frames=2, modality=modality)
    inputs = dataclasses.replace(inputs, tokens=inputs.tokens.bfloat16())
    before = (inputs.tokens.clone(), {tap: x.clone() for tap, x in inputs.signals.items()})
    assert stage.scorer(inputs).dtype == torch.float32
    choose(stage, inputs)
    assert torch.equal(inputs.tokens, before[0])
    assert all(torch.equal(inputs.signals[tap], x) for tap, x in before[1].items())


class Watch(TorchDispatchMode):
    """Notes what would make the host wait, and the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.waits, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        boolean = name in ("index", "index_put") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if boolean or name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2"):
            self.waits.append(name)
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize(("stage", "modality"), FIRST_STAGES)
def test_nothing_is_read_back_to_the_host(stage, modality):
    inputs = random_inputs(2, 7, stage.needs, frames=2, modality=modality)
    with Watch() as watch:
        choose(stage, inputs)
    assert watch.waits == []


# greedy selection


def naive_greedy(features, num_keep, rule, first):
    """Recompute every similarity at every step."""
    unit = F.normalize(features.double(), dim=-1)
    similarity = unit @ unit.T
    picks = [first]
    while len(picks) < num_keep:
        others = [token for token in range(len(features)) if token not in picks]
        gain = {
            token: (-similarity[token, picks].sum() if rule == "maxsum" else (1 - similarity[token, picks]).min())
            for token in others
        }
        picks.append(max(others, key=gain.__getitem__))
    return picks


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("num_tokens", "num_keep", "width"), [(5, 5, 3), (24, 1, 6), (24, 23, 6), (40, 12, 4), (60, 20, 16)]
)
def test_greedy_picks_what_the_naive_loop_picks(rule, num_tokens, num_keep, width):
    features = torch.randn(3, num_tokens, width, generator=seeded(num_tokens + num_keep))
    first = torch.tensor([0, num_tokens - 1, 2])
    picks = greedy_select(features, num_keep, RULES[rule], first)
    assert picks.tolist() == [
        naive_greedy(item, num_keep, rule, int(start)) for item, start in zip(features, first, strict=True)
    ]


def test_the_two_rules_differ_on_a_worked_example():
    # From 0 degrees both take 175. Then 60 is far from either (max-min), while 170, a near copy of 175, has the smaller
    # sum of cosines: cos 170 + cos 5 = 0.01 against cos 60 + cos 115 = 0.08.
    angles = torch.tensor([0.0, 60.0, 170.0, 175.0]).deg2rad()
    fan = torch.stack((angles.cos(), angles.sin()), dim=-1)[None]
    assert greedy_select(fan, 3, RULES["maxsum"], torch.tensor([0])).tolist() == [[0, 3, 2]]
    assert greedy_select(fan, 3, RULES["maxmin"], torch.tensor([0])).tolist() == [[0, 3, 1]]


@pytest.mark.parametrize("rule", RULES)
def test_greedy_keeps_apart_what_is_equal(rule):
    picks = greedy_select(torch.ones(2, 6, 3), 6, RULES[rule], torch.tensor([4, 0]))
    assert picks.tolist() == [[4, 0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5]]
    assert greedy_select(torch.zeros(1, 3, 2), 3, RULES[rule]).tolist() == [[0, 1, 2]]
    assert greedy_select(torch.ones(2, 6, 3), 0, RULES[rule]).shape == (2, 0)


def test_greedy_never_makes_an_n_by_n_matrix():
    num_tokens, width = 1024, 16
    features = torch.randn(1, num_tokens, width, generator=seeded(0))
    with Watch() as watch:
        greedy_select(features, 40, RULES["maxsum"], torch.tensor([0]))
    assert watch.largest == num_tokens * width < num_tokens * num_tokens
    assert watch.waits == []


def test_greedy_stays_in_float32_under_autocast():
    features = torch.randn(2, 50, 16, generator=seeded(5))
    plain = greedy_select(features, 20, RULES["maxsum"], torch.tensor([0, 1]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(greedy_select(features, 20, RULES["maxsum"], torch.tensor([0, 1])), plain)


def test_diversity_starts_at_the_highest_score():
    inputs = random_inputs(2, 1)
    scores = torch.zeros(2, 20)
    scores[0, 13], scores[1, 4] = 1, 1
    assert Diversity()(scores, inputs).keep_indices.tolist() == [[13], [4]]


# HiPrune


def hierarchy_inputs(num_keep, best_object, deep, rows, columns, frames=1, grid=True):
    """Object scores that rank ``best_object`` first, in order; deep scores as given."""
    num_tokens = frames * rows * columns
    scores = torch.zeros(1, num_tokens)
    for place, token in enumerate(best_object):
        scores[0, token] = 1.0 - 0.1 * place
    return torch.tensor([deep], dtype=torch.float32), ScoreInputs(
        tokens=torch.zeros(1, num_tokens, 2),
        num_keep=num_keep,
        grid=raster(frames, rows, columns)[None] if grid else None,
        num_original=num_tokens,
        signals={OBJECT: scores},
    )


def test_hierarchy_by_hand():
    # 3 x 4, K = 6, alpha 0.8: round(0.96) = 1 anchor, token 5; buffers 4, 6, 1, 9; one register, the best left: 11.
    deep = [0.1, 0.9, 0.2, 0.3, 0.0, 0.0, 0.0, 0.4, 0.1, 0.0, 0.5, 0.7]
    scores, inputs = hierarchy_inputs(6, [5], deep, 3, 4)
    selection = Hierarchy(OBJECT, alpha=0.8)(scores, inputs)
    assert selection.keep_indices.tolist() == [[1, 4, 5, 6, 9, 11]]
    assert [selection.role_names[role] for role in selection.roles[0]] == [
        "buffer",
        "buffer",
        "anchor",
        "buffer",
        "buffer",
        "register",
    ]


def near(anchor, clamp, grid):
    grid = grid[None]
    inputs = ScoreInputs(tokens=torch.zeros(1, grid.shape[1], 1), num_keep=1, grid=grid)
    return neighbours(inputs, torch.tensor([[anchor]]), clamp)[0].nonzero().flatten().tolist()


def test_neighbours_at_the_border_in_both_variants():
    grid = raster(1, 3, 4)
    assert near(5, True, grid) == near(5, False, grid) == [1, 4, 6, 9]
    assert near(0, True, grid) == [0, 1, 4]  # i - 1 and i - c are clamped to token 0, the anchor itself
    assert near(0, False, grid) == [1, 4]
    assert near(2, True, grid) == [0, 1, 3, 6]  # i - c = -2 becomes token 0, as released
    assert near(2, False, grid) == [1, 3, 6]
    assert near(7, True, grid) == near(7, False, grid) == [3, 6, 8, 11]  # i + 1 wraps to the next row in both
    assert near(9, True, grid) == [5, 8, 10, 11]  # i + c = 13 becomes token 11


def test_neighbours_stay_in_their_tile_and_skip_separators():
    # Two tiles of 2 x 2 and 2 x 3, the second with a separator after each row.
    second = [[1, 0, 0], [1, 0, 1], [1, 0, 2], [1, -1, -1], [1, 1, 0], [1, 1, 1], [1, 1, 2], [1, -1, -1]]
    grid = torch.cat((raster(1, 2, 2), torch.tensor(second)))
    assert near(3, True, grid) == [1, 2, 3]  # last token of the first tile: clamped to itself
    assert near(3, False, grid) == [1, 2]
    assert near(4, False, grid) == [5, 8]  # first of the second tile; below it comes after the separator
    assert near(6, False, grid) == [5, 8, 10]  # end of a row: i + 1 is the next row's first, not the separator
    assert near(7, True, grid) == near(7, False, grid) == []  # a separator as anchor
    assert near(2, False, grid) == [0, 1, 3]  # wraps backwards within its tile


def test_neighbours_without_a_grid_are_left_and_right():
    inputs = ScoreInputs(tokens=torch.zeros(1, 6, 1), num_keep=1)
    assert neighbours(inputs, torch.tensor([[3]]), True)[0].tolist() == [False, False, True, False, True, False]
    assert neighbours(inputs, torch.tensor([[0]]), False)[0].tolist() == [False, True, False, False, False, False]


def test_anchors_come_first_where_all_do_not_fit():
    # K = 3, alpha = 1: round(0.6) = 1 anchor with four buffers, of which the two with the best deep score stay.
    scores, inputs = hierarchy_inputs(3, [5], [0.0] * 4 + [0.3, 0.0, 0.1, 0.9, 0.9, 0.2, 0.9, 0.9], 3, 4)
    selection = Hierarchy(OBJECT, alpha=1.0)(scores, inputs)
    assert selection.keep_indices.tolist() == [[4, 5, 9]]
    assert selection.roles.tolist() == [[1, 0, 1]]


def test_a_small_budget_has_no_anchors():
    scores, inputs = hierarchy_inputs(25, [5], list(range(36)), 6, 6)
    assert Hierarchy(OBJECT)(scores, inputs).keep_indices.tolist() == [list(range(11, 36))]


def test_the_released_exclusion_loses_tokens_and_ours_does_not():
    # The anchor has by far the highest deep score, as happens for sums: minus 1 does not keep it out of the registers.
    deep = [0.0, 0.0, 0.1, 0.2, 0.0, 9.0, 0.0, 0.3, 0.4, 0.0, 0.5, 0.6]
    scores, inputs = hierarchy_inputs(6, [5], deep, 3, 4)
    assert Hierarchy(OBJECT, alpha=0.8, subtract=1.0)(scores, inputs).keep_indices.tolist() == [[1, 4, 5, 6, 9]]
    assert Hierarchy(OBJECT, alpha=0.8)(scores, inputs).keep_indices.tolist() == [[1, 4, 5, 6, 9, 11]]
    # Scores below 1, as means are: both agree.
    both = [
        Hierarchy(OBJECT, alpha=0.8, subtract=subtract)(scores / 10, inputs).keep_indices for subtract in (1.0, None)
    ]
    assert torch.equal(*both)


def test_hiprune_layers():
    def blocks(method):
        return [tap.layer for tap in (*method.stages[0].scorer.needs, *method.stages[0].selector.needs)]

    assert blocks(hiprune(CLIP)) == [22, 8]
    assert blocks(hiprune(QWEN)) == [31, 15]
    assert blocks(hiprune(CLIP, object_layer=3)) == [22, 3]
    assert blocks(hiprune(TINY)) == [1, 0]
    assert blocks(
        hiprune(dataclasses.replace(QWEN, vision_layers=4, feature_layer=3, global_vision_layers=(1, 3)))
    ) == [3, 1]
    with pytest.raises(OptionError, match="windows only"):
        hiprune(QWEN, object_layer=14)


# TransPrune


def test_transition_statistics_by_hand():
    before = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]]])
    after = torch.tensor([[[6.0, 8.0], [0.0, 3.0], [0.0, -1.0]]])
    statistics = transition_statistics(before, after)
    e = torch.tensor(1.0).exp()
    torch.testing.assert_close(statistics[0, :, 0], torch.tensor([2.0, 3.0, 0.5]))
    torch.testing.assert_close(statistics[0, :, 1], torch.tensor([1.0, 0.0, -1.0]))
    torch.testing.assert_close(statistics[0, :, 2], (1 + e + e**2).expand(3))
    code = transition_variation(statistics)
    torch.testing.assert_close(code[0], torch.stack((torch.tensor(2.0), 3 * e, 0.5 * e**2)) / (1 + e + e**2))
    paper = transition_variation(statistics, "paper")  # |c| of 1, 0, 1: the opposite direction counts as unchanged
    torch.testing.assert_close(paper[0], torch.stack((torch.tensor(2.0), 3 * e, torch.tensor(0.5))) / (2 + e))
    padded = transition_statistics(before, after, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(padded[0, 0, 2], 1 + e)


def test_transitions_add_up_over_modules_and_layers():
    scorer = TransitionVariation((6, 7))
    inputs = random_inputs(2, 3, scorer.needs)
    expected = sum(
        transition_variation(inputs.signals[Tap("transition", layer)][..., part])
        for layer in (6, 7)
        for part in (slice(0, 3), slice(3, 6))
    )
    torch.testing.assert_close(scorer(inputs), expected)


def test_blend_weighs_scores_that_sum_to_one():
    first, second = Tap("text_rows", 1), Tap("last_row", 1)
    inputs = ScoreInputs(
        tokens=torch.zeros(1, 2, 1),
        num_keep=1,
        signals={first: torch.tensor([[1.0, 3.0]]), second: torch.tensor([[30.0, 10.0]])},
    )
    torch.testing.assert_close(Blend(SignalScore(first), SignalScore(second))(inputs), torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(Blend(SignalScore(first), SignalScore(second), 0.9)(inputs), torch.tensor([[0.3, 0.7]]))


def test_transprune_stages_as_published():
    method = transprune(CLIP)
    assert [stage.point.label for stage in method.stages] == ["llm:7", "llm:9", "llm:12"]
    assert [stage.budget.num_keep(576) for stage in method.stages] == [504, 360, 72]
    recorded = [[tap.layer for tap in stage.needs if tap.kind == "transition"] for stage in method.stages]
    assert recorded == [[6], [6, 7, 8], [6, 7, 8, 9, 10, 11]]
    assert [tap.layer for stage in method.stages for tap in stage.needs if tap.kind == "text_rows"] == [7, 9, 12]
    assert [stage.budget.num_keep(576) for stage in transprune(CLIP, "low").stages] == [360, 108, 36]
    e2e = transprune(dataclasses.replace(CLIP, decoder_layers=14), layers=(7, 9, 12))
    assert [stage.needs for stage in e2e.stages] == [stage.needs for stage in method.stages]


def test_a_single_keep_scales_the_high_schedule():
    assert [stage.budget for stage in transprune(CLIP, 0.125).stages] == [
        stage.budget for stage in transprune(CLIP, "high").stages
    ]
    assert all(stage.budget.is_everything for stage in transprune(CLIP, 1.0).stages)
    assert [stage.budget.num_keep(576) for stage in transprune(CLIP, 72).stages] == [504, 360, 72]
    assert [stage.budget.num_keep(20) for stage in transprune(CLIP, 20).stages] == [20, 20, 20]
    for keep in (0.03, 0.1, 0.3, 0.5, 0.9, 1, 7, 100, 575):
        counts = [stage.budget.num_keep(576) for stage in transprune(CLIP, keep).stages]
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] == (keep if isinstance(keep, int) else int(576 * keep))
    with pytest.raises(OptionError, match="only 4"):
        transprune(CLIP, 5).stages[0].budget.num_keep(4)


@pytest.mark.parametrize("depth", range(2, 81))
def test_transprune_layers_are_distinct_and_inside_at_any_depth(depth):
    layers = stage_layers(depth)
    assert len(layers) == min(3, depth - 1)
    assert list(layers) == sorted(set(layers))
    assert 1 <= layers[0]
    assert layers[-1] < depth
    method = transprune(dataclasses.replace(CLIP, decoder_layers=depth))
    assert all(
        tap.layer < stage.point.layer for stage in method.stages for tap in stage.needs if tap.kind == "transition"
    )


def test_transprune_layers_of_known_depths():
    assert [stage_layers(depth) for depth in (32, 28, 40, 10, 4, 3, 2)] == [
        (7, 9, 12),
        (6, 8, 11),
        (9, 11, 15),
        (2, 3, 4),
        (1, 2, 3),
        (1, 2),
        (1,),
    ]


# ToDRE, FastV


def test_todre_stages():
    first, second = todre(CLIP).stages
    assert first.needs == (Tap("cls_row", 22),)
    assert second.point.label == "llm:28"
    assert second.needs == (Tap("text_mass", 27),)
    assert second.budget.num_keep(576) == 0
    assert isinstance(todre(QWEN).stages[0].scorer.scorer, Centrality)
    assert todre(QWEN).stages[1].point.layer == 25
    assert len(todre(CLIP, 1.0).stages) == len(todre(CLIP, stage2=False).stages) == 1
    assert len(todre(CLIP, 1.0, stage2=True).stages) == 2


def test_todre_drops_all_of_an_item_the_text_does_not_look_at():
    second = todre(CLIP).stages[1]
    mass = torch.tensor([[0.09] * 4, [0.11] * 4])
    inputs = ScoreInputs(tokens=torch.zeros(2, 4, 1), num_keep=0, signals={Tap("text_mass", 27): mass})
    assert second.gate(inputs).tolist() == [True, False]
    assert choose(second, inputs).keep_indices.shape == (2, 0)


def test_the_pivot_lies_on_the_thumbnail_of_a_tiled_image_and_anywhere_in_a_video():
    tap = Tap("cls_row", 22)
    row = torch.zeros(1, 8)
    row[0, 6], row[0, 2] = 0.9, 0.5
    image = ScoreInputs(tokens=torch.eye(8)[None], num_keep=1, grid=raster(2, 2, 2)[None], signals={tap: row})
    stage = todre(CLIP).stages[0]
    assert choose(stage, image).keep_indices.tolist() == [[2]]
    assert choose(stage, dataclasses.replace(image, modality="video")).keep_indices.tolist() == [[6]]


def test_centrality_prefers_the_token_near_the_mean():
    tokens = torch.tensor([[[1.0, 0.0], [5.0, 5.0], [0.0, 1.0]]])
    assert Centrality()(ScoreInputs(tokens=tokens, num_keep=1)).argmax().item() == 1


def test_fastv_reads_the_layer_before_its_point():
    for facts, layer, point in (
        (CLIP, None, 2),
        (TINY, None, 2),
        (CLIP, 3, 3),
        (dataclasses.replace(CLIP, decoder_layers=2), None, 1),
    ):
        stage = fastv(facts, layer=layer).stages[0]
        assert stage.point.layer == point
        assert stage.needs == (Tap("last_row", point - 1),)
    assert fastv(CLIP, 0.5).stages[0].budget.num_keep(65) == 32


# EVS


def video(tokens, frames, rows, columns, num_keep):
    return ScoreInputs(tokens=tokens, num_keep=num_keep, grid=raster(frames, rows, columns)[None], modality="video")


def test_temporal_dissimilarity_by_hand():
    # Two cells, three frames: the first never changes, the second turns by 90 and then by 180 degrees.
    tokens = torch.tensor([[[1.0, 0], [1, 0], [2, 0], [0, 1], [3, 0], [0, -1]]])
    inputs = video(tokens, 3, 1, 2, 3)
    torch.testing.assert_close(TemporalDissimilarity()(inputs), torch.tensor([[255.0, 255, 0, 1, 0, 2]]))
    assert choose(evs(CLIP).stages[0], inputs).keep_indices.tolist() == [[0, 1, 5]]


def test_temporal_dissimilarity_with_separators_and_missing_cells():
    grid = torch.tensor([[0, 0, 0], [0, 0, 1], [0, -1, -1], [1, 0, 0], [1, 0, 1], [1, -1, -1], [3, 0, 0]])[None]
    tokens = torch.tensor([[[1.0, 0], [1, 0], [1, 1], [0, 1], [1, 0], [1, 1], [1, 0]]])
    scores = TemporalDissimilarity()(ScoreInputs(tokens=tokens, num_keep=3, grid=grid, modality="video"))
    torch.testing.assert_close(scores, torch.tensor([[255.0, 255, 255, 1, 0, 0, 2]]))  # frame 2 is missing: new


def test_evs_keeps_the_first_frame_first_and_breaks_ties_early():
    inputs = video(torch.ones(1, 12, 3), 3, 2, 2, 6)
    assert choose(evs(CLIP).stages[0], inputs).keep_indices.tolist() == [[0, 1, 2, 3, 4, 5]]
    cases = ((196, 8, 0.5), (196, 8, 0.9), (64, 3, 0.7))
    counts = [evs(CLIP, 1 - q).stages[0].budget.num_keep(size * frames, frames) for size, frames, q in cases]
    assert counts == [784, 196, 64]


def test_evs_without_a_grid_says_so():
    inputs = ScoreInputs(tokens=torch.ones(1, 4, 2), num_keep=2, modality="video")
    with pytest.raises(OptionError, match="no grid"):
        TemporalDissimilarity()(inputs)


# options


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (hiprune, {"alpha": 1.5}),
        (hiprune, {"alpha": "much"}),
        (hiprune, {"variant": "mine"}),
        (hiprune, {"object_layer": 24}),
        (hiprune, {"object_layer": True}),
        (fastv, {"layer": 0}),
        (fastv, {"layer": 32}),
        (fastv, {"keep": 1.5}),
        (todre, {"rule": "median"}),
        (todre, {"pivot": "best"}),
        (todre, {"tau": 3}),
        (todre, {"layer": 0}),
        (transprune, {"keep": "medium"}),
        (transprune, {"keep": (0.5, 0.25)}),
        (transprune, {"keep": (0.5, 0.6, 0.1)}),
        (transprune, {"keep": 0.0}),
        (transprune, {"keep": True}),
        (transprune, {"variant": "mine"}),
        (transprune, {"alpha": -0.1}),
        (transprune, {"layers": (9, 7, 12)}),
        (transprune, {"layers": 7}),
        (transprune, {"layers": (0, 1, 2)}),
        (transprune, {"accumulate": (9, 10)}),
        (transprune, {"accumulate": ()}),
        (evs, {"keep": 0}),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", str(value)),
)
def test_an_option_that_cannot_work_is_an_error(build, options):
    with pytest.raises(OptionError):
        build(CLIP, **options)


@pytest.mark.parametrize("build", [hiprune, fastv, todre, transprune, evs])
def test_defaults_build_on_shallow_models(build):
    for depth in (2, 3, 4):
        facts = dataclasses.replace(TINY, decoder_layers=depth)
        assert all(stage.point.layer < depth for stage in build(facts).stages)
    assert next(iter(inspect.signature(build).parameters)) == "facts"


def test_gathering_by_selection_matches_indexing():
    x = torch.randn(2, 5, 3, generator=seeded(1))
    keep = TopK()(x[..., 0], ScoreInputs(tokens=x, num_keep=2)).keep_indices
    assert torch.equal(gather_tokens(x, keep)[1], x[1, keep[1]])

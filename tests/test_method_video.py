"""PruneVid, FastVID, HoliTom and VidCom2: parts worked out by hand, loops over tokens of still videos, exact counts, and what is an error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vlprune
from tests.naive import fastvid as naive_fastvid
from tests.naive import holitom as naive_holitom
from tests.naive import prunevid as naive_prunevid
from tests.naive._video import share_out
from tests.tiny import families
from vlprune.errors import OptionError
from vlprune.kernels import density_peaks
from vlprune.kernels.allotment import DOWN, NEAREST, UP, allot, rank_in_groups
from vlprune.kernels.density_peaks import nearest_centre, peak_scores
from vlprune.kernels.frame_cells import frame_cells
from vlprune.kernels.windows import best_windows, contiguous_labels, extents, starts_of, still_gains
from vlprune.method import ModelFacts, Stage
from vlprune.methods.fastvid import fastvid
from vlprune.methods.holitom import holitom
from vlprune.methods.prunevid import prunevid
from vlprune.methods.vidcom2 import vidcom2
from vlprune.protocols import ScoreInputs, Selection
from vlprune.reducers import anchor_means
from vlprune.reducers.anchor_means import AnchorMeans
from vlprune.reducers.pairwise_means import PairwiseMeans
from vlprune.reducers.still_means import StillMeans
from vlprune.scorers.frame_outliers import FrameOutliers
from vlprune.selectors import TopK
from vlprune.selectors.set_shares import SetShares
from vlprune.tokens import raster_grid

FACTS = ModelFacts(decoder_layers=28, vision_layers=8, feature_layer=6, global_vision_layers=tuple(range(8)), has_cls=True)
BUILD = {"prunevid": prunevid, "fastvid": fastvid, "holitom": holitom, "vidcom2": vidcom2}
NAIVE = {"prunevid": naive_prunevid, "fastvid": naive_fastvid, "holitom": naive_holitom}
WIDTH = 16


def clip(seed: int, scenes: tuple[int, ...] = (3, 4, 2), side: tuple[int, int] = (4, 5), still: float = 0.8, items: int = 1) -> Tensor:
    """(items, T, n, D) scenes of some frames in which most cells hardly change."""
    generator = torch.Generator().manual_seed(seed)
    cells = side[0] * side[1]
    parts = []
    for frames in scenes:
        base = torch.randn(items, 1, cells, WIDTH, generator=generator)
        noise = torch.where(torch.rand(items, 1, cells, 1, generator=generator) < still, 0.15, 1.5)
        parts.append(base + noise * torch.randn(items, frames, cells, WIDTH, generator=generator))
    return torch.cat(parts, dim=1)


def as_inputs(frames: Tensor, stage: Stage, number: int, side: tuple[int, int] = (4, 5), separators: int = 0, seed: int = 0) -> ScoreInputs:
    """A whole video with random attention, and newlines at its end."""
    items, count = frames.shape[:2]
    grid = raster_grid(count, *side)
    tokens = frames.flatten(1, 2)
    if separators:
        grid = torch.cat([grid, torch.tensor([[count - 1, -1, -1]]).expand(separators, -1)])
        tokens = torch.cat([tokens, torch.randn(items, separators, WIDTH, generator=torch.Generator().manual_seed(seed))], dim=1)
    generator = torch.Generator().manual_seed(seed)
    signals = {tap: torch.rand(tokens.shape[:2], generator=generator).softmax(dim=-1) for tap in stage.needs}
    original = torch.arange(tokens.shape[1]).expand(items, -1)
    return ScoreInputs(
        tokens, number, grid.expand(items, -1, -1), original, tokens.shape[1], modality="video", signals=signals, num_frames=count,
    )  # fmt: skip


def choose(stage: Stage, inputs: ScoreInputs) -> Selection:
    return stage.selector(stage.scorer(inputs).float(), inputs)


def some(inputs: ScoreInputs, stay: Tensor) -> ScoreInputs:
    """The tokens (B, n) that an earlier stage left."""

    def pick(values: Tensor) -> Tensor:
        return torch.stack([value[kept] for value, kept in zip(values, stay, strict=True)])

    assert inputs.grid is not None
    assert inputs.original is not None
    signals = {tap: pick(values) for tap, values in inputs.signals.items()}
    return replace(inputs, tokens=pick(inputs.tokens), grid=pick(inputs.grid), original=pick(inputs.original), signals=signals)


# sharing out


def test_shares_by_hand() -> None:
    groups = torch.tensor([[0] * 10 + [1] * 6 + [2] * 2 + [-1] * 3])
    sizes = torch.tensor([[10.0, 6.0, 2.0]])
    assert allot(groups, sizes, 9, DOWN).tolist() == [[5, 3, 1]]
    assert allot(groups, sizes, 8, DOWN).tolist() == [[5, 3, 0]]          # 1/2 of everyone, and the smallest group is last of equals
    assert allot(groups, sizes, 3, UP).tolist() == [[1, 1, 1]]
    assert allot(groups, sizes, 1, NEAREST).tolist() == [[1, 0, 0]]
    assert allot(groups, torch.tensor([[0.0, 1.0, torch.inf]]), 9).tolist() == [[1, 6, 2]]       # 2 first, then 1, then what there is
    assert allot(groups, sizes, 21, DOWN).tolist() == [[10, 6, 2]]        # no more than there are


@pytest.mark.parametrize("offset", [DOWN, NEAREST, UP])
def test_shares_equal_one_place_after_the_other(offset: float) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(40):
        groups = torch.randint(-1, 5, (2, 23), generator=generator)
        weights = torch.randint(0, 6, (2, 5), generator=generator).float()
        number = int(torch.randint(0, 24, (1,), generator=generator))
        found = allot(groups, weights, number, offset)
        for row in range(2):
            members = {name: [place for place in range(23) if groups[row, place] == name] for name in range(5)}
            expected = share_out(members, dict(enumerate(weights[row].tolist())), dict.fromkeys(range(5), offset), number)
            if all(weights[row]):
                assert found[row].tolist() == list(expected.values())
            assert int(found[row].sum()) == min(number, sum(map(len, members.values())))


def test_program_totals_give_program_numbers() -> None:
    """`round(share * size)`, its floor and ceiling, for many shares."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(50):
        sizes = torch.randint(1, 30, (6,), generator=generator)
        groups = torch.repeat_interleave(torch.arange(6), sizes)[None]
        share = float(torch.rand(1, generator=generator, dtype=torch.float64))
        exact = sizes.double() * share
        for offset, counts in ((DOWN, exact.floor()), (UP, exact.ceil()), (NEAREST, (exact + 0.5).floor())):
            assert allot(groups, sizes[None].float(), int(counts.sum()), offset)[0].tolist() == counts.int().tolist()


def test_ranks_in_groups() -> None:
    groups, scores = torch.tensor([[1, 0, 1, 1, -1, 0]]), torch.tensor([[0.5, 0.1, 0.9, 0.5, 7.0, 0.2]])
    assert rank_in_groups(groups, scores).tolist() == [[1, 1, 0, 2, 0, 0]]


# clustering


def test_density_peaks_by_hand() -> None:
    """Two tight pairs and a stray; groups do not see each other."""
    points = torch.tensor([[0.0], [0.1], [5.0], [5.3], [9.0]])[None, None]
    groups = torch.zeros(1, 1, 5, dtype=torch.int64)
    scores = peak_scores(points, groups, 2)
    density = [torch.exp(torch.tensor(-d * d / 2)) for d in (0.1, 0.1, 0.3, 0.3, 3.7)]
    expected = torch.stack([density[0] * 9, density[1] * 0.1, density[2] * 4.9, density[3] * 0.3, density[4] * 3.7])
    torch.testing.assert_close(scores[0, 0], expected, rtol=1e-4, atol=1e-6)
    centres = torch.tensor([[[True, False, True, False, False]]])
    assert nearest_centre(points, groups, centres).tolist() == [[[0, 0, 2, 2, 2]]]
    apart = torch.tensor([[[0, 0, 1, 1, -1]]])
    assert nearest_centre(points, apart, centres & (apart == 1)).tolist() == [[[-1, -1, 2, 2, -1]]]
    assert peak_scores(points, apart, 2)[0, 0, 4] == -torch.inf


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = clip(1, items=2)
    groups = (torch.arange(20) % 3 - 1).expand(2, 9, 20)
    whole = peak_scores(frames, groups, 4)
    stage = fastvid(FACTS, 40).stages[0]
    inputs = as_inputs(frames, stage, 40)
    selection = choose(stage, inputs)
    merged = stage.reducer(inputs, selection).tokens
    monkeypatch.setattr(density_peaks, "CHUNK", 900)
    monkeypatch.setattr(anchor_means, "CHUNK", 100)
    torch.testing.assert_close(peak_scores(frames, groups, 4), whole)
    torch.testing.assert_close(stage.reducer(inputs, selection).tokens, merged)


# windows


def test_contiguous_labels_by_hand() -> None:
    labels = torch.tensor([[0, 1, 0, 1, 2, 2, 1, 1, 1, 0], [0, 1, 2, 0, 1, 2, 0, 1, 2, 0], [3, 3, 0, 1, 1, 1, 0, 3, 3, 2]])
    assert contiguous_labels(labels, 4).tolist() == [
        [2, 2, 2, 2, 2, 2, 1, 1, 1, 1],
        [0] * 10,                                          # no label lasts: one window
        [3, 3, 1, 1, 1, 1, 1, 3, 3, 3],                     # the longer neighbour; both runs of 3 stay
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    for _ in range(60):
        labels = torch.randint(0, 4, (3, 14), generator=generator)
        assert contiguous_labels(labels, 4).tolist() == [naive_prunevid.contiguous(row) for row in labels.tolist()]


def test_extents() -> None:
    first, last = extents(starts_of(torch.tensor([[2, 2, 0, 1, 1, 1]])))
    assert first.tolist() == [[0, 0, 2, 3, 3, 3]]
    assert last.tolist() == [[1, 1, 2, 5, 5, 5]]


def test_windows_by_hand() -> None:
    """Cell 0 is still all along, cell 1 in the first three frames: (0, 3) and (0, 2) (3, 3) save 3 and 4."""
    still = torch.tensor([[[True, True], [True, True], [True, False]]])
    gains = still_gains(still)
    assert gains[0].tolist() == [[0, 2, 4, 3], [0, 0, 2, 2], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert best_windows(gains, 99).tolist() == [[True, False, False, True]]
    assert best_windows(gains, 1).tolist() == [[True] * 4]
    assert best_windows(torch.zeros(1, 4, 4, dtype=torch.int64), 99).tolist() == [[True] * 4]


def test_cells_with_holes_and_separators() -> None:
    grid = torch.tensor([[[0, 0, 1], [0, -1, -1], [1, 0, 0], [1, 0, 1], [2, 1, 1]]])
    cells = frame_cells(grid, 3, 5)
    assert cells.place.tolist() == [[1, 15, 5, 6, 13]]
    assert cells.there.flatten().nonzero().flatten().tolist() == [1, 5, 6, 13]
    assert cells.of_tokens(torch.tensor([[10, 20, 30, 40, 50]]))[0].tolist() == [[0, 10, 0, 0, 0], [30, 40, 0, 0, 0], [0, 0, 0, 50, 0]]
    assert cells.to_tokens(torch.arange(15).reshape(1, 3, 5), -1).tolist() == [[1, -1, 5, 6, 13]]


# against loops, on videos where much stands still


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("number", [3, 12, 40, 70, 110, 160, 179])
@pytest.mark.parametrize("name", ["prunevid", "fastvid", "holitom"])
def test_still_videos_equal_loops(name: str, number: int, seed: int) -> None:
    given: dict[str, dict[str, Any]] = {"prunevid": {"merged": number, "segments": 0.34}, "fastvid": {"segments": 3, "threshold": 0.3, "every": 2 + seed % 2}}
    options = given.get(name, {})
    stage = BUILD[name](FACTS, min(number, 40) if name == "prunevid" and number > 3 else number, **options).stages[0]
    frames = clip(seed, scenes=[(3, 4, 2), (3, 4, 2), (5, 2, 2)][seed], still=[0.9, 0.7, 0.97][seed])
    inputs = as_inputs(frames, stage, number, seed=seed)
    selection = choose(stage, inputs)
    kept, tokens = NAIVE[name].reference(stage, inputs, 0)
    assert selection.keep_indices[0].tolist() == kept
    merged = stage.reducer(inputs, selection)
    assert merged.tokens is not None
    torch.testing.assert_close(merged.tokens[0], tokens, rtol=1e-4, atol=1e-5)


def test_the_still_videos_have_still_and_moving_cells() -> None:
    """So that the loops above say something."""
    for seed, still in ((0, 0.9), (1, 0.7)):
        for stage in (prunevid(FACTS, 40, merged=40, segments=0.34).stages[0], holitom(FACTS, 40).stages[0]):
            frames = clip(seed, still=still)
            starts, stands = stage.selector.cutting(frames, torch.ones(1, 9, 20, dtype=torch.bool))  # type: ignore[attr-defined]
            assert 2 <= int(starts.sum()) <= 5
            assert 40 < int(stands.sum()) < 170
            roles = choose(stage, as_inputs(frames, stage, 40)).roles
            assert roles is not None
            assert 0 < int(roles.sum()) < 40


# exactly K, whatever is there


@pytest.mark.parametrize("separators", [0, 7])
@pytest.mark.parametrize("name", BUILD)
def test_exactly_k_in_rising_order_alone_as_in_a_batch(name: str, separators: int) -> None:
    frames = clip(7, items=3)
    frames[2] = frames[2, :1, :1]                                          # every token the same
    total = 180 + separators
    for number in (1, 2, 9, 10, 45, 120, 178, 181, total - 1):
        if number >= total:
            continue
        stages = BUILD[name](FACTS, number).stages if name != "prunevid" else prunevid(FACTS, number, merged=number).stages
        for stage in stages:
            inputs = as_inputs(frames, stage, number, separators=separators)
            selection = choose(stage, inputs)
            keep = selection.keep_indices
            assert keep.shape == (3, number)
            assert bool((keep.diff(dim=1) > 0).all())
            assert int(keep.min()) >= 0
            assert int(keep.max()) < total
            if not stage.reducer.exact:
                reduced = stage.reducer(inputs, selection)
                assert reduced.tokens is not None
                assert reduced.tokens.isfinite().all()
                assert reduced.tokens.shape == (3, number, WIDTH)
                if isinstance(stage.reducer, StillMeans) and reduced.sizes is not None and stage.selector.moving == "merge" and number > 60:  # type: ignore[attr-defined]
                    assert reduced.sizes.sum(dim=1).tolist() == [180.0 + max(0, number - 180)] * 3     # every token is in one mean; dropped newlines in none
            for item in range(3):
                alone = replace(
                    inputs, tokens=inputs.tokens[item : item + 1], grid=inputs.grid[item : item + 1], original=inputs.original[item : item + 1],  # type: ignore[index]
                    signals={tap: values[item : item + 1] for tap, values in inputs.signals.items()},
                )  # fmt: skip
                assert torch.equal(choose(stage, alone).keep_indices[0], keep[item])


@pytest.mark.parametrize("name", BUILD)
def test_after_another_method(name: str) -> None:
    """Frames with holes, some of them empty."""
    frames = clip(9, items=2)
    generator = torch.Generator().manual_seed(4)
    stay = torch.stack([torch.cat([torch.arange(20), 60 + torch.randperm(120, generator=generator)[:70].sort().values]) for _ in range(2)])
    for number in (1, 8, 30, 80, 89):
        stage = BUILD[name](FACTS, number).stages[0]
        inputs = some(as_inputs(frames, stage, number), stay)
        selection = choose(stage, inputs)
        assert selection.keep_indices.shape == (2, number)
        assert bool((selection.keep_indices.diff(dim=1) > 0).all())
        reduced = stage.reducer(inputs, selection).tokens
        assert reduced is None or bool(reduced.isfinite().all())


def test_newlines_go_first_and_are_merged_into_nothing() -> None:
    frames = clip(3)
    for name in ("prunevid", "fastvid", "holitom"):
        stage = BUILD[name](FACTS, 30).stages[0]
        plain, ended = (as_inputs(frames, stage, 30, separators=count) for count in (0, 5))
        ended = replace(ended, signals={tap: torch.cat([values, values.amax() + torch.ones(1, 5)], dim=1) for tap, values in plain.signals.items()})
        first, second = choose(stage, plain), choose(stage, ended)
        assert torch.equal(first.keep_indices, second.keep_indices)
        merged, same = stage.reducer(plain, first).tokens, stage.reducer(ended, second).tokens
        assert merged is not None
        assert same is not None
        torch.testing.assert_close(merged, same)


def test_newlines_of_vidcom2() -> None:
    frames = clip(3)
    for separators, expected in (("keep", 5), ("drop", 0)):
        stage = vidcom2(FACTS, 30, separators=separators).stages[0]
        keep = choose(stage, as_inputs(frames, stage, 30, separators=5)).keep_indices[0]
        assert int((keep >= 180).sum()) == expected


def test_gradients_flow_through_what_is_merged() -> None:
    frames = clip(11)
    for stage in (prunevid(FACTS, 30, merged=60).stages[0], fastvid(FACTS, 60).stages[0], *holitom(FACTS, 60).stages):
        inputs = as_inputs(frames, stage, 60)
        tokens = inputs.tokens.clone().requires_grad_()
        merged = stage.reducer(replace(inputs, tokens=tokens), choose(stage, inputs)).tokens
        assert merged is not None
        merged.sum().backward()
        assert tokens.grad is not None
        assert int((tokens.grad.abs().sum(dim=-1) > 0).sum()) > 60


# each method by hand


def test_vidcom2_gives_the_odd_frame_more() -> None:
    """Three frames alike and one unlike them; at a high temperature all get the same."""
    frames = 0.05 * torch.randn(1, 4, 20, WIDTH, generator=torch.Generator().manual_seed(1)) + torch.ones(WIDTH)
    frames[0, 2] = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(2))
    stage = vidcom2(FACTS, 20).stages[0]
    keep = choose(stage, as_inputs(frames, stage, 20)).keep_indices[0] // 20
    counts = torch.bincount(keep, minlength=4).tolist()
    assert counts[2] >= 7
    assert min(counts) >= 4
    even = vidcom2(FACTS, 20, temperature=1e6).stages[0]
    assert torch.bincount(choose(even, as_inputs(frames, even, 20)).keep_indices[0] // 20).tolist() == [5] * 4
    few = vidcom2(FACTS, 4).stages[0]
    assert (choose(few, as_inputs(frames, few, 4)).keep_indices[0] // 20).tolist() == [0, 1, 2, 3]


def test_vidcom2_sees_nan() -> None:
    frames = clip(1)
    frames[0, 0, 0, 0] = torch.nan
    stage = vidcom2(FACTS, 20).stages[0]
    assert bool(stage.scorer(as_inputs(frames, stage, 20)).isnan().any())


def test_prunevid_stages_and_shares() -> None:
    method = prunevid(ModelFacts(decoder_layers=32))
    assert [stage.point.label for stage in method.stages] == ["before_llm", "llm:11"]
    assert [stage.budget.num_keep(2304) for stage in method.stages] == [921, 368]        # 0.4 and 0.16
    assert [stage.budget.num_keep(100) for stage in prunevid(FACTS, 0.25, merged=0.7).stages] == [70, 25]
    assert all(stage.budget.is_everything for stage in prunevid(FACTS, 1.0).stages)


def test_set_shares_by_hand() -> None:
    """Sets of 4, 2 and 4; with 5 of them half of each, the still ones of a frame apart from its moving ones."""
    grid = torch.tensor([[[0, 0, c] for c in range(6)] + [[1, 0, c] for c in range(4)] + [[1, -1, -1]]])
    roles = torch.tensor([[1, 0, 1, 1, 0, 1, 0, 0, 0, 0, 0]])
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.3, 0.8, 0.4, 0.7, 0.1, 0.2, 0.6, 9.0]])
    inputs = ScoreInputs(torch.zeros(1, 11, 2), 5, grid, modality="video", roles=roles)
    assert SetShares()(scores, inputs).keep_indices.tolist() == [[1, 3, 5, 6, 9]]
    assert SetShares()(scores, replace(inputs, roles=None)).keep_indices.tolist() == [[1, 4, 5, 6, 9]]
    assert SetShares()(scores, replace(inputs, num_keep=10)).keep_indices.tolist() == [list(range(10))]


def test_prunevid_passes_roles_on_to_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ScoreInputs] = []
    original = SetShares.__call__
    monkeypatch.setattr(SetShares, "__call__", lambda self, scores, inputs: seen.append(inputs) or original(self, scores, inputs))
    tiny = families()["llava_next_video"]
    model = tiny.build()
    with vlprune.apply(model, "prunevid", keep=0.25, threshold=-1.0) as handle, torch.no_grad():
        model(**tiny.prompt([[3, "video", 4], [2, "video", 2]]))
        first = handle.report().points[0]
    assert len(seen) == 1
    assert seen[0].roles is not None
    assert seen[0].roles.tolist() == [[1] * 9 + [0] * 4] * 2              # one still window, and four tokens of it that stay unmerged
    assert seen[0].num_frames == 3
    assert first.visual_kept == 2 * 13


def test_holitom_shares_and_layers() -> None:
    method = holitom(FACTS, 0.2)
    assert [stage.point.label for stage in method.stages] == ["before_llm", "llm:18"]
    assert [stage.budget.num_keep(100) for stage in method.stages] == [20, 10]
    assert [stage.budget.num_keep(100) for stage in holitom(FACTS, 15, llm_keep=0.3).stages] == [15, 4]
    assert len(holitom(FACTS, 0.2, llm_keep=1.0).stages) == 1
    assert len(holitom(FACTS, 1.0).stages) == 1
    thresholds = [holitom(FACTS, keep).stages[0].selector.cutting.threshold for keep in (0.1, 0.15, 64)]  # type: ignore[attr-defined]
    assert thresholds == [0.65, 0.8, 0.8]


def test_pairwise_means_by_hand() -> None:
    """Tokens 1, 3 and 4 leave; 1 and 4 are like 0, 3 is like 2. (8 + 4) / 2 = 6, (6 + 10) / 2 = 8."""
    tokens = torch.tensor([[[8.0, 0.0], [4.0, 0.0], [0.0, 2.0], [0.0, 6.0], [10.0, 0.0], [100.0, 1.0]]])
    grid = torch.tensor([[[0, 0, c] for c in range(5)] + [[0, -1, -1]]])
    reduced = PairwiseMeans()(ScoreInputs(tokens, 2, grid, modality="video"), Selection(torch.tensor([[0, 2]])))
    assert reduced.tokens is not None
    assert reduced.sizes is not None
    assert reduced.tokens.tolist() == [[[8.0, 0.0], [0.0, 4.0]]]          # the newline is averaged into nothing
    assert reduced.sizes.tolist() == [[3.0, 2.0]]


def test_a_still_video_is_one_picture() -> None:
    """Ten equal frames: with a frame's worth of tokens, that frame; with more, some of its tokens again."""
    frames = clip(1, scenes=(1,)).expand(-1, 10, -1, -1)
    for name in ("prunevid", "holitom"):
        stage = prunevid(FACTS, 10, merged=20).stages[0] if name == "prunevid" else holitom(FACTS, 20).stages[0]
        selection = choose(stage, as_inputs(frames, stage, 20))
        assert selection.keep_indices[0].tolist() == list(range(20))
        merged = stage.reducer(as_inputs(frames, stage, 20), selection)
        assert merged.tokens is not None
        torch.testing.assert_close(merged.tokens, frames[:, 0])
        assert merged.sizes is not None
        assert merged.sizes.tolist() == [[10.0] * 20]
        more = choose(stage, as_inputs(frames, stage, 50)).keep_indices[0]
        assert more[:20].tolist() == list(range(20))


def test_fastvid_segments_and_anchor_frames() -> None:
    """Segments of 5 and 1 frames with anchors in every second, counted from the end: frames 0, 2, 4 and 5."""
    frames = torch.cat([clip(1, scenes=(5,), still=1.0), clip(2, scenes=(1,), still=1.0)], dim=1)
    stage = fastvid(FACTS, 48, segments=2, every=2, context=0.5).stages[0]
    selection = choose(stage, as_inputs(frames, stage, 48))
    assert selection.roles is not None
    keep, roles = selection.keep_indices[0], selection.roles[0]
    assert torch.bincount(keep[roles == 0] // 20, minlength=6).tolist() == [4] * 6
    assert torch.bincount(keep[roles == 1] // 20, minlength=6).tolist() == [7, 0, 7, 0, 6, 4]      # 20 places for 5 frames, 4 for one


# errors


@pytest.mark.parametrize(
    ("build", "options", "words"),
    [
        (prunevid, {"threshold": 2.0}, "threshold=2.0.*mean cosine"),
        (prunevid, {"segments": 0.25, "cluster_ratio": 1.5}, "ratio=1.5"),
        (prunevid, {"segments": 8}, "segments=8.*between 0 and 1"),
        (prunevid, {"layer": 0}, "from 1 to 27"),
        (prunevid, {"keep": 0.5, "merged": 0.2}, "at least what is left in the end"),
        (fastvid, {"segments": 0}, "segments=0"),
        (fastvid, {"every": 0}, "every=0"),
        (fastvid, {"context": -0.1}, "context=-0.1"),
        (fastvid, {"beta": 2}, "beta=2"),
        (fastvid, {"frames": "cls"}, "'tokens' or 'states'"),
        (holitom, {"threshold": "high"}, "threshold='high'"),
        (holitom, {"llm_keep": 0}, "llm_keep=0"),
        (holitom, {"llm_layer": 28}, "from 1 to 27"),
        (holitom, {"longest": 0}, "longest=0"),
        (holitom, {"beta": -1}, "centre=-1"),
        (vidcom2, {"temperature": 0}, "temperature=0"),
        (vidcom2, {"separators": "all"}, "'keep'.*'drop'"),
    ],
)
def test_options_are_checked_when_built(build: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        build(FACTS, **{"keep": 0.2, **options})


@pytest.mark.parametrize("name", BUILD)
def test_without_a_grid_it_says_what_is_missing(name: str) -> None:
    stage = BUILD[name](FACTS, 20).stages[0]
    inputs = replace(as_inputs(clip(1), stage, 20), grid=None, num_frames=None)
    with pytest.raises(OptionError, match="frame, row and column"):
        choose(stage, inputs)


def test_reducers_say_which_selector_they_go_with() -> None:
    inputs = ScoreInputs(torch.zeros(1, 4, 2), 2)
    for reducer in (StillMeans(), AnchorMeans()):
        with pytest.raises(OptionError, match="into one stage"):
            reducer(inputs, Selection(torch.tensor([[0, 1]])))


def test_frame_count_is_read_from_the_grid_where_nobody_knows_it() -> None:
    stage = vidcom2(FACTS, 20).stages[0]
    inputs = as_inputs(clip(1), stage, 20)
    scores = FrameOutliers()(inputs)
    assert torch.equal(FrameOutliers()(replace(inputs, num_frames=None)), scores)
    assert TopK()(scores, inputs).keep_indices.shape == (1, 20)


@pytest.mark.parametrize("name", BUILD)
def test_images_are_an_error(name: str) -> None:
    tiny = families()["llava_next_video"]
    model = tiny.build()
    with vlprune.apply(model, name), torch.no_grad(), pytest.raises(OptionError, match=rf"{name} works on videos only.*image"):
        model(**tiny.prompt([[3, "image", 4]]))

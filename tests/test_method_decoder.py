"""PyramidDrop, SparseVLM and DyCoke: counts and layers worked out by hand, loops over tokens, and what is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlprune
from tests.naive import sparsevlm as naive_sparsevlm
from tests.test_decode_select import expected_logits, generate
from tests.test_naive import GRIDS, ITEMS, inputs_for, one
from tests.tiny import families
from vlprune.errors import OptionError
from vlprune.kernels.recycling import density_peaks, num_clustered, num_unchanged, recycle
from vlprune.method import ModelFacts
from vlprune.methods.dycoke import dycoke
from vlprune.methods.pyramiddrop import pyramiddrop
from vlprune.methods.sparsevlm import LISTS, sparsevlm, stage_shares
from vlprune.protocols import ScoreInputs, Tap
from vlprune.scorers.frame_groups import FrameGroups
from vlprune.selectors import TopK
from vlprune.tokens import raster_grid

DEEP, TINY = ModelFacts(decoder_layers=32), ModelFacts(decoder_layers=4)


def counts(method: Any, total: int = 576) -> list[int]:
    return [stage.budget.num_keep(total) for stage in method.stages]


# PyramidDrop


def test_pyramiddrop_schedule() -> None:
    method = pyramiddrop(DEEP)
    assert [stage.point.layer for stage in method.stages] == [8, 16, 24]
    assert [stage.needs for stage in method.stages] == [(Tap("last_row", layer),) for layer in (8, 16, 24)]
    assert counts(method) == [288, 144, 72]
    assert counts(pyramiddrop(DEEP, (0.9, 0.5, 0.3)), 101) == [90, 50, 30]      # int(), of the original number
    assert counts(pyramiddrop(DEEP, 1 / 64)) == [144, 36, 9]                    # the same share at every stage
    assert counts(pyramiddrop(DEEP, 9)) == [144, 36, 9]
    assert [stage.point.layer for stage in pyramiddrop(TINY).stages] == [1, 2, 3]
    assert [stage.point.layer for stage in pyramiddrop(ModelFacts(decoder_layers=28)).stages] == [7, 14, 21]


@pytest.mark.parametrize(
    ("keep", "options", "words"),
    [("high", {}, "one share per stage"), ((0.5, 0.2), {}, "3 stages"), ((0.2, 0.5, 0.1), {}, "only fall"), (0.1, {"layers": (0, 3)}, "from 1 to 31")],
)
def test_pyramiddrop_errors(keep: Any, options: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        pyramiddrop(DEEP, keep, **options)


# SparseVLM


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_sparsevlm_lists(variant: str) -> None:
    for average, listed in LISTS[variant].items():
        assert counts(sparsevlm(DEEP, average, variant=variant)) == list(listed)
        assert counts(sparsevlm(DEEP, average / 576, variant=variant)) == list(listed)
    method = sparsevlm(DEEP, variant=variant)
    assert [stage.point.layer for stage in method.stages] == [3, 7, 16]
    assert [tap.layer for stage in method.stages for tap in stage.needs] == [2, 6, 15]
    assert counts(sparsevlm(DEEP, 32, variant=variant)) == [round(count / 2) for count in LISTS[variant][64]]
    assert stage_shares(variant, 1.0) == (1.0, 1.0, 1.0)
    assert stage_shares(variant, 160 / 576) == pytest.approx([(a + b) / 2 / 576 for a, b in zip(LISTS[variant][128], LISTS[variant][192], strict=True)])
    for percent in range(1, 100):
        left = [576, *counts(sparsevlm(DEEP, percent / 100, variant=variant))]
        assert left == sorted(left, reverse=True)
        assert left[-1] >= 1
    assert all(stage.budget.is_everything for stage in sparsevlm(DEEP, 1.0, variant=variant).stages)


def test_recycling_counts() -> None:
    """The program's counts come out of ours: 300 of 576 are left with 9 clusters, 200 of those 309 with 4, 110 of those 204 with 3."""
    assert [num_clustered(dropped) for dropped in (276, 109, 94, 1)] == [(83, 9), (33, 4), (29, 3), (1, 1)]
    assert [num_unchanged(*pair) for pair in ((576, 309), (309, 204), (204, 113), (100, 99), (10, 2), (10, 1), (576, 5))] == [300, 200, 110, 98, 1, 1, 1]
    for total in (2, 17, 64):
        for keep in range(1, total):
            generator = torch.Generator().manual_seed(keep)
            plan = recycle(torch.rand(2, total, generator=generator), torch.randn(2, total, 5, generator=generator), keep)
            assert plan.kept.shape[1] + plan.centres.shape[1] == keep
            assert plan.kept.shape[1] >= 1
            places = torch.cat([plan.kept, torch.gather(plan.pool, 1, plan.centres)], dim=1)
            assert all(len(set(row)) == keep for row in places.tolist())


def test_density_peaks_by_hand() -> None:
    """Two dense heaps and a loner, one-dimensional, two neighbours: itself and the next."""
    features = torch.tensor([0.0, 0.1, 0.2, 5.0, 5.1, 9.0])[None, :, None]
    centres, owner = density_peaks(features, 3, 2)
    # The densest of the first heap is as far as can be (9); of the second 4.8; the loner 3.9, but with density exp(-3.9^2 / 2) nearly nothing.
    assert centres[0, :2].tolist()[0] in (0, 1, 2)
    assert centres[0, 1].item() in (3, 4)
    assert owner[0, :3].unique().numel() <= 2
    two, belongs = density_peaks(features, 2, 2)
    assert two.tolist() == centres[:, :2].tolist()
    assert belongs[0].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("appended", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_sparsevlm_v1_equals_loops_over_tokens(seed: int, appended: bool) -> None:
    built = sparsevlm(ModelFacts(decoder_layers=12), 0.3, variant="v1", appended=appended)
    for shape in [*GRIDS["image"], (1, 12, 14)]:
        count = total = shape[1] * shape[2]
        for number, stage in enumerate(built.stages):
            inputs = inputs_for(stage, shape, "image", count, 100 * seed + number)
            selection = stage.selector(stage.scorer(inputs).float(), inputs)
            assert torch.all(selection.keep_indices.diff(dim=1) > 0)
            reduced = stage.reducer(inputs, selection)
            for row in range(ITEMS):
                kept, tokens = naive_sparsevlm.reference(stage, one(inputs, row), number)
                assert selection.keep_indices[row].tolist() == kept
                torch.testing.assert_close(reduced.tokens[row], tokens, rtol=1e-4, atol=1e-4)
                alone = stage.selector(stage.scorer(one(inputs, row)).float(), one(inputs, row))
                assert torch.equal(alone.keep_indices[0], selection.keep_indices[row])
            assert 1 <= selection.keep_indices.shape[1] < total
            count = selection.keep_indices.shape[1]


def test_gradients_flow_through_cluster_means() -> None:
    stage = sparsevlm(DEEP, 0.3, variant="v1").stages[1]
    inputs = inputs_for(stage, (1, 6, 6), "image", 36, 0)
    inputs.tokens.requires_grad_()
    selection = stage.selector(stage.scorer(inputs), inputs)
    stage.reducer(inputs, selection).tokens.sum().backward()
    gradient = inputs.tokens.grad.sum(dim=-1) / inputs.tokens.shape[-1]              # each token's share in what is left: sums to K
    torch.testing.assert_close(gradient.sum(dim=1), torch.full((ITEMS,), float(inputs.num_keep)), rtol=1e-4, atol=1e-4)
    assert bool(((gradient > 0) & (gradient < 0.99)).any(dim=1).all())


@pytest.mark.parametrize("appended", [False, True])
def test_sparsevlm_v1_on_a_model(appended: bool) -> None:
    """Exactly K slots, whole-length logits, a row of a batch as alone, also while decoding."""
    family = families()["llava"]
    model = family.build()
    rows = [[3, "image", 4], [5, "image", 2, "image", 6]]
    options = {"variant": "v1", "appended": appended, "positions": "renumber" if appended else "preserve"}
    with torch.no_grad(), vlprune.apply(model, "sparsevlm", keep=(20, 12, 7), **options) as handle:
        together = generate(model, family.prompt(rows), steps=3)
        assert [record.visual_kept for record in handle.report().points] == [60, 36, 21]
        for number, row in enumerate(rows):
            alone = generate(model, family.prompt([row], row_numbers=[number]), steps=3)
            torch.testing.assert_close(torch.stack(together.logits)[:, number], torch.stack(alone.logits)[:, 0], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "v3"}, "'v1', 'v2'"), ({"heads": 0}, "from 1"), ({"appended": True}, "v2 has none"), ({"layers": (3, 3)}, "rising layer"),
        ({"layers": (1, 2, 3, 4)}, "one share per stage"), ({"keep": (0.5, 0.2)}, "3 stages"),
    ],
)  # fmt: skip
def test_sparsevlm_errors(options: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        sparsevlm(DEEP, **options)


# DyCoke


def thinned(tokens: torch.Tensor, frames: int, each: int, share: int, slips: bool) -> list[int]:
    """Kept tokens, written as the program's two passes: pairs, then the third of every four."""
    video, keep = tokens.view(frames, each, -1), {frame: list(range(each)) for frame in range(frames)}

    def least_alike(frame: int, other: int) -> list[int]:
        alike = [float(torch.cosine_similarity(video[frame, cell], video[other, cell], dim=0)) for cell in range(each)]
        return sorted(range(each), key=lambda cell: alike[cell])[:share]

    for frame in range(0, frames - 1, 2):
        keep[frame + 1] = least_alike(frame + 1, frame)
    for frame in range(0, frames - 4 if slips else frames - 2, 4):
        keep[frame + 2] = least_alike(frame + 2, frame)
    if slips and frames % 2:
        del keep[frames - 1]
    return sorted(frame * each + cell for frame, cells in keep.items() for cell in cells)


@pytest.mark.parametrize("slips", [False, True])
@pytest.mark.parametrize("frames", [2, 3, 4, 5, 7, 8, 11])
def test_dycoke_frames(frames: int, slips: bool) -> None:
    generator = torch.Generator().manual_seed(frames)
    tokens, grid = torch.randn(2, frames * 12, 8, generator=generator), raster_grid(frames, 3, 4).expand(2, -1, -1)
    scores = FrameGroups("code" if slips else "paper")(ScoreInputs(tokens, 1, grid))
    for row in range(2):
        expected = thinned(tokens[row], frames, 12, 5, slips)
        selection = TopK()(scores, ScoreInputs(tokens, len(expected), grid))
        assert selection.keep_indices[row].tolist() == expected
    more = torch.randperm(frames * 12, generator=generator)
    moved = FrameGroups("code" if slips else "paper")(ScoreInputs(tokens[:, more], 1, grid[:, more]))
    assert torch.equal(moved, scores[:, more])


def test_dycoke_spreads_what_is_left_and_counts_separators() -> None:
    """Four frames of four tokens and one separator each; all alike but for one changed cell a frame, which the frame after sees change back."""
    grid = torch.cat([torch.cat([torch.tensor([[f, r, c] for r in range(2) for c in range(2)]), torch.tensor([[f, -1, -1]])]) for f in range(4)])
    tokens = torch.ones(20, 3)
    tokens[[5 + 2, 10 + 1, 15 + 3]] = torch.tensor([1.0, -2.0, 0.0])                     # cosine -0.26 with the others
    scores = FrameGroups()(ScoreInputs(tokens[None], 8, grid[None]))

    def kept(number: int) -> list[int]:
        return TopK()(scores, ScoreInputs(tokens[None], number)).keep_indices[0].tolist()

    assert kept(8) == [0, 1, 2, 3, 4, 7, 11, 16]        # in frame 3 cells 1 (changed back) and 3 changed alike: the earlier goes first
    assert kept(7) == [0, 1, 2, 3, 4, 7, 11]
    assert kept(11) == [0, 1, 2, 3, 4, 7, 9, 11, 14, 16, 18]    # the second of frames 1 and 2 is as similar as the others there: the separator, their cell 0
    assert kept(3) == [0, 3, 4]                         # less than the whole frame: what differs from the last frame, then by cell
    with pytest.raises(OptionError, match="frame, row and column"):
        FrameGroups()(ScoreInputs(tokens[None], 8))


@pytest.mark.parametrize("slips", [False, True])
def test_dycoke_thins_whole_frames_alike(slips: bool) -> None:
    """Fewer tokens than the whole frames hold: every fourth frame keeps the same number."""
    frames, each = 12, 6
    tokens, grid = torch.randn(2, frames * each, 8, generator=torch.Generator().manual_seed(0)), raster_grid(frames, 2, 3).expand(2, -1, -1)
    scores = FrameGroups("code" if slips else "paper")(ScoreInputs(tokens, 1, grid))
    whole = [0, 4, 8, 10] if slips else [0, 4, 8]
    kept = TopK()(scores, ScoreInputs(tokens, 2 * len(whole))).keep_indices
    for row in range(2):
        assert (kept[row] // each).tolist() == sorted(2 * whole)
        video = tokens[row].view(frames, each, -1)
        alike = torch.cosine_similarity(video[0], video[4], dim=1)
        assert kept[row, :2].tolist() == sorted(alike.argsort()[:2].tolist())


def test_dycoke_works_on_videos_only() -> None:
    """Also where nothing leaves the prompt."""
    family = families()["llava"]
    model, prompt = family.build(), family.prompt([[3, "image", 4]])
    for keep in (0.5, 1.0):
        with pytest.raises(OptionError, match="videos only"), torch.no_grad(), vlprune.apply(model, "dycoke", keep=keep, decode_keep=0.5):
            model(**prompt, use_cache=True)


def test_dycoke_options() -> None:
    (select,) = dycoke(ModelFacts(decoder_layers=28)).decode_selects
    assert (select.layer, select.reads, select.reuse, select.budget.num_keep(64)) == (3, 2, 0.9, 19)
    assert dycoke(DEEP, 1.0).decode_selects == ()
    assert dycoke(DEEP, 0.5, decode_keep=1.0).decode_selects == ()
    assert dycoke(DEEP, 1.0, decode_keep=0.5).decode_selects[0].budget.keep == 0.5
    assert dycoke(ModelFacts(decoder_layers=2)).decode_selects[0].layer == 1
    wrong = {"layer": (0, "from 1"), "reuse": (2, "a cosine"), "decode_keep": (1.5, "share"), "variant": ("x", "'code'")}
    for name, (value, words) in wrong.items():
        with pytest.raises(OptionError, match=words):
            dycoke(DEEP, 0.5, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="to 31"):
        dycoke(DEEP, 0.5, layer=32)


def test_dycoke_with_both_stages_on_a_model() -> None:
    """Frames thinned, then keys selected while decoding: each step equals a dense model in which the others are hidden."""
    family = families()["qwen2_5_vl"]
    model, prompt = family.build(), family.prompt([[3, "video", 4], [2, ("video", 1), 5]])
    with torch.no_grad(), vlprune.apply(model, "dycoke", keep=0.6, reuse=0.95) as handle:
        (select,) = handle.method.decode_selects
        out = generate(model, prompt)
        record = handle.trace.points[0]
        items: list[list[int]] = [[], []]
        for item, kept in zip(record.items, record.kept, strict=True):
            items[item.row].append(kept.numel())
        if "video_grid_thw" in prompt:
            prompt = {**prompt, "image_grid_thw": None}                 # the reference lets the model make its own positions
        expected, _ = expected_logits(family, prompt, out.sequences, select, handle.trace, items)
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, rtol=1e-4, atol=2e-4)

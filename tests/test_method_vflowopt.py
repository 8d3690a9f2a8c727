"""VFlowOpt's parts on cases worked by hand, its budgets against the paper's averages, and its mistakes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vlprune.errors import OptionError
from vlprune.kernels.cells import cell_numbers, num_single, rank
from vlprune.method import ModelFacts
from vlprune.methods._average import AverageBudget, average, scaled_to
from vlprune.methods.vflowopt import STRATEGIES, vflowopt
from vlprune.protocols import ScoreInputs, Tap
from vlprune.reducers.cell_mean import CellMean
from vlprune.scorers.grey_entropy import PIXELS, GreyEntropy
from vlprune.scorers.received_and_entropy import ReceivedAndEntropy
from vlprune.selectors.cells import CellsOrSingle
from vlprune.tokens import raster_grid

FACTS = ModelFacts(decoder_layers=28, vision_layers=26, feature_layer=25)
RECEIVED = Tap("received_from", 25, (2.0, "mean"))


def item(scores: list[float], rows: int, columns: int, num_keep: int, newlines: bool = False) -> ScoreInputs:
    """One picture; token i is (i, 1)."""
    grid = raster_grid(1, rows, columns)[None].clone()
    if newlines:
        grid[:, columns - 1 :: columns, 1:] = -1
    tokens = torch.stack([torch.arange(len(scores)).float(), torch.ones(len(scores))], dim=-1)[None]
    return ScoreInputs(tokens, num_keep, grid, num_original=len(scores), signals={RECEIVED: torch.tensor([scores])})


def reduced(inputs: ScoreInputs, side: float, **options: Any) -> tuple[list[int], Tensor, list[float]]:
    scorer = ReceivedAndEntropy(RECEIVED, **options)
    selection = CellsOrSingle(side)(scorer(inputs), inputs)
    out = CellMean(scorer, side)(inputs, selection)
    assert out.tokens is not None
    assert out.sizes is not None
    return selection.keep_indices[0].tolist(), out.tokens[0], out.sizes[0].tolist()


def test_cells_by_hand() -> None:
    """Four by four in cells of two by two: with K = 6, tokens 5 and 10 stay single, and each cell leaves the mean of its other tokens."""
    scores = [1, 2, 1, 3, 1, 9, 1, 1, 1, 4, 8, 1, 2, 1, 1, 1]
    kept, tokens, sizes = reduced(item([float(s) for s in scores], 4, 4, 6), 2)
    assert kept == [1, 3, 5, 9, 10, 11]
    wanted = {
        1: (0 * 1 + 1 * 2 + 4 * 1) / 4, 3: (2 * 1 + 3 * 3 + 6 * 1 + 7 * 1) / 6, 5: 5.0, 9: (8 * 1 + 9 * 4 + 12 * 2 + 13 * 1) / 8, 10: 10.0,
        11: (11 + 14 + 15) / 3,
    }  # fmt: skip
    assert torch.allclose(tokens[:, 0], torch.tensor(list(wanted.values())))
    assert torch.allclose(tokens[:, 1], torch.ones(6))
    assert sizes == [3, 4, 1, 4, 1, 3]


def test_every_count_is_met() -> None:
    """From one token to all, also where there are fewer places than cells; fractional sides."""
    scores = torch.rand(3, 63, generator=torch.Generator().manual_seed(0))
    grid = raster_grid(1, 7, 9)[None].expand(3, -1, -1)
    for side in (1.0, 2.5, 4.0, 20.0):
        for num_keep in range(1, 64):
            inputs = ScoreInputs(torch.zeros(3, 63, 1), num_keep, grid, num_original=63)
            keep = CellsOrSingle(side)(scores, inputs).keep_indices
            assert keep.shape == (3, num_keep)
            assert bool((keep.diff(dim=1) > 0).all())
    cells = cell_numbers(grid, 3.0)
    assert cells[0].unique().tolist() == list(range(9))
    assert num_single(rank(scores), cells, 5).tolist() == [0, 0, 0]       # nine cells already are more


def test_tiles_share_no_cell() -> None:
    grid = torch.stack([raster_grid(2, 2, 2), raster_grid(1, 2, 4)])
    cells = cell_numbers(grid, 4.0)
    assert cells.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0] * 8]


def test_importance_without_a_positive_part_is_a_plain_mean() -> None:
    kept, tokens, _ = reduced(item([-4.0, -1.0, -2.0, -3.0], 2, 2, 1), 2)
    assert (kept, tokens.tolist()) == ([1], [[1.5, 1.0]])


def test_newlines() -> None:
    """Last by default, first on request; then gradients stay finite although their importance is not."""
    inputs = item([5.0, 1.0, 9.0, 4.0, 2.0, 9.0], 2, 3, 3, newlines=True)
    assert reduced(inputs, 1)[0] == [0, 3, 4]
    leaf = inputs.tokens.clone().requires_grad_()
    kept, tokens, _ = reduced(replace(inputs, tokens=leaf), 2, keep_separators=True)
    assert kept == [0, 2, 5]
    assert torch.allclose(tokens[0], torch.tensor([(1 * 1 + 3 * 4 + 4 * 2) / 12, 1.0]))
    tokens.sum().backward()
    assert leaf.grad is not None
    assert torch.allclose(leaf.grad[0, :, 0], torch.tensor([5 / 12, 1 / 12, 1.0, 4 / 12, 2 / 12, 1.0]))


def test_entropy_by_hand() -> None:
    """One grey is 0 bits, two in equal parts are 1, four are 2; whatever the range of the pixels."""
    levels = torch.tensor([[0.5] * 4, [0.0, 0.0, 1.0, 1.0], [0.0, 0.2, 0.6, 1.0]])
    pixels = levels.repeat(1, 3)[None]                                  # three equal channels
    for scale, shift, given in ((1.0, 0.0, (0.0, 1.0)), (2.0, -1.0, (-1.0, 1.0)), (3.7, -2.1, None)):
        inputs = ScoreInputs(torch.zeros(1, 3, 1), 1, signals={PIXELS: pixels * scale + shift})
        assert torch.allclose(GreyEntropy(given)(inputs), torch.tensor([[0.0, 1.0, 2.0]]), atol=1e-5)
    with pytest.raises(OptionError, match="black and of white"):
        GreyEntropy((1.0, -1.0))


def test_entropy_counts_by_alpha_and_by_what_is_left() -> None:
    """Three tokens of six left: half of alpha."""
    levels = torch.tensor([[0.5] * 4, [0.0, 0.0, 1.0, 1.0], [0.0, 0.2, 0.6, 1.0]]).repeat(1, 3)[None]
    inputs = ScoreInputs(torch.zeros(1, 3, 1), 1, num_original=6, signals={PIXELS: levels, RECEIVED: torch.tensor([[0.3, 0.2, 0.1]])})
    scorer = ReceivedAndEntropy(RECEIVED, alpha=-2.0, entropy=GreyEntropy((0.0, 1.0)))
    assert scorer.needs == (RECEIVED, PIXELS)
    assert torch.allclose(scorer(inputs), torch.tensor([[0.3, 0.2, 0.1]]) - torch.tensor([[0.0, 1.0, 2.0]]).softmax(dim=-1), atol=1e-5)
    assert ReceivedAndEntropy(RECEIVED).needs == (RECEIVED,)


def test_released_strategies() -> None:
    """They average what they are called, at layers 9 and 18 of 28; numbers as released."""
    for name, strategy in STRATEGIES.items():
        method = vflowopt(FACTS, name)
        assert [stage.point.label for stage in method.stages] == ["before_llm", "llm:9", "llm:18"]
        assert average([stage.budget.keep for stage in method.stages], (9 / 28, 9 / 28, 10 / 28)) == pytest.approx(strategy.average, abs=1e-3)
        assert method.stages[0].needs[0].options == (strategy.t, "mean")
        assert method.stages[0].selector.side == strategy.cell  # type: ignore[attr-defined]
    assert vflowopt(FACTS, "25%").stages[2].budget.num_keep(1000) == 229  # 0.2651 x 0.983 x 0.877
    assert [stage.point.layer for stage in vflowopt(replace(FACTS, decoder_layers=32), 0.5).stages] == [0, 10, 20]
    assert vflowopt(FACTS, 0.25, variant="paper").stages[0].needs[0].options == (34.8, "sum")


def test_keep_is_the_average() -> None:
    """Shares and numbers, at every depth; all of it is all of it."""
    for depth in (1, 2, 3, 10, 28):
        facts = replace(FACTS, decoder_layers=depth)
        for keep in (0.03, 0.2, 0.7, 1.0):
            stages = vflowopt(facts, keep).stages
            edges = [0, *(stage.point.layer for stage in stages[1:]), depth]
            shares = [stage.budget.keep for stage in stages]
            assert sum(share * (b - a) / depth for share, a, b in zip(shares, edges, edges[1:], strict=False)) == pytest.approx(keep)
            assert shares == sorted(shares, reverse=True)
    counts = [stage.budget.num_keep(1000) for stage in vflowopt(FACTS, 250).stages]
    assert counts == [stage.budget.num_keep(1000) for stage in vflowopt(FACTS, 0.25).stages]
    assert all(stage.budget.num_keep(250) == 250 for stage in vflowopt(FACTS, 250).stages)
    assert scaled_to((0.5, 0.25), (0.5, 0.5), 0.375) == pytest.approx((0.5, 0.25))
    assert scaled_to((0.5, 0.25), (0.5, 0.5), (0.25 + 0.0625) / 2) == pytest.approx((0.25, 0.0625))
    with pytest.raises(OptionError, match="has only 6"):
        AverageBudget(7, shares=(0.5,), weights=(1.0,)).num_keep(6)


@pytest.mark.parametrize(
    ("keep", "options", "says"),
    [
        ("30%", {}, "'50%', '25%', '10%'"),
        ((0.5, 0.25), {}, "2 shares, but there are 3 stages"),
        ((0.2, 0.3, 0.1), {}, "can only fall"),
        (0.0, {}, r"\(0, 1\]"),
        (0.25, {"t": -1.0}, "t=-1.0: a number from 0"),
        (0.25, {"alpha": float("nan")}, "alpha=nan: a number"),
        (0.25, {"cell": 0.5}, "cell=0.5"),
        (0.25, {"cell": 0.5, "recycle": False}, "cell=0.5"),
        (0.25, {"variant": "both"}, "variant='both'"),
        (0.25, {"count": "some"}, "count='some'"),
        (0.25, {"layers": (3, 2)}, "layers="),
        (0.25, {"layers": (3, 28)}, "from 1 to 27"),
        (0.25, {"layers": (3, 4, 5)}, "at most 2"),
        (0.25, {"pixel_range": (1, 0)}, "pixel_range="),
    ],
)
def test_mistakes(keep: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        vflowopt(FACTS, keep, **options)


def test_the_released_count_needs_pictures_that_keep_the_same_number() -> None:
    one = item([float(s) for s in (9, 8, 1, 2, 1, 2, 1, 2)], 2, 4, 4)
    two = item([float(s) for s in (9, 1, 8, 2, 1, 2, 1, 2)], 2, 4, 4)
    selector, scorer = CellsOrSingle(2, "cells"), ReceivedAndEntropy(RECEIVED)
    assert selector(scorer(one), one).keep_indices.tolist() == [[0, 1, 3, 5]]             # 8 - 4 - 2 singles left, two cells
    alone = item([9.0, 8.0, 1.0, 1.0, 7.0, 6.0, 1.0, 1.0], 2, 4, 6)                      # the first cell is empty
    assert selector(scorer(alone), alone).keep_indices.tolist() == [[0, 1, 2, 4, 5]]
    both = ScoreInputs(
        torch.cat([two.tokens, alone.tokens]), 6, torch.cat([two.grid, alone.grid]), num_original=8,  # type: ignore[list-item]
        signals={RECEIVED: torch.cat([two.signals[RECEIVED], alone.signals[RECEIVED]])},
    )  # fmt: skip
    with pytest.raises(OptionError, match=r"keep \[6, 5\] tokens; give one image a call"):
        selector(scorer(both), both)


def test_cells_need_places() -> None:
    inputs = replace(item([1.0, 2.0, 3.0, 4.0], 2, 2, 2), grid=None)
    with pytest.raises(OptionError, match="recycle=False"):
        CellsOrSingle(2)(torch.rand(1, 4), inputs)

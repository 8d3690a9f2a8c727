"""VFlowOpt: rank by attention from the tokens that matter, recycle the rest by cells, drop twice more; all of it tuned.

Reference: "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization",
arXiv:2508.05211 (ICCV 2025). Official code: https://github.com/sihany077/VFlowOpt

Convention: the paper's t and alpha are ``t`` and ``alpha``, its a is ``cell``. Its stages are `BeforeLLM` and, in
0-based layers, ``LLMLayer(9)``, ``LLMLayer(18)`` of 28 and 10, 20 of 32: both are 10 and 20 of 32, scaled. R1, R2, R3
are relative to the stage before; here shares are of the original number: R1, R1 R2, R1 R2 R3.

Importance of token i, the same in all three stages: attention that i receives in the last used vision block from the
relatively important tokens, those that receive more than t times the mean, plus alpha times the softmax of the
patches' grey entropy. ``variant="code"`` takes the mean over these tokens and is the default because the published
strategies were found with it; ``"paper"`` takes the sum, which gives alpha another scale.

``keep`` is the average over decoder layers, (R1 L1 + R1 R2 L2 + R1 R2 R3 L3) / L, as the paper counts. ``"50%"``,
``"25%"`` and ``"10%"`` are the released strategies as they are. Any other share takes t, cell and the split of the
released strategy nearest to it (by ratio): its three shares are raised to the one power that makes their average
``keep`` in this model. A number per item does so with that number over the item's tokens, from the 25 % strategy.

The released strategies were found for one model. ``vlprune tune --method vflowopt`` finds one for yours.

Differences:
- Exactly K tokens stay in stage 1 (`vlprune.selectors.cells`); the released count depends on the picture.
- For large t no token is relatively important, and the released program fails with NaN. Here the most attended
  token is asked then.
- Newline tokens rank last and lie in no cell; the program always keeps them, as ``keep_newlines=True`` does.
- Every image is recycled; the program does so for a prompt with one tiled image. Videos get plain top K, as there.
- Entropy is of the picture, not of wrapped normalised pixels (`vlprune.scorers.grey_entropy`), and its softmax runs over
  all tiles together (`vlprune.scorers.received_and_entropy`). All released strategies have alpha 0.
- Kept tokens keep their positions in stage 1 as well, where the program renumbers (``positions="renumber"``).
- In a tower with windows the block nearest to the last used one that sees the whole image is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods._average import AverageBudget, average, drawn_shares, scaled_to, stage_weights
from vlprune.methods._stages import given_budgets, given_layers, scaled_layers
from vlprune.points import BeforeLLM, Depth, LLMLayer
from vlprune.protocols import Reducer, Selector, Tap
from vlprune.reducers.cell_mean import CellMean
from vlprune.reducers.drop import Drop
from vlprune.scorers.grey_entropy import GreyEntropy
from vlprune.scorers.received_and_entropy import ReceivedAndEntropy
from vlprune.selectors.cells import CellsOrSingle
from vlprune.selectors.topk import TopK

LAYERS = (Depth(10, of=32), Depth(20, of=32))
VARIANTS = {"code": "mean", "paper": "sum"}


@dataclass(frozen=True)
class Strategy:
    """A released strategy: average, shares of the original number after each stage, threshold t and cell side a (alpha is 0)."""

    average: float
    shares: tuple[float, float, float]
    t: float
    cell: float


STRATEGIES = {
    "50%": Strategy(0.5, (0.7233, 0.7233 * 0.749, 0.7233 * 0.749 * 0.487), t=28.7, cell=11.76),
    "25%": Strategy(0.25, (0.2651, 0.2651 * 0.983, 0.2651 * 0.983 * 0.877), t=34.8, cell=15.58),
    "10%": Strategy(0.1, (0.1166, 0.1166 * 1.0, 0.1166 * 1.0 * 0.601), t=39.3, cell=17.39),
}


def nearest(share: float) -> Strategy:
    """The released strategy nearest to an average, by ratio."""
    return min(STRATEGIES.values(), key=lambda strategy: abs(math.log(share / strategy.average)))


def budgets(keep: Keep | str | Sequence[Keep], weights: tuple[float, ...]) -> tuple[tuple[Budget, ...], Strategy]:
    """One budget a stage, and the strategy that the other defaults come from."""
    count = len(weights)
    if isinstance(keep, str):
        if keep not in STRATEGIES:
            names = ", ".join(map(repr, STRATEGIES))
            raise OptionError(f"keep={keep!r}: one of {names}, an average share or number, or one share of the original number per stage")
        return tuple(Budget(share) for share in STRATEGIES[keep].shares[:count]), STRATEGIES[keep]
    if not isinstance(keep, (int, float)):
        only_shares = all(isinstance(share, float) for share in keep)
        return given_budgets(keep, count, "round"), nearest(average(keep, weights)) if only_shares else STRATEGIES["25%"]
    Budget(keep)                                                         # says what is wrong with it
    if isinstance(keep, int):
        shares = STRATEGIES["25%"].shares[:count]
        return tuple(AverageBudget(keep, stage=stage, shares=shares, weights=weights) for stage in range(count)), STRATEGIES["25%"]
    return tuple(Budget(share) for share in scaled_to(nearest(keep).shares[:count], weights, keep)), nearest(keep)


def vflowopt(
    facts: ModelFacts,
    keep: Keep | str | Sequence[Keep] = 0.25,
    *,
    t: float | None = None,
    cell: float | None = None,
    alpha: float = 0.0,
    variant: str = "code",
    recycle: bool = True,
    count: str = "exact",
    keep_newlines: bool = False,
    pixel_range: tuple[float, float] | None = None,
    layers: Sequence[int] | None = None,
) -> PruningMethod:
    """Rank once in the vision tower; recycle before the language model, drop twice inside.

    Args:
        facts: of the model.
        keep: average share or number over the decoder's layers; ``"50%"``, ``"25%"``, ``"10%"``, the released
            strategies; or shares of the original number after each stage.
        t: how many times the mean attention a token must receive to be asked; by default the released strategy's.
        cell: rows and columns of the cells that the rest is recycled in (the paper's a); by default likewise.
        alpha: weight of the patches' entropy.
        variant: ``"code"`` averages over the tokens that are asked, ``"paper"`` sums.
        recycle: whether stage 1 recycles; if not, it drops.
        count: ``"exact"``, or ``"cells"`` for the released count of stage 1, which depends on the picture.
        keep_newlines: keep the newline tokens of tiled images, as released.
        pixel_range: what the tower's input has for black and white; see `vlprune.scorers.grey_entropy`.
        layers: decoder layers, counted from 0, of the second and third stage; by default 10 and 20 of 32, scaled.
    """
    places = later_layers(facts) if layers is None else given_layers("layers", layers, 1, facts.decoder_layers)
    if len(places) > len(LAYERS):
        raise OptionError(f"layers={layers!r}: the second and the third stage act there, so at most {len(LAYERS)} numbers are needed")
    amounts, strategy = budgets(keep, stage_weights(places, facts.decoder_layers))
    t, cell = _number("t", strategy.t if t is None else t, 0.0), strategy.cell if cell is None else cell
    if variant not in VARIANTS:
        raise OptionError(f"variant={variant!r}: 'code' (mean over the tokens that are asked) or 'paper' (sum)")
    received = Tap("received_from", facts.nearest_global(facts.feature_layer), (t, VARIANTS[variant]))
    importance = ReceivedAndEntropy(received, _number("alpha", alpha), GreyEntropy(pixel_range), keep_newlines)
    cells = CellsOrSingle(cell, count)                                   # looks at its options also where it is not used
    selector: Selector = cells if recycle else TopK(stable=True)
    reducer: Reducer = CellMean(importance, cell) if recycle else Drop()
    first = Stage(BeforeLLM(), importance, selector, reducer, amounts[0])
    later = (Stage(LLMLayer(place), importance, TopK(stable=True), Drop(), amount) for place, amount in zip(places, amounts[1:], strict=True))
    return PruningMethod("vflowopt", (first, *later))


def later_layers(facts: ModelFacts) -> tuple[int, ...]:
    """Decoder layers of the second and third stage; fewer where the decoder is too shallow for both."""
    return scaled_layers(LAYERS, facts.decoder_layers) if facts.decoder_layers > 1 else ()


def _number(name: str, value: Any, lowest: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < lowest:
        raise OptionError(f"{name}={value!r}: a number" + (f" from {lowest:g} is needed" if math.isfinite(lowest) else " is needed"))
    return value


def search(facts: ModelFacts, keep: float, suggest: Callable[[str, float, float], float]) -> tuple[tuple[float, ...], dict[str, Any]] | None:
    """The search space at an average ``keep``, for `vlprune.tune`: the paper's ranges at 25 %, R1 from 0.25 to 0.375 and R2 from 0.2 / 0.375, scaled."""
    options = {"t": suggest("t", 0.0, 50.0), "cell": suggest("cell", 3.0, 24.0)}
    if "pixels" in facts.signals:
        options["alpha"] = suggest("alpha", -1.0, 1.0)
    weights = stage_weights(later_layers(facts), facts.decoder_layers)
    shares = drawn_shares(weights, keep, suggest, most_first=1.5, least_second=0.2 / 0.375)
    return None if shares is None else (shares, options)


CARD = MethodCard(
    "vflowopt",
    vflowopt,
    "attention from the tokens that matter, the rest recycled by cells, in three tuned stages",
    paper="arXiv:2508.05211",
    code="https://github.com/sihany077/VFlowOpt",
    points=("before_llm", "llm:K", "llm:K"),
    needs=("received_from",),  # and "pixels" with alpha
    reduction="recycle",
    exact=False,
    default_keep=0.25,
    golden=("vflowopt",),
    test_options={"t": 1.2, "cell": 2.5},
    search=search,
)

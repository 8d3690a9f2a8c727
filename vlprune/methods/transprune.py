"""TransPrune: inside the decoder, drop visual tokens that its modules barely transform and the text does not look at.

Reference: "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model", arXiv:2507.20630 (CVPR
2026).
Official code: https://github.com/liaolea/TransPrune

Convention: the paper prunes "after layers 7, 9 and 12" of 32, counted from 1: ``LLMLayer(7)``, ``LLMLayer(9)``,
``LLMLayer(12)``. It accumulates transitions over layers 7 to 12, our 0-based 6 to 11. Instruction attention (IGA)
uses the next layer's norm and projections, a probe of the layer at the point. Shares are of the original number,
``int(N * share)``.

Score of a stage: alpha * TTV + (1 - alpha) * IGA, each summing to one over the tokens still there; TTV is summed over
the accumulated layers that have run. ``variant="code"`` is the default because the published numbers come from that
program and the golden cases are its output; the paper's formula can rank very differently
(`vlprune.scorers.transition`).

Other depths: layers scale with depth, and each stage stays at least one layer after the one before and within the
decoder. Too shallow a decoder for three stages has the last ones only. Transitions accumulate from the layer before
the first stage to the layer before the last.

A single ``keep`` is what the last stage leaves. The earlier stages are the published High schedule raised to one
power: all stages at 1 for ``keep=1``, exactly High for 0.125, always in falling order.

Differences:
- Positions are preserved by default, where the program renumbers after each drop: it is right for M-RoPE as well, and
  makes dropping equal to masking. ``vlprune.apply(..., positions="renumber")`` follows the program.
- The denominator of TTV runs over one row of the batch, not over the whole batch.
- Low is not in the repository; it is the one schedule on a 1/16 grid that gives the published FLOPs.
- Works for batches and grouped-query attention, where the program does not.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlprune.budget import Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods._stages import falling_budgets, given_layers, scaled_layers
from vlprune.points import Depth, LLMLayer
from vlprune.protocols import Tap
from vlprune.reducers import Drop
from vlprune.scorers import Blend, SignalScore, TransitionVariation
from vlprune.selectors import TopK

LAYERS = (Depth(7, of=32), Depth(9, of=32), Depth(12, of=32))
SCHEDULES = {"high": (0.875, 0.625, 0.125), "low": (0.625, 0.1875, 0.0625)}


def stage_layers(depth: int) -> tuple[int, ...]:
    """Where the stages act in a decoder of ``depth`` layers."""
    return scaled_layers(LAYERS, depth)


def transprune(
    facts: ModelFacts,
    keep: Keep | str | Sequence[Keep] = "high",
    *,
    variant: str = "code",
    layers: Sequence[int] | None = None,
    accumulate: Sequence[int] | None = None,
    alpha: float = 0.5,
) -> PruningMethod:
    """Drop in stages, by token transitions and instruction attention.

    Args:
        facts: of the model.
        keep: ``"high"``, ``"low"``, shares of the original number per stage, or the share or number that the last stage
            leaves.
        variant: of the transition score, ``"code"`` or ``"paper"``.
        layers: decoder layers, counted from 0, before which to drop ("after the 7th layer" is 7).
        accumulate: decoder layers, counted from 0, whose transitions count; by default from ``layers[0] - 1`` to the
            last stage. Each stage takes those that have run.
        alpha: weight of transitions against instruction attention, in [0, 1].
    """
    places = (
        stage_layers(facts.decoder_layers) if layers is None else given_layers("layers", layers, 1, facts.decoder_layers)
    )
    seen = (
        tuple(range(places[0] - 1, places[-1]))
        if accumulate is None
        else given_layers("accumulate", accumulate, 0, facts.decoder_layers)
    )
    if seen[0] >= places[0]:
        raise OptionError(f"accumulate={seen}: no layer before the first stage, which acts before layer {places[0]}")
    stages = []
    for place, budget in zip(places, falling_budgets(keep, SCHEDULES["high"], len(places), SCHEDULES), strict=True):
        transitions = TransitionVariation(tuple(layer for layer in seen if layer < place), variant)
        scorer = Blend(transitions, SignalScore(Tap("text_rows", place)), alpha)
        stages.append(Stage(LLMLayer(place), scorer, TopK(), Drop(), budget))
    return PruningMethod("transprune", tuple(stages))


CARD = MethodCard(
    "transprune",
    transprune,
    "token transitions over several decoder layers, plus instruction attention, in three stages",
    paper="arXiv:2507.20630",
    code="https://github.com/liaolea/TransPrune",
    points=("llm:K", "llm:K", "llm:K"),
    needs=("transition", "text_rows"),
    text_aware=True,
    default_keep=0.125,
    golden=("transprune",),
)

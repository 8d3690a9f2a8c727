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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.points import Depth, LLMLayer
from vlprune.protocols import Tap
from vlprune.reducers import Drop
from vlprune.scorers import Blend, SignalScore, TransitionVariation
from vlprune.selectors import TopK

LAYERS = (Depth(7, of=32), Depth(9, of=32), Depth(12, of=32))
SCHEDULES = {"high": (0.875, 0.625, 0.125), "low": (0.625, 0.1875, 0.0625)}


@dataclass(frozen=True)
class EarlierStage(Budget):
    """A stage before the last where ``keep`` is a number: ``share``, raised to the power that leads to that number."""

    share: float = 1.0
    last_share: float = 0.125

    def num_keep(self, num_tokens: int, num_frames: int = 1) -> int:
        """Return how many of ``num_tokens`` stay; never fewer than the last stage needs."""
        last = super().num_keep(num_tokens, num_frames)
        return max(last, int(num_tokens * scaled_share(self.share, self.last_share, last / num_tokens)))


def scaled_share(share: float, last_share: float, keep: float) -> float:
    """Raise ``share`` to the power that turns ``last_share`` into ``keep``."""
    return float(share ** (math.log(keep) / math.log(last_share)))


def budgets(keep: Keep | str | Sequence[Keep], num_stages: int) -> tuple[Budget, ...]:
    """One budget a stage, from a schedule's name, its shares, or what the last stage leaves."""
    if isinstance(keep, str):
        if keep not in SCHEDULES:
            raise OptionError(
                f"keep={keep!r}: 'high', 'low', a share or number for the last stage, or one share per stage"
            )
        return tuple(Budget(share, "floor") for share in SCHEDULES[keep][-num_stages:])
    if not isinstance(keep, (int, float)):
        if len(keep) != num_stages:
            raise OptionError(
                f"keep={tuple(keep)!r} has {len(keep)} shares, but there are {num_stages} stages; "
                "give `layers` as well, or one number"
            )
        if any(type(after) is type(before) and after > before for before, after in pairwise(keep)):
            raise OptionError(f"keep={tuple(keep)!r}: shares of the original number can only fall from stage to stage")
        return tuple(Budget(share, "floor") for share in keep)
    last = Budget(keep, "floor")
    *earlier, end = SCHEDULES["high"][-num_stages:]
    if isinstance(keep, int):
        return (*(EarlierStage(keep, "floor", share=share, last_share=end) for share in earlier), last)
    return (*(Budget(scaled_share(share, end, keep), "floor") for share in earlier), last)


def stage_layers(depth: int) -> tuple[int, ...]:
    """Where the stages act in a decoder of ``depth`` layers: scaled, distinct, inside."""
    published = LAYERS[-max(1, min(len(LAYERS), depth - 1)) :]
    layers: list[int] = []
    for layer in published:
        layers.append(max(layer.resolve(depth), layers[-1] + 1 if layers else 1))
    room = range(max(depth, 2) - len(layers), max(depth, 2))
    return tuple(min(layer, limit) for layer, limit in zip(layers, room, strict=True))


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
        stage_layers(facts.decoder_layers) if layers is None else _checked("layers", layers, 1, facts.decoder_layers)
    )
    seen = (
        tuple(range(places[0] - 1, places[-1]))
        if accumulate is None
        else _checked("accumulate", accumulate, 0, facts.decoder_layers)
    )
    if seen[0] >= places[0]:
        raise OptionError(f"accumulate={seen}: no layer before the first stage, which acts before layer {places[0]}")
    stages = []
    for place, budget in zip(places, budgets(keep, len(places)), strict=True):
        transitions = TransitionVariation(tuple(layer for layer in seen if layer < place), variant)
        scorer = Blend(transitions, SignalScore(Tap("text_rows", place)), alpha)
        stages.append(Stage(LLMLayer(place), scorer, TopK(), Drop(), budget))
    return PruningMethod("transprune", tuple(stages))


def _checked(name: str, given: Sequence[int], lowest: int, depth: int) -> tuple[int, ...]:
    """Layer numbers from the user: ints, rising, inside the decoder."""
    layers = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else ()
    whole = bool(layers) and all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers)
    if not whole or layers[0] < lowest or layers[-1] >= max(depth, lowest + 1) or list(layers) != sorted(set(layers)):
        raise OptionError(
            f"{name}={given!r}: rising layer numbers from {lowest} to {depth - 1} are needed, counted from 0"
        )
    return layers


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

"""PyramidDrop: inside the decoder, drop in stages what the last prompt token looks at least.

Reference: "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", arXiv:2410.17247 (CVPR 2025).
Official code: https://github.com/Cooperx521/PyramidDrop

Convention: the paper drops "after layers 8, 16 and 24" of 32, counted from 1: ``LLMLayer(8)``, ``LLMLayer(16)``, ``LLMLayer(24)``. The attention
is that of the layer at the point, probed with its own norm and projections before it runs: last prompt token, all causal keys, mean over heads.
Shares are of the original number, ``int(N * share)``; lambda = 0.5 is ``(0.5, 0.25, 0.125)``.

Other depths: as in TransPrune, layers scale with depth and stay distinct. A single ``keep`` is what the last stage leaves; the earlier stages are
the published schedule raised to one power, which for this geometric schedule means: every stage leaves the same share of what it gets.

Differences:
- Positions are preserved by default, where the program renumbers after each drop: it is right for M-RoPE as well, and makes dropping equal to
  masking. ``vlprune.apply(..., positions="renumber")`` follows the program.
- Works for batches, padding on either side and eager attention, where the program does not.
- In training the paper asks the token before each answer; here the last prompt token is asked, as in inference.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlprune.budget import Keep
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods._stages import falling_budgets, given_layers, scaled_layers
from vlprune.points import Depth, LLMLayer
from vlprune.protocols import Tap
from vlprune.reducers import Drop
from vlprune.scorers import SignalScore
from vlprune.selectors import TopK

LAYERS = (Depth(8, of=32), Depth(16, of=32), Depth(24, of=32))
SHARES = (0.5, 0.25, 0.125)


def pyramiddrop(facts: ModelFacts, keep: Keep | Sequence[Keep] = SHARES[-1], *, layers: Sequence[int] | None = None) -> PruningMethod:
    """Drop in stages, by the attention of the last prompt token.

    Args:
        facts: of the model.
        keep: shares of the original number per stage, or the share or number that the last stage leaves.
        layers: decoder layers, counted from 0, before which to drop ("after the 8th layer" is 8).
    """
    places = scaled_layers(LAYERS, facts.decoder_layers) if layers is None else given_layers("layers", layers, 1, facts.decoder_layers)
    budgets = falling_budgets(keep, SHARES, len(places))
    stages = (Stage(LLMLayer(place), SignalScore(Tap("last_row", place)), TopK(), Drop(), budget) for place, budget in zip(places, budgets, strict=True))
    return PruningMethod("pyramiddrop", tuple(stages))


CARD = MethodCard(
    "pyramiddrop",
    pyramiddrop,
    "attention of the last prompt token, in three stages down the decoder",
    paper="arXiv:2410.17247",
    code="https://github.com/Cooperx521/PyramidDrop",
    points=("llm:K", "llm:K", "llm:K"),
    needs=("last_row",),
    text_aware=True,
    default_keep=0.125,
    golden=("pyramiddrop",),
)

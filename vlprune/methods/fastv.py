"""FastV: after two decoder layers, keep the visual tokens that the last prompt token attends to.

Reference: "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language
Models", arXiv:2403.06764 (ECCV 2024). Official code: https://github.com/pkunlp-icler/FastV

Convention: the paper's K is the number of decoder layers that see every token, so K=2 is ``LLMLayer(2)`` and the
attention is that of 0-based layer K - 1. It is not scaled with depth: the paper's finding is about the first two
layers. The paper's R is ``1 - keep``; the number kept is ``round(N * keep)``, half to even, as in the released
transformers fork.

Differences:
- Chosen once, in prefill (the fork's path with a cache). The released demo without a cache chooses anew at every
  step.
- The attention row is computed from queries and keys; no attention map is asked for.
"""

from __future__ import annotations

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.points import LLMLayer
from vlprune.protocols import Tap
from vlprune.reducers import Drop
from vlprune.scorers import SignalScore
from vlprune.selectors import TopK

LAYER = 2


def fastv(facts: ModelFacts, keep: Keep = 0.5, *, layer: int | None = None) -> PruningMethod:
    """Rank by the last prompt token's attention, inside the decoder.

    Args:
        facts: of the model.
        keep: share or number of visual tokens per item.
        layer: decoder layer, counted from 0, before which tokens are dropped (the paper's K); 2 unless the model is
            shallower than three layers.
    """
    depth = facts.decoder_layers
    if layer is None:
        layer = max(1, min(LAYER, depth - 1))
    elif isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer < max(depth, 2):
        raise OptionError(
            f"layer={layer!r}: from 1 (one layer must have attended) to {depth - 1}, the last decoder layer"
        )
    scorer = SignalScore(Tap("last_row", layer - 1))
    return PruningMethod("fastv", (Stage(LLMLayer(layer), scorer, TopK(), Drop(), Budget(keep)),))


CARD = MethodCard(
    "fastv",
    fastv,
    "attention of the last prompt token in the second decoder layer",
    paper="arXiv:2403.06764",
    code="https://github.com/pkunlp-icler/FastV",
    points=("llm:2",),
    needs=("last_row",),
    text_aware=True,
    default_keep=0.5,
    golden=("fastv",),
)

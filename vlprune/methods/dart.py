"""DART: inside the decoder, keep a few pivots and the visual tokens that duplicate them least.

Reference: "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More", arXiv:2502.11494 (EMNLP 2025).
Official code: https://github.com/ZichenWen1/DART

Convention: the shipped scripts' K=2 is the number of decoder layers that see every token: ``LLMLayer(2)``, with the keys of 0-based layer K - 1 after
rotation, and the hidden states at the point after the decoder's *last* norm. Like FastV's it is not scaled with depth.
Pivots are the 4 visual and the 4 following text tokens whose keys, all heads together, have the largest L1 norm.

Differences:
- Exactly K tokens stay. The program gives each of the 8 pivots ``K // 8`` tokens and keeps the 4 image pivots beyond that (132 for 128); here the image
  pivots count, and what is left is shared out, the pivots visited first getting one more.
- Pivots are visited image first, largest norm first. The program visits them in the order of a Python set of their positions, which depends on the
  length of the prompt; ``order`` gives any other order.
- Where fewer than four text tokens follow the item, image pivots stand in. Each item of a prompt has its own text, all of what follows it.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.points import LLMLayer
from vlprune.protocols import Tap
from vlprune.reducers import Drop
from vlprune.scorers import SignalScore
from vlprune.selectors.unlike_pivots import UnlikePivots

LAYER = 2


def dart(
    facts: ModelFacts,
    keep: Keep = 2 / 9,
    *,
    layer: int | None = None,
    image_pivots: int = 4,
    text_pivots: int = 4,
    order: Sequence[int] | None = None,
) -> PruningMethod:
    """Keep pivots and what is unlike them, inside the decoder.

    Args:
        facts: of the model.
        keep: share or number of visual tokens per item.
        layer: decoder layer, counted from 0, before which tokens are dropped (the scripts' K); 2 unless the model is shallower than three layers.
        image_pivots: visual tokens that are pivots, and stay.
        text_pivots: text tokens behind the item that are pivots.
        order: in which pivots are visited: numbers of the list (image pivots, text pivots), each kind by falling norm; by default as listed.
    """
    depth = facts.decoder_layers
    if layer is None:
        layer = max(1, min(LAYER, depth - 1))
    elif isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer < max(depth, 2):
        raise OptionError(f"layer={layer!r}: from 1 (one layer must have made keys) to {depth - 1}, the last decoder layer")
    pivots = UnlikePivots(
        Tap("normed", 0), Tap("text_normed", 0), Tap("text_key_l1", layer - 1), image_pivots, text_pivots, None if order is None else tuple(order)
    )
    return PruningMethod("dart", (Stage(LLMLayer(layer), SignalScore(Tap("key_l1", layer - 1)), pivots, Drop(), Budget(keep)),))


CARD = MethodCard(
    "dart",
    dart,
    "a few pivots by the size of their keys, and the tokens least like them",
    paper="arXiv:2502.11494",
    points=("llm:2",),
    needs=("key_l1", "normed", "text_normed", "text_key_l1"),
    text_aware=True,
    default_keep=2 / 9,
    golden=("dart",),
)

"""DivPrune: keep the visual tokens that are farthest from each other.

Reference: "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", arXiv:2503.02175 (CVPR 2025).
Official code: https://github.com/vbdi/divprune

Convention: distance is 1 - cosine of the projected tokens, those of all tiles together, newlines among them. The first token is the one whose nearest
neighbour is farthest, then always the one farthest from its nearest chosen one (max-min). The program's ratio is ``keep``, ``round(N * keep)``, half
to even; it ships with 0.098, 56 of 576.

Differences:
- Tokens that were chosen are out. The program leaves that to their distance of 0 from themselves, so that exact duplicates can be listed twice.
- Kept tokens keep their positions; the program renumbers them (``positions="renumber"``).
- Works for batches, and wherever the image stands in the prompt; the program counts on 35 tokens before it.
"""

from __future__ import annotations

from vlprune.budget import Budget, Keep
from vlprune.kernels.greedy import ISOLATED, MaxMin
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.points import BeforeLLM
from vlprune.reducers import Drop
from vlprune.scorers import Constant
from vlprune.selectors.greedy import Greedy


def divprune(facts: ModelFacts, keep: Keep = 0.098) -> PruningMethod:
    """Keep diverse tokens before the language model.

    Args:
        facts: of the model.
        keep: share or number of visual tokens per item.
    """
    return PruningMethod("divprune", (Stage(BeforeLLM(), Constant(), Greedy(MaxMin(), ISOLATED), Drop(), Budget(keep)),))


CARD = MethodCard(
    "divprune",
    divprune,
    "diverse tokens: greedy choice of the largest smallest distance",
    paper="arXiv:2503.02175",
    code="https://github.com/vbdi/divprune",
    default_keep=0.098,
    golden=("divprune",),
)

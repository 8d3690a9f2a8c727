"""VisPruner: half of the tokens for the attention of CLS, the other half because nothing else is like them.

Reference: "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs", arXiv:2412.01818 (ICCV 2025).
Official code: https://github.com/Theia-4869/VisPruner

Convention: attention and features are those of the block whose output becomes the visual tokens (``attentions[-2]``, before the projector), mean
over heads. The program's important ratio r (0.5; 0.75 in some of its runs) is ``important``; its T is ``num_keep``.

The choice of diverse tokens is sensitive: the list is sorted anew by near-equal likenesses in every round, so rounding of another kernel or type
can lead to another, equally diverse, choice.

Differences:
- Lists of odd length work (the released program stops with an error): the last even place has a partner as any other.
- The budget counts per image with all its tiles. They form one list, so what a thumbnail and a crop both show is a duplicate; the program treats
  every tile alone.
- Kept tokens keep their positions; the program renumbers them (``positions="renumber"``).
- A tower without CLS is ranked by the attention received from all tokens.
"""

from __future__ import annotations

from vlprune.budget import Budget, Keep
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods._vision import attention_tap
from vlprune.points import BeforeLLM
from vlprune.protocols import Tap
from vlprune.reducers import Drop
from vlprune.scorers import SignalScore
from vlprune.selectors.dedup import Dedup


def vispruner(facts: ModelFacts, keep: Keep = 1 / 3, *, important: float = 0.5) -> PruningMethod:
    """Keep important and diverse tokens before the language model.

    Args:
        facts: of the model.
        keep: share or number of visual tokens per item.
        important: share of these that stay for their attention; the others are what removing duplicates leaves.
    """
    selector = Dedup(Tap("vision_states", facts.feature_layer), important)
    return PruningMethod("vispruner", (Stage(BeforeLLM(), SignalScore(attention_tap(facts)), selector, Drop(), Budget(keep)),))


CARD = MethodCard(
    "vispruner",
    vispruner,
    "attention of CLS for one half, removal of duplicates for the other",
    paper="arXiv:2412.01818",
    code="https://github.com/Theia-4869/VisPruner",
    needs=("cls_row", "vision_states"),  # "column_mean" instead of "cls_row" without CLS
    golden=("vispruner",),
)

"""FasterVLM: keep the visual tokens that CLS attends to at the end of the vision tower.

Reference: "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster", arXiv:2412.01818 v1.
Official code: https://github.com/Theia-4869/FasterVLM

Convention: the attention is that of the block whose output becomes the visual tokens, the program's ``attentions[-2]``, mean over heads. Its T is
``num_keep``.

Differences:
- The budget counts per image with all its tiles, which compete; the program gives every tile the same number.
- Kept tokens keep their positions; the program renumbers them (``positions="renumber"``).
- A tower without CLS is ranked by the attention received from all tokens, in the nearest block that sees the whole image.
"""

from __future__ import annotations

from vlprune.budget import Budget, Keep
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods._vision import attention_tap
from vlprune.points import BeforeLLM
from vlprune.reducers import Drop
from vlprune.scorers import SignalScore
from vlprune.selectors import TopK


def fastervlm(facts: ModelFacts, keep: Keep = 1 / 3) -> PruningMethod:
    """Rank by CLS attention before the language model.

    Args:
        facts: of the model.
        keep: share or number of visual tokens per item.
    """
    return PruningMethod("fastervlm", (Stage(BeforeLLM(), SignalScore(attention_tap(facts)), TopK(), Drop(), Budget(keep)),))


CARD = MethodCard(
    "fastervlm",
    fastervlm,
    "attention of CLS in the last used vision layer",
    paper="arXiv:2412.01818v1",
    code="https://github.com/Theia-4869/FasterVLM",
    needs=("cls_row",),  # "column_mean" without CLS
    golden=("fastervlm",),
)

"""HoloV: every part of the picture keeps tokens in proportion to the attention it gets, so that not all come from one place.

Reference: "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention", arXiv:2510.02912 (NeurIPS 2025).
Official code: https://github.com/obananas/HoloV

Convention: attention is that of CLS in the block whose output becomes the visual tokens (``attentions[-2]``), mean over heads; features are the
projected tokens. The parts are 16 strips of the sequence in reading order. The program adds 0.09 times the scaled variance to 1000 times the
attention, which is ``variance=0.09 / 1000`` here: only the ratio matters. It decides how many tokens a strip keeps, attention alone decides which.

Differences:
- Exactly K tokens stay. Where the program gives a strip more tokens than it has, it fills the rest up with zero vectors; here the other strips share
  them in proportion to their scores (`vlprune.selectors.strips`).
- Variances are scaled to the mean attention of the whole item. Scaled within each strip they would add the same share to every strip and cancel; the
  stored numbers of the program do not tell the two apart.
- Tokens stay in reading order; in the program by falling attention within a strip.
- K and the number of strips are free; the program has 64 and 16 in its call. Strips lie within a tile, and tiles compete; newlines are tokens as
  others, but stay last (the program drops them).
- A tower without CLS is ranked by the attention received from all tokens.
"""

from __future__ import annotations

from vlprune.budget import Budget, Keep
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods._vision import attention_tap
from vlprune.points import BeforeLLM
from vlprune.reducers import Drop
from vlprune.scorers import SignalScore
from vlprune.selectors.strips import Strips


def holov(facts: ModelFacts, keep: Keep = 1 / 3, *, strips: int = 16, variance: float = 0.09 / 1000) -> PruningMethod:
    """Share the budget between strips of the picture before the language model.

    Args:
        facts: of the model.
        keep: share or number of visual tokens per item.
        strips: how many strips a tile or frame is cut into.
        variance: weight, against the attention, of how differently a token resembles the others of its strip.
    """
    selector = Strips(strips, variance)
    return PruningMethod("holov", (Stage(BeforeLLM(), SignalScore(attention_tap(facts)), selector, Drop(), Budget(keep)),))


CARD = MethodCard(
    "holov",
    holov,
    "attention of CLS, the budget shared between strips of the picture",
    paper="arXiv:2510.02912",
    code="https://github.com/obananas/HoloV",
    needs=("cls_row",),  # "column_mean" without CLS
    equivariant=False,
    golden=("holov",),
)

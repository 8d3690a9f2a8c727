"""PruMerge: keep what CLS attends to at the very end of the vision tower, fold near tokens into it, and add one summary of the rest.

Reference: "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", arXiv:2403.15388 (ICCV 2025).
Official code: https://github.com/42Shawn/LLaVA-PruMerge

Convention: features are those that become the visual tokens (the program's ``hidden_states[-2]``, block 22 of 24), but attention and keys come from
the last block (23), which HF LLaVA runs although nothing behind the tower uses it; a tower cut off before its last block has no such signals. The
attention of CLS is one softmax over the whole width, divided by its root, heads side by side. The program's reduction ratio is 1/8 where it is not
adaptive, the default here; ``keep="auto"`` is its adaptive rule: as many as are outliers of that attention.

Differences:
- ``keep`` counts the summary: with K tokens, K - 1 are kept and one is the summary, in the place of the best token that leaves. The program adds it
  to its count (72 + 1 at 1/8 of 576).
- Tokens stand in reading order; in the program by falling attention, the summary last.
- With ``keep="auto"`` the count of outliers is used as it is; the program divides by N and multiplies again, which may lose one to rounding. An
  item without any outlier keeps the summary alone.
- The program handles one picture without tiles. Here neighbours are of one tile or frame, and the summary is the mean over tiles.
- Features are merged before the projector where it works on each feature alone, elsewhere the projected tokens are merged.
- A tower without CLS uses the attention received from all tokens.
"""

from __future__ import annotations

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.points import BeforeLLM
from vlprune.protocols import Tap
from vlprune.reducers.neighbours import Neighbours
from vlprune.scorers import SignalScore
from vlprune.selectors.portion import Portion
from vlprune.selectors.summary import Summary

AUTO = "auto"


def prumerge(facts: ModelFacts, keep: Keep | str = 1 / 8, *, neighbours: int = 32) -> PruningMethod:
    """Keep, fold and summarise before the language model.

    Args:
        facts: of the model.
        keep: share or number of visual tokens per item, the summary included; ``"auto"``: as many as stand out, different for every item (a count
            per item is read back to the host).
        neighbours: tokens near a kept one that are folded into it.
    """
    return PruningMethod("prumerge", (stage(facts, keep, neighbours, most=0.25),))


def stage(facts: ModelFacts, keep: Keep | str, neighbours: int, most: float, spread: Portion = 0.0) -> Stage:
    """The stage of PruMerge and PruMerge+; ``most``: share that ``keep="auto"`` cannot exceed (at most a quarter are outliers)."""
    if isinstance(keep, str) and keep != AUTO:
        raise OptionError(f"keep={keep!r}: a share in (0, 1], a number of tokens, or {AUTO!r} for as many as stand out")
    auto, last = keep == AUTO, max(facts.vision_layers - 1, 0)
    attention = Tap("cls_row_wide", last) if facts.has_cls else Tap("column_mean", facts.nearest_global(last))
    reducer = Neighbours(attention, Tap("vision_keys_all", last), Tap("vision_states", facts.feature_layer), neighbours)
    budget = Budget(most if isinstance(keep, str) else keep)
    return Stage(BeforeLLM(), SignalScore(attention), Summary(spread, auto), reducer, budget)


CARD = MethodCard(
    "prumerge",
    prumerge,
    "what CLS attends to, with its neighbours folded in, and one summary of the rest; keep='auto' counts outliers",
    paper="arXiv:2403.15388",
    code="https://github.com/42Shawn/LLaVA-PruMerge",
    needs=("cls_row_wide", "vision_keys_all", "vision_states"),  # "column_mean" instead of "cls_row_wide" without CLS
    reduction="merge",
    exact=False,
    default_keep=1 / 8,
    golden=("prumerge",),
)

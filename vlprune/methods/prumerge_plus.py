"""PruMerge+: PruMerge with evenly spaced tokens beside those that CLS attends to.

Reference: "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", arXiv:2403.15388 (ICCV 2025).
Official code: https://github.com/42Shawn/LLaVA-PruMerge

Convention: as `vlprune.methods.prumerge`. The program takes every n-th token with n = int(int(1 / ratio) / 3), which makes about four times as many
tokens as PruMerge keeps (about a quarter of all, the default of ``keep``): three evenly spaced ones beside each that is attended to. Hence
``spread=0.75``.

Differences, beside those of PruMerge:
- With a share or number as ``keep`` exactly that many stay: a quarter for attention, the others evenly spaced over what is left. The program's
  count depends on how many of its grid were chosen already, and its branch with a fixed ratio (for training) counts such tokens twice and loses
  others; only its adaptive branch, ``keep="auto"``, is reproduced.
- n is at least 2. Where more than a sixth of the tokens are outliers, the program's n is 1, which keeps everything, and above a third 0, which stops
  it with an error.
- As in the program, the grid of ``keep="auto"`` never holds the last token (its range ends one early).
"""

from __future__ import annotations

from vlprune.budget import Keep
from vlprune.method import MethodCard, ModelFacts, PruningMethod
from vlprune.methods.prumerge import stage
from vlprune.selectors.portion import Portion


def prumerge_plus(facts: ModelFacts, keep: Keep | str = 1 / 4, *, spread: Portion = 0.75, neighbours: int = 32) -> PruningMethod:
    """Keep attended and evenly spaced tokens, fold and summarise.

    Args:
        facts: of the model.
        keep: share or number of visual tokens per item, the summary included; ``"auto"``: as many as stand out with an evenly spaced grid beside
            them (a count per item is read back to the host).
        spread: share or number of the kept tokens that are evenly spaced; with ``"auto"`` the grid follows from the outliers.
        neighbours: tokens near a kept one that are folded into it.
    """
    return PruningMethod("prumerge+", (stage(facts, keep, neighbours, most=0.75, spread=spread),))


CARD = MethodCard(
    "prumerge+",
    prumerge_plus,
    "prumerge with evenly spaced tokens beside the attended ones",
    paper="arXiv:2403.15388",
    code="https://github.com/42Shawn/LLaVA-PruMerge",
    needs=("cls_row_wide", "vision_keys_all", "vision_states"),  # "column_mean" instead of "cls_row_wide" without CLS
    reduction="merge",
    exact=False,
    equivariant=False,
    default_keep=1 / 4,
    golden=("prumerge",),
)

"""HiPrune++: HiPrune, and beside it the visual tokens most like the text.

Reference: "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
arXiv:2508.00553. Official code: none for this variant (https://github.com/Danielement321/HiPrune has HiPrune only)

Convention: as `vlprune.methods.hiprune`. The paper's t, the number of tokens chosen for the text, is ``text``. The paper gives it twice and
differently, [beta N] and round(N beta / 5) with N once the tokens and once the budget, beta = 0.1. Here it is round(beta K), the same beta of the
tokens that stay: a share of all visual tokens would take most of a small budget (58 of 64), and the division by 5 belongs to an anchor, which comes
with four neighbours; a text token comes alone. ``text=0`` is HiPrune.

Differences, beside those of HiPrune:
- Exactly K stay, tokens for the text included; added on top, as some do, the budget would not be the one asked for.
- The text is the mean of the language model's embeddings of the text tokens behind the item (the paper prefers a text encoder paired with the vision
  tower where there is one, which a language model does not bring along). Without text behind the item, HiPrune's deep score decides.
"""

from __future__ import annotations

from dataclasses import replace

from vlprune.budget import Keep
from vlprune.method import MethodCard, ModelFacts, PruningMethod
from vlprune.methods.hiprune import hiprune
from vlprune.selectors.plus_text import PlusText
from vlprune.selectors.portion import Portion


def hiprune_plus_plus(
    facts: ModelFacts,
    keep: Keep = 1 / 3,
    *,
    text: Portion = 0.1,
    alpha: float = 0.1,
    object_layer: int | None = None,
    variant: str = "code",
) -> PruningMethod:
    """Keep anchors, buffers, registers, and tokens for the text.

    Args:
        facts: of the model.
        keep: share or number of visual tokens per item.
        text: share or number of these that are chosen for their likeness to the text.
        alpha: share meant for anchors with their four neighbours, of the tokens not chosen for the text.
        object_layer: vision block, counted from 0, in which objects stand out; by default the paper's, scaled to the depth.
        variant: ``"code"`` clamps the neighbours of border anchors as released, ``"paper"`` leaves them out.
    """
    (stage,) = hiprune(facts, keep, alpha=alpha, object_layer=object_layer, variant=variant).stages
    return PruningMethod("hiprune++", (replace(stage, selector=PlusText(stage.selector, text)),))


CARD = MethodCard(
    "hiprune++",
    hiprune_plus_plus,
    "hiprune, and the tokens most like the text",
    paper="arXiv:2508.00553",
    needs=("column_mean", "text_states"),
    text_aware=True,
)

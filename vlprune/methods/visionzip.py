"""VisionZip: keep what CLS attends to, and fold everything else into evenly spaced contextual tokens.

Reference: "VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv:2412.04467 (CVPR 2025).
Official code: https://github.com/dvlab-research/VisionZip

Convention: attention, keys and features are those of the block whose output becomes the visual tokens (the program's ``attentions[-2]`` and
``hidden_states[-2]``; its layer 22 of 24 for the keys is the same block). K is dominant + contextual, the program's 54 + 10, 108 + 20 and 162 + 30:
by default 10 of 64 are contextual. The program counts CLS among the dominant ones.

``variant="paper"`` (default): a contextual token is the mean of its target and the tokens assigned to it, all K places belong to patches, and they
stand in reading order. ``variant="code"``: target plus mean of the assigned, which has about twice the length of a feature; the CLS token is a
visual token and takes a dominant one's place; the order is CLS, dominant, contextual. The default is the paper's because a mean stays among the
vectors that the projector was trained on, because CLS was never shown to the language model in training, and because it means the same in towers
without CLS; the published numbers come from the program. ``positions="renumber"`` with ``variant="code"`` is that program.

Differences:
- The budget counts per image with all its tiles, which the program treats one by one. Tiles compete, but a token is folded into a target of its own
  tile or frame only.
- Features are merged before the projector where it works on each feature alone; elsewhere (tiles, pooled frames, mergers of several patches) the
  projected tokens are merged, and ``variant="code"`` is an error.
- A contextual token keeps the place of its target; in ``variant="code"`` CLS takes the place of the best patch that is neither dominant nor a target.
- A tower without CLS is ranked by the attention received from all tokens, as other papers do when they compare with VisionZip.
"""

from __future__ import annotations

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods._vision import attention_tap
from vlprune.points import BeforeLLM
from vlprune.protocols import Tap
from vlprune.reducers.contextual import Contextual
from vlprune.scorers import SignalScore
from vlprune.selectors.portion import Portion
from vlprune.selectors.strided import Strided

VARIANTS = ("paper", "code")


def visionzip(facts: ModelFacts, keep: Keep = 1 / 3, *, contextual: Portion = 10 / 64, variant: str = "paper") -> PruningMethod:
    """Keep dominant tokens and merge the others into contextual ones.

    Args:
        facts: of the model.
        keep: share or number of visual tokens per item, dominant and contextual together.
        contextual: share or number of these that are contextual.
        variant: ``"paper"``: true means, patches only, reading order. ``"code"``: target plus mean of the others, and CLS as the first token.
    """
    if variant not in VARIANTS:
        raise OptionError(f"variant={variant!r}: 'paper' (means, reading order) or 'code' (sums, CLS first)")
    code, block = variant == "code", facts.feature_layer
    places = Strided(contextual, cls_slot=code and facts.has_cls)
    cls = Tap("cls_state", block) if places.cls_slot else None
    reducer = Contextual(places, Tap("vision_keys", block), Tap("vision_states", block), summed=code, cls=cls)
    return PruningMethod("visionzip", (Stage(BeforeLLM(), SignalScore(attention_tap(facts)), places, reducer, Budget(keep)),))


CARD = MethodCard(
    "visionzip",
    visionzip,
    "what CLS attends to; the others averaged into evenly spaced contextual tokens by likeness of keys",
    paper="arXiv:2412.04467",
    code="https://github.com/dvlab-research/VisionZip",
    needs=("cls_row", "vision_keys", "vision_states"),  # "column_mean" instead of "cls_row" without CLS
    reduction="merge",
    exact=False,
    equivariant=False,
    golden=("visionzip",),
)

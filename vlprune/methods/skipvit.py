"""SkipViT: patches that CLS does not attend to skip the blocks in the middle of a vision tower, and come back behind them.

Reference: "SkipViT: Speeding Up Vision Transformers with a Token-Level Skip Connection", arXiv:2401.15293. No official code.

Convention: patches leave at ``VisionLayer(layer)``, ranked by the CLS attention of the block before, and are back in their places, unchanged,
at ``VisionLayer(back)``. ``keep`` is the share that runs the blocks between; the paper lets 55 % skip.

Differences:
- The paper trains from scratch with the skip; its tables say nothing about an untouched model, and nothing is trained here.
- Where the paper leaves and returns could not be checked (no code). By default a third of the tower is skipped, in the middle of it: from
  block 4 to block 8 of 12, scaled to the depth.
- A tower without CLS is ranked by the attention received from all tokens.
- Returning patches stand in their original places (the paper concatenates them; a block does not see the order).
"""

from __future__ import annotations

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.points import Depth, VisionLayer
from vlprune.protocols import Tap
from vlprune.reducers import Drop
from vlprune.scorers import SignalScore
from vlprune.selectors import TopK

LAYER, BACK = Depth(4, of=12), Depth(8, of=12)


def skipvit(facts: ModelFacts, keep: Keep = 0.45, *, layer: int | None = None, back: int | None = None) -> PruningMethod:
    """Let the least attended patches skip the middle of the tower.

    Args:
        facts: of the model.
        keep: share or number of an image's patches that run every block.
        layer: vision block, counted from 0, before which the others leave; by default a third of the way up.
        back: vision block before which they come back; by default two thirds of the way up.
    """
    depth = facts.vision_layers
    for name, value in (("layer", layer), ("back", back)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise OptionError(f"{name}={value!r}: a block number, counted from 0")
    leave = LAYER.resolve(depth) if layer is None else layer
    enter = max(BACK.resolve(depth), leave + 1) if back is None else back
    if not 1 <= leave < enter < max(depth, 3):
        raise OptionError(f"layer={leave}, back={enter}: 1 <= layer < back < {depth}, the number of vision blocks; one block must have attended before")
    scorer = SignalScore(Tap("cls_row" if facts.has_cls else "column_mean", leave - 1))
    return PruningMethod("skipvit", (Stage(VisionLayer(leave), scorer, TopK(), Drop(), Budget(keep), restore=enter),))


CARD = MethodCard(
    "skipvit",
    skipvit,
    "patches that CLS attends to least skip the middle blocks of a vision tower and come back",
    paper="arXiv:2401.15293",
    points=("vision:K",),
    needs=("cls_row",),
    modality="image",
    default_keep=0.45,
)

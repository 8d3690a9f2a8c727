"""HiPrune: keep what two vision layers attend to, with the surroundings of what the middle one sees as objects.

Reference: "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
arXiv:2508.00553. Official code: https://github.com/Danielement321/HiPrune

Convention: the paper counts vision blocks from 1. Its object layer 9 of 24 (CLIP) and 16 of 32 (Qwen2.5-VL) are our
0-based blocks 8 and 15, scaled with depth. Its deep layer, ``attentions[-2]`` of LLaVA and ``attentions[-1]`` of
Qwen2.5-VL, is in both the block whose output becomes the visual tokens. K and alpha are the paper's; the retention
ratio is ``keep``.

``variant="code"`` (border neighbours clamped) is the default because the published numbers come from that program;
the paper's text differs for border anchors only. `vlprune.selectors.hierarchy` tells the two apart.

Differences:
- Exactly K tokens stay. The released exclusion of chosen tokens (minus 1) loses some where scores are sums; ours is a
  mask.
- The score is the mean over queries everywhere (released: mean for LLaVA, sum for Qwen), which orders tokens the
  same.
- The budget counts per image with all its tiles. The released LLaVA-NeXT code splits it evenly over the tiles of the
  batch and drops the newline tokens; here tiles compete and newlines are tokens as others.
- Kept tokens keep their positions, as the released Qwen code does; its LLaVA code renumbers
  (``positions="renumber"``).
- In a tower with windows only blocks with attention over the whole image are read: a default moves to the nearest of
  them.
"""

from __future__ import annotations

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.points import BeforeLLM, Depth
from vlprune.protocols import Tap
from vlprune.reducers import Drop
from vlprune.scorers import SignalScore
from vlprune.selectors import Hierarchy

OBJECT_LAYER = Depth(9, of=24)  # counted from 1
OBJECT_LAYER_WINDOWED = Depth(16, of=32)  # counted from 1


def hiprune(
    facts: ModelFacts,
    keep: Keep = 1 / 3,
    *,
    alpha: float = 0.1,
    object_layer: int | None = None,
    variant: str = "code",
    subtract: float | None = None,
) -> PruningMethod:
    """Keep anchors, buffers and registers before the language model.

    Args:
        facts: of the model.
        keep: share or number of visual tokens per item.
        alpha: share of them meant for anchors with their four neighbours.
        object_layer: vision block, counted from 0, in which objects stand out; by default the paper's, scaled to the
            depth.
        variant: ``"code"`` clamps the neighbours of border anchors as released, ``"paper"`` leaves them out.
        subtract: reproduce the released exclusion instead of a mask (fewer than K tokens may stay): 1 for LLaVA, 1 /
            number of patches for Qwen, whose program subtracts 1 from a sum over that many queries.
    """
    deep = Tap("column_mean", facts.nearest_global(facts.feature_layer))
    selector = Hierarchy(Tap("column_mean", _object_block(facts, object_layer)), alpha, variant, subtract)
    return PruningMethod("hiprune", (Stage(BeforeLLM(), SignalScore(deep), selector, Drop(), Budget(keep)),))


def _object_block(facts: ModelFacts, layer: int | None) -> int:
    """The object layer as a 0-based block that sees the whole image."""
    depth, see_all = facts.vision_layers, facts.global_vision_layers
    windowed = bool(see_all) and len(see_all) < depth
    if layer is None:
        return facts.nearest_global((OBJECT_LAYER_WINDOWED if windowed else OBJECT_LAYER).resolve(depth) - 1)
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < max(depth, 1):
        raise OptionError(f"object_layer={layer!r}: a vision block from 0 to {depth - 1}, counted from 0")
    if windowed and layer not in see_all:
        raise OptionError(
            f"object_layer={layer}: this block sees windows only. Blocks that see the whole image: {see_all}."
        )
    return layer


CARD = MethodCard(
    "hiprune",
    hiprune,
    "attention received in a middle and in the last used vision layer; anchors, buffers, registers",
    paper="arXiv:2508.00553",
    code="https://github.com/Danielement321/HiPrune",
    needs=("column_mean",),
    golden=("hiprune", "hiprune_qwen"),
)

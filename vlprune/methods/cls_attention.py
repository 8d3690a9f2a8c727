"""CLS attention: inside a vision tower, keep the patches that the CLS token attends to.

Reference: "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations" (EViT),
arXiv:2202.07800 (ICLR 2022), without its fused token. Official code: https://github.com/youweiliang/evit

Convention: EViT reads its 4th block of 12, counted from 1, so by default four blocks see every patch
(``VisionLayer(4)`` of 12, scaled to the depth) and the attention is that of 0-based block 3.

Differences:
- EViT drops inside the block, between its attention and its MLP; here the patches leave before the next block, so they
  pass one more MLP, which changes nothing for the survivors.
- One drop by default; ``layers`` gives several. EViT keeps a share of what each earlier drop left; here ``keep`` is what
  is left of all patches behind the last drop, reached in equal ratios.
- Survivors stay in raster order; registers and distillation tokens never leave.
- A tower without CLS (SigLIP) is ranked by the attention received from all tokens instead.
- EViT trains with the dropping. Nothing is trained here, and it shows: on ViT-tiny and 200 to 334 ImageNet pictures
  (standard error about 2 points) it was ahead of `random` at the same block with keep=0.7, level with it at 0.5, and
  level or behind at 0.3. Hence the default of 0.7.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.points import Depth, VisionLayer
from vlprune.protocols import Tap
from vlprune.reducers import Drop
from vlprune.scorers import SignalScore
from vlprune.selectors import TopK

LAYER = Depth(4, of=12)


def cls_attention(facts: ModelFacts, keep: Keep = 0.7, *, layer: int | None = None, layers: Sequence[int] | None = None) -> PruningMethod:
    """Rank patches by the CLS row of the block before the drop.

    Args:
        facts: of the model.
        keep: share or number of patches left of an image at the end.
        layer: vision block, counted from 0, before which patches leave; by default a third of the way up.
        layers: several such blocks, ascending, instead of ``layer``; with a share as ``keep``.
    """
    depth = facts.vision_layers
    if layer is not None and layers is not None:
        raise OptionError(f"layer={layer!r} and layers={layers!r}: give one of them")
    chosen = tuple(layers) if layers is not None else (LAYER.resolve(depth) if layer is None else layer,)
    for number in chosen:
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number < max(depth, 2):
            raise OptionError(f"layer={number!r}: from 1 (one block must have attended) to {depth - 1}, the last vision block")
    if not chosen or list(chosen) != sorted(set(chosen)):
        raise OptionError(f"layers={layers!r}: ascending block numbers, each once")
    if len(chosen) > 1 and not isinstance(keep, float):
        raise OptionError(f"keep={keep!r} with {len(chosen)} layers: give the share that is left at the end, such as keep=0.5")
    kind = "cls_row" if facts.has_cls else "column_mean"
    stages = []
    for step, number in enumerate(chosen, start=1):
        budget = Budget(keep if step == len(chosen) else keep ** (step / len(chosen)))
        stages.append(Stage(VisionLayer(number), SignalScore(Tap(kind, number - 1)), TopK(), Drop(), budget))
    return PruningMethod("cls_attention", tuple(stages))


CARD = MethodCard(
    "cls_attention",
    cls_attention,
    "attention of CLS (or received from all) inside a vision tower",
    paper="arXiv:2202.07800",
    code="https://github.com/youweiliang/evit",
    points=("vision:K",),
    needs=("cls_row",),
    modality="image",
    default_keep=0.7,
)

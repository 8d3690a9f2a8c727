"""EViT: inside a vision tower, the patches that the CLS token attends to stay, and the others become one.

Reference: "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations", arXiv:2202.07800 (ICLR 2022).
Official code: https://github.com/youweiliang/evit

Convention: between attention and MLP of the 4th, 7th and 10th block of 12, ``VisionMiddle(3)``, ``VisionMiddle(6)`` and ``VisionMiddle(9)``, scaled to
the depth, patches are ranked by the CLS attention of that very block (mean over heads). The paper's keep rate is what each stage leaves of what reached
it; our ``keep`` is what is left at the end, its third power: the paper's 0.7 is ``keep=0.343``. One share per stage may be given instead. The new token is
the sum of all that leave, each weighted by its attention; it takes part in later rankings as any other.

Differences:
- Exactly K tokens stay, the new one among them (released: K of them and the new one), at the place of the best of those that it stands for;
  ``fuse=False`` drops instead, and K patches stay. Counts are rounded, not rounded up. Raster order (released: by attention, the new one last).
- A distillation token and registers never leave (released: they are ranked as patches).
- A tower without CLS is ranked, and the sum weighted, by the attention received from all tokens.
- The paper trains with it, and there the attention weights carry gradients. Here they are numbers; gradients reach what was summed.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlprune.budget import Keep
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods._in_tower import budgets, chosen_layers
from vlprune.points import VisionMiddle
from vlprune.protocols import Reducer, Selector, Tap
from vlprune.reducers import Drop
from vlprune.reducers.fuse import Fuse
from vlprune.scorers import SignalScore
from vlprune.selectors import TopK
from vlprune.selectors.summary import Summary


def evit(facts: ModelFacts, keep: Keep | Sequence[Keep] = 0.343, *, layers: Sequence[int] | None = None, fuse: bool = True) -> PruningMethod:
    """Keep what CLS attends to, fuse the rest.

    Args:
        facts: of the model.
        keep: share or number of an image's patches left at the end, reached in equal ratios; or a share or number per stage.
        layers: vision blocks, counted from 0, between whose attention and MLP the stages act; by default 3, 6 and 9 of 12, scaled to the depth.
        fuse: what leaves becomes one token; ``False``: it is dropped.
    """
    chosen = chosen_layers(layers, facts)
    stages = []
    for layer, budget in zip(chosen, budgets(keep, len(chosen)), strict=True):
        tap = Tap("cls_row" if facts.has_cls else "column_mean", layer)
        parts: tuple[Selector, Reducer] = (Summary(), Fuse(tap)) if fuse else (TopK(), Drop())
        stages.append(Stage(VisionMiddle(layer), SignalScore(tap), *parts, budget))
    return PruningMethod("evit", tuple(stages))


CARD = MethodCard(
    "evit",
    evit,
    "attention of CLS inside three blocks of a vision tower; what leaves becomes one token",
    paper="arXiv:2202.07800",
    code="https://github.com/youweiliang/evit",
    points=("vision:K.mid", "vision:K.mid", "vision:K.mid"),
    needs=("cls_row",),
    modality="image",
    reduction="merge",
    exact=False,
    default_keep=0.343,
    golden=("evit",),
)

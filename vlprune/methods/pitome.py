"""PiToMe: in every block of a vision tower, the most redundant patches are merged in pairs; what is like nothing else stays as it is.

Reference: "Accelerating Transformers with Spectrum-Preserving Token Merging", arXiv:2405.16148 (NeurIPS 2024).
Official code: https://github.com/hchautran/PiToMe

Convention: between attention and MLP of each block, ``VisionMiddle(k)`` for every k. A patch's energy is the mean over all patches of its likeness to
them, the cosine of the keys (mean over heads) less a margin where that is above 0, and bounded from below. Of the 2 r patches with most energy, those of
even rank each go into the one of odd rank most like it, size-weighted, at its place. The margin falls from 0.75 in the first block to 0 behind the last.
The paper's ratio is what each block leaves of what reached it; our ``keep`` is what is left at the end, its power: 0.95 in 12 blocks is ``keep=0.54``.

``variant="paper"`` does this in all blocks. ``variant="code"`` (default) is the released program for DeiT, from which the published numbers come: in the
first half of the blocks all patches, ranked by energy, are split alternately, and the r likest pairs are merged. On ViT-tiny and 200 ImageNet pictures it
was ahead, too: 81.0, 73.5 and 40.0 % against 78.5, 66.0 and 33.5 % at 0.7, 0.5 and 0.3 to the third power (dense: 86.5 %). The program for MAE does it
the other way round.

Differences:
- Where a block leaves fewer than half, the merging is repeated on what it made (released: the ratio has to be above a half).
- Counts are rounded shares of the patches at the start, not of those at each block.
- Sizes are tracked and weigh the means, but attention does not count them, as in the released timm models; ``proportional=True`` lets it.
- The released CLIP models merge by hidden states, behind the block; here all towers merge by keys.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlprune.budget import Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods._in_tower import budgets, chosen_layers, tower_depth
from vlprune.points import VisionMiddle
from vlprune.protocols import Tap
from vlprune.reducers.planned_merge import PlannedMerge
from vlprune.scorers.energy import Energy
from vlprune.selectors.matching import Matching, Ranked

VARIANTS = ("code", "paper")


def pitome(
    facts: ModelFacts,
    keep: Keep | Sequence[Keep] = 0.54,
    *,
    variant: str = "code",
    margin: float = 0.75,
    layers: Sequence[int] | None = None,
    proportional: bool = False,
) -> PruningMethod:
    """Merge the patches with most energy.

    Args:
        facts: of the model.
        keep: share or number of an image's patches left at the end, reached in equal ratios; or a share or number per block.
        variant: ``"code"``: in the first half of the blocks the likest pairs of all patches; ``"paper"``: the most redundant ones in all blocks.
        margin: cosine above which patches count as alike, in the first block; it falls linearly to 0. The released programs: 0.75, for CLIP 0.9.
        layers: vision blocks, counted from 0, between whose attention and MLP patches are merged; by default all.
        proportional: attention and pooling count a merged token by its size. Not for flash attention.
    """
    if variant not in VARIANTS:
        raise OptionError(f"variant={variant!r}: choose 'code' or 'paper'")
    chosen, depth = chosen_layers(layers, facts, every=True), tower_depth(facts)
    stages = []
    for layer, budget in zip(chosen, budgets(keep, len(chosen)), strict=True):
        keys = Tap("vision_keys", layer)
        among = "all" if variant == "code" and layer < (depth + 1) // 2 else "redundant"
        energy = Energy(keys, margin * (1 - layer / max(depth, 1)))
        stages.append(Stage(VisionMiddle(layer), energy, Matching(keys, Ranked(among)), PlannedMerge(), budget))
    return PruningMethod("pitome", tuple(stages), size_bias=proportional)


CARD = MethodCard(
    "pitome",
    pitome,
    "the most redundant patches are merged in pairs in every block of a vision tower, the others stay as they are",
    paper="arXiv:2405.16148",
    code="https://github.com/hchautran/PiToMe",
    points=("vision:K.mid",),
    needs=("vision_keys",),
    modality="image",
    reduction="merge",
    exact=False,
    default_keep=0.54,
    golden=("pitome",),
)

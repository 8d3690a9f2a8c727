"""ToMe: in every block of a vision tower, patches whose keys are alike are merged in pairs; attention counts a merged token by its size.

Reference: "Token Merging: Your ViT But Faster", arXiv:2210.09461 (ICLR 2023). Official code: https://github.com/facebookresearch/ToMe

Convention: between attention and MLP of each block, ``VisionMiddle(k)`` for every k. Every other patch may go into the one among those between whose key
(mean over heads) is most like its own; of these pairs the r likest are merged, into the size-weighted mean, at the place of the one that it went into. The
log of the sizes is added to the logits of the blocks behind (proportional attention), and what pools over tokens counts them by size.

``r`` merges that many a block (the paper: 8 or 16), or ``(r, inflection)``, falling for an inflection below 0. Without it ``keep`` is what is left at the
end, reached in equal numbers a block, as a constant r does.

Differences:
- Later blocks pair patches by their places in raster order; the released program by the order in which it left them, unmerged ones first.
- Where fewer than half of the patches shall stay in one block, the matching is repeated on what it made (released: r is cut to half of them).
- CLS, distillation tokens and registers never take part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods._in_tower import budgets, chosen_layers
from vlprune.points import VisionMiddle
from vlprune.protocols import Tap
from vlprune.reducers.planned_merge import PlannedMerge
from vlprune.scorers.flat import Flat
from vlprune.selectors.matching import Alternate, Matching


@dataclass(frozen=True)
class Merged(Budget):
    """What is left when each of ``removed`` took away as many tokens, or half of what there was."""

    removed: tuple[int, ...] = ()

    def num_keep(self, num_tokens: int, num_frames: int = 1) -> int:
        """Return how many of ``num_tokens`` stay."""
        for number in self.removed:
            num_tokens -= min(number, num_tokens // 2)
        return num_tokens


def schedule(num_blocks: int, r: int | Sequence[float]) -> tuple[int, ...]:
    """Tokens to merge in each block: a constant, a constant with an inflection, or a list as it is."""
    if isinstance(r, int) and not isinstance(r, bool):
        r = (r, 0.0)
    numbers = tuple(r) if isinstance(r, Sequence) and not isinstance(r, str) else ()
    if len(numbers) == 2 and num_blocks != 2:
        first = int(numbers[0] * (1 - numbers[1]))
        rise = 2 * numbers[0] - 2 * first
        numbers = tuple(int(first + rise * block / max(num_blocks - 1, 1)) for block in range(num_blocks))
    if len(numbers) != num_blocks or any(not isinstance(number, int) or isinstance(number, bool) or number < 0 for number in numbers):
        raise OptionError(f"r={r!r}: a number such as 8, (number, inflection) such as (8, -0.5), or one number from 0 for each of {num_blocks} blocks")
    return tuple(int(number) for number in numbers)


def tome(
    facts: ModelFacts,
    keep: Keep | Sequence[Keep] = 0.5,
    *,
    r: int | Sequence[float] | None = None,
    layers: Sequence[int] | None = None,
    proportional: bool = True,
) -> PruningMethod:
    """Merge patches with like keys.

    Args:
        facts: of the model.
        keep: share or number of an image's patches left at the end; or a share or number per block. Ignored with ``r``.
        r: patches that each block merges away, instead of ``keep``.
        layers: vision blocks, counted from 0, between whose attention and MLP patches are merged; by default all.
        proportional: attention and pooling count a merged token by its size. Not for flash attention.
    """
    chosen = chosen_layers(layers, facts, every=True)
    if r is None:
        left = budgets(keep, len(chosen), equal_numbers=True)
    else:
        numbers = schedule(len(chosen), r)
        left = tuple(Merged(1, removed=numbers[: block + 1]) for block in range(len(chosen)))
    stages = []
    for layer, budget in zip(chosen, left, strict=True):
        keys = Tap("vision_keys", layer)
        matching = Matching(keys, Alternate(int(facts.has_cls)))         # the released program counts CLS as the first
        stages.append(Stage(VisionMiddle(layer), Flat(keys), matching, PlannedMerge(), budget))
    return PruningMethod("tome", tuple(stages), size_bias=proportional)


CARD = MethodCard(
    "tome",
    tome,
    "patches with like keys are merged in pairs in every block of a vision tower; attention counts them by size",
    paper="arXiv:2210.09461",
    code="https://github.com/facebookresearch/ToMe",
    points=("vision:K.mid",),
    needs=("vision_keys",),
    modality="image",
    reduction="merge",
    exact=False,
    equivariant=False,
    default_keep=0.5,
    golden=("tome",),
)

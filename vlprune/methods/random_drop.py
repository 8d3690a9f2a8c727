"""Random: a seeded random subset, the baseline that every method has to beat.

The choice depends on the seed and on the number of tokens of the item alone: the same seed gives the same answer, and an
item keeps its choice whatever else is in the batch. Numbers are drawn on the CPU, so they agree between devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.points import Point, parse_point
from vlprune.protocols import ScoreInputs, Tap
from vlprune.reducers import Drop
from vlprune.selectors import TopK


@dataclass(frozen=True)
class RandomScore:
    """Uniform random scores from a seed."""

    seed: int = 0

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Nothing."""
        return ()

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N); drawn per place in the original item, so that later stages see the same draw."""
        generator = torch.Generator().manual_seed(self.seed)
        draw = torch.rand(inputs.num_original or inputs.tokens.shape[1], generator=generator).to(inputs.tokens.device, non_blocking=True)
        return draw.expand(inputs.tokens.shape[0], -1) if inputs.original is None else draw[inputs.original]


def random(facts: ModelFacts, keep: Keep = 1 / 3, *, seed: int = 0, point: str | Point = "before_llm") -> PruningMethod:
    """Keep a random subset at one point.

    Args:
        facts: of the model (unused).
        keep: share or number of visual tokens per item.
        seed: of the draw.
        point: where, e.g. ``"before_llm"`` (default), ``"llm:2"`` or ``"vision:3"``.
    """
    if not isinstance(seed, int):
        raise OptionError(f"seed={seed!r}: an int is needed")
    return PruningMethod("random", (Stage(parse_point(point), RandomScore(seed), TopK(), Drop(), Budget(keep)),))


CARD = MethodCard("random", random, "a seeded random subset; the baseline to beat", points=("any",), equivariant=False)

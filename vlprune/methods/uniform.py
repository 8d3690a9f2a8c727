"""Uniform: every n-th token in reading order, a baseline with even coverage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.budget import Budget, Keep
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.points import Point, parse_point
from vlprune.protocols import ScoreInputs, Selection, Tap
from vlprune.reducers import Drop
from vlprune.scorers import Constant


@dataclass(frozen=True)
class EvenlySpaced:
    """Keep tokens ``floor((i + 1/2) * N / K)``, in whole numbers."""

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Nothing."""
        return ()

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """(B, K), the same for every item."""
        num_items, num_tokens = scores.shape
        steps = torch.arange(inputs.num_keep, device=scores.device)
        return Selection(((2 * steps + 1) * num_tokens // (2 * inputs.num_keep)).expand(num_items, -1))


def uniform(facts: ModelFacts, keep: Keep = 1 / 3, *, point: str | Point = "before_llm") -> PruningMethod:
    """Keep evenly spaced tokens at one point.

    Args:
        facts: of the model (unused).
        keep: share or number of visual tokens per item.
        point: where, e.g. ``"before_llm"`` (default), ``"llm:2"`` or ``"vision:3"``.
    """
    return PruningMethod("uniform", (Stage(parse_point(point), Constant(), EvenlySpaced(), Drop(), Budget(keep)),))


CARD = MethodCard("uniform", uniform, "evenly spaced tokens in reading order; a baseline", points=("any",), equivariant=False)

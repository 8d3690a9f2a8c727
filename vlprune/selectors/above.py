"""Above: tokens whose score reaches a threshold stay, and at least K. How many that is, is in the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.errors import OptionError
from vlprune.protocols import ScoreInputs, Selection, Tap

RULES = ("mean", "max", "absolute")


def cut_of(scores: Tensor, threshold: Tensor | float, rule: str, weights: Tensor | None = None) -> Tensor:
    """(B, 1) or a scalar: the score from which on a token (of ``scores`` (B, N), each counted with its ``weights``) stays."""
    if rule == "absolute":
        return torch.as_tensor(threshold, device=scores.device)
    if rule == "max":
        return threshold * (scores if weights is None else scores * weights).amax(dim=-1, keepdim=True)
    mean = scores.mean(dim=-1, keepdim=True) if weights is None else (scores * weights).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True).clamp(min=1e-6)
    return threshold * mean


@dataclass(frozen=True)
class Above:
    """Keep what reaches the threshold, best first up to K of the others; one host read an item.

    Attributes:
        threshold: a score, or with ``rule`` ``"max"`` or ``"mean"`` times the largest or mean score of the item.
    """

    threshold: float
    rule: str = "absolute"
    one_by_one: bool = True

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise OptionError(f"rule={self.rule!r}: one of {', '.join(map(repr, RULES))}")

    @property
    def needs(self) -> tuple[Tap, ...]:
        """No signals of its own."""
        return ()

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """(1, n) indices, n from K to all."""
        count = max(inputs.num_keep, int((scores >= cut_of(scores, self.threshold, self.rule)).sum(dim=-1).max()))
        return Selection(scores.topk(count, dim=-1).indices.sort(dim=-1).values)

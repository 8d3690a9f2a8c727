"""Strided: the best tokens, and evenly spaced ones of the rest as places that stand for what leaves (VisionZip).

With K tokens, C of them contextual: the K - C best stay (dominant). Of the R others in reading order every ``max(1, R // C)``-th is a contextual
place, C in all. Separators are counted and used last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.protocols import ScoreInputs, Selection, Tap
from vlprune.selectors.places import rest_in_order, separators_last
from vlprune.selectors.portion import Portion, check_portion, portion_of

ROLES = ("dominant", "contextual", "cls")


@dataclass(frozen=True)
class Strided:
    """Keep dominant tokens and evenly spaced contextual places.

    Attributes:
        contextual: share or number of the kept tokens that are contextual.
        cls_slot: one dominant token fewer, whose place the CLS token takes: the best token that is neither dominant nor contextual.
    """

    contextual: Portion = 10 / 64
    cls_slot: bool = False

    def __post_init__(self) -> None:
        check_portion("contextual", self.contextual)

    @property
    def needs(self) -> tuple[Tap, ...]:
        """No signals of its own."""
        return ()

    def split(self, num_keep: int) -> tuple[int, int]:
        """How many of ``num_keep`` tokens are dominant, and how many contextual."""
        room = num_keep - int(self.cls_slot)
        contextual = min(portion_of("contextual", self.contextual, num_keep), room)
        return room - contextual, contextual

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """(B, K) indices with the role of each."""
        scores = separators_last(scores, inputs)
        dominant, contextual = self.split(inputs.num_keep)
        best = scores.topk(dominant, dim=-1).indices
        kind = torch.full_like(scores, len(ROLES), dtype=torch.int64).scatter(1, best, 0)          # number of the role; the last: leaves
        if contextual:
            rest, count = rest_in_order(kind == 0, inputs)
            step = (count // contextual).clamp(min=1)                                              # (B, 1)
            kind = kind.scatter(1, rest.gather(1, torch.arange(contextual, device=rest.device) * step), 1)
        if self.cls_slot:
            kind = kind.scatter(1, scores.masked_fill(kind < len(ROLES), -torch.inf).argmax(dim=-1, keepdim=True), 2)
        keep = kind.argsort(dim=-1, stable=True)[:, : inputs.num_keep].sort(dim=-1).values
        return Selection(keep, kind.gather(1, keep), ROLES)

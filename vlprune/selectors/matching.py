"""Matching: tokens are merged in pairs that are alike until K are left; who may go into whom is decided by place (ToMe) or by rank (PiToMe)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.errors import OptionError
from vlprune.kernels.bipartite import Split, merge_plan
from vlprune.protocols import ScoreInputs, Selection, Tap

RANKINGS = ("redundant", "all", "halves")


@dataclass(frozen=True)
class Alternate:
    """Every other token, from the first or from the second one on, may go into one of those between.

    Attributes:
        first: 0 or 1, the first source.
    """

    first: int = 0

    def __call__(self, scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Sources and targets."""
        places = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
        return places[:, self.first :: 2], places[:, 1 - self.first :: 2]


@dataclass(frozen=True)
class Ranked:
    """Alternately by rank, from the lowest score up; the earlier of two equal ones comes first.

    Attributes:
        among: ``"redundant"``: the lowest scores, two for each to be merged, others stay as they are; ``"halves"``: of these, the lower half goes
            into the upper half; ``"all"``: all tokens, of which the likest pairs are merged.
    """

    among: str = "redundant"

    def __post_init__(self) -> None:
        if self.among not in RANKINGS:
            raise OptionError(f"among={self.among!r}: choose one of {', '.join(RANKINGS)}")

    def __call__(self, scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Sources and targets."""
        order = scores.argsort(dim=1, stable=True)
        if self.among == "halves":
            return order[:, :number], order[:, number : 2 * number]
        if self.among == "redundant":
            order = order[:, : 2 * number]
        return order[:, 0::2], order[:, 1::2]


@dataclass(frozen=True)
class Matching:
    """Merge until K are left; a merged token stands where its target stood. ``plan`` is what each token goes into, (B, N) in 0..K-1.

    Attributes:
        metric: what likeness is the cosine of.
        split: who may go into whom.
    """

    metric: Tap
    split: Split

    @property
    def needs(self) -> tuple[Tap, ...]:
        """The metric."""
        return (self.metric,)

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """(B, K) indices; role 1 for what took others in."""
        keep, owner = merge_plan(inputs.signal(self.metric), scores, inputs.num_keep, self.split, inputs.sizes)
        members = torch.zeros_like(keep).scatter_add(1, owner, torch.ones_like(owner))
        return Selection(keep, (members > 1).long(), ("kept", "merged"), plan=owner)

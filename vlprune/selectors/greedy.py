"""Greedy: tokens picked one by one, each for its worth and for how little it is like those picked before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.kernels.greedy import GreedyRule, greedy_select
from vlprune.kernels.groups import shared_quotas
from vlprune.protocols import ScoreInputs, Selection, Tap
from vlprune.selectors.places import frames_of, real_tokens


@dataclass(frozen=True)
class Greedy:
    """Pick by ``rule``; scores, not negative, are the tokens' worth for the rules that look at it.

    Attributes:
        rule: what a pick does to the gains, see `vlprune.kernels.greedy_rules`.
        first: ``vlprune.kernels.greedy.ISOLATED`` to start from the token whose nearest neighbour is farthest; ``None``: from the largest gain.
        apart: each tile or frame picks by itself, and the K tokens are shared out in proportion to their sizes; separators stay only when nothing else is
            left. Otherwise all tokens of an item compete, separators too.
    """

    rule: GreedyRule
    first: str | None = None
    apart: bool = False

    def __post_init__(self) -> None:
        assert self.first is None or not self.apart, "the most isolated token of an item says nothing about each of its tiles"

    @property
    def needs(self) -> tuple[Tap, ...]:
        """No signals of its own."""
        return ()

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """(B, K) indices, in raster order."""
        return Selection(self.picks(scores, inputs).sort(dim=-1).values)

    def picks(self, scores: Tensor, inputs: ScoreInputs) -> Tensor:
        """(B, K) indices in the order of picking."""
        groups = quota = None
        if self.apart and inputs.grid is not None:
            real = real_tokens(inputs)
            groups = torch.where(real, frames_of(inputs), -1)
            quota = shared_quotas(groups, real, inputs.num_keep)
        return greedy_select(inputs.tokens, inputs.num_keep, self.rule, self.first, weights=scores, groups=groups, quota=quota)

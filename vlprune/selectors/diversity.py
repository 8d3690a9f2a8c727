"""Diversity: tokens that are unlike each other stay, picked greedily from the best-scored one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlprune.errors import OptionError
from vlprune.kernels import RULES, greedy_select
from vlprune.protocols import ScoreInputs, Selection, Tap


@dataclass(frozen=True)
class Diversity:
    """Start at the highest score (the pivot), then follow ``rule`` over the tokens' cosine similarities.

    ``"maxsum"`` adds the token with the smallest cumulative similarity to the chosen ones, ``"maxmin"`` (k-center)
    the one farthest from its nearest chosen token. Scores choose the pivot and nothing else.
    """

    rule: str = "maxsum"

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise OptionError(f"rule={self.rule!r}: one of {', '.join(map(repr, RULES))}")

    @property
    def needs(self) -> tuple[Tap, ...]:
        """No signals of its own."""
        return ()

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """(B, K) indices, in raster order."""
        picks = greedy_select(inputs.tokens, inputs.num_keep, RULES[self.rule], first=scores.argmax(dim=-1))
        return Selection(picks.sort(dim=-1).values)

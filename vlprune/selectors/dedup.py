"""Dedup: some tokens for their score, the rest by removing, a few at a time, what is most like another (VisPruner).

With K tokens and the share r, the ``int(K r)`` best stay. The others start as a list from the best score down. A round compares the tokens at even
places of the list with those at odd places, by cosine, removes the even ones (``step`` of them at most) whose likeness to any odd one is largest,
and makes a new list of the even ones that are left, most alike first, and the odd ones. Rounds end when as many are left as are wanted.

The number of rounds and the length of every list follow from N and K, so nothing is read back; the similarities are computed once. A separator
counts as a duplicate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.errors import OptionError
from vlprune.kernels.similarity import cosine
from vlprune.protocols import ScoreInputs, Selection, Tap
from vlprune.selectors.places import real_tokens, separators_last

ROLES = ("important", "diverse")
DUPLICATE = 2.0  # above every cosine


@dataclass(frozen=True)
class Dedup:
    """Keep important and diverse tokens.

    Attributes:
        features: signal (B, N, C) that is compared.
        important: share r of the kept tokens that stay for their score, in [0, 1]; rounded down.
        step: tokens that leave in a round, at most.
    """

    features: Tap
    important: float = 0.5
    step: int = 8

    def __post_init__(self) -> None:
        if isinstance(self.important, bool) or not isinstance(self.important, (int, float)) or not 0 <= self.important <= 1:
            raise OptionError(f"important={self.important!r}: the share of tokens that stay for their score must lie in [0, 1]")
        if isinstance(self.step, bool) or not isinstance(self.step, int) or self.step < 1:
            raise OptionError(f"step={self.step!r}: tokens that leave in a round, a whole number from 1")

    @property
    def needs(self) -> tuple[Tap, ...]:
        """The features."""
        return (self.features,)

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """(B, K) indices with the role of each."""
        order = separators_last(scores, inputs).argsort(dim=-1, descending=True, stable=True)                               # (B, N), the best first
        num_important = int(inputs.num_keep * self.important)
        best, rest = order[:, :num_important], order[:, num_important:]
        num_diverse = inputs.num_keep - num_important
        rest = self._thin_out(rest, num_diverse, inputs) if num_diverse else rest[:, :0]
        kind = torch.full_like(order, 2).scatter(1, best, 0).scatter(1, rest, 1)
        keep = torch.cat((best, rest), dim=-1).sort(dim=-1).values
        return Selection(keep, kind.gather(1, keep), ROLES)

    def _thin_out(self, rest: Tensor, wanted: int, inputs: ScoreInputs) -> Tensor:
        """(B, wanted) of ``rest`` (B, R), R >= wanted >= 1."""
        features = inputs.signal(self.features)
        likeness = cosine(features, features).masked_fill(~real_tokens(inputs)[..., None], DUPLICATE)
        tokens, at = rest, rest                                            # ``at``: the list, as numbers of the rows of ``likeness``
        while at.shape[1] > wanted:
            if at is rest or 4 * at.shape[1] <= 3 * likeness.shape[1]:     # rows and columns of what left cost time: leave them out
                tokens = tokens if at is rest else tokens.gather(1, at)
                likeness = torch.stack([one.index_select(0, left).index_select(1, left) for one, left in zip(likeness, at, strict=True)])
                at = torch.arange(at.shape[1], device=at.device).expand_as(at)
            even, odd = at[:, ::2], at[:, 1::2]
            leave = min(self.step, at.shape[1] - wanted, even.shape[1])
            hidden = torch.full_like(likeness[:, 0], -torch.inf).scatter(1, odd, 0.0)
            rows = torch.stack([one.index_select(0, number) for one, number in zip(likeness, even, strict=True)])      # (B, R / 2, R)
            nearest = rows.add_(hidden[:, None]).amax(dim=-1)
            stay = nearest.argsort(dim=-1, descending=True, stable=True)[:, leave:]
            at = torch.cat((even.gather(1, stay), odd), dim=-1)
        return at if at is rest else tokens.gather(1, at)

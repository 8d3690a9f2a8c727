"""Strips: the sequence is cut into strips, each gets tokens in proportion to its score, and attention decides inside it (HoloV).

A token's score is its attention plus ``variance`` times the variance of its likeness to the tokens of its strip (brought to the mean of the
attention); a strip's score is the mean of its tokens'. Strip c of K tokens gets the whole part of K w_c, w its share of all scores, and what is then
missing goes to the strips of largest w, one each. Where a strip gets more than it has, the others share it, the next token going to the strip with
the largest w_c / (tokens it has + 1), so that exactly K stay.

Strips lie within a tile or frame; all of them share the budget. Separators stay only when nothing else is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.errors import OptionError
from vlprune.kernels.strips import EPS, strip_starts, strip_sums, strip_variance
from vlprune.protocols import ScoreInputs, Selection, Tap, gather_tokens
from vlprune.selectors.places import frames_of, real_tokens


@dataclass(frozen=True)
class Strips:
    """Keep the best tokens of every strip.

    Attributes:
        strips: number of strips a tile or frame.
        variance: weight of the variance against the attention.
    """

    strips: int = 16
    variance: float = 0.09 / 1000

    def __post_init__(self) -> None:
        if isinstance(self.strips, bool) or not isinstance(self.strips, int) or self.strips < 1:
            raise OptionError(f"strips={self.strips!r}: how many strips a tile or frame is cut into, a whole number from 1")
        if isinstance(self.variance, bool) or not isinstance(self.variance, (int, float)) or not 0 <= self.variance:
            raise OptionError(f"variance={self.variance!r}: the weight of the variance against the attention, 0 or more")

    @property
    def needs(self) -> tuple[Tap, ...]:
        """No signals of its own."""
        return ()

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """(B, K) indices."""
        real = real_tokens(inputs)
        number = torch.where(real, frames_of(inputs), torch.iinfo(torch.int64).max)
        order = number.argsort(dim=-1, stable=True)                                                # frames one after another, separators last
        real, attention = real.gather(1, order), scores.gather(1, order)
        start, size = strip_starts(number.gather(1, order), self.strips)
        shares = self.shares(gather_tokens(inputs.tokens, order), attention, real, start, size)
        rank = within_strip(attention, start)
        share, quota = (x.gather(1, start) for x in (shares, quotas(shares, inputs.num_keep, start)))
        worth = share / (rank + 1)
        worth = torch.where(rank < quota, 2.0, worth).masked_fill(~real, -1.0)
        best = worth.argsort(dim=-1, descending=True, stable=True)[:, : inputs.num_keep]
        return Selection(order.gather(1, best).sort(dim=-1).values)

    def shares(self, features: Tensor, attention: Tensor, real: Tensor, start: Tensor, size: Tensor) -> Tensor:
        """(B, N) share of every strip, at its first token; they sum to one. Tokens in the order of the strips."""
        longest = -(-features.shape[1] // self.strips)
        attention = attention.masked_fill(~real, 0.0)
        worth = attention
        if self.variance:
            variance = strip_variance(features, start, size, longest).masked_fill(~real, 0.0)
            scale = attention.sum(dim=-1, keepdim=True) / (variance.sum(dim=-1, keepdim=True) + EPS)
            worth = attention + self.variance * scale * variance
        strip = strip_sums(worth, start, longest) / size
        return strip / strip.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(strip.dtype).tiny)


def within_strip(attention: Tensor, start: Tensor) -> Tensor:
    """(B, N) rank of each token within its strip, 0 for the most attended; the earlier of equals."""
    order = attention.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(1, start.gather(1, order).argsort(dim=-1, stable=True))
    return order.argsort(dim=-1) - start


def quotas(shares: Tensor, num_keep: int, start: Tensor) -> Tensor:
    """(B, N) tokens that every strip would get, at its first token; a strip may get more than it has."""
    quota = (shares * num_keep).floor()
    missing = num_keep - quota.sum(dim=-1, keepdim=True)
    first = start == torch.arange(start.shape[1], device=start.device)
    rank = shares.masked_fill(~first, -1.0).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return quota + (first & (rank < missing))

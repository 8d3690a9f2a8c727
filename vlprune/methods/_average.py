"""``keep`` as the average over a decoder's layers: how many tokens each of several stages leaves then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from vlprune.budget import Budget


def stage_weights(layers: Sequence[int], depth: int) -> tuple[float, ...]:
    """Share of a decoder's ``depth`` layers behind a stage before it and behind each at ``layers``; they add up to 1."""
    edges = (0, *layers, max(depth, 1))
    return tuple((after - before) / edges[-1] for before, after in pairwise(edges))


def average(shares: Sequence[float], weights: Sequence[float], power: float = 1.0) -> float:
    """Weighted mean of ``shares ** power``."""
    return sum([float(weight * share**power) for share, weight in zip(shares, weights, strict=True)], 0.0)


def scaled_to(shares: Sequence[float], weights: Sequence[float], wanted: float) -> tuple[float, ...]:
    """Raise ``shares``, all below 1, to the one power that makes their weighted mean ``wanted``."""
    if wanted >= 1:
        return (1.0,) * len(shares)
    low, high = 0.0, 1.0
    while average(shares, weights, high) > wanted:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if average(shares, weights, middle) > wanted else (low, middle)
    return tuple(float(share**high) for share in shares)


@dataclass(frozen=True)
class AverageBudget(Budget):
    """A stage where ``keep`` is the average number per item: its share is known when the number of tokens is.

    Attributes:
        stage: which of the shares is this stage's.
        shares, weights: of all stages, see `scaled_to`.
    """

    stage: int = 0
    shares: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()

    def num_keep(self, num_tokens: int, num_frames: int = 1) -> int:
        """Return how many of ``num_tokens`` stay."""
        wanted = super().num_keep(num_tokens, num_frames) / num_tokens
        return max(1, round(num_tokens * scaled_to(self.shares, self.weights, wanted)[self.stage]))


def drawn_shares(
    weights: Sequence[float], keep: float, suggest: Callable[[str, float, float], float], *, most_first: float, least_second: float
) -> tuple[float, ...] | None:
    """Draw the shares that one to three stages leave so that they average ``keep``; ``None`` where the numbers drawn cannot.

    The last stage follows from the others. Of the range of the second (relative to the first) only the part where the last one lies in (0, 1] is
    of use, so that what is drawn is a place in this part.

    Args:
        weights: of the stages, see `stage_weights`.
        keep: the average.
        suggest: ``(name, low, high)``: draws a number.
        most_first: the first share lies between ``keep`` and this times ``keep``.
        least_second: the second, relative to the first, lies between this and 1.
    """
    if len(weights) == 1:
        return (keep,)
    first = suggest("R1", keep, min(most_first * keep, 1.0))
    left = keep / first - weights[0]                                     # to be spent behind the first stage, relative to R1
    if len(weights) == 2:
        last = left / weights[1]
        return (first, first * min(last, 1.0)) if last > 0 else None
    lowest, highest = max(least_second, left / (weights[1] + weights[2])), min(1.0, left / weights[1])
    place = suggest("R2_place", 0.0, 1.0)                                # drawn in any case: samplers like a constant space
    if lowest > highest:
        return None
    second = lowest + place * (highest - lowest)
    third = min((left - second * weights[1]) / (second * weights[2]), 1.0)
    return (first, first * second, first * second * third) if third > 0 else None

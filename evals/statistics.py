"""Means with their standard errors, and paired comparisons of two runs over the same samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Mean:
    """A mean over samples with its standard error (unbiased deviation over the root of the count; 0 for one sample)."""

    value: float
    error: float
    count: int


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard error; NaN of nothing."""
    count = len(values)
    if not count:
        return Mean(math.nan, math.nan, 0)
    data = np.asarray(values, dtype=float)
    return Mean(float(data.mean()), float(data.std(ddof=1) / math.sqrt(count)) if count > 1 else 0.0, count)


@dataclass(frozen=True)
class Paired:
    """Another run minus a baseline, sample by sample.

    Attributes:
        change, error: mean difference and its standard error.
        gained, lost: samples that are better and worse than in the baseline.
        p: two-sided p value that the signs of the differences are a coin's: exact sign test, for right and wrong answers McNemar's exact test.
    """

    change: float
    error: float
    gained: int
    lost: int
    p: float


def paired(run: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Compare two runs over the same samples in the same order."""
    differences = [a - b for a, b in zip(run, baseline, strict=True)]
    mean = mean_of(differences)
    gained, lost = sum(value > 0 for value in differences), sum(value < 0 for value in differences)
    return Paired(mean.value, mean.error, gained, lost, sign_test(gained, lost))


def sign_test(gained: int, lost: int) -> float:
    """Two-sided exact binomial test of ``gained`` against ``lost`` with equal odds; 1 where nothing differs."""
    count, least = gained + lost, min(gained, lost)
    if count == 0:
        return 1.0
    log_half = count * math.log(2)
    tail = sum(math.exp(math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - log_half) for k in range(least + 1))
    return min(1.0, 2 * tail)


def relative_average(values: Sequence[float], baselines: Sequence[float]) -> float:
    """Mean over benchmarks of score over dense score, the "relative average" of pruning papers; benchmarks whose dense score is 0 are left out."""
    ratios = [value / base for value, base in zip(values, baselines, strict=True) if base > 0 and not math.isnan(value)]
    return sum(ratios) / len(ratios) if ratios else math.nan

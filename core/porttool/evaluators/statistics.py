"""Paired comparison of two models on the same articles: bootstrap, non-inferiority and power."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
POWER = 0.8
MIN_ARTICLES = 10
"""With fewer articles a bootstrap interval means nothing, and no verdict is given."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its bootstrap bounds and the standard deviation of what was averaged.

    `low` and `high` are one-sided bounds, each at the confidence that was asked for.
    """

    mean: float
    low: float
    high: float
    sd: float
    n: int


def bootstrap_mean(
    values: Sequence[float],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """Estimate a mean by the percentile bootstrap (Efron and Tibshirani 1993, chapter 13).

    Given paired differences it is the paired bootstrap. The seed makes it repeatable, and equal
    numbers of values are resampled alike.
    """
    data = np.asarray(values, dtype=np.float64)
    if not data.size:
        raise ValueError("there is nothing to average")
    generator = np.random.default_rng(seed)
    means = np.concatenate([
        data[generator.integers(0, data.size, (size, data.size))].mean(axis=1)
        for size in block_sizes(resamples, data.size)
    ])  # fmt: skip
    low, high = np.quantile(means, [1 - confidence, confidence])
    sd = float(data.std(ddof=1)) if data.size > 1 else 0.0
    return Estimate(float(data.mean()), float(low), float(high), sd, data.size)


def block_sizes(resamples: int, n: int, most: int = 1 << 22) -> list[int]:
    """Divide resamples into blocks whose index arrays stay small."""
    block = max(1, most // n)
    return [min(block, resamples - done) for done in range(0, resamples, block)]


def unseen_share(n: int, confidence: float = CONFIDENCE) -> float:
    """Largest share of all articles that may differ although none of n does (Hanley 1983).

    Where nothing differs a bootstrap interval has no width, however few were looked at.
    """
    return 1 - math.exp(math.log1p(-confidence) / n)


def power_of(n: int, sd: float, margin: float, confidence: float = CONFIDENCE) -> float:
    """Chance that n articles show non-inferiority of a port that is exactly as good.

    Normal approximation (Chow, Shao and Wang 2008, section 3.2): the mean of n paired differences
    of standard deviation sd must lie less than margin - z * sd / sqrt(n) below zero. With fewer
    than MIN_ARTICLES there is no verdict to pass.
    """
    if n < MIN_ARTICLES:
        return 0.0
    if sd == 0:
        return 1.0
    normal = NormalDist()
    return normal.cdf(margin * math.sqrt(n) / sd - normal.inv_cdf(confidence))


def articles_needed(
    sd: float, margin: float, *, confidence: float = CONFIDENCE, power: float = POWER
) -> int:
    """Articles with which a port that is exactly as good passes with the power asked for."""
    normal = NormalDist()
    z = normal.inv_cdf(confidence) + normal.inv_cdf(power)
    return max(MIN_ARTICLES, math.ceil((z * sd / margin) ** 2))

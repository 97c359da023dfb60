"""The statistics against numbers known from elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest

from porttool.evaluators.statistics import (
    MIN_ARTICLES,
    articles_needed,
    block_sizes,
    bootstrap_mean,
    power_of,
    unseen_share,
)


def test_bounds_are_those_of_a_normal_mean():
    values = np.random.default_rng(5).normal(1.0, 4.0, 400)
    found = bootstrap_mean(values)
    error = values.std(ddof=1) / math.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.sd == pytest.approx(values.std(ddof=1))
    assert found.low == pytest.approx(values.mean() - 1.645 * error, abs=0.03)
    assert found.high == pytest.approx(values.mean() + 1.645 * error, abs=0.03)


def test_bootstrap_of_two_values_is_binomial():
    """Of n draws from {0, 1}, the 5 % quantile of Binomial(20, 1/2) / 20 is 6 / 20."""
    found = bootstrap_mean([0.0, 1.0] * 10)
    assert (found.low, found.high) == (6 / 20, 14 / 20)


def test_constant_differences_have_no_width():
    found = bootstrap_mean([0.25] * 30)
    assert (found.mean, found.low, found.high, found.sd) == (0.25, 0.25, 0.25, 0.0)


def test_same_seed_same_bounds():
    values = np.random.default_rng(1).normal(size=57).tolist()
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert bootstrap_mean(values) != bootstrap_mean(values, seed=1)


def test_coverage_of_the_lower_bound():
    """The one-sided 95 % bound lies above the true mean in about 5 % of samples."""
    generator = np.random.default_rng(0)
    above = sum(
        bootstrap_mean(generator.normal(0, 3, 60), resamples=400).low > 0 for _ in range(400)
    )
    assert 0.025 < above / 400 < 0.09


@pytest.mark.parametrize(
    ("n", "sd", "margin", "power"),
    [
        (100, 2.0, 0.5, 0.8038),  # z = 2.5 - 1.6449 = 0.8551
        (200, 2.0, 0.5, 0.9707),  # z = 3.5355 - 1.6449 = 1.8907
        (100, 4.0, 0.5, 0.3465),  # z = 1.25 - 1.6449 = -0.3949
        (50, 0.0, 0.5, 1.0),
        (MIN_ARTICLES, 0.0, 0.5, 1.0),
        (MIN_ARTICLES - 1, 0.0, 0.5, 0.0),
    ],
)
def test_power(n, sd, margin, power):
    assert power_of(n, sd, margin) == pytest.approx(power, abs=2e-4)


def test_power_is_what_a_simulation_gives():
    generator = np.random.default_rng(2)
    n, sd, margin, runs = 80, 2.0, 0.6, 1500
    means = generator.normal(0, sd, (runs, n)).mean(1)
    passed = (means - 1.6449 * sd / math.sqrt(n) > -margin).mean()
    assert power_of(n, sd, margin) == pytest.approx(passed, abs=0.03)


def test_articles_needed():
    """((1.6449 + 0.8416) * 2 / 0.5)² = 98.92."""
    assert articles_needed(2.0, 0.5) == 99
    assert power_of(99, 2.0, 0.5) >= 0.8 > power_of(98, 2.0, 0.5)
    assert articles_needed(0.01, 0.5) == MIN_ARTICLES


def test_nothing_to_average():
    with pytest.raises(ValueError, match="nothing to average"):
        bootstrap_mean([])


def test_blocks_add_up():
    assert sum(block_sizes(10_000, 11_490)) == 10_000
    assert max(block_sizes(10_000, 11_490)) * 11_490 <= 1 << 22


@pytest.mark.parametrize(("n", "share"), [(10, 0.2589), (200, 0.01487), (11490, 0.0002607)])
def test_what_no_article_showed_may_still_be(n, share):
    found = unseen_share(n)
    assert found == pytest.approx(share, rel=1e-3)
    assert (1 - found) ** n == pytest.approx(0.05)

"""Intervals cover what they say: 2,000 draws of a known truth each.

Left out: noise that is far from normal, which no interval of three seeds survives.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import bootstrap

from ceg_model.study import aa, stats
from ceg_model.study.trend import classify, classify_points

DRAWS = 2000
PROMISED = pytest.approx(0.95, abs=0.015)


def coverage(interval, rng, *shape, draws=DRAWS):
    hits = 0
    for _ in range(draws):
        found = interval(rng.normal(0.0, 1.0, shape))
        hits += found.low <= 0 <= found.high
    return hits / draws


def test_bootstrap_covers_from_as_many_seeds_as_it_is_used():
    """Expanded percentiles; without them, and with fewer seeds, BCa promises too much."""

    def few(d):
        return stats.bca([d], resamples=999)

    def plain(d):
        return stats.bca([d], resamples=999, expand=False)

    rng = np.random.default_rng(11)
    assert coverage(few, rng, stats.BCA_FROM) == PROMISED
    assert coverage(few, rng, 5, draws=800) < 0.94
    assert coverage(plain, rng, 8, draws=800) < 0.91


def test_pooled_bootstrap_covers():
    rng = np.random.default_rng(12)

    def pooled(groups):
        return stats.bca(list(groups), resamples=999)

    assert coverage(pooled, rng, 3, stats.BCA_FROM, draws=1000) == PROMISED


@pytest.mark.parametrize("sizes", [(15,), (200,), (20, 31, 15)])
def test_bca_is_scipys(sizes):
    rng = np.random.default_rng(16)
    groups = [rng.gamma(2.0, size=n) for n in sizes]

    def mean(*samples, axis=-1):
        return np.mean([np.mean(s, axis=axis) for s in samples], axis=0)

    weights = stats._weights(sizes, 999, 0)
    drawn = np.mean([w @ g for w, g in zip(weights, groups, strict=True)], axis=0)
    theirs = bootstrap(
        groups, mean, n_resamples=0, confidence_level=0.95, method="BCa",
        bootstrap_result=SimpleNamespace(bootstrap_distribution=drawn),
    ).confidence_interval  # fmt: skip
    ours = stats.bca(groups, resamples=999, expand=False)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)


@pytest.mark.parametrize("middle", [0.0, 0.3, -1.7, 41.1])
def test_bootstrap_of_values_that_differ_by_rounding_alone(middle):
    for seed in range(20):
        signs = np.random.default_rng(seed).integers(-1, 2, size=stats.BCA_FROM)
        values = middle + signs * np.spacing(middle)
        found = stats.bca([values], resamples=99)
        assert found.low <= found.high
        assert (found.low, found.high) == pytest.approx((middle, middle), rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("seeds", [(3, 3), (5, 3), (8, 8)])
def test_welch_covers_unequal_noise(seeds):
    rng = np.random.default_rng(13)
    hits = 0
    for _ in range(DRAWS):
        a, b = rng.normal(0, 1, seeds[0]), rng.normal(0, 2, seeds[1])
        found = stats.welch_interval(a, b)
        hits += found.low <= 0 <= found.high
    assert hits / DRAWS == PROMISED


def test_the_method_follows_the_number_of_seeds():
    rng = np.random.default_rng(0)
    few, many = rng.normal(size=stats.BCA_FROM - 1), rng.normal(size=stats.BCA_FROM)
    assert stats.paired_interval(few).method == "paired t over seeds"
    found = stats.paired_interval(many)
    assert found.method == "BCa bootstrap over seeds"
    assert found == stats.paired_interval(many)  # the same resamples each time
    assert stats.RESAMPLES >= 4000
    assert stats.paired_interval(np.ones(20)).low == 1.0
    assert stats.pooled_interval([many, -many]).method == "BCa bootstrap over seeds"
    assert stats.paired_interval([0.1]) is None
    assert stats.welch_interval(few[:1], many) is None


@pytest.mark.parametrize(("scales", "seeds"), [(3, 3), (1, 4)])
def test_gate_passes_as_often_as_it_says(scales, seeds):
    rng = np.random.default_rng(14)
    passed = 0
    for _ in range(DRAWS):
        levels = rng.normal(0, 10, (scales, 1)) + rng.normal(0, 0.01, (scales, seeds))
        passed += aa.gate({str(i): row for i, row in enumerate(levels)})["passed"]
    assert passed / DRAWS == PROMISED


def test_half_widths_of_known_noise():
    """0.9% a run: the difference of two means of 1, 3, 5 and 8 runs."""
    half = [100 * stats.half_width(0.009, n) for n in (1, 3, 5, 8)]
    assert half == pytest.approx([2.5, 1.4, 1.1, 0.9], abs=0.05)
    assert stats.half_width(0.009, 3, 6) / stats.half_width(0.009, 3) == pytest.approx(
        2.447 / 1.96, rel=1e-3
    )


def test_slopes_cover():
    """Equal weights for few seeds, 1/se^2 for many, and one slope a seed along a single curve."""
    rng = np.random.default_rng(15)
    x = np.log([1e15, 4e15, 1.6e16])
    hits = {"equal": 0, "1/se^2": 0, "along": 0}
    for _ in range(DRAWS):
        for seeds in (3, stats.BCA_FROM):
            trend = classify([(np.full(seeds, at), rng.normal(0.2, 0.05, seeds)) for at in x])
            hits[trend.weights] += trend.low <= 0 <= trend.high
        trunk = rng.normal(0, 0.05, (3, 1))
        trend = classify_points(x, 0.2 + trunk + rng.normal(0, 0.02, (3, 3)))
        hits["along"] += trend.low <= 0 <= trend.high
    for name in hits:
        assert hits[name] / DRAWS == PROMISED, name


def test_weights_are_trusted_with_enough_seeds_only():
    """A noisy scale with a far-off mean pulls the slope less where its noise is known."""
    rng = np.random.default_rng(1)
    noise = rng.normal(size=stats.BCA_FROM)
    noise -= noise.mean()
    x = [np.full(noise.size, at) for at in np.log([1e15, 1e16, 1e17])]
    y = [0.01 * noise, 0.01 * noise, 0.5 + 1.0 * noise]
    heavy = classify(list(zip(x, y, strict=True)))
    light = classify([(a[:3], b[:3]) for a, b in zip(x, y, strict=True)])
    assert (heavy.weights, light.weights) == ("1/se^2", "equal")
    assert abs(heavy.slope) < 0.01
    assert classify(list(zip(x, [y[0]] * 3, strict=True))).slope == pytest.approx(0, abs=1e-12)

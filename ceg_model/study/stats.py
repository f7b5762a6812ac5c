"""Intervals and the equivalence test; everything in ln C.

Below BCA_FROM seeds the interval is Student's t (Welch's where the arms share no seed), from there
on the BCa bootstrap. BCa as it is usually written covers 84, 89, 90 and 92% of normal null draws at
5, 8, 10 and 15 seeds where 95% is promised: resampling n values gives them a variance that is
(n - 1) / n too small and a normal quantile where t's is due. Expanded percentiles (Hesterberg 2015,
What Teachers Should Know About the Bootstrap) undo both, and then it covers 91, 94, 94 and 95%:
hence 15, where t covers 95% all the way. tests/test_coverage.py draws this.

Seeds are resampled within their scale, and whole: a scale is not drawn from a population of scales,
and the budgets of one seed may share a trunk. The luck of the evaluation set is in no interval, for
no curve comes with a loss per evaluation batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special  # scipy.stats takes half a second more

Array = NDArray[np.float64]

LEVEL = 0.95
EQUIVALENCE = (0.98, 1.02)
BCA_FROM = 15  # seeds
RESAMPLES = 4999


@dataclass(frozen=True)
class Interval:
    """A mean of logs with its confidence interval; `ratio` gives it as gains."""

    mean: float
    low: float
    high: float
    df: float
    method: str

    @property
    def ratio(self) -> tuple[float, float]:
        return float(np.exp(self.low)), float(np.exp(self.high))


@lru_cache(maxsize=1024)
def t_quantile(p: float, df: float) -> float:
    """Of Student's t: a report asks thousands of times for a few of them."""
    return float(special.stdtrit(df, p))


def _interval(mean: float, se: float, df: float, method: str, level: float) -> Interval:
    half = t_quantile(0.5 + level / 2, df) * se
    return Interval(mean, mean - half, mean + half, df, method)


def paired_interval(differences: Sequence[float] | Array, level: float = LEVEL) -> Interval | None:
    """The mean of paired differences; None for a single pair."""
    d = np.asarray(differences, dtype=np.float64)
    if d.size < 2:
        return None
    if d.size >= BCA_FROM and np.ptp(d) > 0:
        return bca([d], level)
    return t_interval(d, level)


def t_interval(
    values: Sequence[float] | Array, level: float = LEVEL, method: str = "paired t over seeds"
) -> Interval | None:
    """Student's t of a mean at any number of values; None for a single one."""
    d = np.asarray(values, dtype=np.float64)
    if d.size < 2:
        return None
    se = float(d.std(ddof=1) / np.sqrt(d.size))
    return _interval(float(d.mean()), se, d.size - 1, method, level)


def welch_interval(a: Array, b: Array, level: float = LEVEL) -> Interval | None:
    """mean(a) - mean(b) of runs that share no seed; None where one side has a single run."""
    if min(a.size, b.size) < 2:
        return None
    parts = np.array([a.var(ddof=1) / a.size, b.var(ddof=1) / b.size])
    se2, df = float(parts.sum()), float(a.size + b.size - 2)
    if se2 > 0:
        df = se2**2 / float((parts**2 / [a.size - 1, b.size - 1]).sum())
    return _interval(float(a.mean() - b.mean()), np.sqrt(se2), df, "Welch t over seeds", level)


def pooled_interval(groups: Sequence[Array], level: float = LEVEL) -> Interval | None:
    """The mean over groups (scales) of paired differences, variance pooled within the groups.

    It answers "what is the gain, averaged over these scales", not "over all scales": the scales
    are fixed, only the seeds are a sample.
    """
    filled = [np.asarray(g, dtype=np.float64) for g in groups if len(g)]
    df = sum(g.size - 1 for g in filled)
    if df < 1:
        return None
    if min(g.size for g in filled) >= BCA_FROM and all(np.ptp(g) > 0 for g in filled):
        return bca(filled, level)
    weight = 1.0 / len(filled)
    se = float(np.sqrt(pooled_variance(filled) * sum(weight**2 / g.size for g in filled)))
    mean = weight * sum(float(g.mean()) for g in filled)
    return _interval(mean, se, df, "paired t over seeds, pooled within scales", level)


def pooled_variance(groups: Sequence[Array]) -> float:
    """Variance of one run within its scale; the groups hold one degree of freedom at least."""
    squares = sum(float(((g - g.mean()) ** 2).sum()) for g in groups)
    return squares / sum(g.size - 1 for g in groups)


def bca(
    groups: Sequence[Array],
    level: float = LEVEL,
    *,
    resamples: int = RESAMPLES,
    expand: bool = True,
    seed: int = 0,
) -> Interval:
    """BCa interval of the mean of the groups' means, each group resampled by itself.

    `expand` asks for the percentiles at which a bootstrap of normal values is as wide as t.
    """
    df = sum(g.size - 1 for g in groups)
    asked = level
    if expand:
        n = sum(g.size for g in groups)
        wide = np.sqrt(n / df) * t_quantile(0.5 + level / 2, df)
        asked = float(2 * special.ndtr(wide) - 1)

    weights = _weights(tuple(g.size for g in groups), resamples, seed)
    # Not `@`: its threads stand in each other's way where arms are compared side by side.
    means = [np.einsum("rn,n->r", w, g) for w, g in zip(weights, groups, strict=True)]
    drawn = np.mean(means, axis=0)
    middle = np.mean([g.mean() for g in groups])
    below = ((drawn < middle).sum() + (drawn <= middle).sum()) / (2 * resamples)
    # Values that differ by rounding alone may all lie on one side of their mean.
    bias = special.ndtri(np.clip(below, 1 / resamples, 1 - 1 / resamples))
    at = bias + special.ndtri((1 - asked) / 2) * np.array([1, -1])
    percentiles = special.ndtr(bias + at / (1 - _acceleration(groups) * at))
    # Between neighbours by two products, as scipy.stats.bootstrap has it: numpy rounds differently.
    place, share = np.divmod(percentiles * resamples + (1 - percentiles), 1)
    drawn, first = np.sort(drawn), place.astype(np.int64) - 1
    low, high = (1 - share) * drawn[first] + share * drawn[np.minimum(first + 1, resamples - 1)]
    return Interval(float(middle), float(low), float(high), df, "BCa bootstrap over seeds")


def _acceleration(groups: Sequence[Array]) -> float:
    """From the jackknife, group by group: Efron and Tibshirani 1993, equation 15.36."""
    own = [float(g.mean()) for g in groups]
    cubes = squares = 0.0
    for i, g in enumerate(groups):
        n = g.size
        others = np.broadcast_to(g, (n, n))[~np.eye(n, dtype=bool)].reshape(n, n - 1)
        left = np.mean([others.mean(axis=1) if j == i else np.full(n, own[j])
                        for j in range(len(groups))], axis=0)  # fmt: skip
        pull = (n - 1) * (left.mean() - left)
        cubes += (pull**3).sum() / n**3
        squares += (pull**2).sum() / n**2
    return 1 / 6 * cubes / squares**1.5 if squares else 0.0


@lru_cache(maxsize=8)
def _weights(sizes: tuple[int, ...], resamples: int, seed: int) -> tuple[Array, ...]:
    """How much each value of a group counts in each resample: (resamples, n) for every group.

    A mean is linear, so a report's thousand groups of 200 seeds need these drawn only once.
    """
    rng = np.random.default_rng(seed)
    weights = []
    for n in sizes:
        chosen = rng.integers(n, size=(resamples, n)) + n * np.arange(resamples)[:, None]
        times = np.bincount(chosen.ravel(), minlength=resamples * n)
        weights.append(times.reshape(resamples, n) / n)
    return tuple(weights)


def half_width(sd: float, seeds: int, df: float = np.inf, *, cells: int = 1) -> float:
    """How far apart luck alone puts the means of `seeds` unpaired runs each, in ln C.

    sd is that of one run, known with df degrees of freedom; the mean over `cells` is narrower.
    """
    return t_quantile(0.5 + LEVEL / 2, df) * sd * float(np.sqrt(2 / seeds / cells))


@dataclass(frozen=True)
class Equivalence:
    """TOST at 5%: equivalent where the 90% interval lies inside the bounds."""

    passed: bool | None  # None: one seed, so nothing to test with
    low: float | None
    high: float | None
    bounds: tuple[float, float]


def equivalence(groups: Sequence[Array], bounds: tuple[float, float] = EQUIVALENCE) -> Equivalence:
    """Two one-sided tests that exp(mean difference) lies within `bounds`."""
    interval = pooled_interval(groups, level=0.90)
    if interval is None:
        return Equivalence(None, None, None, bounds)
    low, high = interval.ratio
    return Equivalence(bounds[0] < low and high < bounds[1], low, high, bounds)

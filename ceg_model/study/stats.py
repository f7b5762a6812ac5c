"""Intervals, the equivalence test and the class of a trend; everything in ln C.

With the two to eight seeds a study has, Student's t on paired differences is the interval used: it
covers what it says (tests/test_estimate.py draws it 2,000 times), which a bootstrap of so few
values does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]

LEVEL = 0.95
MARGIN = 0.041  # |slope| below it: less than 10% a decade of compute
EQUIVALENCE = (0.98, 1.02)
MIN_SCALES, MIN_RANGE, MIN_SEEDS = 3, 10.0, 3


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


def _interval(mean: float, se: float, df: float, method: str, level: float) -> Interval:
    half = float(stats.t.ppf(0.5 + level / 2, df)) * se
    return Interval(mean, mean - half, mean + half, df, method)


def paired_interval(differences: Sequence[float] | Array, level: float = LEVEL) -> Interval | None:
    """Student's t on paired differences; None for a single pair."""
    d = np.asarray(differences, dtype=np.float64)
    if d.size < 2:
        return None
    se = float(d.std(ddof=1) / np.sqrt(d.size))
    return _interval(float(d.mean()), se, d.size - 1, "paired t over seeds", level)


def pooled_interval(groups: Sequence[Array], level: float = LEVEL) -> Interval | None:
    """The mean over groups (scales) of paired differences, variance pooled within the groups.

    It answers "what is the gain, averaged over these scales", not "over all scales": the scales
    are fixed, only the seeds are a sample.
    """
    filled = [np.asarray(g, dtype=np.float64) for g in groups if len(g)]
    df = sum(g.size - 1 for g in filled)
    if df < 1:
        return None
    variance = sum(float(((g - g.mean()) ** 2).sum()) for g in filled) / df
    weight = 1.0 / len(filled)
    se = float(np.sqrt(variance * sum(weight**2 / g.size for g in filled)))
    mean = weight * sum(float(g.mean()) for g in filled)
    return _interval(mean, se, df, "paired t over seeds, pooled within scales", level)


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


@dataclass(frozen=True)
class Trend:
    """The slope of ln G_alg against ln C_b, and what it allows one to say."""

    label: str  # compute-independent | compute-dependent | diminishing | inconclusive
    slope: float | None
    low: float | None
    high: float | None
    scales: int
    reason: str
    ends: tuple[float, float] | None = None  # G at both ends of the range, on the line
    below_one: bool = False  # G < 1 somewhere among the scales


def slope_of(x: Array, y: Array) -> float:
    centred = x - x.mean()
    return float((centred * y).sum() / (centred**2).sum())


def classify(groups: Sequence[tuple[Array, Array]], margin: float = MARGIN) -> Trend:
    """groups: per scale, (ln C_b, ln G_alg) over seeds.

    Each seed's value is a point and all weigh the same: with fewer than five seeds, 1/se^2 from
    one scale's own scatter is noise. The interval is the regression's t interval, so that misfit
    between scales widens it too.
    """
    filled = [(np.asarray(x), np.asarray(y)) for x, y in groups if len(x)]
    below = any(float(y.mean()) < 0 for _, y in filled)
    if len(filled) < MIN_SCALES:
        reason = f"{len(filled)} scales with a number, {MIN_SCALES} needed"
        return Trend("inconclusive", None, None, None, len(filled), reason, None, below)
    x = np.concatenate([np.full(len(y), xs.mean()) for xs, y in filled])
    y = np.concatenate([ys for _, ys in filled])
    slope = slope_of(x, y)
    intercept = float(y.mean() - slope * x.mean())
    ends = (float(np.exp(intercept + slope * x.min())), float(np.exp(intercept + slope * x.max())))
    if all(ys.size < 2 for _, ys in filled):
        return Trend("inconclusive", slope, None, None, len(filled), "one seed", ends, below)
    df = x.size - 2
    residual = y - intercept - slope * x
    se = float(np.sqrt((residual**2).sum() / df / ((x - x.mean()) ** 2).sum()))
    half = float(stats.t.ppf(0.5 + LEVEL / 2, df)) * se
    low, high = slope - half, slope + half
    span = float(np.exp(x.max() - x.min()))
    fewest = min(ys.size for _, ys in filled)
    if fewest < MIN_SEEDS:
        # One odd baseline seed moves all arms of a scale; two seeds cannot show which is odd.
        label = "inconclusive"
        reason = f"{fewest} seeds at a scale, {MIN_SEEDS} needed; slope [{low:.2g}, {high:.2g}]"
    elif span < MIN_RANGE * 0.999:
        label, reason = "inconclusive", f"{span:.3g}x compute between the scales, 10x needed"
    elif -margin <= low and high <= margin:
        label, reason = "compute-independent", f"slope interval inside +-{margin}"
    elif low > 0 and slope > margin:
        label, reason = "compute-dependent", f"slope above {margin} and its interval above 0"
    elif high < 0 and slope < -margin:
        label, reason = "diminishing", f"slope below -{margin} and its interval below 0"
    else:
        label = "inconclusive"
        reason = f"slope interval [{low:.3g}, {high:.3g}] allows more than one class"
    return Trend(label, slope, low, high, len(filled), reason, ends, below)

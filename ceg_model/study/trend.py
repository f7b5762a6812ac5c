"""The class of an arm: does its gain grow with compute, fall, or neither? Everything in ln C.

y = ln G at x = ln C_b. For two power laws with a common floor the slope against C_b is 1 - a_b/a_v;
against C_v it would be a_v/a_b - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ceg_model.study import stats
from ceg_model.study.stats import BCA_FROM, LEVEL, Array

MARGIN = 0.041  # |slope| below it: less than 10% a decade of compute
MIN_SCALES, MIN_RANGE, MIN_SEEDS = 3, 10.0, 3


@dataclass(frozen=True)
class Trend:
    """The slope of ln G against ln C_b, and what it allows one to say."""

    label: str  # compute-independent | compute-dependent | diminishing | inconclusive
    slope: float | None
    low: float | None
    high: float | None
    scales: int
    reason: str
    ends: tuple[float, float] | None = None  # G at both ends of the range, on the line
    below_one: bool = False  # G < 1 somewhere among the scales
    slope_c_v: float | None = None  # the same slope against ln C_v
    weights: str = "equal"

    def as_dict(self) -> dict[str, Any]:
        out = asdict(self)
        low, high, ends = out.pop("low"), out.pop("high"), out.pop("ends")
        return {
            "class": out.pop("label"),
            **out,
            "ci": None if low is None else [low, high],
            "ends": None if ends is None else list(ends),
            "axis": "ln C_b",
            "margin": MARGIN,
        }


def slope_of(x: Array, y: Array, weights: Array | None = None) -> float:
    w = np.ones_like(x) if weights is None else weights
    centred = x - (w * x).sum() / w.sum()
    return float((w * centred * y).sum() / (w * centred**2).sum())


def classify(groups: Sequence[tuple[Array, Array]], margin: float = MARGIN) -> Trend:
    """groups: per scale, (ln C_b, ln G) over seeds. Each seed's value is a point.

    Weights are 1/variance of a scale's own seeds where every scale has BCA_FROM of them: the
    interval then covers 94%. From the scatter of 3, 5 or 8 seeds it would cover 89, 92 and 93%,
    so that below it all points weigh the same. The interval is the regression's t interval, so that
    misfit between scales widens it too.
    """
    filled = [(np.asarray(x), np.asarray(y)) for x, y in groups if len(x)]
    below = any(float(y.mean()) < 0 for _, y in filled)
    if len(filled) < MIN_SCALES:
        reason = f"{len(filled)} scales with a number, {MIN_SCALES} needed"
        return Trend("inconclusive", None, None, None, len(filled), reason, None, below)
    sizes = [len(y) for _, y in filled]
    spread = [float(y.var(ddof=1)) if len(y) > 1 else 0.0 for _, y in filled]
    trusted = min(sizes) >= BCA_FROM and min(spread) > 0
    w = np.repeat(1 / np.array(spread) if trusted else np.ones(len(filled)), sizes)
    x = np.repeat([float(xs.mean()) for xs, _ in filled], sizes)
    gains = np.repeat([float(ys.mean()) for _, ys in filled], sizes)
    y = np.concatenate([ys for _, ys in filled])
    slope = slope_of(x, y, w)
    middle = np.average(x, weights=w)
    intercept = float(np.average(y, weights=w) - slope * middle)
    first = Trend(
        "inconclusive", slope, None, None, len(filled), "one seed", _ends(x, slope, intercept),
        below, slope_of(x - gains, gains, w), "1/se^2" if trusted else "equal",
    )  # fmt: skip
    if max(sizes) < 2:
        return first
    df = x.size - 2
    residual = y - intercept - slope * x
    se = float(np.sqrt((w * residual**2).sum() / df / (w * (x - middle) ** 2).sum()))
    half = stats.t_quantile(0.5 + LEVEL / 2, df) * se
    few = None
    if min(sizes) < MIN_SEEDS:
        # One odd baseline seed moves all arms of a scale; two seeds cannot show which is odd.
        few = f"{min(sizes)} seeds at a scale, {MIN_SEEDS} needed"
    trend = replace(first, low=slope - half, high=slope + half)
    return _judge(trend, float(np.exp(np.ptp(x))), few, "scales", margin)


def classify_points(x: Array, logs: Array, margin: float = MARGIN) -> Trend:
    """The trend along one curve: logs (seeds, points) at the baseline's points x = ln C_b.

    The points of a seed share its runs, so the sample is the seeds: one slope of each.
    """
    seeds, points = logs.shape
    mean = logs.mean(axis=0)
    below = bool((mean < 0).any())
    what = "points of one curve; they share runs, so that each seed gives one slope"
    if points < MIN_SCALES:
        reason = f"{points} of {MIN_SCALES} needed {what}"
        return Trend("inconclusive", None, None, None, points, reason, None, below)
    slopes = np.array([slope_of(x, row) for row in logs])
    slope = float(slopes.mean())
    ends = _ends(x, slope, float(mean.mean() - slope * x.mean()))
    first = Trend(
        "inconclusive", slope, None, None, points, f"one seed; {points} {what}", ends, below,
        slope_of(x - mean, mean),
    )  # fmt: skip
    interval = stats.paired_interval(slopes)
    if interval is None:
        return first
    few = f"{seeds} seeds, {MIN_SEEDS} needed" if seeds < MIN_SEEDS else None
    trend = replace(first, low=interval.low, high=interval.high)
    judged = _judge(trend, float(np.exp(np.ptp(x))), few, "points", margin)
    return replace(judged, reason=f"{judged.reason}; {points} {what}")


def _ends(x: Array, slope: float, intercept: float) -> tuple[float, float]:
    return float(np.exp(intercept + slope * x.min())), float(np.exp(intercept + slope * x.max()))


def _judge(trend: Trend, span: float, few: str | None, between: str, margin: float) -> Trend:
    slope, low, high = trend.slope, trend.low, trend.high
    assert slope is not None
    assert low is not None
    assert high is not None
    label = "inconclusive"
    if few is not None:
        reason = f"{few}; slope [{low:.2g}, {high:.2g}]"
    elif span < MIN_RANGE * 0.999:
        reason = f"{span:.3g}x compute between the {between}, 10x needed"
    elif -margin <= low and high <= margin:
        label, reason = "compute-independent", f"slope interval inside +-{margin}"
    elif low > 0 and slope > margin:
        label, reason = "compute-dependent", f"slope above {margin} and its interval above 0"
    elif high < 0 and slope < -margin:
        label, reason = "diminishing", f"slope below -{margin} and its interval below 0"
    else:
        reason = f"slope interval [{low:.3g}, {high:.3g}] allows more than one class"
    return replace(trend, label=label, reason=reason)

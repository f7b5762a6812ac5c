"""Within-run crossings: the compute at which a run's loss first comes down to a target.

Rule: the running minimum of the evaluation loss (one fixed token set, so that arms are paired), its
first crossing of the target, linear in (ln C, L) between two evaluations. Nothing is smoothed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ceg_model.study.curves import Curve
from ceg_model.study.trend import slope_of

Array = NDArray[np.float64]

MIN_EVALS_BEFORE = 5
NOISE = 3.0  # a difference counts where it exceeds this many sd of the evaluation noise


@dataclass(frozen=True)
class Crossing:
    """Where a curve reaches the target; flops is None where it never does."""

    flops: float | None = None
    seconds: float | None = None
    flags: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()


def noise_sd(curve: Curve) -> float | None:
    """The evaluation noise: scatter about the line through both neighbours, over the last half.

    A trend leaves it alone, and half the curve is left out because early curvature is no noise.
    """
    n = curve.loss.size
    if n < 6:
        return None
    x, y = curve.log_flops[n // 2 - 1 :], curve.loss[n // 2 - 1 :]
    weight = (x[2:] - x[1:-1]) / (x[2:] - x[:-2])
    residual = y[1:-1] - weight * y[:-2] - (1 - weight) * y[2:]
    return float(np.sqrt(np.mean(residual**2 / (1 + weight**2 + (1 - weight) ** 2))))


def rise(curve: Curve) -> float | None:
    """How far the final loss lies above the minimum, where that exceeds the noise; else None."""
    sd = noise_sd(curve)
    above = float(curve.loss[-1] - curve.loss.min())
    return above if sd is not None and above > NOISE * max(sd, 1e-9) else None


def loss_at(curve: Curve, flops: float, *, best: bool) -> float:
    """The loss at `flops`, linear in ln C; best takes the running minimum, which never rises."""
    loss = curve.running_minimum if best else curve.loss
    return float(np.interp(np.log(flops), curve.log_flops, loss))


def first_at_or_below(curve: Curve, targets: Array) -> NDArray[np.int64]:
    """Index of the first evaluation whose running minimum is at or below each target; n if none."""
    return np.searchsorted(curve.negated_minimum, -targets, side="left")


def log_flops_at(curve: Curve, targets: Array) -> Array:
    """ln C at each target; NaN where it is not reached or reached too early to be trusted."""
    index = first_at_or_below(curve, targets)
    usable = (index >= MIN_EVALS_BEFORE) & (index < curve.loss.size)
    found = np.full(targets.shape, np.nan)
    found[usable] = _between(curve, index[usable], targets[usable])
    return found


def _between(curve: Curve, at: Any, target: Any) -> Any:
    """ln C at `target`, which evaluation `at` reaches first: the one before lies above it."""
    low, x = curve.running_minimum, curve.log_flops
    before, start = low[at - 1], x[at - 1]
    return start + (before - target) / (before - low[at]) * (x[at] - start)


def cross(curve: Curve, target: float) -> Crossing:
    """The first crossing of `target`, with everything that is to be said about it."""
    index = int(first_at_or_below(curve, np.array([target]))[0])
    if index == curve.loss.size:
        return Crossing()
    if index < MIN_EVALS_BEFORE:
        where = "in its first eval interval" if index < 2 else f"after {index} evaluations"
        reason = (
            f"{curve.key.arm} seed {curve.key.seed} crosses {target:.4f} {where}; "
            f"{MIN_EVALS_BEFORE} before it are needed: evaluate more often"
        )
        return Crossing(refusals=(reason,))
    flops = float(np.exp(_between(curve, index, target)))
    seconds = None
    if curve.seconds is not None:
        # The rate hardly changes between two evaluations, so seconds are linear in FLOPs.
        seconds = float(np.interp(flops, curve.flops, curve.seconds))
    return Crossing(flops, seconds, tuple(_flags(curve, index)))


def _flags(curve: Curve, index: int) -> list[str]:
    flags = []
    if curve.lr is None:
        flags.append("schedule_unknown")
    elif curve.lr[index - 1 : index + 1].min() < (1 - 1e-6) * curve.lr[: index + 1].max():
        flags.append("schedule_confounded")
    sd = noise_sd(curve)
    if sd is not None:
        near = slice(max(index - 3, 0), index + 3)
        x = curve.log_flops[near]
        slope = -slope_of(x, curve.loss[near])
        if slope * (x[-1] - x[0]) / (x.size - 1) < NOISE * sd:
            flags.append("plateau")
    return flags

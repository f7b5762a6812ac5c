"""Crossing and slope mode: an arm against the baseline by what happens within their runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ceg_model.study import stats
from ceg_model.study.cells import Cell, Options, distrust, make_cells
from ceg_model.study.crossing import (
    MIN_EVALS_BEFORE,
    NOISE,
    Crossing,
    cross,
    log_flops_at,
    loss_at,
    noise_sd,
)
from ceg_model.study.curves import Curve, disagreement
from ceg_model.study.gains import (
    Result,
    begin,
    differences,
    executed_over_model,
    mean_interval,
    name_seeds,
    settle,
    settle_bound,
    settle_time,
)
from ceg_model.study.stats import Array

# What an engine is: see also endpoint.py.
__all__ = [
    "common_target",
    "compare",
    "describe",
    "fits",
    "joint",
    "make_cells",
    "null_logs",
    "over_range",
]

RANGE_POINTS = 33


def compare(cell: Cell, arm: str, options: Options) -> Result:
    """Arm against baseline in one cell."""
    result = begin(cell, arm, options)
    base, variant = cell.curves.get(options.baseline, {}), cell.curves[arm]
    reasons = [*cell.refusals, *(r for c in variant.values() for r in distrust(c, options))]
    if reasons:
        return result.refuse(*reasons)
    bases, variants = _sides(base, variant, result)
    differing = [r for v in variants if (r := disagreement(bases[0], v))]
    if differing:
        return result.refuse(*differing)
    if any(v.loss.size < 2 for v in variants):
        return result.refuse(f"{arm} needs at least 2 evaluations")
    result.executed_over_model = executed_over_model(variants)
    if options.hardware is not None:
        result.g_hw = options.hardware.get(cell.name, {}).get(arm)
    if options.mode == "slope":
        return _local_slope(result, bases, variants)
    return _judge(result, bases, variants, cell)


def _sides(
    base: dict[str, Curve], variant: dict[str, Curve], result: Result
) -> tuple[list[Curve], list[Curve]]:
    """The runs of shared seeds, side by side; all runs where none is shared."""
    shared = [seed for seed in base if seed in variant]
    name_seeds(result, shared or base, shared or variant)
    if shared:
        return [base[seed] for seed in shared], [variant[seed] for seed in shared]
    return list(base.values()), list(variant.values())


def _judge(result: Result, bases: list[Curve], variants: list[Curve], cell: Cell) -> Result:
    target = cell.target
    assert target is not None
    for c in (*bases, *variants):  # every arm asks for the baseline's again
        if c.key not in cell.crossings:
            cell.crossings[c.key] = cross(c, target)
    at_b, at_v = ([cell.crossings[c.key] for c in side] for side in (bases, variants))
    both = [*at_b, *at_v]
    if refusals := [r for c in both for r in c.refusals]:
        return result.refuse(*refusals)
    result.flags.extend(f for c in both for f in c.flags)
    base_missing, variant_missing = ([c.flops is None for c in side] for side in (at_b, at_v))
    log_b, log_v = _log_compute(bases, at_b), _log_compute(variants, at_v)
    if any(base_missing) or any(variant_missing):
        if result.g_hw is None:
            result.g_hw = _whole_run_rate(bases, variants)
        if any(base_missing) and any(variant_missing):
            return result.refuse(f"target {target:.4f} is reached by neither arm in every seed")
        return settle_bound(
            result, log_b, log_v, censored_base=any(base_missing), target=target
        )  # fmt: skip
    settle(result, log_b, log_v)
    if all(c.seconds for c in both):
        f_b, f_v = (
            log_c - np.log([c.seconds or np.nan for c in at])
            for log_c, at in ((log_b, at_b), (log_v, at_v))
        )
        settle_time(result, differences(result, f_v, f_b))
    return result


def _log_compute(curves: list[Curve], at: list[Crossing]) -> Array:
    """ln C at the crossing; a seed that never crosses counts with all the compute it had."""
    pairs = zip(curves, at, strict=True)
    return np.log([found.flops or float(curve.flops[-1]) for curve, found in pairs])


def _whole_run_rate(bases: list[Curve], variants: list[Curve]) -> float | None:
    means = []
    for side in (variants, bases):
        if any(c.seconds is None or not c.seconds[-1] for c in side):
            return None
        means.append(
            np.mean([np.log(c.flops[-1] / c.seconds[-1]) for c in side if c.seconds is not None])
        )
    return float(np.exp(means[0] - means[1]))


def _local_slope(result: Result, bases: list[Curve], variants: list[Curve]) -> Result:
    """G = exp((L_b - L_v) / s) at the last common FLOPs, s = -dL/dlnC of the baseline there.

    Seed by seed, with the slope of each; runs that share no seed have one mean slope.
    """
    both = [*bases, *variants]
    at = min(float(c.flops[-1]) for c in both)
    if any(float(b.flops[0]) > at / 1.25 for b in bases) or any(c.flops[0] > at for c in variants):
        return result.refuse("the curves share no range of FLOPs around their ends")
    slopes = [_end_slope(b, at, result) for b in bases]
    if result.status == "refused":
        return result
    for v in variants:
        if v.lr is not None and not np.isclose(v.lr[-1], v.lr.max()):
            result.flags.append("schedule_confounded")
    if any(c.lr is None for c in both):
        result.flags.append("schedule_unknown")
    loss_b, loss_v = (np.array([loss_at(c, at, best=True) for c in s]) for s in (bases, variants))
    slope = np.mean(slopes) if result.unpaired else np.array(slopes)
    # In ln C about the baseline's mean, so that no slope multiplies the loss itself.
    middle = loss_b.mean()
    log_b, log_v = (loss_b - middle) / slope, (loss_v - middle) / slope
    result.logs = differences(result, log_b, log_v)
    result.log_base = np.log([b.flops[-1] for b in bases])
    result.interval = mean_interval(result, log_b, log_v)
    if result.g_hw is None:
        result.g_hw = _whole_run_rate(bases, variants)
    if abs(result.logs.mean()) > np.log(1.25):
        value = float(np.exp(result.logs.mean()))
        return result.refuse(f"G_alg {value:.3g} is outside [0.8, 1.25], where slope mode holds")
    if result.g_hw is not None:
        result.log_time = result.logs + np.log(result.g_hw)
        result.flags.append("time_inferred")
    return result


def _end_slope(base: Curve, at: float, result: Result) -> float:
    """-dL/dlnC of a run about `at` FLOPs; refuses the result where there is none to be had."""
    window = base.flops >= at / 1.5
    if window.sum() < 3:
        result.refuse("3 baseline evaluations are needed within the last third: densify")
        return np.nan
    slope = -float(np.polyfit(base.log_flops[window], base.loss[window], 1)[0])
    if slope <= NOISE * (noise_sd(base) or 0.0):
        result.flags.append("plateau")
    if slope <= 0:
        result.refuse("the baseline's loss does not fall at the end of its run")
    if base.lr is not None and not np.allclose(base.lr[window], base.lr.max()):
        result.flags.append("schedule_confounded")
    return slope


def over_range(cell: Cell, arm: str, options: Options) -> dict[str, list[float | None]] | None:
    """G_alg at every loss that all seeds of both arms reach, late enough to be trusted."""
    pairs = [
        (b, cell.curves[arm][seed])
        for seed, b in cell.curves.get(options.baseline, {}).items()
        if seed in cell.curves[arm]
    ]
    curves = [c for pair in pairs for c in pair]
    if not curves or any(c.problems or c.loss.size <= MIN_EVALS_BEFORE for c in curves):
        return None
    low = max(float(c.loss.min()) for c in curves)
    high = min(float(c.running_minimum[MIN_EVALS_BEFORE - 1]) for c in curves)
    if not low < high:
        return None
    losses = np.linspace(high, low, RANGE_POINTS + 1)[1:]
    logs = np.array([log_flops_at(b, losses) - log_flops_at(v, losses) for b, v in pairs])
    keep = np.isfinite(logs).all(axis=0)
    # t at any number of seeds: a bootstrap of each point of a curve would take minutes.
    intervals = [stats.t_interval(column) for column in logs.T[keep]]
    return range_of(losses[keep], intervals, logs.T[keep].mean(axis=1))


def range_of(
    losses: Array, intervals: Sequence[stats.Interval | None], means: Array
) -> dict[str, list[float | None]]:
    return {
        "loss": losses.tolist(),
        "g_alg": np.exp(means).tolist(),
        "low": [None if i is None else i.ratio[0] for i in intervals],
        "high": [None if i is None else i.ratio[1] for i in intervals],
    }


def null_logs(cell: Cell, options: Options) -> Array:
    """ln C of each baseline run at the cell's target: what the A/A gate is made of."""
    if cell.target is None or cell.refusals:
        return np.zeros(0)
    base = cell.curves.get(options.baseline, {}).values()
    logs = np.array([float(log_flops_at(c, np.array([cell.target]))[0]) for c in base])
    return logs[np.isfinite(logs)]


def joint(
    cell: Cell, arms: Sequence[str], results: Mapping[str, Result], _: Options
) -> tuple[float, dict[str, Array]] | str:
    """The target and ln G of each arm there, seed by seed; or why that cannot be had."""
    for arm in arms:
        if arm not in results or results[arm].status != "ok":
            return f"{arm} has no gain here"
    if len({results[arm].seeds for arm in arms}) > 1:
        return "the arms do not share their seeds"
    assert cell.target is not None
    return cell.target, {arm: results[arm].logs for arm in arms}


def common_target(cell: Cell, _: Options) -> float | None:
    return cell.target


def describe(cells: Mapping[str, Cell], _: Options) -> dict[str, Any]:
    """Points and envelopes are endpoint mode's."""
    return {}


def fits(cells: Mapping[str, Cell], _: Options) -> dict[str, Any]:
    """A power law through one run would fit its schedule."""
    return {}

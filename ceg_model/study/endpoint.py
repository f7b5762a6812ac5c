"""Endpoint mode: an arm against the baseline by the last losses of runs of several budgets.

Headline target, unless one is given: the lowest loss that both arms reach. It is then itself the
mean of some runs, and its luck is in the interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ceg_model.study import ladder as rungs
from ceg_model.study.budgets import (
    ALL_SCALES,
    Cell,
    common_target,
    describe,
    fits,
    make_cells,
    possible,
    schedule_flags,
)
from ceg_model.study.cells import Options, distrust
from ceg_model.study.crossing import NOISE
from ceg_model.study.curves import disagreement
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
from ceg_model.study.ladder import (
    MIN_BUDGETS,
    Ladder,
    Runs,
    best_ladder,
    make_ladder,
    whole_seeds,
)
from ceg_model.study.stats import Array
from ceg_model.study.within import RANGE_POINTS, range_of

# What an engine is: see also within.py.
__all__ = [
    "common_target",
    "compare",
    "describe",
    "fits",
    "joint",
    "make_cells",
    "null_logs",
    "over_range",
    "possible",
]


def compare(cell: Cell, arm: str, options: Options) -> Result:
    """Arm against baseline in one cell."""
    result = begin(cell, arm, options)
    result.extra = {"overlap": None, "g_alg_overlap_mean": None}
    variants = cell.curves(arm)
    reasons = [*cell.refusals, *(r for c in variants for r in distrust(c, options))]
    if any(not c.loss.size for c in variants):
        reasons.append(f"{arm} has a run without an evaluation")
    if not reasons:
        bases = cell.curves(options.baseline)
        reasons = [r for c in [*bases, *variants] if (r := disagreement(bases[0], c))]
    if reasons:
        return result.refuse(*reasons)
    if options.hardware is not None:
        result.g_hw = options.hardware.get(cell.name, {}).get(arm)
    ladders = _ladders(cell, arm, options, result)
    if ladders is None:
        return result
    result.executed_over_model = executed_over_model(variants)
    result.flags.extend(schedule_flags([*cell.curves(options.baseline), *variants]))
    return _judge(result, *ladders, cell, options)


def _ladders(
    cell: Cell, arm: str, options: Options, result: Result
) -> tuple[Ladder, Ladder] | None:
    base, variant = cell.runs[options.baseline], cell.runs.get(arm, {})
    shared = whole_seeds([base, variant])
    seeds_b, seeds_v = shared or whole_seeds([base]), shared or whole_seeds([variant])
    if not seeds_v:
        n = max((sum(s in r for r in variant.values()) for s in _seeds(variant)), default=0)
        result.refuse(f"{arm} needs {MIN_BUDGETS} budgets with one seed, got {n}")
        return None
    left = [s for s in _seeds(variant) if s not in seeds_v]
    if left:
        result.reasons.append(f"seed {', '.join(left)} left out: it lacks budgets that others have")
    name_seeds(result, seeds_b, seeds_v)
    ladders = make_ladder(base, seeds_b), make_ladder(variant, seeds_v)
    for name, found in zip((options.baseline, arm), ladders, strict=True):
        if found is None:
            result.refuse(f"the loss of {name} does not fall as its budget grows")
            return None
    assert ladders[0] is not None
    assert ladders[1] is not None
    return ladders[0], ladders[1]


def _seeds(runs: Runs) -> list[str]:
    return list(dict.fromkeys(s for by_seed in runs.values() for s in by_seed))


def _judge(result: Result, base: Ladder, variant: Ladder, cell: Cell, options: Options) -> Result:
    low, high = max(base.bottom, variant.bottom), min(base.top, variant.top)
    target = cell.target
    result.target = min(low, high) if target is None else target
    if low < high:
        _over_overlap(result, base, variant, cell.name == ALL_SCALES)
    if result.target < low:
        return _censored(result, base, variant, result.target)
    if result.target > high or low >= high:
        return result.refuse(
            f"target {result.target:.4f} lies above {high:.4f}, which an arm's smallest budget "
            "already reaches: train at smaller budgets"
        )
    if target is None:
        at = rungs.lowest(base, variant)
    else:
        at = rungs.fixed(np.array([target]), base, variant)
        if options.target_at_flops is not None:
            at.by_base[:, 0] = base.pinned(target)
    _flag_plateau(result, base, variant)
    log_b, log_v = rungs.seed_values(base, variant, at)
    settle(result, log_b[:, 0], log_v[:, 0])
    rate_b, rate_v = base.rate_at(log_b.mean(axis=0)), variant.rate_at(log_v.mean(axis=0))
    if rate_b is not None and rate_v is not None:
        settle_time(result, differences(result, rate_v[:, 0], rate_b[:, 0]))
    return result


def _censored(result: Result, base: Ladder, variant: Ladder, target: float) -> Result:
    """All the compute that the arm had which never came there, against what the other needed."""
    if target < min(base.bottom, variant.bottom):
        return result.refuse(f"target {target:.4f} is reached by neither arm")
    if result.g_hw is None and base.log_rate is not None and variant.log_rate is not None:
        result.g_hw = float(np.exp(variant.log_rate[:, -1].mean() - base.log_rate[:, -1].mean()))
    log_b, log_v = base.log_flops[-1:], variant.log_flops[-1:]
    if censored_base := target < base.bottom:
        log_v = _reached(variant, target)
    else:
        log_b = _reached(base, target)
    return settle_bound(result, log_b, log_v, censored_base=censored_base, target=target)


def _reached(arm: Ladder, target: float) -> Array:
    return arm.envelope(np.array([min(target, arm.top)]))


def _over_overlap(result: Result, base: Ladder, variant: Ladder, one_cell: bool) -> None:
    """The mean of ln G over the losses that both reach, evenly spaced."""
    span = rungs.between(
        rungs.highest(base, variant), rungs.lowest(base, variant), RANGE_POINTS
    )  # fmt: skip
    log_b, log_v = (side.mean(axis=1) for side in rungs.seed_values(base, variant, span))
    interval = mean_interval(result, log_b, log_v)
    result.extra = {
        "overlap": [float(span.losses[-1]), float(span.losses[0])],
        "g_alg_overlap_mean": {
            "g_alg": float(np.exp(log_b.mean() - log_v.mean())),
            "ci": None if interval is None else list(interval.ratio),
            "ci_method": None if interval is None else interval.method,
        },
    }
    if one_cell and not result.unpaired:
        result.along = _along_baseline(base, variant)


def _along_baseline(base: Ladder, variant: Ladder) -> tuple[Array, Array]:
    """ln C_b and ln G (seeds, points) at the baseline's own points that both arms reach."""
    mean = base.mean
    low, high = max(base.bottom, variant.bottom), min(base.top, variant.top)
    inside = [i for i in base.vertices if low <= mean[i] <= high]
    at = rungs.fixed(mean[inside], base, variant)
    for column, i in enumerate(inside):
        at.by_base[:, column] = base.pinned(float(mean[i]))
    log_b, log_v = rungs.seed_values(base, variant, at)
    return base.log_flops[inside], log_b - log_v


def _flag_plateau(result: Result, base: Ladder, variant: Ladder) -> None:
    """Where two budgets differ by less than the noise, the compute between them is not known.

    The noise is what is left of the losses without seed and budget effects: a seed that is worse
    at all budgets moves both arms.
    """
    for arm in (base, variant):
        n, points = arm.loss.shape
        if n < 2 or points < 2:
            continue
        rest = arm.loss - arm.mean - arm.loss.mean(axis=1, keepdims=True) + arm.loss.mean()
        sd = float(np.sqrt((rest**2).sum() / ((n - 1) * (points - 1))))
        steps = arm.mean[arm.vertices]
        assert result.target is not None
        at = min(max(int(np.searchsorted(-steps, -result.target)), 1), steps.size - 1)
        if steps[at - 1] - steps[at] < NOISE * sd:
            result.flags.append("plateau")


def over_range(cell: Cell, arm: str, options: Options) -> dict[str, Any] | None:
    """G_alg over the overlap, at losses fixed beforehand."""
    if cell.refusals or any(c.problems or not c.loss.size for c in cell.curves(arm)):
        return None
    ladders = _ladders(cell, arm, options, result := Result())
    if ladders is None:
        return None
    base, variant = ladders
    low, high = max(base.bottom, variant.bottom), min(base.top, variant.top)
    if low >= high:
        return None
    losses = np.linspace(high, low, RANGE_POINTS)
    log_b, log_v = rungs.seed_values(base, variant, rungs.fixed(losses, base, variant))
    intervals = [mean_interval(result, *pair) for pair in zip(log_b.T, log_v.T, strict=True)]
    return range_of(losses, intervals, log_b.mean(axis=0) - log_v.mean(axis=0))


def null_logs(cell: Cell, options: Options) -> Array:
    """ln C of each baseline seed at the baseline's lowest loss: what the A/A gate is made of."""
    own = None if cell.refusals else best_ladder(cell.runs.get(options.baseline, {}))
    if own is None:
        return np.zeros(0)
    return own.values(np.array([own.bottom]), np.zeros((len(own.loss), 1)))[:, 0]


def joint(
    cell: Cell, arms: Sequence[str], results: Mapping[str, Result], options: Options
) -> tuple[float, dict[str, Array]] | str:
    """The lowest loss that all reach (or the target asked for) and ln G of each arm there."""
    for arm in arms:
        if arm not in results or results[arm].status == "refused":
            return f"{arm} has no gain here"
    names = [options.baseline, *arms]
    seeds = whole_seeds([cell.runs[name] for name in names])
    found = {name: make_ladder(cell.runs[name], seeds) for name in names}
    ladders = {name: one for name, one in found.items() if one is not None}
    if len(ladders) < len(names):
        return "the arms share no seed with three budgets of each"
    worst = max(ladders, key=lambda name: ladders[name].bottom)
    target = ladders[worst].bottom if cell.target is None else cell.target
    if (
        not max(a.bottom for a in ladders.values())
        <= target
        <= min(a.top for a in ladders.values())
    ):
        return "no loss is reached by all arms"
    moves = np.zeros((len(seeds), 1))
    if cell.target is None:
        moves[:, 0] = ladders[worst].pinned(target)
    elif options.target_at_flops is not None:
        moves[:, 0] = ladders[options.baseline].pinned(target)
    at = np.array([target])
    logs = {name: one.values(at, moves)[:, 0] for name, one in ladders.items()}
    return target, {arm: logs[options.baseline] - logs[arm] for arm in arms}

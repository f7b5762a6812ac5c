"""The estimator: G_alg, G_hw and G_time of every arm, or the reason why there is no number.

    T_b / T_v = (C_b / C_v) x (F_v / F_b),   G_time = G_alg x G_hw,   F = C / T

C is model FLOPs to a target loss, T training seconds to it. Pure NumPy/SciPy: it knows curves, not
models. Modes: "crossing" (within a run) and "slope" (local); "endpoint" has its place in MODES.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ceg_model.study import stats
from ceg_model.study.cells import Cell, Options, choose_target, make_cells
from ceg_model.study.crossing import MIN_EVALS_BEFORE, log_flops_at, running_minimum
from ceg_model.study.curves import Curve
from ceg_model.study.gains import Result, compare

RANGE_POINTS = 33


def estimate(curves: Sequence[Curve], options: Options | None = None) -> dict[str, Any]:
    """The spec's JSON: baseline, target_loss, mode, arms, class, aa (and cells, interaction)."""
    options = options or Options()
    cells = make_cells(curves, options)
    for cell in cells:
        choose_target(cell, options)
    arms = list(dict.fromkeys(c.key.arm for c in curves if c.key.arm != options.baseline))
    results = {
        arm: {cell.name: compare(cell, arm, options) for cell in cells if arm in cell.curves}
        for arm in arms
    }
    gate = _aa_gate(cells, options)
    if gate["passed"] is False:
        for per_cell in results.values():
            for result in per_cell.values():
                result.flags.append("aa_failed")
    targets = {cell.name: cell.target for cell in cells}
    single = next(iter(targets.values())) if len(targets) == 1 else None
    return {
        "baseline": options.baseline,
        "target_loss": options.target if options.target is not None else single,
        "target_losses": targets,
        "offered_targets": {cell.name: cell.offer for cell in cells if cell.offer is not None},
        "mode": options.mode,
        "arms": {arm: _arm(arm, per_cell, cells, options) for arm, per_cell in results.items()},
        "class": {arm: _trend(per_cell) for arm, per_cell in results.items()},
        "interaction": _interactions(results, options),
        "aa": gate,
    }


def _arm(
    arm: str, per_cell: dict[str, Result], cells: list[Cell], options: Options
) -> dict[str, Any]:
    """The arm's answer: the largest cell's on top, every cell's below, and the mean over cells."""
    by_name = {cell.name: cell for cell in cells}
    out: dict[str, dict[str, Any]] = {}
    for name, result in per_cell.items():
        out[name] = result.as_dict() | {
            "target_loss": by_name[name].target,
            "range": _over_range(by_name[name], arm, options.baseline),
        }
    largest = max(per_cell, key=lambda name: _compute(by_name[name], options.baseline))
    good = [r.logs for r in per_cell.values() if r.status == "ok"]
    top = {key: value for key, value in out[largest].items() if key != "range"}
    top["scale"] = largest
    top["mean_over_scales"] = _mean(good)
    if arm in options.same_maths:
        top["equivalence"] = verdict = _equivalence(good)
        if verdict["passed"] is False:
            for part in (top, out[largest]):
                part["flags"] = [*part["flags"], "not_equivalent"]
                part["reasons"] = [*part["reasons"], verdict["reason"]]
    return top | {"scales": out}


def _compute(cell: Cell, baseline: str) -> float:
    return max(
        (float(c.flops.max(initial=0)) for c in cell.curves.get(baseline, {}).values()), default=0
    )


def _mean(groups: list[np.ndarray]) -> dict[str, Any] | None:
    if not groups:
        return None
    interval = stats.pooled_interval(groups)
    mean = float(np.exp(np.mean([g.mean() for g in groups])))
    return {
        "g_alg": mean,
        "ci": None if interval is None else list(interval.ratio),
        "method": None if interval is None else interval.method,
        "scales": len(groups),
    }


def _equivalence(groups: list[np.ndarray]) -> dict[str, Any]:
    test = stats.equivalence(groups)
    if test.passed is None:
        reason = "not tested: two seeds are needed"
    elif test.passed:
        reason = "the 90% interval lies inside the bounds: the same maths, measured"
    else:
        reason = (
            f"same maths, yet the 90% interval [{test.low:.4f}, {test.high:.4f}] leaves "
            f"[{test.bounds[0]}, {test.bounds[1]}]: a bug in the numerics, or too few evaluations "
            "to tell; never a gain"
        )
    interval = None if test.low is None else [test.low, test.high]
    return {"passed": test.passed, "ci90": interval, "bounds": list(test.bounds), "reason": reason}


def _over_range(cell: Cell, arm: str, baseline: str) -> dict[str, list[float | None]] | None:
    """G_alg at every loss that all seeds of both arms reach, late enough to be trusted."""
    pairs = [
        (b, cell.curves[arm][seed])
        for seed, b in cell.curves.get(baseline, {}).items()
        if seed in cell.curves[arm]
    ]
    curves = [c for pair in pairs for c in pair]
    if not curves or any(c.problems or c.loss.size <= MIN_EVALS_BEFORE for c in curves):
        return None
    low = max(float(c.loss.min()) for c in curves)
    high = min(float(running_minimum(c)[MIN_EVALS_BEFORE - 1]) for c in curves)
    if not low < high:
        return None
    losses = np.linspace(high, low, RANGE_POINTS + 1)[1:]
    logs = np.array([log_flops_at(b, losses) - log_flops_at(v, losses) for b, v in pairs])
    keep = np.isfinite(logs).all(axis=0)
    intervals = [stats.paired_interval(column) for column in logs.T[keep]]
    return {
        "loss": losses[keep].tolist(),
        "g_alg": np.exp(logs.T[keep].mean(axis=1)).tolist(),
        "low": [None if i is None else i.ratio[0] for i in intervals],
        "high": [None if i is None else i.ratio[1] for i in intervals],
    }


def _trend(per_cell: dict[str, Result]) -> dict[str, Any]:
    good = [r for r in per_cell.values() if r.status == "ok"]
    trend = stats.classify([(r.log_base, r.logs) for r in good])
    return {
        "class": trend.label,
        "slope": trend.slope,
        "ci": None if trend.low is None else [trend.low, trend.high],
        "axis": "ln C_b",
        "margin": stats.MARGIN,
        "scales": trend.scales,
        "reason": trend.reason,
        "ends": None if trend.ends is None else list(trend.ends),
        "below_one": trend.below_one,
    }


def _interactions(results: dict[str, dict[str, Result]], options: Options) -> dict[str, Any]:
    """ln G(all) - sum ln G(part): what a product of single gains would get wrong."""
    out: dict[str, Any] = {}
    for bundle, parts in options.bundles.items():
        # A part with the same maths has ln G = 0 by construction; only the others must be there.
        needed = [p for p in parts if p not in options.same_maths]
        if any(arm not in results for arm in (bundle, *needed)):
            continue
        scales: dict[str, dict[str, Any]] = {}
        for name, whole in results[bundle].items():
            pieces = [results[p].get(name) for p in needed]
            rows = [whole, *(p for p in pieces if p is not None)]
            unequal = len({r.seeds for r in rows}) > 1
            if len(rows) <= len(needed) or unequal or any(r.status != "ok" for r in rows):
                scales[name] = {"interaction": None, "ratio": None, "ci": None}
                continue
            d = whole.logs - sum(p.logs for p in rows[1:])
            interval = stats.paired_interval(d)
            scales[name] = {
                "interaction": float(d.mean()),
                "ratio": float(np.exp(d.mean())),
                "ci": None if interval is None else list(interval.ratio),
            }
        out[bundle] = {"parts": list(parts), "scales": scales}
    return out


def _aa_gate(cells: list[Cell], options: Options) -> dict[str, Any]:
    """Baseline against itself under other seeds, in disjoint pairs: it must give 1."""
    differences: list[float] = []
    for cell in cells:
        base = list(cell.curves.get(options.baseline, {}).values())
        if cell.target is None or cell.refusals:
            continue
        logs = [float(log_flops_at(c, np.array([cell.target]))[0]) for c in base]
        differences += [a - b for a, b in zip(logs[::2], logs[1::2], strict=False)]
    differences = [d for d in differences if np.isfinite(d)]
    interval = stats.paired_interval(differences)
    if interval is None:
        reason = f"{len(differences)} pairs of baseline seeds, 2 needed"
        return {"passed": None, "reason": reason, "ratios": np.exp(differences).tolist()}
    half = (interval.high - interval.low) / 2
    passed = interval.low <= 0 <= interval.high
    return {
        "passed": passed,
        "g_alg": float(np.exp(interval.mean)),
        "ci": list(interval.ratio),
        "detection_limit": float(np.exp(half) - 1),
        "pairs": len(differences),
        "ratios": np.exp(differences).tolist(),
        "reason": "the interval holds 1" if passed else "baseline against itself is not 1",
    }

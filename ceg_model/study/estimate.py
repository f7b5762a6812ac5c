"""The estimator: G_alg, G_hw and G_time of every arm, or the reason why there is no number.

    T_b / T_v = (C_b / C_v) x (F_v / F_b),   G_time = G_alg x G_hw,   F = C / T

C is model FLOPs to a target loss, T training seconds to it. Pure NumPy/SciPy: it knows curves, not
models. Modes: "endpoint" (last losses of several budgets), "crossing" (within a run) and "slope"
(local); each has its engine, and everything above it is shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np

from ceg_model.study import aa, endpoint, shapley, stats, within
from ceg_model.study.cells import Options, check_options
from ceg_model.study.curves import Curve
from ceg_model.study.forked import forked
from ceg_model.study.gains import Result
from ceg_model.study.trend import Trend, classify, classify_points

Results = dict[str, dict[str, Result]]  # arm -> cell -> result
Ranges = dict[str, dict[str, Any] | None]  # cell -> an arm's gain over the losses there
MANY = 1000  # curves from which a second process saves more time than it takes to begin


def estimate(curves: Sequence[Curve], options: Options | None = None) -> dict[str, Any]:
    """The spec's JSON: baseline, target_loss, mode, arms, class, aa; and what plots need beside."""
    options = options or Options()
    check_options(curves, options)
    if options.mode is None:
        options = replace(options, mode="endpoint" if endpoint.possible(curves) else "crossing")
    engine: ModuleType = endpoint if options.mode == "endpoint" else within
    cells = {cell.name: cell for cell in engine.make_cells(curves, options)}
    arms = list(dict.fromkeys(c.key.arm for c in curves if c.key.arm != options.baseline))

    def compared(arm: str) -> tuple[dict[str, Result], Ranges]:
        its = [cell for cell in cells.values() if arm in cell.arms] or list(cells.values())
        return (
            {cell.name: engine.compare(cell, arm, options) for cell in its},
            {cell.name: engine.over_range(cell, arm, options) for cell in its},
        )

    with forked(compared, arms, pays=len(curves) >= MANY) as found:
        both = dict(zip(arms, found(), strict=True))
    results: Results = {arm: per_cell for arm, (per_cell, _) in both.items()}
    gate = aa.gate({name: engine.null_logs(cell, options) for name, cell in cells.items()})
    if gate["passed"] is False:
        for per_cell in results.values():
            for result in per_cell.values():
                result.flags.append("aa_failed")

    def joint(cell: str, names: Sequence[str]) -> Any:
        here = {arm: r[cell] for arm, r in results.items() if cell in r}
        return engine.joint(cells[cell], names, here, options)

    targets = {name: engine.common_target(cell, options) for name, cell in cells.items()}
    single = next(iter(targets.values())) if len(targets) == 1 else None
    answers = {
        arm: _arm(*both[arm], cells, options, twin=_twin(arm, results, options)) for arm in arms
    }
    return {
        "baseline": options.baseline,
        "target_loss": options.target if options.target is not None else single,
        "target_losses": targets,
        "offered_targets": {n: cell.offer for n, cell in cells.items() if cell.offer is not None},
        "mode": options.mode,
        "arms": answers,
        "class": {arm: _class(results[arm]) | _lowest(answers[arm]) for arm in arms},
        "class_hw": {arm: _class_hw(results[arm]).as_dict() for arm in arms},
        "interaction": shapley.interactions(list(cells), set(arms), joint, options),
        "shapley": shapley.shares(list(cells), set(arms), joint, options),
        "cells": engine.describe(cells, options),
        "fit": engine.fits(cells, options),
        "aa": gate,
    }


def _arm(
    per_cell: dict[str, Result],
    ranges: Ranges,
    cells: Mapping[str, Any],
    options: Options,
    *,
    twin: dict[str, Result] | None,
) -> dict[str, Any]:
    """The arm's answer: the largest cell's on top, every cell's below, and the mean over cells.

    `twin`: the results of the arm with the same maths, {} where that is the baseline itself.
    """
    out = {name: r.as_dict() | {"range": ranges[name]} for name, r in per_cell.items()}
    largest = max(per_cell, key=lambda name: cells[name].most_flops(options.baseline))
    good = [r.logs for r in per_cell.values() if r.status == "ok"]
    top = {key: value for key, value in out[largest].items() if key != "range"}
    top["scale"] = largest
    top["mean_over_scales"] = _mean(good)
    if twin is not None:
        top["equivalence"] = verdict = _equivalence(_beside(per_cell, twin))
        if verdict["passed"] is False:
            for part in (top, out[largest]):
                part["flags"] = [*part["flags"], "not_equivalent"]
                part["reasons"] = [*part["reasons"], verdict["reason"]]
    return top | {"scales": out}


def _twin(arm: str, results: Results, options: Options) -> dict[str, Result] | None:
    if arm in options.same_maths:
        return {}
    return results.get(options.twins.get(arm, ""))


def _beside(per_cell: dict[str, Result], twin: dict[str, Result]) -> list[np.ndarray]:
    """ln of the twin's compute over the arm's, by cell: 0 where their maths is the same."""
    groups = []
    for name, result in per_cell.items():
        other = twin.get(name)
        if result.status == "ok" and not twin:
            groups.append(result.logs)
        elif result.status == "ok" and other is not None and other.seeds == result.seeds:
            groups += [result.logs - other.logs] if other.status == "ok" else []
    return groups


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


def _class(per_cell: dict[str, Result]) -> dict[str, Any]:
    good = [r for r in per_cell.values() if r.status == "ok"]
    if len(good) == 1 and good[0].along is not None:
        return classify_points(*good[0].along).as_dict()
    return classify([(r.log_base, r.logs) for r in good]).as_dict()


def _class_hw(per_cell: dict[str, Result]) -> Trend:
    """The same test on ln G_hw; a benchmark gives one value a scale, so a slope and no class."""
    groups = []
    for r in per_cell.values():
        if r.status == "ok" and r.log_hw.size:
            groups.append((r.log_base, r.log_hw))
        elif r.status == "ok" and r.g_hw is not None:
            groups.append((r.log_base, np.log([r.g_hw])))
    return classify(groups)


def _lowest(answer: dict[str, Any]) -> dict[str, float | None]:
    """The lowest G_alg seen anywhere: is it below 1 somewhere?"""
    seen = [v for cell in answer["scales"].values() for v in (cell["range"] or {}).get("g_alg", ())]
    seen += [c["g_alg"] for c in answer["scales"].values() if c["g_alg"] is not None]
    return {"lowest": min(seen, default=None)}

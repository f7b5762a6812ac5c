"""Bundles: what each part brings, in ln C and at one target; never a product of single gains.

Where every sub-bundle was trained, Shapley's value: the mean over all orders of putting the parts
in, of what a part adds. Else the interaction, ln G(all) - sum ln G(part). A part with the same
maths has ln G = 0 by construction, alone and in company, and needs no run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from math import factorial
from typing import Any

import numpy as np

from ceg_model.study import stats
from ceg_model.study.cells import Options
from ceg_model.study.stats import Array

# The target and ln G of each arm at it, seed by seed; or why there is none.
Joint = Callable[[str, Sequence[str]], "tuple[float, dict[str, Array]] | str"]


def interactions(cells: Sequence[str], present: set[str], joint: Joint, options: Options) -> dict:
    """bundle -> ln G(all) - sum ln G(part), per cell: what a product would get wrong."""
    out: dict[str, Any] = {}
    for bundle, parts in options.bundles.items():
        needed = _needed(parts, options)
        if not {bundle, *needed} <= present:
            continue
        scales: dict[str, dict[str, Any]] = {}
        for cell in cells:
            found = joint(cell, [bundle, *needed])
            if isinstance(found, str):
                scales[cell] = {"interaction": None, "ratio": None, "ci": None}
                continue
            logs = found[1]
            d = logs[bundle] - sum(logs[part] for part in needed)
            row = _row(d)
            scales[cell] = {"interaction": row["log"], "ratio": row["ratio"], "ci": row["ci"]}
        out[bundle] = {"parts": list(parts), "scales": scales}
    return out


def shares(cells: Sequence[str], present: set[str], joint: Joint, options: Options) -> dict:
    """bundle -> Shapley's value of each part, per cell; only where all sub-bundles are arms."""
    out: dict[str, Any] = {}
    for bundle, parts in options.bundles.items():
        arms = _subsets(bundle, parts, options)
        if arms is None or not set(arms.values()) <= present:
            continue
        scales: dict[str, Any] = {}
        for cell in cells:
            found = joint(cell, list(arms.values()))
            if isinstance(found, str):
                scales[cell] = {"reason": found}
                continue
            target, logs = found
            worth = {subset: logs[arm] for subset, arm in arms.items()}
            scales[cell] = {
                "target_loss": target,
                "parts": {
                    part: {"log": 0.0, "ratio": 1.0, "ci": None}
                    if part in options.same_maths
                    else _row(share)
                    for part, share in shapley(parts, worth, options.same_maths).items()
                },
                "total": _row(logs[bundle]),
            }
        out[bundle] = {"parts": list(parts), "scales": scales}
    return out


def shapley(
    parts: Sequence[str], worth: Mapping[frozenset[str], Array], null: frozenset[str] = frozenset()
) -> dict[str, Array]:
    """Shapley's value of each part from the worth of every non-empty subset without `null`."""
    players = [p for p in parts if p not in null]
    n = len(players)
    zero = np.zeros_like(worth[frozenset(players)])
    shares = {part: zero.copy() for part in parts}
    for part in players:
        others = [p for p in players if p != part]
        for size in range(n):
            weight = factorial(size) * factorial(n - size - 1) / factorial(n)
            for company in combinations(others, size):
                before = worth[frozenset(company)] if company else zero
                shares[part] += weight * (worth[frozenset({*company, part})] - before)
    return shares


def _needed(parts: Sequence[str], options: Options) -> list[str]:
    return [p for p in parts if p not in options.same_maths]


def _subsets(
    bundle: str, parts: Sequence[str], options: Options
) -> dict[frozenset[str], str] | None:
    """The arm of every non-empty subset of the parts that matter; None where one has no arm."""
    players = _needed(parts, options)
    known = {frozenset(_needed(p, options)): arm for arm, p in options.bundles.items()}
    known |= {frozenset({p}): p for p in players} | {frozenset(players): bundle}
    wanted = [frozenset(c) for n in range(1, len(players) + 1) for c in combinations(players, n)]
    if len(players) < 2 or any(subset not in known for subset in wanted):
        return None
    return {subset: known[subset] for subset in wanted}


def _row(logs: Array) -> dict[str, Any]:
    interval = stats.paired_interval(logs)
    mean = float(logs.mean())
    return {
        "log": mean,
        "ratio": float(np.exp(mean)),
        "ci": None if interval is None else list(interval.ratio),
    }

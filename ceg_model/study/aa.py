"""The A/A gate: the baseline against itself under other seeds must give 1; the detection limit.

Every run's ln C at one loss, in each scale: y = scale + d z + noise, z = +-1/2 by turns over the
seeds. d is the gain of half of the baseline's runs over the other half, and with the noise pooled
over the scales it has a t interval of N - K - 1 degrees of freedom (N runs, K scales): 5 for three
seeds at three scales, where disjoint pairs of seeds would leave 2 and waste a third of the runs.

The detection limit is what luck alone may put between two unpaired means of n runs: t s sqrt(2/n),
s the pooled sd of one run within its scale. Arms that share the baseline's seeds do better.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from ceg_model.study import stats
from ceg_model.study.stats import LEVEL, Array


def gate(by_cell: Mapping[str, Array]) -> dict[str, Any]:
    """by_cell: ln C of the baseline's runs at one loss of each cell, by seed."""
    groups = [g for g in by_cell.values() if g.size > 1]
    runs = sum(g.size for g in groups)
    ratios = [float(np.exp(a - b)) for g in groups for a, b in combinations(g, 2)]
    df = runs - len(groups) - 1
    if df < 1:
        reason = (
            f"{runs} baseline runs in scales with two seeds or more, {len(groups) + 2} needed"
            if groups
            else "no scale has two baseline runs with other seeds"
        )
        return {"passed": None, "reason": reason, "ratios": ratios}
    y = np.concatenate([g - g.mean() for g in groups])
    turns = [np.where(np.arange(g.size) % 2, -0.5, 0.5) for g in groups]
    z = np.concatenate([t - t.mean() for t in turns])
    weight = float((z**2).sum())
    mean = float((z * y).sum()) / weight
    se = float(np.sqrt(max(float((y**2).sum()) - mean**2 * weight, 0.0) / df / weight))
    half = stats.t_quantile(0.5 + LEVEL / 2, df) * se
    low, high = mean - half, mean + half
    passed = low <= 0 <= high
    sd = float(np.sqrt(stats.pooled_variance(groups)))
    fewest, free = min(g.size for g in groups), runs - len(groups)
    return {
        "passed": passed,
        "g_alg": float(np.exp(mean)),
        "ci": [float(np.exp(low)), float(np.exp(high))],
        "detection_limit": float(np.expm1(stats.half_width(sd, fewest, free))),
        "detection_limit_mean": float(
            np.expm1(stats.half_width(sd, fewest, free, cells=len(groups)))
        ),
        "sd": sd,
        "df": free,
        "seeds": fewest,
        "pairs": len(ratios),
        "ratios": ratios,
        "reason": "the interval holds 1" if passed else "baseline against itself is not 1",
    }

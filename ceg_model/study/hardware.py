"""G_hw = F_v / F_b of every arm: from runs in lockstep where there are any, else throughput.py.

Only runs whose ops ran on the arm's own backends tell its rate: a plan may train its curves with
faster kernels than the arm stands for, since a curve does not depend on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ceg_model.flops import model_flops
from ceg_model.study import stats
from ceg_model.study.lockstep import rate_gains
from ceg_model.study.plan import Plan, RunSpec, backends_of

Rates = Mapping[tuple[str, str], "Rate"]


@dataclass(frozen=True)
class Rate:
    """What runs in lockstep say of an arm: ln of F_v / F_b, and F_b in FLOP/s."""

    gain: stats.Interval
    base_flops_per_s: float


def rates(
    plan: Plan,
    specs: Sequence[tuple[str, RunSpec]],
    clocks: Mapping[str, np.ndarray],
    ours: Mapping[str, str | None],
) -> dict[tuple[str, str], Rate]:
    """(scale, arm) -> its rate over whole runs in lockstep, all seeds together.

    clocks: run id -> training seconds at each row, on the group's common clock.
    """
    place = {
        (s.scale, s.seed, s.arm): (run, s)
        for run, s in specs
        if run in clocks and s.train.backend == backends_of(s.arm, ours)
    }
    logs: dict[tuple[str, str], list[np.ndarray]] = {}
    base_rates: dict[tuple[str, str], list[float]] = {}
    for (scale, seed, arm), (run, spec) in place.items():
        base, base_spec = place.get((scale, seed, plan.baseline), (None, spec))
        if base is not None:
            work = _flops_per_step(spec) / _flops_per_step(base_spec)
            gains = rate_gains(np.array(clocks[base]), np.array(clocks[run]))
            logs.setdefault((scale, arm), []).append(gains + np.log(work))
            rate = _flops_per_step(base_spec) * base_spec.train.steps / clocks[base][-1]
            base_rates.setdefault((scale, arm), []).append(rate)
    found = {key: stats.paired_interval(np.concatenate(parts)) for key, parts in logs.items()}
    return {
        key: Rate(interval, float(np.mean(base_rates[key])))
        for key, interval in found.items()
        if interval is not None
    }


def _flops_per_step(spec: RunSpec) -> int:
    return model_flops(spec.model, batch=spec.train.batch_size * spec.train.grad_accum).total


def split(
    plan: Plan, timings: Mapping[str, Any], rates: Rates, roofs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Scale -> arm -> G_hw. timings: throughput.measure by scale; roofs: of this machine."""
    out: dict[str, Any] = {}
    for scale in plan.scales:
        timed = timings.get(scale.name, {"arms": {}})["arms"]
        arms: dict[str, Any] = {}
        for arm in plan.arms:
            rate, row = rates.get((scale.name, arm)), timed.get(arm)
            if rate is None and row is None:
                continue
            bench = row["against_reference"]["gain"] if row else None
            arms[arm] = {
                "against_reference": float(np.exp(rate.gain.mean)) if rate else bench,
                "ci": list(rate.gain.ratio) if rate else None,
                "source": "runs in lockstep" if rate else "throughput benchmark",
                "benchmark": bench,
                "against_torch": row["against_torch"]["gain"] if row else None,
            }
        if arms:
            out[scale.name] = arms
    return out

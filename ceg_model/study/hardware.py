"""G_hw = F_v / F_b of every arm: from runs in lockstep where there are any, else throughput.py.

Only runs whose ops ran on the arm's own backends tell its rate: a plan may train its curves with
faster kernels than the arm stands for, since a curve does not depend on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ceg_model.mfu import AbovePeakError, mfu
from ceg_model.study import stats
from ceg_model.study.lockstep import log_stretches
from ceg_model.study.plan import Plan, RunSpec, Scale, backends_of, train_config

Rates = Mapping[tuple[str, str], "Rate"]
UNEXPLAINED = 0.05


@dataclass(frozen=True)
class Rate:
    """What runs in lockstep say of an arm: ln of F_v / F_b, and F_b in FLOP/s."""

    gain: stats.Interval
    base_flops_per_s: float


def rates(
    plan: Plan,
    specs: Sequence[tuple[str, RunSpec]],
    clocks: Mapping[str, np.ndarray],
    work: Mapping[str, float],
    ours: Mapping[str, str | None],
) -> dict[tuple[str, str], Rate]:
    """(scale, arm) -> its rate over whole runs in lockstep, all seeds together.

    clocks: run id -> training seconds at each row, on the group's common clock.
    work: run id -> model FLOPs of a step.
    """
    own = {arm: backends_of(arm, ours) for arm in plan.arms}
    place = {
        (s.scale, s.seed, s.arm): (run, s)
        for run, s in specs
        if run in clocks and s.train.backend == own[s.arm]
    }
    taken = {run: log_stretches(clocks[run]) for run, _ in place.values()}
    logs: dict[tuple[str, str], list[np.ndarray]] = {}
    base_rates: dict[tuple[str, str], list[float]] = {}
    for (scale, seed, arm), (run, spec) in place.items():
        base, base_spec = place.get((scale, seed, plan.baseline), (None, spec))
        if base is not None:
            more_work = np.log(work[run] / work[base])
            logs.setdefault((scale, arm), []).append(taken[base] - taken[run] + more_work)
            rate = work[base] * base_spec.train.steps / clocks[base][-1]
            base_rates.setdefault((scale, arm), []).append(rate)
    found = {key: stats.t_interval(np.concatenate(parts)) for key, parts in logs.items()}
    return {
        key: Rate(interval, float(np.mean(base_rates[key])))
        for key, interval in found.items()
        if interval is not None
    }


@dataclass(frozen=True)
class Side:
    """What an arm trains on: the dtype of its matmuls, and the dense FLOP/s of one device in it."""

    dtype: str
    peak: float | None
    devices: int = 1  # a run of a study is one process on one device


def split(
    plan: Plan, timings: Mapping[str, Any], rates: Rates, roofs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Scale -> arm -> G_hw and its parts.

    timings: scale -> throughput.measure; roofs: this machine's, as ceilings.Roofs has them. An
    arm's flags: "peak_unknown" (so no MFU), "mfu_above_1" (an MFU was refused: a peak too low or
    seconds too short), "unexplained" (Amdahl is off by more than 5%).
    """
    out: dict[str, Any] = {}
    for scale in plan.scales:
        timing = timings.get(scale.name) or {"arms": {}}
        arms: dict[str, Any] = {}
        for arm in plan.arms:
            rate, row = rates.get((scale.name, arm)), timing["arms"].get(arm)
            if rate is None and row is None:
                continue
            gains = _gains(rate, row)
            base, own = (_side(plan, a, scale, timing, roofs) for a in (plan.baseline, arm))
            speed = _base_flops_per_s(plan, rate, timing)
            parts, flags = utilisation(gains["against_reference"], speed, base, own)
            step = amdahl((row or {}).get("kernels"))
            if step is not None and not _explained(step["unexplained"]):
                flags.append("unexplained")
            arms[arm] = gains | parts | {
                "hfu_over_mfu": _hfu_over_mfu(row),
                "amdahl": step,
                "joules_per_step": (row or {}).get("joules_per_step"),
                "flags": flags,
            }  # fmt: skip
        if arms:
            out[scale.name] = arms
    return out


def _gains(rate: Rate | None, row: Mapping[str, Any] | None) -> dict[str, Any]:
    against = {kind: row[f"against_{kind}"] if row else {} for kind in ("reference", "torch")}
    ci = list(rate.gain.ratio) if rate else None
    bench = against["reference"].get("gain")
    return {
        "against_reference": float(np.exp(rate.gain.mean)) if rate else bench,
        "ci": ci,
        "source": "runs in lockstep" if rate else "throughput benchmark",
        "benchmark": bench,
        "against_torch": against["torch"].get("gain"),
        "against_reference_ci": ci if rate else against["reference"].get("ci"),
        "against_torch_ci": against["torch"].get("ci"),
    }


def _side(
    plan: Plan, arm: str, scale: Scale, timing: Mapping[str, Any], roofs: Mapping[str, Any] | None
) -> Side:
    configured = train_config(plan, arm, scale, plan.seeds[0]).dtype
    dtype = timing["arms"].get(arm, {}).get("dtype", configured)  # what "auto" has come to
    known = [timing.get("peaks", {}).get(dtype)]
    # Roofs of other threads than the steps had are those of another machine.
    threads = timing.get("threads", plan.threads)
    if roofs and (roofs["device"].startswith("cuda") or roofs["threads"] == threads):
        known.append(roofs["flops"].get(dtype))
    return Side(dtype, max((peak for peak in known if peak), default=None))


def _base_flops_per_s(plan: Plan, rate: Rate | None, timing: Mapping[str, Any]) -> float:
    if rate is not None:
        return rate.base_flops_per_s
    row = timing["arms"][plan.baseline]
    return row["model_flops"] / row["study"]["median_s"]


def utilisation(
    g_hw: float, base_flops_per_s: float, base: Side, own: Side
) -> tuple[dict[str, float | None], list[str]]:
    """MFUs and the three ratios whose product is g_hw (None where unknown), and flags."""
    values: dict[str, float | None] = {"mfu": None, "mfu_baseline": None}
    flags: list[str] = []
    sides = {"mfu_baseline": (base, base_flops_per_s), "mfu": (own, base_flops_per_s * g_hw)}
    for name, (side, speed) in sides.items():
        if side.peak is None:
            flags.append("peak_unknown")
            continue
        try:
            values[name] = mfu(speed, 1, peak=side.peak, devices=side.devices, dtype=side.dtype)
        except AbovePeakError:
            flags.append("mfu_above_1")
    peak_ratio = None
    if base.dtype == own.dtype:  # whatever the peak is
        peak_ratio = 1.0
    elif base.peak and own.peak and not flags:
        peak_ratio = own.peak / base.peak
    device_ratio = own.devices / base.devices
    values["mfu_ratio"] = None if peak_ratio is None else g_hw / (peak_ratio * device_ratio)
    values |= {"peak_ratio": peak_ratio, "device_ratio": device_ratio}
    return values, list(dict.fromkeys(flags))


def amdahl(kernels: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Predicted beside measured seconds of a step, from what kernel_parts has found of an arm."""
    if kernels is None:
        return None
    parts = kernels["parts"]
    saved = sum(part["calls"] * (part["baseline_s"] - part["own_s"]) for part in parts)
    predicted, measured = kernels["baseline_s"] - saved, kernels["measured_s"]
    return {
        "predicted_s": predicted,
        "measured_s": measured,
        "unexplained": measured / predicted - 1 if predicted > 0 else None,
        "parts": parts,
        "own": kernels["own"],
        "baseline_s": kernels["baseline_s"],
    }


def _explained(rest: float | None) -> bool:
    return rest is not None and abs(rest) <= UNEXPLAINED


def _hfu_over_mfu(row: Mapping[str, Any] | None) -> float | None:
    executed = (row or {}).get("executed_flops")
    return None if row is None or executed is None else executed / row["model_flops"]

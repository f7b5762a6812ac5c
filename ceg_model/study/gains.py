"""One arm against the baseline in one cell: gains, bounds, or the reason why there is no number."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ceg_model.study import stats
from ceg_model.study.cells import Cell, Options, distrust
from ceg_model.study.crossing import NOISE, Crossing, cross, loss_at, noise_sd
from ceg_model.study.curves import Curve, disagreement

MAX_RESIDUAL = 0.01


@dataclass
class Result:
    """What is known of one arm in one cell. Logs are per seed, paired with the baseline's."""

    status: str = "ok"
    seeds: tuple[str, ...] = ()
    logs: np.ndarray = field(default_factory=lambda: np.zeros(0))
    log_base: np.ndarray = field(default_factory=lambda: np.zeros(0))
    log_time: np.ndarray = field(default_factory=lambda: np.zeros(0))
    interval: stats.Interval | None = None
    g_hw: float | None = None
    residual: float | None = None
    c_baseline: float | None = None
    c_variant: float | None = None
    bound: float | None = None
    bound_side: str | None = None
    executed_over_model: float | None = None  # HFU / MFU: recomputation and padding
    flags: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    @property
    def g_alg(self) -> float | None:
        return float(np.exp(self.logs.mean())) if self.status == "ok" else None

    @property
    def g_time(self) -> float | None:
        if self.status != "ok" or not self.log_time.size:
            return None
        return float(np.exp(self.log_time.mean()))

    def refuse(self, *reasons: str) -> Result:
        self.status = "refused"
        self.reasons.extend(dict.fromkeys(reasons))
        return self

    def as_dict(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "g_alg": self.g_alg,
            "ci": list(self.interval.ratio) if self.interval and self.status == "ok" else None,
            "ci_method": self.interval.method if self.interval else None,
            "g_hw": self.g_hw,
            "g_time": self.g_time,
            "residual": self.residual,
            "c_baseline": self.c_baseline,
            "c_variant": self.c_variant,
            "bound": self.bound,
            "bound_side": self.bound_side,
            "executed_over_model": self.executed_over_model,
            "seeds": list(self.seeds),
            "flags": list(dict.fromkeys(self.flags)),
            "reasons": list(dict.fromkeys(self.reasons)),
        }


def compare(cell: Cell, arm: str, options: Options) -> Result:
    """Arm against baseline in one cell."""
    result = Result(flags=list(cell.flags))
    if options.untuned:
        result.flags.append("untuned")
    base, variant = cell.curves.get(options.baseline, {}), cell.curves[arm]
    reasons = [*cell.refusals, *(r for c in variant.values() for r in distrust(c, options))]
    if reasons:
        return result.refuse(*reasons)
    pairs = _pairs(base, variant, result)
    differing = [r for b, v in pairs if (r := disagreement(b, v))]
    if differing:
        return result.refuse(*differing)
    if len(pairs) == 1:
        result.flags.append("no_ci")
    if any(v.loss.size < 2 for _, v in pairs):
        return result.refuse(f"{arm} needs at least 2 evaluations")
    result.executed_over_model = _executed_over_model([v for _, v in pairs])
    assert cell.target is not None
    hardware = None
    if options.hardware is not None:
        hardware = options.hardware.get(cell.name, {}).get(arm)
    if options.mode == "slope":
        return _local_slope(result, pairs, hardware)
    crossings = [(cross(b, cell.target), cross(v, cell.target)) for b, v in pairs]
    return _judge(result, pairs, crossings, target=cell.target, hardware=hardware)


def _pairs(
    base: dict[str, Curve], variant: dict[str, Curve], result: Result
) -> list[tuple[Curve, Curve]]:
    """Runs of equal seed. Where no seed is shared, in the order given: independent samples may be
    paired at will, the t interval holds and is only wider than it need be.
    """
    result.seeds = tuple(seed for seed in base if seed in variant)
    if result.seeds:
        return [(base[seed], variant[seed]) for seed in result.seeds]
    result.flags.append("unpaired")
    pairs = list(zip(base.values(), variant.values(), strict=False))
    result.seeds = tuple(f"{b.key.seed}/{v.key.seed}" for b, v in pairs)
    return pairs


def _executed_over_model(curves: list[Curve]) -> float | None:
    ratios = [c.executed_flops[-1] / c.flops[-1] for c in curves if c.executed_flops is not None]
    return float(np.mean(ratios)) if ratios else None


def _judge(
    result: Result,
    pairs: list[tuple[Curve, Curve]],
    crossings: list[tuple[Crossing, Crossing]],
    *,
    target: float,
    hardware: float | None,
) -> Result:
    refusals = [r for pair in crossings for c in pair for r in c.refusals]
    if refusals:
        return result.refuse(*refusals)
    result.flags.extend(f for pair in crossings for c in pair for f in c.flags)
    result.g_hw = hardware
    base_missing = sum(b.flops is None for b, _ in crossings)
    variant_missing = sum(v.flops is None for _, v in crossings)
    if base_missing or variant_missing:
        if result.g_hw is None:
            result.g_hw = _whole_run_rate(pairs)
        if base_missing and variant_missing:
            return result.refuse(f"target {target:.4f} is reached by neither arm in every seed")
        return _bound(result, pairs, crossings, censored_base=bool(base_missing))
    log_c = np.log([[c.flops or np.nan for c in pair] for pair in crossings])
    result.log_base = log_c[:, 0]
    result.logs = log_c[:, 0] - log_c[:, 1]
    result.interval = stats.paired_interval(result.logs)
    result.c_baseline, result.c_variant = (float(c) for c in np.exp(log_c.mean(axis=0)))
    if all(c.seconds for pair in crossings for c in pair):
        log_t = np.log([[c.seconds or np.nan for c in pair] for pair in crossings])
        result.log_time = log_t[:, 0] - log_t[:, 1]
        measured = float((result.log_time - result.logs).mean())
        if result.g_hw is None:
            result.g_hw = float(np.exp(measured))
        result.residual = measured - float(np.log(result.g_hw))
        if abs(result.residual) > MAX_RESIDUAL:
            result.flags.append("identity_failed")
    return result


def _whole_run_rate(pairs: list[tuple[Curve, Curve]]) -> float | None:
    logs = []
    for b, v in pairs:
        if b.seconds is None or v.seconds is None or not (b.seconds[-1] and v.seconds[-1]):
            return None
        logs.append(np.log(v.flops[-1] / v.seconds[-1]) - np.log(b.flops[-1] / b.seconds[-1]))
    return float(np.exp(np.mean(logs)))


def _bound(
    result: Result,
    pairs: list[tuple[Curve, Curve]],
    crossings: list[tuple[Crossing, Crossing]],
    *,
    censored_base: bool,
) -> Result:
    """G_alg <= C_b / C_v,max or G_alg >= C_b,max / C_v; seeds that did cross count as they are."""
    logs, bases, variants = [], [], []
    for (b, v), (at_b, at_v) in zip(pairs, crossings, strict=True):
        bases.append(at_b.flops or float(b.flops[-1]))
        variants.append(at_v.flops or float(v.flops[-1]))
        logs.append(np.log(bases[-1] / variants[-1]))
    who = "baseline" if censored_base else "variant"
    result.status = "censored"
    result.bound = float(np.exp(np.mean(logs)))
    result.bound_side = "lower" if censored_base else "upper"
    result.flags.append("censored")
    result.reasons.append(
        f"the {who} never reaches the target: G_alg {'>=' if censored_base else '<='} "
        f"{result.bound:.3g}"
    )
    if not censored_base:
        result.c_baseline = float(np.exp(np.mean(np.log(bases))))
    else:
        result.c_variant = float(np.exp(np.mean(np.log(variants))))
    return result


def _local_slope(
    result: Result, pairs: list[tuple[Curve, Curve]], hardware: float | None
) -> Result:
    """G = exp((L_b - L_v) / s) at the last common FLOPs, s = -dL/dlnC of the baseline there."""
    logs = []
    for b, v in pairs:
        at = min(float(b.flops[-1]), float(v.flops[-1]))
        if float(b.flops[0]) > at / 1.25 or float(v.flops[0]) > at:
            return result.refuse("the curves share no range of FLOPs around their ends")
        window = b.flops >= at / 1.5
        if window.sum() < 3:
            return result.refuse("3 baseline evaluations are needed within the last third: densify")
        s = -float(np.polyfit(np.log(b.flops[window]), b.loss[window], 1)[0])
        if s <= NOISE * (noise_sd(b) or 0.0):
            result.flags.append("plateau")
        if s <= 0:
            return result.refuse("the baseline's loss does not fall at the end of its run")
        logs.append((loss_at(b, at, best=True) - loss_at(v, at, best=True)) / s)
        if b.lr is None or v.lr is None:
            result.flags.append("schedule_unknown")
        elif not (np.allclose(b.lr[window], b.lr.max()) and np.isclose(v.lr[-1], v.lr.max())):
            result.flags.append("schedule_confounded")
    result.logs = np.array(logs)
    result.log_base = np.log([b.flops[-1] for b, _ in pairs])
    result.interval = stats.paired_interval(result.logs)
    result.g_hw = hardware if hardware is not None else _whole_run_rate(pairs)
    if abs(result.logs.mean()) > np.log(1.25):
        value = float(np.exp(result.logs.mean()))
        return result.refuse(f"G_alg {value:.3g} is outside [0.8, 1.25], where slope mode holds")
    if result.g_hw is not None:
        result.log_time = result.logs + np.log(result.g_hw)
        result.flags.append("time_inferred")
    return result

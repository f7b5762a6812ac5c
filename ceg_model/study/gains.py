"""One arm against the baseline in one cell: gains, a bound, or the reasons for neither.

Both ways to take a compute at a loss (within.py, endpoint.py) end in `settle`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ceg_model.study import stats
from ceg_model.study.cells import Options
from ceg_model.study.curves import Curve
from ceg_model.study.stats import Array

MAX_RESIDUAL = 0.01


def _none() -> Array:
    return np.zeros(0)


@dataclass
class Result:
    """Logs hold one value a seed, paired with the baseline's; see `differences` for unshared."""

    status: str = "ok"
    target: float | None = None
    seeds: tuple[str, ...] = ()
    logs: Array = field(default_factory=_none)
    log_base: Array = field(default_factory=_none)
    log_time: Array = field(default_factory=_none)
    log_hw: Array = field(default_factory=_none)
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
    # One curve in place of scales: ln C_b (points,) and ln G (seeds, points) along it.
    along: tuple[Array, Array] | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # what only one mode has to say

    @property
    def g_alg(self) -> float | None:
        return float(np.exp(self.logs.mean())) if self.status == "ok" else None

    @property
    def g_time(self) -> float | None:
        if self.status != "ok" or not self.log_time.size:
            return None
        return float(np.exp(self.log_time.mean()))

    @property
    def unpaired(self) -> bool:
        return "unpaired" in self.flags

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
            "target_loss": self.target,
            "seeds": list(self.seeds),
            "flags": list(dict.fromkeys(self.flags)),
            "reasons": list(dict.fromkeys(self.reasons)),
        } | self.extra


class Held(Protocol):
    """What the cells of both modes have."""

    flags: list[str]
    target: float | None

    @property
    def scales(self) -> list[str]: ...


def begin(cell: Held, arm: str, options: Options) -> Result:
    """A result with what holds for the cell and for how the arm was tuned."""
    result = Result(flags=list(cell.flags), target=cell.target)
    if (why := options.why_untuned(cell.scales, arm)) is not None:
        result.flags.append("untuned")
        result.reasons.extend(why)
    return result


def name_seeds(result: Result, base: Iterable[str], variant: Iterable[str]) -> None:
    """Notes which seeds are compared: the shared ones, else `unpaired` runs side by side."""
    base, variant = list(base), list(variant)
    if base == variant:
        result.seeds = tuple(base)
    else:
        result.flags.append("unpaired")
        result.seeds = tuple(f"{b}/{v}" for b, v in zip(base, variant, strict=False))
    if min(len(base), len(variant)) == 1:
        result.flags.append("no_ci")


def differences(result: Result, base: Array, variant: Array) -> Array:
    """base - variant of each seed.

    Runs that share no seed are independent, so any pairing of them will do where one value a seed
    is needed: in the order given, moved so that their mean is the difference of all runs' means.
    """
    if not result.unpaired:
        return base - variant
    n = min(base.size, variant.size)
    d = base[:n] - variant[:n]
    return d - d.mean() + base.mean() - variant.mean()


def mean_interval(result: Result, base: Array, variant: Array) -> stats.Interval | None:
    if result.unpaired:
        return stats.welch_interval(base, variant)
    return stats.paired_interval(base - variant)


def settle(result: Result, base: Array, variant: Array) -> None:
    """The gain in compute from ln C_b and ln C_v of each seed."""
    result.log_base = base
    result.logs = differences(result, base, variant)
    result.interval = mean_interval(result, base, variant)
    result.c_baseline, result.c_variant = float(np.exp(base.mean())), float(np.exp(variant.mean()))


def settle_time(result: Result, log_hw: Array) -> None:
    """G_time and G_hw from ln F_v / F_b of each seed, and how far a benchmark's G_hw is off."""
    result.log_hw = log_hw
    result.log_time = result.logs + log_hw
    measured = float(log_hw.mean())
    if result.g_hw is None:
        result.g_hw = float(np.exp(measured))
    result.residual = measured - float(np.log(result.g_hw))
    if abs(result.residual) > MAX_RESIDUAL:
        result.flags.append("identity_failed")


def settle_bound(
    result: Result, base: Array, variant: Array, *, censored_base: bool, target: float
) -> Result:
    """G_alg <= C_b / C_v,max, or G_alg >= C_b,max / C_v where it is the baseline that fails."""
    who = "baseline" if censored_base else "variant"
    result.status = "censored"
    result.bound = float(np.exp(base.mean() - variant.mean()))
    result.bound_side = "lower" if censored_base else "upper"
    result.flags.append("censored")
    result.reasons.append(
        f"the {who} never reaches the target {target:.4f}: G_alg {'>=' if censored_base else '<='} "
        f"{result.bound:.3g}"
    )
    if censored_base:
        result.c_variant = float(np.exp(variant.mean()))
    else:
        result.c_baseline = float(np.exp(base.mean()))
    return result


def executed_over_model(curves: Iterable[Curve]) -> float | None:
    ratios = [c.executed_flops[-1] / c.flops[-1] for c in curves if c.executed_flops is not None]
    return float(np.mean(ratios)) if ratios else None

"""The options; the cells of crossing and slope mode, their targets, what makes one untrustworthy.

A *cell* is one scale and budget: arms are compared inside a cell, seed by seed. (In endpoint mode a
cell holds all budgets of a scale: see endpoint.py.)

Target of a cell, unless one is given: the baseline's running minimum at 80% of its compute, that of
its worst seed, so that every seed gets there with room to spare. At the very end the target would
be the extreme of the baseline's own noise, and an arm that is equal would miss it half of the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ceg_model.mfu import check_dense
from ceg_model.study.crossing import NOISE, Crossing, loss_at, noise_sd, rise
from ceg_model.study.curves import Curve, CurveError, Key

MODES = ("endpoint", "crossing", "slope")
TARGET_FRACTION = 0.8


class OptionError(ValueError):
    """An option of the estimator that does not fit the curves."""


@dataclass(frozen=True)
class Options:
    baseline: str = "baseline"
    target: float | None = None
    target_at_flops: float | None = None
    mode: str | None = None  # endpoint where the curves allow it, else crossing
    peak_flops: float | None = None
    same_maths: frozenset[str] = frozenset()  # arms whose C is the baseline's
    twins: Mapping[str, str] = field(default_factory=dict)  # arm -> another with the same C
    bundles: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # From a throughput benchmark: scale -> arm -> F_v / F_b. Else F comes from the runs themselves.
    hardware: Mapping[str, Mapping[str, float]] | None = None
    # True, or (scale, arm) -> why its learning rate is not tuned: the optimum lay on the sweep's
    # edge, or of two arms only one was swept. The baseline's own entry taints all arms there.
    untuned: bool | Mapping[tuple[str, str], str] = False
    fit: bool = True  # power laws for plots, in endpoint mode; they take seconds

    def why_untuned(self, scales: Iterable[str], arm: str) -> list[str] | None:
        """Reasons, [] where none was given, None where the arm and the baseline are tuned."""
        if isinstance(self.untuned, bool):
            return [] if self.untuned else None
        pairs = [(scale, name) for scale in scales for name in (self.baseline, arm)]
        found = [
            f"{name}{f' at scale {scale}' if scale else ''}: {self.untuned[scale, name]}"
            for scale, name in pairs
            if (scale, name) in self.untuned
        ]
        return found or None


@dataclass
class Cell:
    """One scale and budget: curves by arm and seed, and the target they are held to."""

    name: str
    curves: dict[str, dict[str, Curve]]
    target: float | None = None
    offer: float | None = None
    flags: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    crossings: dict[Key, Crossing] = field(default_factory=dict)  # of the target, as asked for

    @property
    def arms(self) -> list[str]:
        return list(self.curves)

    @property
    def scales(self) -> list[str]:
        return list(dict.fromkeys(c.key.scale for s in self.curves.values() for c in s.values()))

    def most_flops(self, arm: str) -> float:
        runs = self.curves.get(arm, {}).values()
        return max((float(c.flops.max(initial=0)) for c in runs), default=0.0)


def check_options(curves: Sequence[Curve], options: Options) -> None:
    """Raises OptionError, and CurveError where two curves have one key."""
    if options.mode is not None and options.mode not in MODES:
        raise OptionError(f"mode must be one of {', '.join(MODES)}, got {options.mode!r}")
    names = list(dict.fromkeys(c.key.arm for c in curves))
    if options.baseline not in names:
        raise OptionError(f"--baseline must be one of {', '.join(names)}, got {options.baseline!r}")
    if options.peak_flops is not None:
        check_dense(options.peak_flops)
    seen = set()
    for curve in curves:
        if curve.key in seen:
            raise CurveError(
                f"expected one curve for each arm, scale, budget and seed, got two {curve.key}"
            )
        seen.add(curve.key)


def make_cells(curves: Sequence[Curve], options: Options) -> list[Cell]:
    cells: dict[str, Cell] = {}
    for curve in curves:
        name = "/".join(part for part in (curve.key.scale, curve.key.budget) if part)
        cell = cells.setdefault(name, Cell(name, {}))
        cell.curves.setdefault(curve.key.arm, {})[curve.key.seed] = curve
    for cell in cells.values():
        choose_target(cell, options)
    return list(cells.values())


def choose_target(cell: Cell, options: Options) -> None:
    base = list(cell.curves.get(options.baseline, {}).values())
    for curve in base:
        cell.refusals.extend(distrust(curve, options))
    if not base:
        cell.refusals.append(f"no run of {options.baseline} at this scale")
    elif any(c.loss.size < 2 for c in base):
        cell.refusals.append(f"{options.baseline} needs at least 2 evaluations")
    if cell.refusals:
        return
    rises = [r for r in map(rise, base) if r is not None]
    lowest = max(float(c.loss.min()) for c in base)
    if rises:
        cell.flags.append("rising_baseline")
    if options.target_at_flops is not None:
        _target_at(cell, base, options.target_at_flops)
    elif options.target is not None:
        cell.target = options.target
        final = float(np.mean([c.loss[-1] for c in base]))
        if rises and abs(options.target - final) < max(noise_sd(c) or 0.0 for c in base):
            refuse_risen(cell, final, lowest)
    else:
        at = [loss_at(c, TARGET_FRACTION * c.flops[-1], best=True) for c in base]
        cell.target = max(at)


def _target_at(cell: Cell, base: list[Curve], flops: float) -> None:
    low = max(float(c.flops[0]) for c in base)
    high = min(float(c.flops[-1]) for c in base)
    if not low <= flops <= high * (1 + 1e-9):
        cell.refusals.append(
            f"--target-at-flops must lie within the baseline's curves, [{low:.4g}, {high:.4g}], "
            f"got {flops:.4g}: that would be an extrapolation"
        )
        return
    flops = min(flops, high)
    raw = [loss_at(c, flops, best=False) for c in base]
    best = [loss_at(c, flops, best=True) for c in base]
    cell.target = float(np.mean(raw))
    above = [
        r - b > NOISE * max(noise_sd(c) or 0.0, 1e-9)
        for r, b, c in zip(raw, best, base, strict=True)
    ]
    if any(above):
        refuse_risen(cell, cell.target, max(best))


class Refusable(Protocol):
    offer: float | None
    flags: list[str]
    refusals: list[str]


def refuse_risen(cell: Refusable, risen: float, minimum: float) -> None:
    cell.flags.append("rising_baseline")
    cell.offer = minimum
    cell.refusals.append(
        f"the baseline's loss has risen to {risen:.4f}, above its minimum by more than "
        f"{NOISE:g} sd: a risen loss is no target; its minimum is {minimum:.4f}"
    )


def distrust(curve: Curve, options: Options) -> list[str]:
    reasons = [f"{curve.key.arm} seed {curve.key.seed}: {p}" for p in curve.problems]
    peak = options.peak_flops
    if not reasons and peak is not None and curve.seconds is not None:
        work = curve.flops if curve.executed_flops is None else curve.executed_flops
        timed = curve.seconds > 0
        rate = float((work[timed] / curve.seconds[timed]).max(initial=0.0))
        if rate > peak:
            reasons.append(
                f"{curve.key.arm} seed {curve.key.seed}: FLOP/s must not exceed the peak "
                f"{peak:.4g}, got {rate:.4g} (MFU {rate / peak:.2f} > 1)"
            )
    return reasons

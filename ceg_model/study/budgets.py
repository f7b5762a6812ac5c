"""Endpoint mode's cells: the runs of one scale by budget and seed, and what a plot needs of them.

Each run counts with its last evaluation, so every budget needs a complete schedule of its own (or a
trunk at constant rate with a decay for each budget). A cell is a scale where the baseline and an
arm have three budgets; where no scale is one, all scales together are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ceg_model.study import powerlaw
from ceg_model.study.cells import Options, distrust, refuse_risen
from ceg_model.study.crossing import NOISE, noise_sd
from ceg_model.study.curves import Curve
from ceg_model.study.ladder import (
    MIN_BUDGETS,
    Ladder,
    Point,
    Runs,
    best_ladder,
)

ALL_SCALES = "all scales"
DRAWN_POINTS = 64
SAME_END = 0.1  # how far apart the last learning rates may be, as fractions of their peaks


@dataclass
class Cell:
    """The runs of one scale (or of all), by arm, (scale, budget) and seed."""

    name: str
    runs: dict[str, dict[Point, dict[str, Curve]]] = field(default_factory=dict)
    target: float | None = None  # one that was asked for
    offer: float | None = None
    flags: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    @property
    def arms(self) -> list[str]:
        return list(self.runs)

    @property
    def scales(self) -> list[str]:
        return list(dict.fromkeys(scale for points in self.runs.values() for scale, _ in points))

    def curves(self, arm: str) -> list[Curve]:
        return [c for by_seed in self.runs.get(arm, {}).values() for c in by_seed.values()]

    def most_flops(self, arm: str) -> float:
        return max((float(c.flops.max(initial=0)) for c in self.curves(arm)), default=0.0)


def possible(curves: Sequence[Curve]) -> bool:
    """Has every arm three named budgets, each with a schedule that came to its end?

    Runs of one arm that stop at other fractions of their peak rate are cuts of a longer schedule.
    """
    arms: dict[str, list[Curve]] = {}
    for curve in curves:
        arms.setdefault(curve.key.arm, []).append(curve)
    return all(
        len({(c.key.scale, c.key.budget) for c in own if c.key.budget}) >= MIN_BUDGETS
        and "schedule_confounded" not in schedule_flags(own)
        for own in arms.values()
    )


def make_cells(curves: Sequence[Curve], options: Options) -> list[Cell]:
    by_scale: dict[str, Cell] = {}
    whole = Cell(ALL_SCALES)
    for curve in curves:
        key = curve.key
        for cell in (by_scale.setdefault(key.scale, Cell(key.scale)), whole):
            points = cell.runs.setdefault(key.arm, {})
            points.setdefault((key.scale, key.budget), {})[key.seed] = curve
    cells = [cell for cell in by_scale.values() if _is_cell(cell, options.baseline)] or [whole]
    for cell in cells:
        _prepare(cell, options)
    return cells


def _is_cell(cell: Cell, baseline: str) -> bool:
    enough = [arm for arm, points in cell.runs.items() if len(points) >= MIN_BUDGETS]
    return baseline in enough and len(enough) > 1


def _prepare(cell: Cell, options: Options) -> None:
    """Leaves risen baseline points out and checks the target that was asked for."""
    base = cell.runs.get(options.baseline, {})
    for curve in cell.curves(options.baseline):
        cell.refusals.extend(distrust(curve, options))
        if not curve.loss.size:
            cell.refusals.append(f"{options.baseline} seed {curve.key.seed} has no evaluation")
    if cell.refusals:
        return
    risen = {point: runs for point, runs in base.items() if _has_risen(list(runs.values()))}
    if risen:
        cell.flags.append("rising_baseline")
        cell.runs[options.baseline] = {p: runs for p, runs in base.items() if p not in risen}
    own = best_ladder(cell.runs.get(options.baseline, {}))
    if own is None:
        budgets = len(cell.runs.get(options.baseline, {}))
        cell.refusals.append(
            f"{MIN_BUDGETS} budgets of {options.baseline} are needed with loss falling from one "
            f"to the next, got {budgets}{' that have not risen at their end' if risen else ''}"
        )
        if risen:
            cell.offer = float(np.mean([c.loss.min() for r in risen.values() for c in r.values()]))
        return
    _check_target(cell, own, risen, options)


def _check_target(cell: Cell, own: Ladder, risen: Runs, options: Options) -> None:
    asked, high = options.target_at_flops, float(np.exp(own.log_flops[own.vertices[-1]]))
    low = float(np.exp(own.log_flops[0]))
    for runs in risen.values():
        final = float(np.mean([c.loss[-1] for c in runs.values()]))
        near = max(noise_sd(c) or 0.0 for c in runs.values())
        flops = float(np.mean([c.flops[-1] for c in runs.values()]))
        if (options.target is not None and abs(options.target - final) < near) or (
            asked is not None and (abs(asked / flops - 1) < 1e-6 or high < asked <= flops)
        ):
            refuse_risen(cell, final, own.bottom)
            return
    cell.target = options.target
    if asked is not None:
        if not low * (1 - 1e-9) <= asked <= high * (1 + 1e-9):
            cell.refusals.append(
                f"--target-at-flops must lie within the baseline's budgets, [{low:.4g}, "
                f"{high:.4g}], got {asked:.4g}: that would be an extrapolation"
            )
            return
        cell.target = own.loss_at(float(np.log(asked)))


def _has_risen(runs: Sequence[Curve]) -> bool:
    """Does the mean last loss lie above the mean minimum by more than the noise?"""
    sds = [noise_sd(c) for c in runs]
    if not runs or any(sd is None for sd in sds):
        return False
    above = np.mean([c.loss[-1] - c.loss.min() for c in runs])
    return bool(above > NOISE * max(float(np.mean([sd or 0.0 for sd in sds])), 1e-9))


def schedule_flags(curves: Sequence[Curve]) -> list[str]:
    if any(c.lr is None for c in curves):
        return ["schedule_unknown"]
    ends = [c.lr[-1] / c.lr.max() for c in curves if c.lr is not None and c.lr.size and c.lr.any()]
    return ["schedule_confounded"] if ends and max(ends) - min(ends) > SAME_END else []


def common_target(cell: Cell, options: Options) -> float | None:
    """The target asked for, else the lowest loss that all arms reach which overlap the baseline."""
    if cell.target is not None or cell.refusals:
        return cell.target
    overlap = _common_overlap(cell, options.baseline)
    return None if overlap is None else overlap[0]


def _common_overlap(cell: Cell, baseline: str) -> tuple[float, float] | None:
    """Of the arms that share losses with the baseline; the others have bounds alone."""
    ladders = _drawable(cell)
    base = ladders.get(baseline)
    if base is None:
        return None
    shared = [a for a in ladders.values() if a.bottom < base.top and base.bottom < a.top]
    low, high = max(a.bottom for a in shared), min(a.top for a in shared)
    return (low, high) if low < high else None


def _drawable(cell: Cell) -> dict[str, Ladder]:
    """The ladders of the arms that can be trusted, each with all its whole seeds."""
    out: dict[str, Ladder] = {}
    for arm, runs in cell.runs.items():
        if all(c.loss.size and not c.problems for c in cell.curves(arm)):
            found = best_ladder(runs)
            out |= {} if found is None else {arm: found}
    return out


def describe(cells: Mapping[str, Cell], options: Options) -> dict[str, Any]:
    """What a plot of each cell needs: points, envelopes and the overlap of all arms."""
    out: dict[str, Any] = {}
    for name, cell in cells.items():
        overlap = _common_overlap(cell, options.baseline)
        out[name] = {
            "points": {arm: list(_points(runs)) for arm, runs in cell.runs.items()},
            "envelope": {arm: _drawn(found) for arm, found in _drawable(cell).items()},
            "overlap": None if overlap is None else list(overlap),
        }
    return out


def fits(cells: Mapping[str, Cell], options: Options) -> dict[str, Any]:
    """Power laws for plots: of every cell, and over the envelope of all scales."""
    if not options.fit:
        return {}
    out = {}
    whole: dict[str, dict[Point, dict[str, Curve]]] = {}
    for name, cell in cells.items():
        if ladders := _drawable(cell):
            out[name] = powerlaw.describe(ladders, envelope=name == ALL_SCALES)
        for arm in cell.runs:
            whole.setdefault(arm, {}).update(cell.runs[arm])
    if len(cells) > 1 and (ladders := _drawable(Cell(ALL_SCALES, whole))):
        out[ALL_SCALES] = powerlaw.describe(ladders, envelope=True)
    return out


def _points(runs: Runs) -> Iterator[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for (scale, budget), by_seed in runs.items():
        ends = [(c.flops[-1], c.loss[-1]) for c in by_seed.values() if c.loss.size]
        finite = [e for e in ends if np.isfinite(e).all()]
        if finite:
            flops, losses = np.array(finite).T
            rows.append(
                {"scale": scale, "budget": budget, "flops": float(np.exp(np.log(flops).mean())),
                 "loss": float(losses.mean()), "n": len(finite), "low": float(losses.min()),
                 "high": float(losses.max())}
            )  # fmt: skip
    yield from sorted(rows, key=lambda row: row["flops"])


def _drawn(arm: Ladder) -> dict[str, list[float]]:
    losses = np.linspace(arm.top, arm.bottom, DRAWN_POINTS)
    return {"flops": np.exp(arm.envelope(losses)).tolist(), "loss": losses.tolist()}

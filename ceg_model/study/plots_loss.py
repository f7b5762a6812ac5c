"""Loss against compute and against seconds: whole curves, or runs' ends at several budgets."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from ceg_kernels.measure.svg import HEIGHT, INK, PAPER, panel
from ceg_model.study.plots_style import (
    ALL_SCALES,
    HALO,
    NOTE,
    RIM,
    End,
    Look,
    Plot,
    Results,
    arms,
    cell_of,
    compute_axis,
    is_endpoint,
    label_ends,
    looks,
    scale_title,
    short,
)

Array = NDArray[np.float64]

WHAT = {"flops": "model FLOPs", "seconds": "training seconds"}
MOST_POINTS = 160  # of a drawn curve; more are not seen at this size


@dataclass(frozen=True)
class Line:
    """An arm's line in a panel: the mean with the seeds' range, and in endpoint mode the points."""

    x: Array
    y: Array
    low: Array
    high: Array
    points: list[dict[str, Any]] = field(default_factory=list)  # of each budget: x, loss, low, high


def losses(results: Results, axis: str) -> Plot:
    """Loss against "flops" or "seconds", a panel for each cell."""
    panels = []
    for i, (cell, lines) in enumerate(_by_cell(results, axis).items()):
        name = scale_title(cell)
        body = partial(_panel, results=results, cell=cell, axis=axis, lines=lines)
        label = f"Loss against {WHAT[axis]}, {name}, one line per arm"
        panels.append(panel(f"loss-{axis}-{i}", name, body, label=label))
    why = "" if panels else f"No run recorded its {WHAT[axis]}, so this plot is left out."
    return Plot(panels, why)


def _by_cell(results: Results, axis: str) -> dict[str, dict[str, Line]]:
    """Cell -> arm -> line."""
    out: dict[str, dict[str, Line]] = {}
    if is_endpoint(results):
        for cell, points in _endpoints(results, axis).items():
            out[cell] = {arm: _through(results, cell, arm, own) for arm, own in points.items()}
        return out
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for curve in results["curves"]:
        if curve.get(axis):
            by_arm = runs.setdefault(cell_of(results, curve), {})
            by_arm.setdefault(curve["arm"], []).append(curve)
    return {c: {arm: _mean(own, axis) for arm, own in by.items()} for c, by in runs.items()}


def _mean(runs: list[dict[str, Any]], axis: str) -> Line:
    n = min(len(c["loss"]) for c in runs)
    keep = np.unique(np.linspace(0, n - 1, min(n, MOST_POINTS)).round().astype(int))
    x = np.mean([np.asarray(c[axis][:n], dtype=float)[keep] for c in runs], axis=0)
    y = np.array([np.asarray(c["loss"][:n], dtype=float)[keep] for c in runs])
    return Line(x, y.mean(axis=0), y.min(axis=0), y.max(axis=0))


def _endpoints(results: Results, axis: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Cell -> arm -> a point for each budget. The estimate knows FLOPs, the curves know seconds."""
    cells = results["estimate"].get("cells") or {}
    ends = _final_seconds(results) if axis == "seconds" else {}
    out: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for cell, content in cells.items():
        for arm, points in content["points"].items():
            for p in points:
                at = p["flops"] if axis == "flops" else ends.get((arm, p["scale"], p["budget"]))
                if at:
                    out.setdefault(cell, {}).setdefault(arm, []).append(p | {"x": at})
    fits = results["estimate"].get("fit") or {}
    if axis == "flops" and len(cells) > 1 and ALL_SCALES in fits:
        together: dict[str, list[dict[str, Any]]] = {}
        for by_arm in out.values():
            for arm, points in by_arm.items():
                together.setdefault(arm, []).extend(points)
        out[ALL_SCALES] = together
    for by_arm in out.values():
        for points in by_arm.values():
            points.sort(key=lambda p: p["x"])
    return out


def _final_seconds(results: Results) -> dict[tuple[str, str, str], float]:
    """(arm, scale, budget) -> seconds of a whole run, mean over seeds."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for c in results["curves"]:
        if c.get("seconds"):
            key = (c["arm"], c["scale"], c.get("budget") or "")
            found.setdefault(key, []).append(c["seconds"][-1])
    return {key: float(np.mean(values)) for key, values in found.items()}


def _through(results: Results, cell: str, arm: str, points: list[dict[str, Any]]) -> Line:
    """The lower envelope: as the estimate drew it where it did, else through the best so far."""
    envelope = (results["estimate"]["cells"].get(cell) or {}).get("envelope", {}).get(arm)
    if envelope and points[0]["x"] == points[0]["flops"]:
        x, y = np.array(envelope["flops"], dtype=float), np.array(envelope["loss"], dtype=float)
    else:
        best = np.minimum.accumulate([p["loss"] for p in points])
        keep = np.array([p["loss"] for p in points]) <= best
        x, y = np.array([p["x"] for p in points])[keep], best[keep]
    return Line(x, y, y, y, points)


def _panel(ax: Axes, results: Results, cell: str, axis: str, lines: dict[str, Line]) -> None:
    style, target = looks(results), results["estimate"]["target_losses"].get(cell)
    ordered = {arm: lines[arm] for arm in arms(results) if arm in lines}
    for arm, line in ordered.items():
        look = style[arm]
        ax.fill_between(
            line.x, line.low, line.high, color=look.colour, alpha=0.16, linewidth=0, gid=look.gid
        )
        ax.plot(
            line.x, line.y, color=look.colour, linestyle=look.dash, gid=look.gid,
            zorder=4 if arm == results["estimate"]["baseline"] else 3,
        )  # fmt: skip
        _points(ax, line, look)
    fit = (results["estimate"].get("fit") or {}).get(cell) or {}
    laws = fit.get("arms") or {} if axis == "flops" else {}
    _limits(ax, list(ordered.values()), target, beyond=1.4 if laws else 1.08)
    _power_laws(ax, laws, style)
    for arm, line in ordered.items():
        _mark_crossing(ax, line, target, style[arm])
    ends = [
        End(float(line.x[-1]), float(line.y[-1]), short(results, arm), style[arm])
        for arm, line in ordered.items()
    ]
    label_ends(ax, ends, HEIGHT)
    _axes(ax, axis, target)


def _points(ax: Axes, line: Line, look: Look) -> None:
    """The ends of runs: their mean over seeds, and the least and greatest as a bar."""
    if not line.points:
        return
    x, y = [p["x"] for p in line.points], [p["loss"] for p in line.points]
    bars = ax.vlines(
        x, [p["low"] for p in line.points], [p["high"] for p in line.points],
        color=look.colour, linewidth=1.2, zorder=4,
    )  # fmt: skip
    bars.set_gid(look.gid)
    ax.plot(x, y, look.marker, color=look.colour, markersize=4.5, zorder=5, gid=look.gid)


def _power_laws(ax: Axes, laws: dict[str, Any], style: dict[str, Look]) -> None:
    """L = E + A C^-a dashed; dotted where it goes beyond what was run."""
    for arm, law in laws.items():
        if arm not in style:
            continue
        x, y = np.array(law["flops"]), np.array(law["loss"])
        beyond = np.array(law.get("extrapolated") or np.zeros(x.size, dtype=bool), dtype=bool)
        for here, dash in ((~beyond, (0, (5, 3))), (beyond, (0, (1, 2)))):
            ax.plot(
                np.where(here, x, np.nan), np.where(here, y, np.nan), color=style[arm].colour,
                linestyle=dash, linewidth=1, alpha=0.75, zorder=2, gid=style[arm].gid,
            )  # fmt: skip


def _limits(ax: Axes, lines: list[Line], target: float | None, beyond: float) -> None:
    """From where the first curve comes down into the panel; all of it where there are points."""
    if any(line.points for line in lines):
        tops = [p["high"] for line in lines for p in line.points]
        bottoms = [p["low"] for line in lines for p in line.points]
    else:
        tops = [float(line.y[min(line.y.size // 8, line.y.size - 1)]) for line in lines]
        bottoms = [float(line.y.min()) for line in lines]
    top = max(tops)
    bottom = min([*bottoms, *([] if target is None else [target])])
    begins = [float(x) for ln in lines for x in ln.x[ln.y <= top][:1] if x > 0]
    ends = [float(line.x[-1]) for line in lines]
    ends += [p["x"] for line in lines for p in line.points]
    ax.set_xscale("log")
    ax.set_xlim(min(begins, default=max(ends) / 10) / 1.1, max(ends) * beyond)
    pad = 0.05 * (top - bottom) or 0.01
    ax.set_ylim(bottom - pad, top + pad / 2)


def _axes(ax: Axes, axis: str, target: float | None) -> None:
    if target is not None:
        ax.axhline(target, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        ax.annotate(
            f"target {target:.3f}", (0.015, target), xycoords=("axes fraction", "data"),
            xytext=(0, -3), textcoords="offset points", va="top", fontsize=NOTE,
            bbox=HALO, zorder=7,
        )  # fmt: skip
    compute_axis(ax.xaxis, *ax.get_xlim())
    ax.set_xlabel(WHAT[axis])
    ax.set_ylabel("evaluation loss, nats a token")


def _mark_crossing(ax: Axes, line: Line, target: float | None, look: Look) -> None:
    if target is None or line.y.min() > target:
        return
    low = np.minimum.accumulate(line.y)
    at = int(np.searchsorted(-low, -target))
    if 0 < at < low.size and low[at - 1] > low[at]:
        part = (low[at - 1] - target) / (low[at - 1] - low[at])
        place = np.exp(np.log(line.x[at - 1]) + part * np.log(line.x[at] / line.x[at - 1]))
        ax.plot(
            place, target, look.marker, color=look.colour, markeredgecolor=PAPER, markersize=8,
            markeredgewidth=RIM, zorder=6, gid=look.gid,
        )  # fmt: skip

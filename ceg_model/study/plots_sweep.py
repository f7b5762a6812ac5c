"""Learning-rate sweeps: loss against rate for every arm and scale, and the rate that was chosen."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from ceg_kernels.measure.svg import BAD, INK, PAPER, SERIES, panel
from ceg_model.study.plots_style import (
    DASHES,
    MARKERS,
    NOTE,
    End,
    Look,
    Plot,
    Results,
    compute_axis,
    label_ends,
    scales,
    title,
)

WIDTH, HEIGHT = 3.4, 2.5
WORST = 0.5  # nats above the best rate; what lies higher leaves the panel at its top


def sweeps(results: Results) -> Plot:
    """One panel an arm: how far each rate's loss lies above the best one's, a line a scale."""
    found: dict[str, list[dict[str, Any]]] = {}
    for sweep in results.get("sweeps") or []:
        if len(_finite(sweep)) > 1:
            found.setdefault(sweep["arm"], []).append(sweep)
    if not found:
        return Plot(why="No learning rate was swept, so there is no sweep to show.")
    every = [p for own in found.values() for sweep in own for p in _finite(sweep)]
    rates = [rate for rate, _ in every]
    above = [_loss - _best(s) for own in found.values() for s in own for _, _loss in _finite(s)]
    top = min(max([*above, 0.01]), WORST)
    panels = [
        panel(
            f"sweep-{i}",
            title(results, arm),
            partial(
                _sweep, results=results, own=own, top=top,
                reach=(min(rates) / 1.3, max(rates) * 1.3),
            ),
            width=WIDTH,
            height=HEIGHT,
            label=f"Loss against learning rate of {title(results, arm)}, one line per scale",
        )
        for i, (arm, own) in enumerate(found.items())
    ]  # fmt: skip
    return Plot(panels, arms=tuple(found))


def _finite(sweep: dict[str, Any]) -> list[tuple[float, float]]:
    pairs = [(p["lr"], p["loss"]) for p in sweep["points"]]
    return sorted((r, v) for r, v in pairs if v is not None and math.isfinite(v))


def _best(sweep: dict[str, Any]) -> float:
    return min(loss for _, loss in _finite(sweep))


def _sweep(
    ax: Axes, results: Results, own: list[dict[str, Any]], top: float, reach: tuple[float, float]
) -> None:
    order = scales(results)
    ends: list[End] = []
    for i, sweep in enumerate(own):
        at = order.index(sweep["scale"]) if sweep["scale"] in order else i
        look = Look(SERIES[at % len(SERIES)], MARKERS[at % len(MARKERS)], DASHES[0], "")
        rates, losses = zip(*_finite(sweep), strict=True)
        above = [loss - _best(sweep) for loss in losses]
        ax.plot(rates, above, color=look.colour, linewidth=1.4, zorder=3, marker=look.marker,
                markersize=3.5)  # fmt: skip
        _chosen(ax, sweep, dict(zip(rates, above, strict=True)), look)
        name = _name(sweep, own)
        if all(end.text != name for end in ends):  # other seeds of it have the same look
            ends.append(End(rates[-1], min(above[-1], top), name, look))
    ax.set_xscale("log")
    ax.set_xlim(*reach)
    ax.set_ylim(-0.12 * top, top * 1.05)
    ax.axhline(0, color=INK, linewidth=0.6, zorder=1)
    compute_axis(ax.xaxis, *reach)
    label_ends(ax, ends, HEIGHT)
    ax.set_xlabel("peak learning rate")
    ax.set_ylabel("nats above the best")


def _name(sweep: dict[str, Any], own: list[dict[str, Any]]) -> str:
    """The scale, and the budget where the scale was swept at more than one."""
    budgets = {s.get("budget") for s in own if s["scale"] == sweep["scale"]}
    return f"{sweep['scale']}/{sweep['budget']}" if len(budgets) > 1 else sweep["scale"]


def _chosen(ax: Axes, sweep: dict[str, Any], above: dict[float, float], look: Look) -> None:
    """A ring about the rate that was taken; on the edge of the sweep it is open and says so."""
    best = next((rate for rate in above if math.isclose(rate, sweep.get("best_lr") or 0)), None)
    if best is None:
        return
    edge = not sweep["inside"]
    ax.plot(
        best, above[best], "s" if edge else "o", markersize=10 if edge else 9,
        markerfacecolor=PAPER if edge else look.colour,
        markeredgecolor=BAD if edge else PAPER, markeredgewidth=1.8 if edge else 1, zorder=5,
    )  # fmt: skip
    if edge:
        ax.annotate(
            "edge", (best, above[best]), (0, 8), textcoords="offset points", color=BAD,
            ha="center", fontsize=NOTE, weight="bold",
        )  # fmt: skip

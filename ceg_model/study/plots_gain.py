"""The gain over all losses that both arms reach, over compute, and of the baseline over itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from ceg_kernels.measure.svg import ALG, FAINT, HEIGHT, INK, PAPER, SOFT, panel
from ceg_model.study.plots_style import (
    HALO,
    NOTE,
    RIM,
    End,
    Look,
    Plot,
    Results,
    compute_axis,
    gain_axis,
    label_ends,
    looks,
    scale_title,
    short,
    title,
)

MAX_BAND = 2.0  # intervals up to this factor are drawn as a band
MIN_SPAN = 1.5  # from bottom to top of a trend's panel at least
TREND_WIDTH, TREND_HEIGHT = 3.4, 2.7
AA_HEIGHT = 2.4


def over_range(results: Results) -> Plot:
    """G_alg over the whole overlapping loss range with its interval, a panel for each cell."""
    panels = []
    for i, cell in enumerate(results["estimate"]["target_losses"]):
        if any(_range_of(answer, cell) for answer in results["estimate"]["arms"].values()):
            label = f"Compute-equivalent gain over the loss range at scale {cell}"
            draw = partial(_range, results=results, cell=cell)
            panels.append(panel(f"range-{i}", scale_title(cell), draw, label=label))
    why = "No two arms have a range of losses in common, so the gain over it is left out."
    return Plot(panels, "" if panels else why)


def _range_of(answer: dict[str, Any], cell: str) -> dict[str, Any] | None:
    data = (answer["scales"].get(cell) or {}).get("range")
    return data if data and data["loss"] else None


def _range(ax: Axes, results: Results, cell: str) -> None:
    style = looks(results)
    seen: list[float] = [0.9, 1.1]
    ends = []
    for arm, answer in results["estimate"]["arms"].items():
        data = _range_of(answer, cell)
        if data is None:
            continue
        look = style[arm]
        x, y = np.array(data["loss"]), np.array(data["g_alg"])
        ax.plot(x, y, color=look.colour, linestyle=look.dash, zorder=3, gid=look.gid)
        if data["low"][0] is not None:
            lows, highs = np.array(data["low"]), np.array(data["high"])
            # Wider ones would cover the panel and say nothing but that.
            ax.fill_between(
                x, lows, highs, where=highs / lows < MAX_BAND, color=look.colour, alpha=0.1,
                linewidth=0, gid=look.gid,
            )  # fmt: skip
        at = int(x.argmin())
        ends.append(End(float(x[at]), float(y[at]), short(results, arm), look))
        seen += data["g_alg"]
    target = results["estimate"]["target_losses"].get(cell)
    if target is not None:
        ax.axvline(target, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        ax.annotate(
            "target ", (target, 0.01), xycoords=("data", "axes fraction"), ha="right",
            fontsize=NOTE, bbox=HALO,
        )  # fmt: skip
    ax.axhline(1, color=INK, linewidth=0.9)
    least, most = min(seen) / 1.15, max(seen) * 1.15
    ax.set_yscale("log")
    ax.set_ylim(least, most)
    gain_axis(ax.yaxis, least, most)
    ax.invert_xaxis()  # training goes to the right
    label_ends(ax, ends, HEIGHT)
    ax.set_xlabel("loss that both reach (training goes right)")
    ax.set_ylabel("G_alg, times less compute")


def trends(results: Results) -> Plot:
    """ln G_alg against ln C_b: an arm a panel, all with the same axes but for where they begin."""
    shown = {a: p for a, answer in results["estimate"]["arms"].items() if (p := _points(answer))}
    if not shown:
        return Plot(why="No scale gives a gain or a bound, so there is no trend to show.")
    x = [p["compute"] for points in shown.values() for p in points]
    reach = min(x) / 1.35, max(x) * 1.35
    # Equal steps look equal in all panels, so that slopes can be compared by eye.
    reached = {a: [v for p in points for v in p["values"]] for a, points in shown.items()}
    height = max(MIN_SPAN, *(max(v) / min(v) for v in reached.values())) * 1.2
    style = looks(results)
    panels = []
    for i, arm in enumerate(shown):
        middle = float(np.sqrt(max(reached[arm]) * min(reached[arm])))
        span = middle / height**0.5, middle * height**0.5
        draw = partial(_trend, results=results, arm=arm, look=style[arm], reach=reach, span=span)
        panels.append(
            panel(
                f"trend-{i}",
                title(results, arm),
                draw,
                note=results["estimate"]["class"][arm]["class"],
                width=TREND_WIDTH,
                height=TREND_HEIGHT,
                label=f"G_alg of {title(results, arm)} against the baseline's compute",
            )
        )
    return Plot(panels, arms=tuple(shown))


def _points(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """Each scale's gain and interval, or its bound, at the baseline's compute."""
    out = []
    for cell in answer["scales"].values():
        bounded = cell["status"] == "censored"
        value = cell.get("bound") if bounded else cell.get("g_alg")
        compute = cell.get("c_baseline") or (cell.get("c_variant") if bounded else None)
        if not value or not compute:
            continue
        pair = None if bounded else cell.get("ci")
        # A wide interval may leave the panel; it must not flatten all others.
        narrow = pair if pair and pair[1] / pair[0] < MAX_BAND else ()
        out.append({"compute": compute, "value": value, "bounded": bounded, "ci": pair,
                    "side": cell.get("bound_side"), "values": [value, *narrow]})  # fmt: skip
    return sorted(out, key=lambda p: p["compute"])


def _trend(
    ax: Axes, results: Results, arm: str, look: Look, *, reach: tuple[float, float],
    span: tuple[float, float],
) -> None:  # fmt: skip
    points = _points(results["estimate"]["arms"][arm])
    _wedge(ax, results["estimate"]["class"][arm], points, look, reach)
    for p in points:
        if p["ci"]:
            ax.plot([p["compute"]] * 2, p["ci"], color=look.colour, linewidth=1.2, zorder=3)
        ax.plot(
            p["compute"], p["value"], look.marker, color=look.colour, markersize=7.5, zorder=4,
            markerfacecolor=PAPER if p["bounded"] else look.colour,
            markeredgewidth=1.3 if p["bounded"] else RIM,
            markeredgecolor=look.colour if p["bounded"] else PAPER,
        )  # fmt: skip
        if p["bounded"]:
            up = p["side"] == "lower"
            ax.annotate(
                "", (p["compute"], p["value"]), (0, 20 if up else -20),
                textcoords="offset points", zorder=2,
                arrowprops={"arrowstyle": "<-", "color": look.colour, "linewidth": 1.2},
            )  # fmt: skip
    ax.axhline(1, color=INK, linewidth=0.9)
    ax.set(xscale="log", yscale="log", xlim=reach, ylim=span)
    gain_axis(ax.yaxis, *span, most=6)
    compute_axis(ax.xaxis, *reach)
    ax.set_xlabel("baseline's model FLOPs at the target")
    ax.set_ylabel("G_alg")


def _wedge(
    ax: Axes, trend: dict[str, Any], points: list[dict[str, Any]], look: Look,
    reach: tuple[float, float],
) -> None:  # fmt: skip
    """The fitted line, its slope's interval as a band, and +-g0: inside it the class is decided."""
    firm = [p for p in points if not p["bounded"]]
    if trend.get("slope") is None or len(firm) < 2:
        return
    centre = np.mean([np.log([p["compute"], p["value"]]) for p in firm], axis=0)
    x = np.geomspace(*reach, 40)
    run = np.log(x) - centre[0]

    def line(slope: float) -> np.ndarray:
        return np.exp(centre[1] + slope * run)

    margin = trend["margin"]
    ax.fill_between(x, line(-margin), line(margin), color=FAINT, linewidth=0, zorder=0.5)
    if trend.get("ci"):
        first, second = line(trend["ci"][0]), line(trend["ci"][1])
        ax.fill_between(x, first, second, color=look.colour, alpha=0.14, linewidth=0, zorder=1)
    ax.plot(x, line(trend["slope"]), color=look.colour, linestyle=look.dash, linewidth=1.4)


POINTS, TALL = 120, 10.0  # of the A/A plot: more pairs than this are a histogram, so high


def aa(results: Results) -> Plot:
    """The baseline against itself: every pair of seeds, and the interval of their mean."""
    gate = results["estimate"]["aa"]
    if not gate.get("ratios"):
        reason = gate.get("reason") or "no pair of seeds"
        return Plot(why=f"The baseline was not compared with itself: {reason}.")
    name = "The baseline against itself"
    return Plot([panel("aa", name, partial(_aa, gate=gate), height=AA_HEIGHT)])


def _aa(ax: Axes, gate: dict[str, Any]) -> None:
    ratios = np.sort(np.array(gate["ratios"], dtype=float))
    low, high = gate.get("ci") or (ratios[0], ratios[-1])
    reach = float(np.abs(np.log([*ratios, low, high])).max()) * 1.2 + 0.01
    many = ratios.size > POINTS
    places = np.zeros(1) if many else _stacked(np.log(ratios), 2 * reach / 40)
    top = TALL if many else max(places.max(), 3)
    if gate.get("ci"):
        ax.axvspan(low, high, color=ALG, alpha=0.14, linewidth=0)
        ax.plot([low, high], [-1, -1], color=ALG, linewidth=2.4, solid_capstyle="butt")
        ax.plot(gate["g_alg"], -1, "D", color=ALG, markeredgecolor=PAPER, markersize=7)
        ax.annotate(f"mean and 95% interval, {low:.3g} to {high:.3g}", (gate["g_alg"], -1),
                    (0, -7), textcoords="offset points", ha="center", va="top",
                    fontsize=NOTE, color=SOFT, bbox=HALO)  # fmt: skip
    if many:
        counts, edges = np.histogram(np.log(ratios), bins=40)
        ax.stairs(counts * (TALL / counts.max()), np.exp(edges), fill=True, color=ALG, alpha=0.5)
    else:
        ax.plot(ratios, places, "o", color=ALG, markeredgecolor=PAPER, markersize=8)
    ax.axvline(1, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    ax.set_xscale("log")
    ax.set_xlim(np.exp(-reach), np.exp(reach))
    ax.set_ylim(-2.4, top + 0.8)
    ax.yaxis.set_major_locator(NullLocator())
    ax.spines["left"].set_visible(False)
    gain_axis(ax.xaxis, *ax.get_xlim())
    each = f"{ratios.size} pairs of seeds" if many else "a point for each pair of seeds"
    ax.set_xlabel(f"“gain” of the baseline over itself, {each}")


def _stacked(values: np.ndarray, width: float) -> np.ndarray:
    """Heights at which points at sorted `values` do not cover each other."""
    heights: list[int] = []
    for i, value in enumerate(values):
        near = {heights[j] for j in range(i) if value - values[j] < width}
        heights.append(next(h for h in range(i + 1) if h not in near))
    return np.array(heights, dtype=float)

"""The plots of the report, each from results.json alone; see svg.py for how they enter the page."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from ceg_kernels.measure.svg import FAINT, INK, PAPER, panel

Results = dict[str, Any]

# Okabe and Ito's colours, told apart by people with any colour vision; the baseline takes the ink.
PALETTE = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^DvPX*"
MAX_BAND = 2.0  # intervals up to this factor are drawn as a band
BLUE, ORANGE = PALETTE[0], PALETTE[4]


def styles(arms: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and line style of each arm; the first is the baseline."""
    out = {arms[0]: (INK, "o", "-")}
    for i, arm in enumerate(arms[1:]):
        dash = "-" if i < len(PALETTE) else "--"
        out[arm] = (PALETTE[i % len(PALETTE)], MARKERS[(i + 1) % len(MARKERS)], dash)
    return out


def scales(results: Results) -> list[str]:
    return list(dict.fromkeys(c["scale"] for c in results["curves"]))


def arms(results: Results) -> list[str]:
    present = dict.fromkeys(c["arm"] for c in results["curves"])
    baseline = results["estimate"]["baseline"]
    return [baseline, *(a for a in present if a != baseline)]


def _times(value: float, _: object = None) -> str:
    return f"{value:.3g}×"


def _compute_axis(axis: Any, low: float, high: float) -> None:
    """Labels of a log axis: each decade, and 2 and 5 where there is hardly a decade."""
    axis.set_minor_formatter(NullFormatter())
    if high / low < 30:
        powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
        ticks = [m * 10.0**p for p in powers for m in (1, 2, 5)]
        axis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
        axis.set_major_formatter(FuncFormatter(_short))


def _short(value: float, _: object = None) -> str:
    if value < 1e4:
        return f"{value:g}"
    mantissa, power = f"{value:.0e}".split("e")
    return rf"${mantissa}\cdot 10^{{{int(power)}}}$"


def _log_gain_axis(axis: Any, low: float, high: float) -> None:
    """Ticks of a log axis of gains at round factors."""
    ticks = [t for t in (0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50) if low <= t <= high]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_times))
    axis.set_minor_formatter(NullFormatter())


def _by_seed(results: Results, scale: str, arm: str) -> list[dict[str, Any]]:
    return [c for c in results["curves"] if c["scale"] == scale and c["arm"] == arm]


def losses(results: Results, axis: str) -> list[str]:
    """Loss against model FLOPs or seconds: mean and seed band, target and crossings, per scale."""
    style = styles(arms(results))
    return [
        panel(
            f"loss-{axis}-{i}",
            f"Scale {scale}",
            partial(_loss, results=results, scale=scale, axis=axis, style=style),
            label=f"Loss against {axis} at scale {scale}, one line per arm",
        )
        for i, scale in enumerate(scales(results))
        if any(c.get(axis) for c in results["curves"] if c["scale"] == scale)
    ]


def _loss(ax: Axes, results: Results, scale: str, axis: str, style: dict) -> None:
    target = results["estimate"]["target_losses"].get(scale)
    top, bottom = 0.0, np.inf
    for arm in arms(results):
        runs = [c for c in _by_seed(results, scale, arm) if c.get(axis)]
        if not runs:
            continue
        n = min(len(c["loss"]) for c in runs)
        x = np.mean([c[axis][:n] for c in runs], axis=0)
        y = np.array([c["loss"][:n] for c in runs])
        colour, marker, dash = style[arm]
        ax.plot(x, y.mean(axis=0), color=colour, linestyle=dash, zorder=3)
        ax.fill_between(x, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.16, linewidth=0)
        bottom = min(bottom, float(y.min()))
        top = max(top, float(y[:, min(n // 8, n - 1)].mean()))
        _mark_crossing(ax, x, y.mean(axis=0), target, colour, marker)
    if target is not None:
        ax.axhline(target, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        ax.annotate(
            f"target {target:.3f}",
            (0.02, target),
            xycoords=("axes fraction", "data"),
            xytext=(0, -3),
            textcoords="offset points",
            va="top",
            fontsize=8.5,
        )
    ax.set_xscale("log")
    _compute_axis(ax.xaxis, *ax.get_xlim())
    ax.set_ylim(bottom - 0.04 * (top - bottom), top)
    ax.set_xlabel("model FLOPs" if axis == "flops" else "training seconds")
    ax.set_ylabel("evaluation loss, nats a token")


def _mark_crossing(
    ax: Axes, x: np.ndarray, y: np.ndarray, target: float | None, colour: str, marker: str
) -> None:
    if target is None or y.min() > target:
        return
    low = np.minimum.accumulate(y)
    at = int(np.searchsorted(-low, -target))
    if 0 < at < y.size and low[at - 1] > low[at]:
        part = (low[at - 1] - target) / (low[at - 1] - low[at])
        place = np.exp(np.log(x[at - 1]) + part * np.log(x[at] / x[at - 1]))
        ax.plot(place, target, marker, color=colour, markeredgecolor=PAPER, markersize=7, zorder=5)


def over_range(results: Results) -> list[str]:
    """G_alg over the whole overlapping loss range, per scale, with its interval."""
    style = styles(arms(results))
    return [
        panel(
            f"range-{i}",
            f"Scale {scale}",
            partial(_range, results=results, scale=scale, style=style),
            label=f"Compute-equivalent gain over the loss range at scale {scale}",
        )
        for i, scale in enumerate(scales(results))
    ]


def _range(ax: Axes, results: Results, scale: str, style: dict) -> None:
    means: list[float] = [0.8, 1.25]
    for arm, answer in results["estimate"]["arms"].items():
        data = (answer["scales"].get(scale) or {}).get("range")
        if not data or not data["loss"]:
            continue
        colour, marker, dash = style[arm]
        ax.plot(data["loss"], data["g_alg"], color=colour, linestyle=dash, zorder=3)
        ax.plot(data["loss"][-1], data["g_alg"][-1], marker, color=colour, markersize=6, zorder=4)
        if data["low"][0] is not None:
            lows, highs = np.array(data["low"]), np.array(data["high"])
            # Wider ones would cover the panel and say nothing but that.
            shown = highs / lows < MAX_BAND
            ax.fill_between(
                data["loss"], lows, highs, where=shown, color=colour, alpha=0.12, linewidth=0
            )
        means += data["g_alg"]
    target = results["estimate"]["target_losses"].get(scale)
    if target is not None:
        ax.axvline(target, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    ax.axhline(1, color=INK, linewidth=0.9)
    low, high = min(means) / 1.25, max(means) * 1.25
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    _log_gain_axis(ax.yaxis, low, high)
    ax.invert_xaxis()  # training goes to the right
    ax.set_xlabel("loss that both reach (training goes right)")
    ax.set_ylabel("G_alg, times less compute")


def bars(results: Results) -> list[str]:
    """ln G_time = ln G_alg + ln G_hw (+ residual), stacked, per scale."""
    return [
        panel(
            f"bars-{i}",
            f"Scale {scale}",
            partial(_bars, results=results, scale=scale),
            height=0.42 * len(results["estimate"]["arms"]) + 1.1,
            label=f"Time gain at scale {scale} as algorithmic times hardware gain",
        )
        for i, scale in enumerate(scales(results))
    ]


def _bars(ax: Axes, results: Results, scale: str) -> None:
    titles, ends = [], [0.8, 1.25]
    rows = list(results["estimate"]["arms"].items())[::-1]
    for place, (arm, answer) in enumerate(rows):
        titles.append(results["titles"].get(arm, arm))
        cell = answer["scales"].get(scale) or {}
        edges = {1: 0.0, -1: 0.0}
        parts = [(cell.get("g_alg"), BLUE, ""), (cell.get("g_hw"), ORANGE, "///")]
        if cell.get("g_time") and cell.get("residual") is not None:
            parts.append((float(np.exp(cell["residual"])), FAINT, ""))
        for gain, colour, hatch in parts:
            if not gain:
                continue
            sign = 1 if gain >= 1 else -1
            start, edges[sign] = edges[sign], edges[sign] + float(np.log(gain))
            left, right = np.exp(start), np.exp(edges[sign])
            ax.barh(
                place, right - left, left=left, height=0.62, color=colour, hatch=hatch,
                edgecolor=PAPER, linewidth=0.7, zorder=3,
            )  # fmt: skip
            ends.append(float(right))
        if cell.get("g_time"):
            ax.plot(cell["g_time"], place, "D", color=INK, markeredgecolor=PAPER, zorder=5)
            ends.append(cell["g_time"])
        elif cell.get("status") in ("censored", "refused"):
            text = cell["status"]
            if cell.get("bound"):
                text = f"G_alg {'≤' if cell['bound_side'] == 'upper' else '≥'} {cell['bound']:.2f}"
            right = float(np.exp(edges[1]))
            ax.annotate(text, (right, place), (5, 0), textcoords="offset points", va="center")
    low, high = min(ends) / 1.12, max(ends) * 1.2
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    _log_gain_axis(ax.xaxis, low, high)
    ax.axvline(1, color=INK, linewidth=0.9, zorder=4)
    ax.set_yticks(range(len(titles)), titles)
    ax.grid(False, axis="y")
    ax.set_xlabel("gain over the baseline, log scale")


def across_scales(results: Results) -> str:
    """G_alg at each scale against the baseline's compute; bounds are hollow."""
    style = styles(arms(results))

    def draw(ax: Axes) -> None:
        values = [0.8, 1.25]
        for arm, answer in results["estimate"]["arms"].items():
            colour, marker, dash = style[arm]
            cells = [c for c in answer["scales"].values() if c["status"] == "ok"]
            x, y = [c["c_baseline"] for c in cells], [c["g_alg"] for c in cells]
            if all(v is not None for v in x) and x:
                ax.plot(x, y, dash + marker, color=colour, markeredgecolor=PAPER, markersize=7)
                values += y
            for c in answer["scales"].values():
                if c["status"] == "censored" and c["c_baseline"]:
                    ax.plot(
                        c["c_baseline"], c["bound"], marker, color=colour, markerfacecolor="none"
                    )
                    values.append(c["bound"])
        ax.axhline(1, color=INK, linewidth=0.9)
        ax.set_xscale("log")
        ax.set_yscale("log")
        low, high = min(values) / 1.2, max(values) * 1.2
        ax.set_ylim(low, high)
        _log_gain_axis(ax.yaxis, low, high)
        _compute_axis(ax.xaxis, *ax.get_xlim())
        ax.set_xlabel("baseline's model FLOPs at the target")
        ax.set_ylabel("G_alg, times less compute")

    return panel("scales", "G_alg as compute grows", draw)


def aa(results: Results) -> str | None:
    """The baseline against itself: every pair of seeds, and the interval of their mean."""
    gate = results["estimate"]["aa"]
    if not gate.get("ratios"):
        return None

    def draw(ax: Axes) -> None:
        ratios = gate["ratios"]
        ax.plot(ratios, np.linspace(0.35, 0.65, len(ratios)), "o", color=BLUE, markersize=8)
        if gate.get("ci"):
            low, high = gate["ci"]
            ax.plot([low, high], [0.15, 0.15], color=INK, linewidth=2.2)
            ax.plot(gate["g_alg"], 0.15, "D", color=INK)
            ax.annotate("95% interval", (gate["g_alg"], 0.15), (0, 7), ha="center",
                        textcoords="offset points", fontsize=8.5)  # fmt: skip
        ax.axvline(1, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        reach = max(abs(np.log([*ratios, *(gate.get("ci") or ())]))) * 1.25 + 0.01
        ax.set_xlim(np.exp(-reach), np.exp(reach))
        ax.set_ylim(0, 0.9)
        ax.set_yticks([])
        ax.xaxis.set_major_formatter(FuncFormatter(_times))
        ax.set_xlabel("gain of the baseline over itself, other seed")

    return panel("aa", "What no change at all looks like", draw, height=2.3)


def roofline(results: Results) -> list[str]:
    """Achieved FLOP/s against intensity under this machine's measured roofs, per dtype."""
    roofs = results.get("roofs") or {}
    rows = [r for r in results.get("bench") or [] if r.get("gflops") and r.get("intensity")]
    out = []
    for dtype in dict.fromkeys(r["dtype"] for r in rows):
        peak = (roofs.get("flops") or {}).get(dtype)
        these = [r for r in rows if r["dtype"] == dtype]
        if peak and roofs.get("copy_bytes_per_s") and these:
            out.append(
                panel(
                    f"roof-{dtype}",
                    f"Roofline, {dtype}",
                    partial(
                        _roof, rows=these, peak=peak / 1e9, bandwidth=roofs["copy_bytes_per_s"]
                    ),
                )
            )
    return out


def _roof(ax: Axes, rows: list[dict[str, Any]], peak: float, bandwidth: float) -> None:
    x = np.array([r["intensity"] for r in rows])
    span = np.logspace(np.log10(x.min() / 3), np.log10(max(x.max() * 3, peak / bandwidth * 3e9)))
    ax.plot(span, np.minimum(peak, span * bandwidth / 1e9), color=INK, linewidth=1.4)
    kinds = (("reference", "s", PALETTE[2]), ("torch", "^", ORANGE), (None, "o", BLUE))
    for peer, marker, colour in kinds:
        these = [r for r in rows if r.get("peer") == peer]
        if these:
            ax.plot(
                [r["intensity"] for r in these],
                [r["gflops"] for r in these],
                marker,
                color=colour,
                markeredgecolor=PAPER,
                markersize=6.5,
                label=peer or "ours",
            )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("arithmetic intensity, FLOP a byte")
    ax.set_ylabel("GFLOP/s")
    legend = ax.legend(frameon=False, fontsize=8.5, loc="lower right")
    for text in legend.get_texts():
        text.set_color(INK)

"""Kernels under this machine's measured roofs, and the MFU of a training step."""

from __future__ import annotations

from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from ceg_kernels.measure import plot as rows_plot
from ceg_kernels.measure.svg import HW, INK, PAPER, SOFT, panel
from ceg_model.study.plots_style import LABEL, NOTE, Plot, Results, short

Row = dict[str, Any]

# What runs a kernel: marker and colour of ours, of stock torch, of the plain formula.
PEERS = {None: ("o", HW), "torch": ("^", INK), "reference": ("s", SOFT)}
NAMES = {None: "ours", "torch": "torch", "reference": "reference"}


def _rows(results: Results) -> list[Row]:
    wanted = ("fwd", "bwd", "fwd_bwd")
    rows = [r for r in results.get("bench") or [] if r.get("gflops") and r.get("intensity")]
    return [r for r in rows if r["direction"] in wanted and r.get("median_s")]


def roofline(results: Results) -> Plot:
    """Achieved FLOP/s against intensity under the measured roofs, a panel for each dtype."""
    roofs, rows = results.get("roofs") or {}, _rows(results)
    panels = []
    for dtype in rows_plot.dtypes_of(rows):
        peak = (roofs.get("flops") or {}).get(dtype)
        if peak and roofs.get("copy_bytes_per_s"):
            these = [r for r in rows if r["dtype"] == dtype]
            draw = partial(
                _roof, rows=these, peak=peak / 1e9, bandwidth=roofs["copy_bytes_per_s"] / 1e9
            )
            panels.append(panel(f"roof-{dtype}", f"Roofline, {dtype}", draw))
    why = "No kernel was benched under measured roofs, so there is no roofline."
    return Plot(panels, "" if panels else why)


def _roof(ax: Axes, rows: list[Row], peak: float, bandwidth: float) -> None:
    x = [r["intensity"] for r in rows]
    left, right = min(x) / 3, max(max(x) * 3, 3 * peak / bandwidth)
    ridge = min(right, max(left, peak / bandwidth))
    ax.plot([left, ridge, right], [bandwidth * left, min(peak, bandwidth * ridge), peak],
            color=INK, linewidth=1.4)  # fmt: skip
    ax.annotate(f"{peak:.3g} GFLOP/s", (right, peak), (0, 3), ha="right", fontsize=NOTE,
                textcoords="offset points")  # fmt: skip
    ax.annotate(f"{bandwidth:.3g} GB/s", (left, bandwidth * left), (2, 12), fontsize=NOTE,
                textcoords="offset points", rotation=0)  # fmt: skip
    for peer in reversed(PEERS):
        marker, colour = PEERS[peer]
        for r in (r for r in rows if r.get("peer") == peer):
            forward = r["direction"] == "fwd"
            ax.plot(
                r["intensity"], r["gflops"], marker, color=colour, markersize=6.5,
                markerfacecolor=colour if forward else PAPER,
                markeredgecolor=PAPER if forward else colour,
            )  # fmt: skip
    for op in dict.fromkeys(r["op"] for r in rows):
        top = max((r for r in rows if r["op"] == op), key=lambda r: r["gflops"])
        ax.annotate(op, (top["intensity"], top["gflops"]), (0, 7), ha="center", fontsize=NOTE,
                    textcoords="offset points", color=SOFT)  # fmt: skip
    ax.set(xscale="log", yscale="log")
    ax.set_xlabel("arithmetic intensity, FLOP a byte")
    ax.set_ylabel("GFLOP/s")
    _peer_legend(ax, rows)


def _peer_legend(ax: Axes, rows: list[Row]) -> None:
    present = [p for p in PEERS if any(r.get("peer") == p for r in rows)]
    handles = [
        Line2D([], [], linestyle="", marker=PEERS[p][0], color=PEERS[p][1], label=NAMES[p])
        for p in present
    ]
    if any(r["direction"] != "fwd" for r in rows):
        handles.append(Line2D([], [], linestyle="", marker="o", markerfacecolor="none",
                              color=SOFT, label="hollow: backward"))  # fmt: skip
    ax.legend(handles=handles, frameon=False, fontsize=LABEL, loc="lower right", labelcolor=INK)


def kernels(results: Results) -> Plot:
    """How near each kernel comes to its roof: ours, torch and the reference on one line."""
    rows = [r for r in results.get("bench") or [] if r.get("roof_fraction") and r.get("median_s")]
    panels = []
    for dtype in rows_plot.dtypes_of(rows):
        lines: dict[tuple[str, str], dict[Any, float]] = {}
        for r in rows:
            if r["dtype"] == dtype and r.get("peer") in PEERS:
                line = lines.setdefault((r["op"], r["direction"]), {})
                best = max(line.get(r.get("peer"), 0.0), r["roof_fraction"])
                line[r.get("peer")] = best
        if lines:
            height = 0.27 * len(lines) + 1.2
            name = f"Share of the roof, {dtype}"
            panels.append(panel(f"share-{dtype}", name, partial(_shares, lines=lines),
                                height=height))  # fmt: skip
    why = "No kernel was benched under measured roofs, so no share of them is known."
    return Plot(panels, "" if panels else why)


def _shares(ax: Axes, lines: dict[tuple[str, str], dict[Any, float]]) -> None:
    names = list(lines)[::-1]
    for place, name in enumerate(names):
        values = lines[name]
        ax.plot([min(values.values()), max(values.values())], [place, place], color=SOFT,
                linewidth=1, zorder=2)  # fmt: skip
        for peer in reversed(PEERS):
            if peer in values:
                marker, colour = PEERS[peer]
                ax.plot(values[peer], place, marker, color=colour, markeredgecolor=PAPER,
                        markersize=7.5, zorder=4)  # fmt: skip
    most = max(v for values in lines.values() for v in values.values())
    ax.set_xlim(0, max(1.0, most) * 1.04)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_yticks(range(len(names)), [f"{op} {direction}" for op, direction in names])
    ax.set_ylim(-0.7, len(names) - 0.3)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("share of the roof (compute or memory, the slower)")
    rows = [{"peer": p, "direction": "fwd"} for p in PEERS if any(p in v for v in lines.values())]
    ax.legend(
        handles=[Line2D([], [], linestyle="", marker=PEERS[r["peer"]][0],
                        color=PEERS[r["peer"]][1], label=NAMES[r["peer"]]) for r in rows],
        frameon=False, fontsize=LABEL, loc="lower right", labelcolor=INK,
    )  # fmt: skip


def mfu(results: Results) -> Plot:
    """Model FLOP/s over the dense peak: the baseline's, and each arm's, for each scale."""
    panels = []
    for i, (scale, arms) in enumerate((results.get("hardware") or {}).items()):
        known = {a: own for a, own in arms.items() if own.get("mfu")}
        if known:
            draw = partial(_mfu, results=results, known=known)
            height = 0.3 * len(known) + 1.1
            panels.append(panel(f"mfu-{i}", f"MFU of a step, scale {scale}", draw, height=height))
    why = "The peak of this machine in the runs' dtype is not known, so there is no MFU."
    return Plot(panels, "" if panels else why)


def _mfu(ax: Axes, results: Results, known: dict[str, dict[str, Any]]) -> None:
    names = list(known)[::-1]
    for place, arm in enumerate(names):
        after, before = known[arm]["mfu"], known[arm].get("mfu_baseline")
        if before:
            ax.plot([before, after], [place, place], color=SOFT, linewidth=1.2, zorder=2)
            ax.plot(before, place, "|", color=SOFT, markersize=9, markeredgewidth=1.6)
        ax.plot(after, place, "o", color=HW, markeredgecolor=PAPER, markersize=8, zorder=4)
        ax.annotate(f"{after:.1%}", (max(after, before or 0), place), (7, 0), va="center",
                    textcoords="offset points", fontsize=LABEL)  # fmt: skip
    most = max(max(o["mfu"], o.get("mfu_baseline") or 0) for o in known.values())
    ax.set_xlim(0, most * 1.22)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_yticks(range(len(names)), [short(results, a) for a in names])
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("share of the dense peak; the bar | is the baseline's")

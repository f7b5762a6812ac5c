"""Kernels under this machine's measured roofs, and the MFU of a training step."""

from __future__ import annotations

from functools import partial
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, PercentFormatter

from ceg_kernels.measure import plot as rows_plot
from ceg_kernels.measure.svg import HW, INK, PAPER, SERIES, SOFT, panel
from ceg_model.study.plots_style import LABEL, RIM, Plot, Results, power, short

Row = dict[str, Any]

# What runs a kernel: marker and colour of ours, of stock torch, of the plain formula.
PEERS = {None: ("o", HW), "torch": ("^", INK), "reference": ("s", SOFT)}


def roofline(results: Results) -> Plot:
    """Achieved FLOP/s against intensity under the measured roofs, a panel for each dtype."""
    rows = drawn(results)
    panels = []
    for dtype in rows_plot.dtypes_of(rows):
        these = [r for r in rows if r["dtype"] == dtype]
        draw = partial(_roofline, rows=these, bandwidth=rows_plot.bandwidth(rows),
                       colours=op_colours(rows))  # fmt: skip
        label = f"Roofline of {len(these)} rows in {dtype}: GFLOP/s against FLOP per byte"
        panels.append(panel(f"roof-{dtype}", f"Roofline, {dtype}", draw, height=3.6, label=label))
    why = "No kernel was benched under measured roofs, so there is no roofline."
    return Plot(panels, "" if panels else why)


def drawn(results: Results) -> list[Row]:
    """The rows with a place under a roof."""
    return rows_plot.drawable([r for r in results.get("bench") or [] if r.get("roof_fraction")])


def op_colours(rows: list[Row]) -> dict[str, str]:
    """The same op has the same colour in all panels."""
    return dict(zip(sorted({r["op"] for r in rows}), cycle((*SERIES, INK)), strict=False))


def _roofline(ax: Axes, rows: list[Row], bandwidth: float | None, colours: dict[str, str]) -> None:
    rows_plot.draw_panel(ax, rows, colours=colours, bandwidth=bandwidth, ink=INK)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(power))
    ax.set_ylabel("GFLOP/s")


def kernels(results: Results) -> Plot:
    """How near each kernel comes to its roof: ours, torch and the reference on one line."""
    rows = [r for r in results.get("bench") or [] if r.get("roof_fraction") and r.get("median_s")]
    panels = []
    for dtype in rows_plot.dtypes_of(rows):
        lines: dict[tuple[str, str], dict[Any, float]] = {}
        for r in rows:
            # Both directions together say nothing beside each alone.
            if r["dtype"] == dtype and r.get("peer") in PEERS and r["direction"] != "fwd_bwd":
                line = lines.setdefault((r["op"], r["direction"]), {})
                line[r.get("peer")] = max(line.get(r.get("peer"), 0.0), r["roof_fraction"])
        if lines:
            height, name = 0.27 * len(lines) + 1.1, f"Share of the roof, {dtype}"
            draw = partial(_shares, lines=lines)
            panels.append(panel(f"share-{dtype}", name, draw, height=height))
    why = "No kernel was benched under measured roofs, so no share of them is known."
    return Plot(panels, "" if panels else why)


def _shares(ax: Axes, lines: dict[tuple[str, str], dict[Any, float]]) -> None:
    names = list(lines)[::-1]
    for place, name in enumerate(names):
        values = lines[name]
        ends = [min(values.values()), max(values.values())]
        ax.plot(ends, [place, place], color=SOFT, linewidth=1, zorder=2)
        for peer in reversed(PEERS):
            if peer in values:
                marker, colour = PEERS[peer]
                ax.plot(values[peer], place, marker, color=colour, markeredgecolor=PAPER,
                        markersize=7.5, markeredgewidth=RIM, zorder=4)  # fmt: skip
    most = max(v for values in lines.values() for v in values.values())
    ax.axvline(1, color=INK, linewidth=0.9, zorder=1)
    ax.set_xlim(0, max(1.0, most) * 1.04)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_yticks(range(len(names)), [f"{op} {direction}" for op, direction in names])
    ax.set_ylim(-0.7, len(names) - 0.3)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("share of the roof")


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
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_yticks(range(len(names)), [short(results, a) for a in names])
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("share of the dense peak (bar: baseline)")

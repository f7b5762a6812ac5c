"""Roofline figures of benchmark rows (needs matplotlib, which the `study` extra installs).

One panel per dtype: intensity against FLOP/s, both logarithmic, the roofs as lines. Colour is the
op, marker the backend, hollow the backward; ours are large, what they are compared with is small
and behind them. The palette (Okabe and Ito) can be told apart by colour-blind readers. The roofs
are those that the rows were computed with, recovered from their `roof_fraction`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = {
    "cpu": "o", "cuda": "o", "triton": "D", "torch": "^", "reference": "s", "eager": "v",
    "compile": "<", "liger": "*", "flash-attn": "P", "cudnn": "h", "flash": "p", "loop": "X",
}  # fmt: skip
OTHER_MARKER = ">"
SYMBOLS = {  # the same in text
    "o": "●", "D": "◆", "^": "▲", "s": "■", "v": "▼", "<": "◀", "*": "★", "P": "✚", "h": "⬢",
    "p": "⬟", "X": "✖", ">": "▶",
}  # fmt: skip
INK, GRID = "#444444", "#dddddd"
_DTYPE_ORDER = ("float64", "float32", "bfloat16", "float16")


def roofline_figure(rows: Sequence[Row], *, directions: Sequence[str] = ("fwd", "bwd")) -> Figure:
    """Rows of one machine as a roofline, one panel per dtype.

    Rows without a time, and ops that compute nothing (their place is infinitely far left), are left
    out and named under the figure. Raises ValueError if no row is left.
    """
    from matplotlib.figure import Figure

    drawn = drawable(rows, directions)
    if not drawn:
        raise ValueError(f"rows must hold a timed op that computes, got {len(rows)} without one")
    dtypes, colours = dtypes_of(drawn), op_colours(drawn)
    figure = Figure(figsize=(1.5 + 5.0 * len(dtypes), 5.6), layout="constrained")
    panels = figure.subplots(1, len(dtypes), squeeze=False, sharey=True)[0]
    for panel, dtype in zip(panels, dtypes, strict=True):
        here = [row for row in drawn if row["dtype"] == dtype]
        draw_panel(panel, here, colours=colours, bandwidth=bandwidth(rows))
        panel.set_title(dtype)
        panel.grid(True, which="major", color=GRID, linewidth=0.6)
    panels[0].set_ylabel("GFLOP/s")
    _legend(figure, drawn, colours)
    figure.suptitle(_title(rows), fontsize=11)
    if absent := left_out(rows, drawn):
        text = f"not shown, since they compute nothing or were not timed: {', '.join(absent)}"
        figure.supxlabel(text, fontsize=8, color="#555555")
    return figure


def drawable(rows: Sequence[Row], directions: Sequence[str] = ("fwd", "bwd")) -> list[Row]:
    """The rows that have a place in the figure."""
    return [r for r in rows if r["direction"] in directions and r["median_s"] and r["flops"]
            and r["intensity"]]  # fmt: skip


def left_out(rows: Sequence[Row], drawn: Sequence[Row]) -> list[str]:
    """The ops that the figure does not show."""
    return sorted({row["op"] for row in rows} - {row["op"] for row in drawn})


def dtypes_of(rows: Iterable[Row]) -> list[str]:
    """Those of the rows, known ones in a fixed order."""
    found = dict.fromkeys(row["dtype"] for row in rows)
    known = [name for name in _DTYPE_ORDER if name in found]
    return known + [name for name in found if name not in known]


def op_colours(rows: Iterable[Row]) -> dict[str, str]:
    ops = sorted({row["op"] for row in rows})
    return {op: COLOURS[i % len(COLOURS)] for i, op in enumerate(ops)}


def marker_of(backend: str) -> str:
    return MARKERS.get(backend.partition(":")[0], OTHER_MARKER)


def backends_of(rows: Sequence[Row]) -> list[str]:
    """Ours first, then the peers, as their markers are known."""
    order = {name: i for i, name in enumerate(MARKERS)}
    peers = {row["backend"]: row["peer"] is not None for row in rows}
    return sorted(peers, key=lambda name: (peers[name], order.get(name, len(order)), name))


def draw_panel(
    panel: Axes,
    rows: Sequence[Row],
    *,
    colours: dict[str, str],
    bandwidth: float | None,
    ink: str = INK,
) -> None:
    """Rows of one dtype, all drawable, under their roofs."""
    _draw_roofs(panel, rows, bandwidth, ink)
    for row in sorted(rows, key=lambda row: row["peer"] is None):
        ours, colour = row["peer"] is None, colours[row["op"]]
        panel.plot(
            row["intensity"], row["gflops"], marker_of(row["backend"]), color=colour,
            markerfacecolor=colour if row["direction"] == "fwd" else "none",
            markersize=7.5 if ours else 4.5, alpha=1.0 if ours else 0.6,
            zorder=4 if ours else 3,
        )  # fmt: skip
    panel.set(xscale="log", yscale="log", xlabel="FLOP per byte")
    panel.xaxis.set_minor_formatter("")
    panel.yaxis.set_minor_formatter("")


def peak(rows: Iterable[Row], dtype: str) -> float | None:
    """The compute roof (GFLOP/s) that rows of this dtype stand under, or None if none tells."""
    return max(recovered(rows, dtype), default=None)


def bandwidth(rows: Iterable[Row]) -> float | None:
    """The memory roof (GB/s) that the rows stand under, or None if none tells."""
    return max(recovered(rows), default=None)


def recovered(rows: Iterable[Row], dtype: str | None = None) -> list[float]:
    """Each row's own roof: GFLOP/s of the compute-bound ones of `dtype`, GB/s of the memory-bound.

    They differ where rows of several runs are together, each with the roofs of its day.
    """
    bound, rate = ("memory", "gbytes_per_s") if dtype is None else ("compute", "gflops")
    return [row[rate] / row["roof_fraction"] for row in rows
            if row["bound"] == bound and row["roof_fraction"] and dtype in (None, row["dtype"])
            ]  # fmt: skip


def _draw_roofs(panel: Axes, rows: Sequence[Row], bandwidth: float | None, ink: str) -> None:
    intensities = [row["intensity"] for row in rows]
    low, high = min(intensities) / 3, max(intensities) * 3
    top = peak(rows, rows[0]["dtype"])
    if bandwidth is not None:
        ridge = high if top is None else min(high, top / bandwidth)
        panel.plot([low, ridge], [bandwidth * low, bandwidth * ridge], color=ink, lw=1.4, zorder=2)
        # Along the line and above it, where no measured point can stand.
        panel.text(
            low, bandwidth * low, f" {bandwidth:.3g} GB/s", fontsize=8.6, color=ink, va="bottom",
            rotation=math.degrees(math.atan(bandwidth)), rotation_mode="anchor",
            transform_rotates_text=True,
        )  # fmt: skip
    if top is not None:
        start = low if bandwidth is None else min(high, top / bandwidth)
        panel.plot([start, high], [top, top], color=ink, lw=1.4, zorder=2)
        panel.annotate(f"{top:.0f} GFLOP/s", (high, top), fontsize=8.6, color=ink, ha="right",
                       xytext=(0, 4), textcoords="offset points")  # fmt: skip


def _legend(figure: Figure, rows: Sequence[Row], colours: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    peers = {row["backend"] for row in rows if row["peer"] is not None}
    handles = [Line2D([], [], color=c, lw=4, label=op) for op, c in colours.items()]
    for name in backends_of(rows):
        size, label = (4.5, name) if name in peers else (7.5, f"{name} (ours)")
        handles.append(
            Line2D([], [], color=INK, marker=marker_of(name), ms=size, ls="", label=label)
        )
    if any(row["direction"] != "fwd" for row in rows):
        handles.append(
            Line2D([], [], color=INK, marker="o", markerfacecolor="none", ls="",
                   label="hollow: backward")
        )  # fmt: skip
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)


def _title(rows: Sequence[Row]) -> str:
    machine = rows[0]["versions"].get("machine", rows[0]["device"])
    threads = rows[0]["versions"].get("threads", "0")
    return machine if threads == "0" else f"{machine}, {threads} threads"

"""Roofline figures of benchmark rows (needs matplotlib, which the `study` extra installs).

One panel per dtype: intensity against FLOP/s, both logarithmic, the roofs as lines. Colour is the
op, marker the backend, hollow the backward; the palette (Okabe and Ito) can be told apart by
colour-blind readers. The roofs are those that the rows were computed with, recovered from their
`roof_fraction`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = {
    "cpu": "o", "cuda": "o", "triton": "D", "torch": "^", "reference": "s", "eager": "v",
    "compile": "<",
}  # fmt: skip
_DTYPE_ORDER = ("float64", "float32", "bfloat16", "float16")


def roofline_figure(rows: Sequence[Row], *, directions: Sequence[str] = ("fwd", "bwd")) -> Figure:
    """Rows of one machine as a roofline, one panel per dtype.

    Rows without a time, and ops that compute nothing (their place is infinitely far left), are left
    out and named under the figure. Raises ValueError if no row is left.
    """
    from matplotlib.figure import Figure

    drawn = [r for r in rows if r["direction"] in directions and r["median_s"] and r["flops"]]
    if not drawn:
        raise ValueError(f"rows must hold a timed op that computes, got {len(rows)} without one")
    dtypes = [name for name in _DTYPE_ORDER if any(row["dtype"] == name for row in drawn)]
    ops = sorted({row["op"] for row in drawn})
    colours = {op: COLOURS[i % len(COLOURS)] for i, op in enumerate(ops)}
    figure = Figure(figsize=(1.5 + 5.0 * len(dtypes), 5.6), layout="constrained")
    panels = figure.subplots(1, len(dtypes), squeeze=False, sharey=True)[0]
    for panel, dtype in zip(panels, dtypes, strict=True):
        here = [row for row in drawn if row["dtype"] == dtype]
        _draw_roofs(panel, here, bandwidth=bandwidth(rows))
        for row in here:
            marker = MARKERS.get(row["backend"], "P")
            colour = colours[row["op"]]
            fill = colour if row["direction"] == "fwd" else "none"
            panel.plot(row["intensity"], row["gflops"], marker, color=colour, markerfacecolor=fill)
        panel.set(xscale="log", yscale="log", title=dtype, xlabel="FLOP per byte")
        panel.xaxis.set_minor_formatter("")
        panel.grid(True, which="major", color="#dddddd", linewidth=0.6)
    panels[0].set_ylabel("GFLOP/s")
    _legend(figure, colours, sorted({row["backend"] for row in drawn}))
    figure.suptitle(_title(rows), fontsize=11)
    left_out = sorted({row["op"] for row in rows} - {row["op"] for row in drawn})
    if left_out:
        text = f"not shown, since they compute nothing or were not timed: {', '.join(left_out)}"
        figure.supxlabel(text, fontsize=8, color="#555555")
    return figure


def peak(rows: Iterable[Row], dtype: str) -> float | None:
    """The compute roof (GFLOP/s) that rows of this dtype stand under, or None if none tells."""
    return _roof([row for row in rows if row["dtype"] == dtype], "compute", "gflops")


def bandwidth(rows: Iterable[Row]) -> float | None:
    """The memory roof (GB/s) that the rows stand under, or None if none tells."""
    return _roof(rows, "memory", "gbytes_per_s")


def _roof(rows: Iterable[Row], bound: str, rate: str) -> float | None:
    known = [row[rate] / row["roof_fraction"] for row in rows
             if row["bound"] == bound and row["roof_fraction"]]  # fmt: skip
    return max(known, default=None)


def _draw_roofs(panel: Axes, rows: Sequence[Row], bandwidth: float | None) -> None:
    intensities = [row["intensity"] for row in rows]
    low, high = min(intensities) / 3, max(intensities) * 3
    top = peak(rows, rows[0]["dtype"])
    if bandwidth is not None:
        ridge = high if top is None else min(high, top / bandwidth)
        panel.plot([low, ridge], [bandwidth * low, bandwidth * ridge], color="#444444")
        panel.annotate(f"{bandwidth:.0f} GB/s", (low, bandwidth * low), fontsize=8,
                       xytext=(12, -4), textcoords="offset points")  # fmt: skip
    if top is not None:
        start = low if bandwidth is None else min(high, top / bandwidth)
        panel.plot([start, high], [top, top], color="#444444")
        panel.annotate(f"{top:.0f} GFLOP/s", (high, top), fontsize=8, ha="right",
                       xytext=(0, 4), textcoords="offset points")  # fmt: skip


def _legend(figure: Figure, colours: dict[str, str], backends: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=c, lw=4, label=op) for op, c in colours.items()]
    handles += [
        Line2D([], [], color="#444444", marker=MARKERS.get(name, "P"), ls="", label=name)
        for name in backends
    ]
    handles.append(
        Line2D([], [], color="#444444", marker="o", markerfacecolor="none", ls="",
               label="hollow: backward")
    )  # fmt: skip
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)


def _title(rows: Sequence[Row]) -> str:
    machine = rows[0]["versions"].get("machine", rows[0]["device"])
    threads = rows[0]["versions"].get("threads", "0")
    return machine if threads == "0" else f"{machine}, {threads} threads"

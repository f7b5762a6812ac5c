"""What the report's plots share: looks of the arms, labels beside lines, axes of gains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from ceg_kernels.measure.svg import INK, PAPER, SERIES

Results = dict[str, Any]

RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MARKERS = "os^DvPX*"
RIM = 0.6  # points of paper about a marker, so that it stands out from its line
# Behind a note that may lie on lines.
HALO = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)))
LABEL, NOTE = 9.0, 8.8  # points; the axes' own text is 9.5
ALL_SCALES = "all scales"  # the cell of an estimate over all of them
SHORT_TITLE = 14  # characters that fit beside a panel


@dataclass(frozen=True)
class Plot:
    """The panels of one plot, or in one sentence why there are none."""

    panels: list[str] = field(default_factory=list)
    why: str = ""
    arms: tuple[str, ...] = ()  # where each panel is of one arm: which


@dataclass(frozen=True)
class Look:
    """Colour, marker and line of an arm, and the class that its marks carry in the page."""

    colour: str
    marker: str
    dash: Any
    gid: str


def looks(results: Results) -> dict[str, Look]:
    """The baseline takes the ink; the colours come again with another marker and line."""
    names = arms(results)
    out = {names[0]: Look(INK, "o", "-", "arm-0")}
    for i, arm in enumerate(names[1:]):
        dash = DASHES[min(i // len(SERIES), len(DASHES) - 1)]
        marker = MARKERS[(i + 1) % len(MARKERS)]
        out[arm] = Look(SERIES[i % len(SERIES)], marker, dash, f"arm-{i + 1}")
    return out


def arms(results: Results) -> list[str]:
    """The baseline first."""
    baseline = results["estimate"]["baseline"]
    found = [c["arm"] for c in results["curves"]] + list(results["estimate"]["arms"])
    return list(dict.fromkeys([baseline, *found]))


def scales(results: Results) -> list[str]:
    return list(dict.fromkeys(c["scale"] for c in results["curves"]))


def cell_of(results: Results, curve: dict[str, Any]) -> str:
    """The cell of the estimate in which a curve is compared."""
    budget = "" if is_endpoint(results) else curve.get("budget", "")
    return "/".join(filter(None, (curve["scale"], budget)))


def scale_title(cell: str) -> str:
    """What stands above a panel of this cell."""
    return "All scales" if cell == ALL_SCALES else f"Scale {cell}"


def is_endpoint(results: Results) -> bool:
    return results["estimate"].get("mode") == "endpoint"


def title(results: Results, arm: str) -> str:
    return results["titles"].get(arm, arm)


def short(results: Results, arm: str) -> str:
    """A name that fits beside a line."""
    full = title(results, arm)
    return full if len(full) <= SHORT_TITLE else arm.replace("_", " ")


def times(value: float, _: object = None) -> str:
    return f"{value:.3g}×"


def compute_axis(axis: Any, low: float, high: float) -> None:
    """Labels of a log axis: each decade, and more between where there are few decades."""
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(power))
    if high / low < 1000:
        powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
        widths = ((3, (1, 1.5, 2, 3, 4, 5, 7)), (30, (1, 2, 5)), (1000, (1, 3)))
        steps = next(found for width, found in widths if high / low < width)
        ticks = [m * 10.0**p for p in powers for m in steps]
        axis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
        axis.set_minor_locator(NullLocator())


def power(value: float, _: object = None) -> str:
    """Small numbers as they are, others as 5·10¹²: one size of text, so that a phone shows it."""
    if 1e-4 <= value < 1e4:
        return f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    raised = f"10{str(int(exponent)).translate(RAISED)}"
    return raised if float(mantissa) == 1 else f"{float(mantissa):g}·{raised}"


# Round factors, coarse to fine; the first that puts three ticks on an axis is taken.
GAIN_TICKS = (
    (0.01, 0.1, 1, 10, 100),
    (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100),
    (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50),
    *([round(step * i, 2) for i in range(1, 1001)] for step in (0.2, 0.1, 0.05, 0.02, 0.01)),
)


def gain_axis(axis: Any, low: float, high: float, most: int = 7) -> None:
    """Ticks of a log axis of gains at round factors, 1 among them where it is in sight."""
    for family in GAIN_TICKS:
        ticks = [t for t in family if low <= t <= high]
        if len(ticks) >= 3:
            break
    apart = np.log(high / low) / (most + 1)
    kept: list[float] = []
    for tick in sorted(ticks, key=lambda t: (t != 1, abs(np.log(t)))):  # from 1 outwards
        if all(abs(np.log(tick / other)) >= apart for other in kept):
            kept.append(tick)
    axis.set_major_locator(FixedLocator(sorted(kept)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(times))


@dataclass(frozen=True)
class End:
    """Where a line ends, in data, and what is to stand beside it."""

    x: float
    y: float
    text: str
    look: Look


def label_ends(ax: Axes, ends: Sequence[End], height: float) -> None:
    """Names at the right of the panel, moved apart where lines end close to each other.

    `height` is the figure's in inches. Limits and scales of the axes must be set before.
    """
    if not ends:
        return
    to_axes = ax.transData + ax.transAxes.inverted()
    starts = np.array([to_axes.transform((e.x, e.y)) for e in ends])
    places = spread(starts[:, 1], LABEL * 1.2 / (72 * height * 0.74))
    for end, start, place in zip(ends, starts, places, strict=True):
        colour, gid = end.look.colour, end.look.gid or None
        ax.plot(
            [start[0], 1.035], [start[1], place], color=colour, linewidth=0.9, clip_on=False,
            transform=ax.transAxes, gid=gid,
        )  # fmt: skip
        ax.text(
            1.045, place, end.text, fontsize=LABEL, va="center", gid=gid,
            transform=ax.transAxes,
        )  # fmt: skip


def spread(wanted: np.ndarray, gap: float) -> np.ndarray:
    """The places nearest to `wanted` that lie at least `gap` apart, order kept, within [0, 1].

    Neighbours that are too close become one block about their mean, until no two blocks touch.
    More places than fit go on above 1.
    """
    order = np.argsort(wanted, kind="stable")
    below = gap * np.arange(len(wanted))  # room that those below need
    inside = np.maximum(np.minimum(wanted[order], 1 - below[::-1]), below)
    blocks: list[tuple[float, int]] = []  # centre and size
    for value in inside:
        centre, size = float(value), 1
        while blocks and centre - blocks[-1][0] < gap * (size + blocks[-1][1]) / 2:
            last, count = blocks.pop()
            centre = (centre * size + last * count) / (size + count)
            size += count
        blocks.append((centre, size))
    ranked = [c + gap * (i - (n - 1) / 2) for c, n in blocks for i in range(n)]
    places = np.empty(len(ranked))
    places[order] = ranked
    return places

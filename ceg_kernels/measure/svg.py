"""Matplotlib figures as SVG to be pasted into a page: real text, colours of the page's theme.

Matplotlib knows no CSS variables, so what depends on the page's theme is drawn in marker colours
that no palette holds, and replaced in the text of the SVG. Ids get the figure's name, so that many
can share a page; an artist whose gid starts with `arm-` gets it as a class, for the page's styles.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import TightLayoutEngine

INK, FAINT, PAPER, SOFT = "#010203", "#040506", "#070809", "#0a0b0c"
ALG, HW, BAD = "#0d0e0f", "#101112", "#131415"
# Lines and markers of a plot: told apart by people with any colour vision, on light and dark.
SERIES = ("#161718", "#191a1b", "#1c1d1e", "#1f2021", "#222324", "#252627")
_THEME = {
    INK: "var(--ink)", FAINT: "var(--grid)", PAPER: "var(--paper)", SOFT: "var(--soft)",
    ALG: "var(--alg)", HW: "var(--hw)", BAD: "var(--bad)",
    **{colour: f"var(--c{i})" for i, colour in enumerate(SERIES)},
}  # fmt: skip
WIDTH, HEIGHT = 4.4, 3.2  # inches; a panel stays readable at the width of a phone

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ceg",
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def css(colour: str) -> str:
    """What stands for a colour in the page's own styles: its variable, or the colour itself."""
    return _THEME.get(colour, colour)


def panel(
    name: str,
    title: str,
    draw: Callable[[Axes], Any],
    *,
    width: float = WIDTH,
    height: float = HEIGHT,
    label: str = "",
    note: str = "",
) -> str:
    """One panel as an <svg> element; `draw` fills its axes. Sizes in inches.

    `note` stands between title and axes; `label` is what a screen reader says for all of it.
    """
    with mpl.rc_context(_STYLE):
        # One axes: the layout that measures it once, where "constrained" does so twice.
        figure = Figure(figsize=(width, height), layout=TightLayoutEngine(pad=0.4))
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(title, pad=19 if note else None)
        if note:
            axes.annotate(note, (0, 1), (0, 5), xycoords="axes fraction", color=SOFT,
                          textcoords="offset points", annotation_clip=False)  # fmt: skip
        text = io.StringIO()
        # savefig would draw it twice.
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
    return _inline(text.getvalue(), name, label or title)


def _inline(svg: str, name: str, label: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="(arm-[^"]*)"', r'class="\1"', svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:)?href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    for marker, variable in _THEME.items():
        svg = svg.replace(marker, variable)
    # A hundredth of a point is more than a screen shows.
    svg = re.sub(r'\b(d|x|y)="[^"]*"', _rounded, svg)
    # The page's own font and width apply; a namespace is implied in HTML.
    svg = re.sub(r'\s?xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    label = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    head = (
        f'<svg {box.group(0)} role="img" aria-label="{label}" preserveAspectRatio="xMidYMid meet">'
    )
    return head + svg[svg.index(">") + 1 :].strip()


def _rounded(attribute: re.Match[str]) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", attribute.group(0))

"""The report: one self-contained HTML page and its JSON twin, from results.json's content alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import orjson
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ceg_kernels.measure.host import stolen_line
from ceg_kernels.measure.plot import SYMBOLS, backends_of, marker_of
from ceg_kernels.measure.svg import css
from ceg_model.rundir import write_atomically
from ceg_model.study import plots, tables, verdicts, words
from ceg_model.study.plots_parts import PIECES, used_pieces
from ceg_model.study.plots_speed import drawn, op_colours
from ceg_model.study.plots_style import Plot, looks

Plotted = Callable[[], Mapping[str, Plot]]
HTML, JSON = "report.html", "results.json"

# The markers of matplotlib as paths about (13, 6), for the legend of the page.
SHAPES = {
    "o": "M17 6A4 4 0 1 1 9 6A4 4 0 1 1 17 6Z",
    "s": "M9.5 2.5H16.5V9.5H9.5Z",
    "^": "M13 1.5L17.5 9.5H8.5Z",
    "D": "M13 1L18 6L13 11L8 6Z",
    "v": "M13 10.5L17.5 2.5H8.5Z",
    "P": "M11.5 2H14.5V4.5H17V7.5H14.5V10H11.5V7.5H9V4.5H11.5Z",
    "X": "M9 3.5L10.5 2L13 4.5L15.5 2L17 3.5L14.5 6L17 8.5L15.5 10L13 7.5L10.5 10L9 8.5L11.5 6Z",
    "*": "M13 1L14.3 4.4H18L15 6.6L16.1 10.2L13 8L9.9 10.2L11 6.6L8 4.4H11.7Z",
}
PIECE_WORDS = {
    "algorithm": "algorithm, G_alg",
    "hardware": "hardware, G_hw",
    "MFU": "hardware: MFU ratio",
    "peak": "hardware: peak ratio",
    "devices": "hardware: number of devices",
    "residual": "residual",
}


def write_report(results: dict[str, Any], out: Path) -> Path:
    """Writes report.html and results.json below `out`; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    with plots.drawing(results) as plotted:
        text = _lines(results)
        page = render(results, plotted)
    write_atomically(out / JSON, text)
    write_atomically(out / HTML, page)
    return out / HTML


def _lines(results: dict[str, Any]) -> str:
    """JSON with an item of each part on a line: `indent` gives every number of a curve its own."""
    dumps = partial(json.dumps, allow_nan=False)
    parts = []
    for name, part in results.items():
        if isinstance(part, list) and part:
            dump = _curve_line if name == "curves" else dumps
            text = "[\n  " + ",\n  ".join(map(dump, part)) + "\n ]"
        elif isinstance(part, dict) and part:
            items = (f"{dumps(key)}: {dumps(value)}" for key, value in part.items())
            text = "{\n  " + ",\n  ".join(items) + "\n }"
        else:
            text = dumps(part)
        parts.append(f" {dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _curve_line(curve: dict[str, Any]) -> str:
    """A curve's numbers are nearly all that results.json holds: orjson takes a tenth of the time.

    It would write NaN as null.
    """
    for column in ("flops", "loss", "seconds"):
        if not math.isfinite(sum(curve.get(column) or ())):
            raise ValueError(f"curves must hold finite numbers, got {column} of {_who(curve)}")
    return orjson.dumps(curve).decode()


def _who(curve: dict[str, Any]) -> str:
    return " ".join(str(curve.get(key)) for key in ("arm", "scale", "seed", "budget"))


def render(results: dict[str, Any], plotted: Plotted | None = None) -> str:
    """The page as text. No script, no font, no image from elsewhere.

    `plotted` gives plots that are being drawn already.
    """
    environment = Environment(
        # The style sheet is the one of the page that `ceg roofline` writes.
        loader=ChoiceLoader(
            [PackageLoader("ceg_model.study"), PackageLoader("ceg_kernels.measure")]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("gain", "interval", "si", "seconds", "flag", "percent", "signed", "off"):
        environment.filters[name] = getattr(words, name)
    hardware = tables.hardware(results)
    return environment.get_template("report.html.j2").render(
        r=results,
        estimate=results["estimate"],
        arms=tables.arm_rows(results),
        limits=[*results["limits"], *_stolen(results)],
        legend=_legend(results),
        gids={arm: look.gid for arm, look in looks(results).items()},
        found=verdicts.found(results),
        undecided=verdicts.undecided(results),
        plots=_plots(plotted() if plotted else plots.draw(results)),
        pieces=_pieces(results),
        untimed=any(
            cell["status"] == "ok" and not cell.get("g_time")
            for answer in results["estimate"]["arms"].values()
            for cell in answer["scales"].values()
        ),
        roofline=_roofline_legend(results),
        trends=tables.trends(results),
        bundles=tables.bundles(results),
        fits=tables.fits(results),
        hardware=hardware,
        amdahl=tables.amdahl(results),
        sweeps=results.get("sweeps") or [],
        flags={name: words.FLAGS.get(name, name) for name in tables.used_flags(results, hardware)},
        bench=tables.bench_rows(results),
    )


def _stolen(results: dict[str, Any]) -> list[str]:
    timings = (results.get("throughput") or {}).values()
    share = max((timing.get("stolen_share") or 0.0 for timing in timings), default=0.0)
    return list(filter(None, [stolen_line(share, "steps were timed")]))


def _plots(plotted: Mapping[str, Plot]) -> dict[str, dict[str, Any]]:
    return {
        # The SVGs are ours; every text in them was escaped by matplotlib.
        name: {"panels": [Markup(svg) for svg in plot.panels], "why": plot.why, "arms": plot.arms}
        for name, plot in plotted.items()
    }


def _legend(results: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "title": results["titles"].get(arm, arm),
            "gid": look.gid,
            "colour": css(look.colour),
            "shape": SHAPES[look.marker],
            "dash": "" if look.dash == "-" else " ".join(f"{v:g}" for v in look.dash[1]),
        }
        for arm, look in looks(results).items()
    ]


def _pieces(results: dict[str, Any]) -> list[dict[str, str]]:
    """The legend of the stacked bars."""
    classes = {"///": "hatch", "...": "hatch-dots", "": ""}
    out = []
    for name in used_pieces(results):
        colour, hatch = PIECES[name]
        style = "" if hatch else f"background: {css(colour)}"
        out.append({"text": PIECE_WORDS[name], "style": classes[hatch], "css": style})
    return out


def _roofline_legend(results: dict[str, Any]) -> dict[str, Any]:
    """Colours of ops, and marker, name and whether it is a peer, of backends."""
    rows = drawn(results)
    peers = {row["backend"] for row in rows if row.get("peer") is not None}
    return {
        "colours": {op: css(colour) for op, colour in op_colours(rows).items()},
        "markers": [(SYMBOLS[marker_of(name)], name, name in peers) for name in backends_of(rows)],
    }

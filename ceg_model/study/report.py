"""The report: one self-contained HTML page and its JSON twin, from results.json's content alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ceg_kernels.measure.page import SYMBOLS
from ceg_kernels.measure.plot import backends_of, marker_of
from ceg_kernels.measure.svg import css
from ceg_model.rundir import write_atomically
from ceg_model.study import plots, verdicts, words
from ceg_model.study.innovations import INNOVATIONS
from ceg_model.study.plots_parts import PIECES, used_pieces
from ceg_model.study.plots_speed import drawn, op_colours
from ceg_model.study.plots_style import looks

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
    text = json.dumps(results, indent=1, allow_nan=False)
    page = render(results)
    write_atomically(out / JSON, text + "\n")
    write_atomically(out / HTML, page)
    return out / HTML


def render(results: dict[str, Any]) -> str:
    """The page as text. No script, no font, no image from elsewhere."""
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
    for name in ("gain", "interval", "si", "seconds", "flag", "percent"):
        environment.filters[name] = getattr(words, name)
    hardware = _hardware(results)
    return environment.get_template("report.html.j2").render(
        r=results,
        estimate=results["estimate"],
        arms=_arm_rows(results),
        legend=_legend(results),
        gids={arm: look.gid for arm, look in looks(results).items()},
        found=verdicts.found(results),
        undecided=verdicts.undecided(results),
        plots=_plots(results),
        pieces=_pieces(results),
        roofline=_roofline_legend(results),
        hardware=hardware,
        amdahl=_amdahl(results),
        sweeps=results.get("sweeps") or [],
        flags={name: words.FLAGS.get(name, name) for name in _used_flags(results, hardware)},
        bench=_bench_rows(results),
    )


def _plots(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        # The SVGs are ours; every text in them was escaped by matplotlib.
        name: {"panels": [Markup(svg) for svg in plot.panels], "why": plot.why, "arms": plot.arms}
        for name, plot in plots.draw(results).items()
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


def _arm_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What the headline table says of each arm."""
    rows = []
    hardware = results.get("hardware") or {}
    for arm, answer in results["estimate"]["arms"].items():
        entry = INNOVATIONS.get(arm)
        own = hardware.get(answer["scale"], {}).get(arm, {})
        rows.append(
            {
                "name": arm,
                "title": results["titles"].get(arm, arm),
                "kind": entry.kind if entry else "",
                "published": entry.published if entry else (),
                "paper_class": entry.paper_class if entry else None,
                "answer": answer,
                "trend": results["estimate"]["class"][arm],
                "against_reference": own.get("against_reference", answer["g_hw"]),
                "hardware_ci": own.get("against_reference_ci") or own.get("ci"),
                "against_torch": own.get("against_torch"),
                "torch_ci": own.get("against_torch_ci"),
            }
        )
    return rows


def _hardware(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Scale -> a row for each arm, what is not known as None."""
    trends = results["estimate"].get("class_hw") or {}
    out: dict[str, list[dict[str, Any]]] = {}
    for scale, arms in (results.get("hardware") or {}).items():
        for arm, own in arms.items():
            step = own.get("amdahl") or {}
            row = {
                "title": results["titles"].get(arm, arm),
                "reference": own.get("against_reference"),
                "reference_ci": own.get("against_reference_ci") or own.get("ci"),
                "torch": own.get("against_torch"),
                "torch_ci": own.get("against_torch_ci"),
                "joules": own.get("joules_per_step"),
                "trend": trends.get(arm),
                "flags": own.get("flags") or [],
            }
            for key in ("mfu", "mfu_baseline", "mfu_ratio", "peak_ratio", "hfu_over_mfu"):
                row[key] = own.get(key)
            for key in ("predicted_s", "measured_s", "unexplained"):
                row[key] = step.get(key)
            out.setdefault(scale, []).append(row)
    return out


def _amdahl(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every kernel's part in every step."""
    return [
        {"scale": scale, "title": results["titles"].get(arm, arm), **part,
         "saved_s": part["calls"] * (part["baseline_s"] - part["own_s"])}
        for scale, arms in (results.get("hardware") or {}).items()
        for arm, own in arms.items()
        for part in (own.get("amdahl") or {}).get("parts", [])
    ]  # fmt: skip


def _used_flags(results: dict[str, Any], hardware: dict[str, list[dict[str, Any]]]) -> list[str]:
    answers = results["estimate"]["arms"].values()
    cells = [c for answer in answers for c in (answer, *answer["scales"].values())]
    rows = [row for own in hardware.values() for row in own]
    return sorted({flag for holder in (*cells, *rows) for flag in holder["flags"]})


def _bench_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours beside its peers: one line for each op, direction, shape and dtype."""
    peaks = (results.get("roofs") or {}).get("flops") or {}
    groups: dict[tuple, dict[str, Any]] = {}
    for row in results.get("bench") or []:
        key = tuple(row[k] for k in ("op", "direction", "shape", "dtype"))
        groups.setdefault(key, {})[row["peer"] or "ours"] = row
    lines = []
    for (op, direction, shape, dtype), group in groups.items():
        best = group.get("ours") or group.get("torch") or group["reference"]
        median = best.get("median_s")

        def against(peer: str, group: dict = group, median: float | None = median) -> float | None:
            other = (group.get(peer) or {}).get("median_s")
            return other / median if other and median and "ours" in group else None

        lines.append(
            {
                "op": op,
                "direction": direction,
                "shape": shape,
                "dtype": dtype,
                "backend": best["backend"],
                "median_s": median,
                "against_reference": against("reference"),
                "against_torch": against("torch"),
                "roof_fraction": best.get("roof_fraction"),
                "bound": best.get("bound"),
                "mfu": _mfu(best, peaks.get(dtype)),
                "error": best.get("max_error_over_slack"),
                "status": best.get("status", "ok"),
            }
        )
    return lines


def _mfu(row: dict[str, Any], peak: float | None) -> float | None:
    """Of a kernel: its model FLOP/s over the measured dense peak of its dtype."""
    return 1e9 * row["gflops"] / peak if peak and row.get("gflops") else None

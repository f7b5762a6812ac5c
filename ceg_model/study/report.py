"""The report: one self-contained HTML page and its JSON twin, from results.json's content alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ceg_kernels.measure.svg import INK
from ceg_model.rundir import write_atomically
from ceg_model.study import plots, words
from ceg_model.study.innovations import INNOVATIONS

HTML, JSON = "report.html", "results.json"


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
    for name in ("gain", "interval", "si", "seconds", "flag"):
        environment.filters[name] = getattr(words, name)
    flags = _used_flags(results)
    return environment.get_template("report.html.j2").render(
        r=results,
        estimate=results["estimate"],
        arms=_arm_rows(results),
        legend=_legend(results),
        verdicts=[
            words.verdict(results["titles"].get(arm, arm), answer)
            for arm, answer in results["estimate"]["arms"].items()
        ],
        figures=_figures(results),
        flags={name: words.FLAGS.get(name, name) for name in flags},
        bench=_bench_rows(results.get("bench") or []),
    )


def _figures(results: dict[str, Any]) -> dict[str, list[Markup]]:
    single = plots.aa(results)
    drawn = {
        "flops": plots.losses(results, "flops"),
        "seconds": plots.losses(results, "seconds"),
        "bars": plots.bars(results),
        "range": plots.over_range(results),
        "scales": [plots.across_scales(results)],
        "aa": [single] if single else [],
        "roofline": plots.roofline(results),
    }
    # The SVGs are ours; every text in them was escaped by matplotlib.
    return {name: [Markup(svg) for svg in svgs] for name, svgs in drawn.items()}


def _legend(results: dict[str, Any]) -> list[dict[str, str]]:
    style = plots.styles(plots.arms(results))
    shapes = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★"}
    return [
        {
            "title": results["titles"].get(arm, arm),
            "colour": "var(--ink)" if colour == INK else colour,
            "shape": shapes[marker],
        }
        for arm, (colour, marker, _) in style.items()
    ]


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
                "note": entry.note if entry else "",
                "published": entry.published if entry else (),
                "paper_class": entry.paper_class if entry else None,
                "answer": answer,
                "trend": results["estimate"]["class"][arm],
                "against_reference": own.get("against_reference", answer["g_hw"]),
                "hardware_ci": own.get("ci"),
                "against_torch": own.get("against_torch"),
            }
        )
    return rows


def _used_flags(results: dict[str, Any]) -> list[str]:
    used = {
        flag
        for answer in results["estimate"]["arms"].values()
        for cell in (answer, *answer["scales"].values())
        for flag in cell["flags"]
    }
    return sorted(used)


def _bench_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours beside its peers: one line for each op, direction, shape and dtype."""
    groups: dict[tuple, dict[str, Any]] = {}
    for row in rows:
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
                "error": best.get("max_error_over_slack"),
                "status": best.get("status", "ok"),
            }
        )
    return lines

"""Benchmark rows as one HTML page: conditions, roofs, the roofline and every row, per machine.

The page needs nothing from elsewhere: no script, no font, no image. Needs matplotlib and jinja2,
which the `study` extra installs. Its style sheet, templates/page.css, is also the study report's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ceg_kernels.measure import plot, table
from ceg_kernels.measure.run import LOOSE
from ceg_kernels.measure.svg import INK, panel

Row = dict[str, Any]

DIRECTIONS = ("fwd", "bwd", "fwd_bwd")
# What `versions` calls the ways in which a roof was measured.
HOW = {
    "fma": "multiply-adds in registers",
    "matmul": "a large torch matmul",
    "native": "a copy by the native core",
    "torch": "a copy by torch",
}
ROOFS_DIFFER = 1.02  # a roof measured again moves by less on a quiet machine


def render(machines: Mapping[str, Sequence[Row]], source: str = "benchmark rows") -> str:
    """The page as text. machines: by name, rows at most one per case and backend."""
    environment = Environment(
        loader=PackageLoader("ceg_kernels.measure"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    shown = [_machine(i, name, rows) for i, (name, rows) in enumerate(machines.items())]
    template = environment.get_template("roofline.html.j2")
    return template.render(machines=shown, source=source, loose=f"{LOOSE:g}")


def _machine(index: int, name: str, rows: Sequence[Row]) -> dict[str, Any]:
    drawn = plot.drawable(rows)
    colours = {op: INK if c == "#000000" else c for op, c in plot.op_colours(drawn).items()}
    roof = plot.bandwidth(rows)
    figures = []
    for number, dtype in enumerate(plot.dtypes_of(drawn)):
        here = [row for row in drawn if row["dtype"] == dtype]
        draw = partial(plot.draw_panel, rows=here, colours=colours, bandwidth=roof, ink=INK)
        label = f"Roofline of {len(here)} rows in {dtype} on {name}: GFLOP/s against FLOP per byte"
        svg = panel(f"m{index}-{number}", f"{dtype}, GFLOP/s", draw, height=3.9, label=label)
        figures.append(Markup(svg))  # ours; matplotlib escapes every text in it
    peers = {row["backend"] for row in rows if row["peer"] is not None}
    return {
        "name": name,
        "rows": len(rows),
        "conditions": _conditions(rows),
        "roofs": _roofs(rows),
        "figures": figures,
        "left_out": plot.left_out(rows, drawn),
        "colours": {op: "var(--ink)" if c == INK else c for op, c in colours.items()},
        "markers": [
            (plot.SYMBOLS[plot.marker_of(b)], b, b in peers) for b in plot.backends_of(drawn)
        ],
        "ops": _tables(rows),
    }  # fmt: skip


def _conditions(rows: Sequence[Row]) -> dict[str, str]:
    """What the rows say of where they were measured; more than one value where they differ."""
    said = [row["versions"] for row in rows]
    keys = dict.fromkeys(key for versions in said for key in versions if key != "roofs")
    found = {
        key.replace("_", " "): dict.fromkeys(str(versions.get(key, "unknown")) for versions in said)
        for key in keys
    }
    found["device"] = dict.fromkeys(row["device"] for row in rows)
    found["commit"] = dict.fromkeys(str(row["commit"]) for row in rows)
    return {key: ", ".join(values) for key, values in found.items()}


def _roofs(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Each roof that the rows were computed with, and how it was measured where they say."""
    sources: dict[str, str] = {}
    for row in rows:
        for part in filter(None, row["versions"].get("roofs", "").split(", ")):
            name, _, how = part.partition(" ")
            sources[name] = HOW.get(how, how)
    kinds = [(dtype, dtype, "GF/s") for dtype in plot.dtypes_of(rows)]
    kinds = [kind for kind in kinds if kind[0] in sources or plot.recovered(rows, kind[0])]
    out = []
    for name, dtype, unit in (*kinds, ("copy", None, "GB/s")):
        seen = plot.recovered(rows, dtype)
        note = ""
        if seen and max(seen) > ROOFS_DIFFER * min(seen):
            note = f"rows of several runs: computed with {min(seen):.4g} to {max(seen):.4g}"
        out.append({
            "name": name if dtype else "copy, read + written",
            "value": f"{max(seen):.4g} {unit}" if seen else "no row says",
            "how": sources.get(name, "how, the rows do not say"),
            "note": note,
        })  # fmt: skip
    return out


def _tables(rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """By op the lines of its table: cases in order, in each ours before the peers."""
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(table.case(row), []).append(row)
    dtypes = plot.dtypes_of(rows)

    def order(case: tuple[str, ...]) -> tuple[int, int]:
        return DIRECTIONS.index(case[1]), dtypes.index(case[3])

    ops: dict[str, list[dict[str, Any]]] = {row["op"]: [] for row in rows}
    for case in sorted(cases, key=order):
        lines = sorted(cases[case], key=lambda row: row["peer"] is not None)
        ops[case[0]] += [_line(row, lines, first=row is lines[0]) for row in lines]
    return ops


def _line(row: Row, case: Sequence[Row], *, first: bool) -> dict[str, Any]:
    fraction, error = row["roof_fraction"], row["max_error_over_slack"]
    return {
        **{key: row[key] for key in ("direction", "shape", "dtype", "backend", "status")},
        "first": first,
        "ours": row["peer"] is None,
        "timed": row["median_s"] is not None,
        "median": table.seconds(row["median_s"]) or "–",
        "hot": table.seconds(row.get("hot_s")),
        "spread": table.spread(row) or "–",
        "rate": table.rate(row) or "–",
        "percent": "–" if fraction is None else f"{fraction:.0%}",
        "bar": 0.0 if fraction is None else min(100.0, 100 * fraction),
        "bound": row["bound"] or "unknown",
        "error": "–" if error is None else f"{error:.2f}",
        "against": _against(row, case),
    }


def _against(row: Row, case: Sequence[Row]) -> list[str]:
    """Of ours, what each peer takes; of a peer, what it takes beside the first of ours."""
    if row["median_s"] is None:
        return []
    if row["peer"] is None:
        timed = [other for other in case if other["peer"] is not None and other["median_s"]]
        return [f"{o['backend']} {o['median_s'] / row['median_s']:.2f}×" for o in timed]
    ours = next((o for o in case if o["peer"] is None and o["median_s"]), None)
    return [] if ours is None else [f"{row['median_s'] / ours['median_s']:.2f}× {ours['backend']}"]

"""The tables of `ceg paper`, on the terminal and in docs/paper.md, out of one list of cells."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from ceg_model.study import paper

WIDTH = 150  # where the output is no terminal


def tables() -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows of cells): the one source of the terminal's tables and the page's."""
    found = paper.taken_apart()
    return [
        ("FLOPs", *_flops_table(found["flops"])),
        ("Version 1, Table III", *_v1_table(found)),
        ("Version 2: steps only", *_v2_table(found["v2"]["rows"])),
        ("What is wrong", ["", "number", "why"],
         [[f"[{i}]", w["number"], w["what"]] for i, w in enumerate(found["wrong"], 1)]),
    ]  # fmt: skip


def _flops_table(flops: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["model", "N", "6N + 12LHQT", "ours, a token", "ours / theirs", "C of the run"]
    rows = [
        [name, f"{f['n_params']:,}", f"{f['palm_per_token']:,}", f"{f['per_token']:,.0f}",
         f"{f['ratio']:.3f}",
         "–" if f["total"] is None else f"{f['palm_total']:.4e}, ours {f['total']:.4e}"]
        for name, f in flops.items()
    ]  # fmt: skip
    return header, rows


def _v1_table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["arm", "loss", "minutes", "MFU", "dense MFU", "at", "paper's CEG",
              "G_alg", "G_hw", "G_time"]  # fmt: skip
    marks = {
        ("flash_attention", "50k"): " [1]",
        ("flash_attention", "25k"): " [2]",
        ("rope", "50k"): " [5]",
        ("layer_norm", "25k"): " [6]",
        ("layer_norm", "50k"): " [6]",
    }
    base = found["v1"]["baseline"]
    rows = [
        ["Baseline", f"{base['loss']:.2f}", f"{base['minutes']:.2f}", f"{base['mfu']:.1f}% [3]",
         f"{base['mfu_dense']:.1f}%", "", f"{paper.BASELINE_AGAINST_ITSELF} [2]", "1", "1", "1"]
    ]  # fmt: skip
    for arm, row in found["v1"]["rows"].items():
        fixed = [row["title"], f"{row['loss']:.2f}", f"{row['minutes']:.2f}", f"{row['mfu']:.1f}%",
                 f"{row['mfu_dense']:.1f}%"]  # fmt: skip
        for at in ("25k", "50k"):
            part = row[at]
            ceg = "not reached" if part["ceg"] is None else f"{part['ceg']:.2f}"
            bound = part["bound"]
            g_alg = _cell(part["g_alg"]) if bound is None else f"≤ {bound:.2f}"
            if paper.is_same_maths(arm):
                g_alg = "1 by construction"
            gains = [g_alg, _cell(part["g_hw"]), _cell(part["g_time"])]
            rows.append([*fixed, at, ceg + marks.get((arm, at), ""), *gains])
            fixed = [""] * len(fixed)
    return header, rows


def _v2_table(rows: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["arm", "steps, compact", "steps, full [4]", "G_alg, compact", "G_alg, full", "G_hw"]
    out = []
    for arm, row in rows.items():
        compact, full = row["compact"], row["full"]
        same = paper.is_same_maths(arm)
        gains = ["1 by construction"] * 2 if same else [_cell(p["g_alg"]) for p in (compact, full)]
        mark = " [7]" if arm == paper.BUNDLE else ""
        steps = [f"{compact['steps']:.3f}", f"{full['steps']:.3f}{mark}"]
        out.append([row["title"], *steps, *gains, _cell(full["g_hw"])])
    return header, out


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def markdown() -> str:
    """The tables as they stand in docs/paper.md."""
    return "\n\n".join(table_markdown(header, rows) for _, header, rows in tables())


def table_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def show() -> None:
    """Prints the tables on the terminal (rich, of the study extra)."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(Text(f"{paper.PAPER}, taken apart: G_time = G_alg x G_hw"))
    for title, header, rows in tables():
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for name in header:
            table.add_column(Text(name), overflow="fold")
        for cells in rows:
            table.add_row(*map(Text, cells))
        console.print(table)

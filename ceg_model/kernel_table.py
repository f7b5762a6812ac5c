"""`ceg info --kernels`: what every Triton kernel becomes on every target, without a GPU."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ceg_model.progress import Progress

if TYPE_CHECKING:
    from ceg_kernels.triton.compile import Facts

COLUMNS = ("target", "kernel", "case", "warps", "registers", "spills", "shared", "matrix unit")


def run(targets: str, *, as_json: bool) -> int:
    """Print the table of these targets (comma-separated, or "all"); 1 where a row may not stay."""
    from ceg_kernels.triton import compile

    wanted = tuple(compile.TARGETS) if targets == "all" else tuple(targets.split(","))
    facts = []
    with Progress("kernels") as progress:
        for fact in compile.report(wanted):
            facts.append(fact)
            progress(len(facts), 0, f"{fact.target} {fact.kernel} {fact.case}")
    if as_json:
        print(json.dumps([dataclasses.asdict(f) | {"wrong": f.wrong} for f in facts], indent=2))
    else:
        print("\n".join(_lines(facts)))
    return 1 if any(fact.wrong for fact in facts) else 0


def _lines(facts: list[Facts]) -> Iterator[str]:
    rows = [COLUMNS, *map(_row, facts)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for fact in facts:
        if fact.wrong:
            yield f"{fact.target} {fact.kernel} {fact.case}: {fact.wrong}"


def _row(fact: Facts) -> tuple[str, ...]:
    return (
        fact.target, fact.kernel, fact.case, str(fact.warps), str(fact.registers),
        f"{fact.spill_bytes} B", f"{fact.shared_bytes} B", fact.tensor_core or "-",
    )  # fmt: skip

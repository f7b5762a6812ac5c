"""`ceg info --kernels`: what every Triton kernel becomes on every target, without a GPU."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

from ceg_model.progress import Progress

if TYPE_CHECKING:
    from ceg_kernels.triton.compile import Facts

COLUMNS = ("target", "kernel", "case", "warps", "registers", "spills", "shared", "matrix unit")


def run(targets: str, *, as_json: bool) -> int:
    """Print the table of these targets (comma-separated, or "all"); 1 where a row may not stay."""
    from ceg_kernels.triton import compile

    facts = compiled(tuple(compile.TARGETS) if targets == "all" else tuple(targets.split(",")))
    if as_json:
        print(json.dumps([dataclasses.asdict(f) | {"wrong": f.wrong} for f in facts], indent=2))
    else:
        print("\n".join(_lines(facts)))
    return 1 if any(fact.wrong for fact in facts) else 0


def compiled(targets: Sequence[str]) -> list[Facts]:
    """Every kernel for these targets, by as many processes as there are processors."""
    from ceg_kernels.triton import compile

    jobs = [(target, family) for target in targets for family in compile.FAMILIES]
    workers = min(len(jobs), os.cpu_count() or 1)
    facts: list[Facts] = []
    # Spawned: a fork would have torch's locks without the threads that hold them.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    with pool, Progress("kernels") as progress:
        for done, found in enumerate(pool.map(_report, *zip(*jobs, strict=True))):
            facts += found
            progress(done + 1, len(jobs), " ".join(jobs[done]))
    return facts


def _report(target: str, family: str) -> list[Facts]:
    from ceg_kernels.triton import compile

    return list(compile.report([target], families=[family]))


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

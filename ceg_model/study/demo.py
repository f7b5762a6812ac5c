"""`ceg demo`: the roofs of this machine, a quick bench of every op, a small study, the report.

Each stage leaves a file in the folder and is skipped when it is there, so the same command goes on
where it was stopped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ceg_model.progress import Progress, duration
from ceg_model.rundir import read_json, write_json
from ceg_model.study.collect import BENCH, ROOFS, collect
from ceg_model.study.plans import plan_named
from ceg_model.study.report import write_report
from ceg_model.study.runner import Summary, describe, run_study

BENCH_BUDGET_S = {"nano": 40.0, "smoke": 8.0}


def run_demo(
    out: str | Path, data_dir: str | Path, *, smoke: bool, say: Callable[[str], None]
) -> Summary:
    """Does what is not done yet; returns how the study ended."""
    import torch

    from ceg_model import data

    plan = plan_named("smoke" if smoke else "nano")
    folder, device = Path(out), "cuda" if torch.cuda.is_available() else "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    roofs = _stage(folder / ROOFS, "1/5 roofs of this machine", lambda: _roofs(device, smoke), say)
    budget = BENCH_BUDGET_S[plan.name]
    _stage(
        folder / BENCH, "2/5 bench of every op", lambda: _bench(device, budget, roofs, smoke), say
    )
    say("3/5 data")
    with Progress("data") as progress:
        data.prepare(data.Request(), data_dir, progress)
    say(f"4/5 study {plan.name}: {len(plan.arms)} arms, {len(plan.scales)} scales, "
        f"{len(plan.seeds)} seeds")  # fmt: skip
    began = time.monotonic()
    with Progress("study") as progress:
        summary = run_study(plan, folder, data_dir, progress=progress, note=progress.note)
    say("    " + describe(summary, time.monotonic() - began))
    say("5/5 report")
    page = write_report(collect(folder), folder / "report")
    say(f"    {duration(time.monotonic() - start)} in all. Open {page}")
    return summary


def _stage(
    path: Path, title: str, make: Callable[[], dict[str, Any]], say: Callable[[str], None]
) -> dict[str, Any]:
    if (known := read_json(path)) is not None:
        say(f"{title}: done before")
        return known
    say(title)
    content = make()
    write_json(path, content)
    return content


def _roofs(device: str, smoke: bool) -> dict[str, Any]:
    from ceg_kernels.measure import measure

    return dataclasses.asdict(measure(device, seconds=0.05 if smoke else 0.2))


def _bench(device: str, budget_s: float, roofs: dict[str, Any], smoke: bool) -> dict[str, Any]:
    from ceg_kernels.measure import Roofs, quick_bench

    with Progress("bench") as progress:
        rows = quick_bench(
            device,
            budget_s=budget_s,
            smoke=smoke,
            roofs=Roofs(**roofs),
            progress=lambda case, done, total: progress(done, total, str(case)),
        )
    return {"rows": [dict(row) for row in rows]}

"""`ceg demo`: the roofs of this machine, a quick bench of every op, a small study, the report.

Each stage leaves a file in the folder and is skipped when it is there, so the same command goes on
where it was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ceg_model.progress import Progress, duration
from ceg_model.study import machine
from ceg_model.study.collect import collect
from ceg_model.study.plans import plan_named
from ceg_model.study.report import write_report
from ceg_model.study.runner import Summary, describe, run_study

BENCH_BUDGET_S = {"nano": machine.BUDGET_S, "smoke": 8.0}


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
    machine.describe(
        folder, device, budget_s=BENCH_BUDGET_S[plan.name], smoke=smoke, say=say,
        titles=("1/5 roofs of this machine", "2/5 bench of every op"),
    )  # fmt: skip
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

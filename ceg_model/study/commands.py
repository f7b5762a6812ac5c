"""The subcommands `ceg study run`, `report` and `export`, `ceg estimate` and `ceg demo`."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
from typing import Any

DATA = "data/stdlib"
DEMO = "ceg-demo"


def add_subcommands(subparsers: Any) -> None:
    _add_study(subparsers)
    _add_estimate(subparsers)
    _add_demo(subparsers)


def _add_study(subparsers: Any) -> None:
    study = subparsers.add_parser("study", help="run a study, write its report")
    commands = study.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run a plan; the same command goes on where it stopped")
    run.add_argument(
        "plan",
        metavar="PLAN",
        help="nano (minutes on two cores), cpu-ladder (hours on two cores), precision (is bf16 "
        "free?), kernels (is each equal to its twin?), smoke (seconds); for GPUs h200-ladder, "
        "paper-compact, paper-full",
    )
    run.add_argument("--out", required=True, metavar="DIR", help="the study's folder")
    run.add_argument("--data", metavar="DIR", help=f"token shards (default: {DATA}, built in)")
    run.add_argument("--budget-minutes", type=float, metavar="M", help="stop after M minutes")
    run.add_argument(
        "--log-to", metavar="LOGGER", help="tensorboard, wandb or trackio, as in train"
    )
    run.add_argument("--json", action="store_true", help="print how it ended as JSON")
    run.set_defaults(run=_run)
    report = commands.add_parser("report", help="write DIR/report from what is done")
    report.add_argument("dir", metavar="DIR")
    report.add_argument("--json", action="store_true", help="print results.json")
    report.set_defaults(run=_report)
    export = commands.add_parser("export", help="all curves of a study as one table")
    export.add_argument("dir", metavar="DIR")
    export.add_argument("--out", required=True, metavar="FILE.csv|FILE.parquet")
    export.set_defaults(run=_export)


def _add_estimate(subparsers: Any) -> None:
    estimate = subparsers.add_parser(
        "estimate",
        help="gains from anyone's loss curves",
        description="Columns: arm, loss, and flops or step; optional seconds, seed, scale, budget, "
        "tokens, lr, executed_flops, data, eval_set, tokenizer, flop_convention, smoothed. "
        "A refusal is an answer: exit status 0. Bad input is 2.",
    )
    estimate.add_argument("curves", metavar="CURVES.csv")
    estimate.add_argument("--baseline", default="baseline", metavar="NAME")
    target = estimate.add_mutually_exclusive_group()
    target.add_argument("--target", type=float, metavar="LOSS")
    target.add_argument(
        "--target-at-flops", type=float, metavar="C", help="the baseline's loss at C FLOPs"
    )
    estimate.add_argument(
        "--mode", choices=("endpoint", "crossing", "slope"),
        help="endpoint: the ends of three or more budgets of each arm, the default where there are "
        "so many; crossing: within a run, the default elsewhere; slope: local, for gains to 1.25",
    )  # fmt: skip
    estimate.add_argument("--flops-per-step", type=float, metavar="F", help="for the column step")
    estimate.add_argument(
        "--peak-flops",
        type=float,
        metavar="P",
        help="dense peak of all devices: MFU > 1 is refused",
    )
    estimate.add_argument(
        "--kernel",
        action="append",
        default=[],
        metavar="ARM",
        help="an arm with the same maths: test that its curves are equal",
    )
    estimate.add_argument("--json", action="store_true", help="print one JSON object")
    estimate.set_defaults(run=_estimate)


def _add_demo(subparsers: Any) -> None:
    demo = subparsers.add_parser(
        "demo", help="bench, a small study and its report, in minutes, on this machine"
    )
    demo.add_argument("--out", metavar="DIR", help=f"default: {DEMO}, {DEMO}-smoke with --smoke")
    demo.add_argument("--data", metavar="DIR", help=f"token shards (default: {DATA}, built in)")
    demo.add_argument("--smoke", action="store_true", help="a minute; proves that all of it runs")
    demo.add_argument("--json", action="store_true", help="print results.json's estimate")
    demo.set_defaults(run=_demo)


def _run(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    import torch

    from ceg_model import data
    from ceg_model.loggers import check
    from ceg_model.progress import Progress
    from ceg_model.study import machine
    from ceg_model.study.plans import plan_named
    from ceg_model.study.runner import describe, run_study
    from ceg_model.train_config import TrainConfig

    plan = plan_named(arguments.plan)
    if arguments.log_to is not None:
        TrainConfig(log_to=arguments.log_to)  # refuses a name that there is not
        plan = dataclasses.replace(plan, train={**plan.train, "log_to": arguments.log_to})
        check(arguments.log_to)
    folder = arguments.data or f"data/{dict(plan.data).get('hf', DATA).rpartition('/')[2]}"
    if arguments.data is None:
        with Progress("data") as progress:
            data.prepare(data.Request(**plan.data), folder, progress)
    start = time.monotonic()
    if plan.name != "smoke":  # a minute at most, and its numbers mean nothing
        device = "cuda" if torch.cuda.is_available() else "cpu"
        machine.describe(Path(arguments.out), device, say=lambda text: print(text, file=sys.stderr))
    with Progress(f"study {plan.name}") as progress:
        summary = run_study(
            plan,
            arguments.out,
            folder,
            budget_minutes=arguments.budget_minutes,
            progress=progress,
            note=progress.note,
        )
    if arguments.json:
        failed = [f"{s.arm}/{s.scale}/{s.seed}: {reason}" for s, reason in summary.failed]
        print(json.dumps({"planned": summary.planned, "done": summary.done, "failed": failed,
                          "stopped": summary.stopped}))  # fmt: skip
    else:
        print(describe(summary, time.monotonic() - start))
    return 1 if summary.failed else 0


def _report(arguments: argparse.Namespace) -> int:
    from ceg_model.study.collect import collect
    from ceg_model.study.report import write_report
    from ceg_model.study.store import Store

    gc.disable()  # 10,000 runs are a million objects, all of them needed until the end
    try:
        results = collect(arguments.dir)
        page = write_report(results, Store(arguments.dir).report)
    finally:
        gc.enable()
    print(json.dumps(results) if arguments.json else page)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from ceg_model.study.curve_export import study_curves, write_curves

    curves = study_curves(arguments.dir)
    write_curves(curves, arguments.out)
    print(f"{arguments.out}: {len(curves)} curves, {sum(c.flops.size for c in curves)} rows")
    return 0


def _estimate(arguments: argparse.Namespace) -> int:
    from ceg_model.study.cells import Options
    from ceg_model.study.curves import read_csv
    from ceg_model.study.estimate import estimate

    curves = read_csv(arguments.curves, flops_per_step=arguments.flops_per_step)
    answer = estimate(
        curves,
        Options(
            baseline=arguments.baseline,
            target=arguments.target,
            target_at_flops=arguments.target_at_flops,
            mode=arguments.mode,
            peak_flops=arguments.peak_flops,
            same_maths=frozenset(arguments.kernel),
        ),
    )
    print(json.dumps(answer, indent=2, allow_nan=False) if arguments.json else _table(answer))
    return 0


def _table(answer: dict[str, Any]) -> str:
    from ceg_model.study import words

    lines = [f"baseline {answer['baseline']}, {answer['mode']} mode, targets: "
             + ", ".join(f"{n or 'all'} {t:.4f}" if t is not None else f"{n or 'all'} refused"
                         for n, t in answer["target_losses"].items())]  # fmt: skip
    for arm, top in answer["arms"].items():
        for scale, cell in top["scales"].items():
            g_alg = words.gain(cell["g_alg"])
            if cell["status"] == "censored":
                g_alg = (
                    f"{'<=' if cell['bound_side'] == 'upper' else '>='} {words.gain(cell['bound'])}"
                )
            row = f"{arm:<20} {scale:<8} G_alg {g_alg:<10} [{words.interval(cell['ci'])}]"
            row += f"  G_hw {words.gain(cell['g_hw'])}  G_time {words.gain(cell['g_time'])}"
            lines.append(row + (f"  {', '.join(cell['flags'])}" if cell["flags"] else ""))
            lines += [f"    {reason}" for reason in cell["reasons"]]
        trend = answer["class"][arm]
        lines.append(f"    class: {trend['class']} ({trend['reason']})")
    gate = answer["aa"]
    lines.append(f"A/A: {gate['reason']}")
    return "\n".join(lines)


def _demo(arguments: argparse.Namespace) -> int:
    from ceg_model.study.demo import run_demo

    out = arguments.out or (f"{DEMO}-smoke" if arguments.smoke else DEMO)
    stream = sys.stderr if arguments.json else sys.stdout
    summary = run_demo(
        out,
        arguments.data or DATA,
        smoke=arguments.smoke,
        say=lambda text: print(text, file=stream, flush=True),
    )
    if arguments.json:
        from pathlib import Path

        print((Path(out) / "report" / "results.json").read_text())
    return 1 if summary.failed else 0

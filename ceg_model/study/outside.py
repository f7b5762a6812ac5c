"""The subcommands that need no study of ours: `ceg curves import` and `ceg paper`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Value = TypeVar("Value")


def add_subcommands(subparsers: Any) -> None:
    _add_curves(subparsers)
    _add_paper(subparsers)


def _add_curves(subparsers: Any) -> None:
    curves = subparsers.add_parser("curves", help="other tools' logs as a table of curves")
    commands = curves.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "import",
        help="TensorBoard and W&B exports -> the CSV that `ceg estimate` reads",
        description="SOURCE: TensorBoard's event files or a folder of them (needs the package "
        "tensorboard), its 'download as CSV', W&B's CSV of a chart or of a run's history, or JSON "
        "lines with a step (W&B's local history, metrics.jsonl of `ceg train`). Options with "
        "[RUN=] may be given several times, once for each run; RUN is its name in the source.",
    )
    command.add_argument("sources", nargs="+", metavar="SOURCE")
    command.add_argument("--out", required=True, metavar="CURVES.csv")
    command.add_argument("--loss", metavar="METRIC", help="the evaluation loss, e.g. val/loss")
    for name, what in (
        ("arm", "default: the run's name"),
        ("seed", "default: none, which counts as 0"),
        ("scale", "of the model"),
        ("budget", "of the run"),
    ):
        command.add_argument(
            f"--{name}", action="append", default=[], metavar="[RUN=]NAME", help=what
        )
    command.add_argument(
        "--flops-per-step", action="append", default=[], metavar="[RUN=]F",
        help="model FLOPs of a step, where no metric counts them",
    )  # fmt: skip
    command.add_argument(
        "--column", action="append", default=[], metavar="COLUMN=METRIC",
        help="the metric behind flops, seconds, tokens, lr or executed_flops where its name is "
        "unusual. seconds=wall and seconds=_runtime take the log's own clock, which counts "
        "evaluation and checkpoints too",
    )  # fmt: skip
    command.add_argument(
        "--smoothed", action="store_true", help="the losses were smoothed: mark all rows"
    )
    command.add_argument("--json", action="store_true", help="print what each curve has")
    command.set_defaults(run=_import)


def _add_paper(subparsers: Any) -> None:
    paper = subparsers.add_parser(
        "paper", help="the published gains (arXiv 2505.04075) taken apart into algorithm and speed"
    )
    paper.add_argument("--json", action="store_true", help="print one JSON object")
    paper.add_argument("--markdown", action="store_true", help="print the tables of docs/paper.md")
    paper.set_defaults(run=_paper)


def _import(arguments: argparse.Namespace) -> int:
    from ceg_model.study.curve_import import LABELS, Wanted, import_curves, summary, write_table

    columns = dict(_split(text, "--column", needs_left=True) for text in arguments.column)
    rates = _by_run(arguments.flops_per_step, "--flops-per-step", _positive)
    wanted = Wanted(
        loss=arguments.loss,
        columns=columns,
        labels={name: _by_run(getattr(arguments, name), f"--{name}", str) for name in LABELS},
        flops_per_step=rates,
        smoothed=arguments.smoothed,
    )
    curves = import_curves(arguments.sources, wanted)
    write_table(curves, arguments.out)
    if arguments.json:
        print(json.dumps(summary(curves), indent=2))
        return 0
    for curve in curves:
        labels = ", ".join(f"{name} {value}" for name, value in curve.labels.items())
        print(f"{curve.run}: {labels}, {len(curve.rows['step'])} rows of {', '.join(curve.rows)}")
        for note in curve.notes:
            print(f"    {note}", file=sys.stderr)
    more = "" if "flops" in curves[0].rows else " --flops-per-step F"
    print(f"ceg estimate {arguments.out}{more} --baseline NAME")
    return 0


def _by_run(texts: Iterable[str], option: str, convert: Callable[[str], Value]) -> dict[str, Value]:
    """[RUN=]VALUE, by run; the run "" is all of them. A run's name may hold "=", no value may."""
    found: dict[str, Value] = {}
    for text in texts:
        run, value = _split(text, option)
        if run in found:
            raise ValueError(f"{option} must be given once for each run, got {text!r} again")
        found[run] = convert(value)
    return found


def _split(text: str, option: str, *, needs_left: bool = False) -> tuple[str, str]:
    left, _, right = text.partition("=") if needs_left else text.rpartition("=")
    if not right or (needs_left and not left):
        shape = "COLUMN=METRIC" if needs_left else "[RUN=]VALUE"
        raise ValueError(f"{option} must be {shape}, got {text!r}")
    return left, right


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise ValueError(f"--flops-per-step must be a number above 0, got {text!r}")
    return value


def _paper(arguments: argparse.Namespace) -> int:
    from ceg_model.study import paper, paper_page

    if arguments.json:
        print(json.dumps(paper.taken_apart(), indent=2, allow_nan=False))
    elif arguments.markdown:
        print(paper_page.markdown())
    else:
        paper_page.show()
    return 0

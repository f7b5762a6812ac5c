"""What a row of a whole training step says beside a kernel's: tokens, utilisation, a prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ceg_kernels import OPS
from ceg_kernels.measure.clock import time_interleaved
from ceg_kernels.measure.table import case, seconds

if TYPE_CHECKING:
    from rich.table import Table

COPIES = 4  # of a call's tensors, in turn: a step does not find them in a near cache either


@dataclass(frozen=True)
class Step:
    tokens: int
    extra_flops: int | None  # executed minus model FLOPs; None where a backend does not say
    predicted_s: float | None  # from the kernels' own times; None where nothing is predicted


def call_times(
    arguments: Mapping[tuple, tuple],
    backends: Mapping[tuple, Iterable[str]],
    *,
    device: str = "cpu",
    beside: Mapping[str, Callable[[], Any]] | None = None,
    min_time_s: float = 0.1,
) -> tuple[dict[tuple[tuple, str], float], dict[str, float]]:
    """Median seconds of (call, backend) on its own arguments, and of what is timed `beside` them.

    arguments: call -> the op's arguments; a call is a tuple that begins with the op's name.
    backends: call -> the names to time it on. All are timed in turn, in one run of the clock.
    """
    beside, copies = beside or {}, COPIES if device == "cpu" else 1  # the GPU's cache is flushed
    names: dict[str, tuple[tuple, str]] = {}
    timed: dict[str, Any] = dict(beside)
    for number, (call, args) in enumerate(arguments.items()):
        turns = [_copy(args) for _ in range(copies)]
        for backend in backends[call]:
            run = OPS[call[0]].backend(backend).run
            names[f"{number} {backend}"] = call, backend
            timed[f"{number} {backend}"] = [lambda r=run, a=a: r(*a) for a in turns]
    timings = time_interleaved(timed, device=device, min_time_s=min_time_s, max_time_s=1.0)
    return (
        {pair: timings[name].median_s for name, pair in names.items()},
        {name: timings[name].median_s for name in beside},
    )


def _copy(args: tuple) -> tuple:
    return tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)


def step_extras(row: dict[str, Any], step: Step) -> None:
    """Add tokens_per_s, mfu, hfu, predicted_s and unexplained to a measured row.

    mfu, hfu: model and executed FLOPs over seconds times the measured peak of the row's dtype; None
    where one of them is unknown. unexplained: measured over predicted, less 1.
    """
    mfu, taken = row["roof_fraction"], row["median_s"]
    row["tokens_per_s"] = step.tokens / taken
    row["mfu"] = mfu
    known = mfu is not None and step.extra_flops is not None
    row["hfu"] = mfu * (1 + step.extra_flops / row["flops"]) if known else None
    row["predicted_s"] = step.predicted_s
    row["unexplained"] = None if step.predicted_s is None else taken / step.predicted_s - 1


def render(rows: Sequence[dict[str, Any]]) -> Table | None:
    """A table of the rows that are steps, each beside the same step with all kernels off."""
    from rich.table import Table

    steps = [row for row in rows if row.get("tokens_per_s") is not None]
    if not steps:
        return None
    table = Table(box=None, padding=(0, 1), header_style="bold", row_styles=("", "dim"))
    for name in ("step", "dtype", "kernels"):
        table.add_column(name, no_wrap=True)
    for name in ("median", "tokens/s", "MFU", "HFU", "vs torch", "predicted", "unexplained"):
        table.add_column(name, justify="right", no_wrap=True)
    stock = {case(row): row["median_s"] for row in steps if row["backend"] == "torch"}
    for row in steps:
        beside = stock.get(case(row))
        table.add_row(
            row["shape"], row["dtype"], row["backend"], seconds(row["median_s"]),
            f"{row['tokens_per_s']:.0f}", _percent(row["mfu"]), _percent(row["hfu"]),
            "" if beside is None else f"{beside / row['median_s']:.2f}x",
            seconds(row["predicted_s"]),
            "" if row["unexplained"] is None else f"{row['unexplained']:+.1%}",
        )  # fmt: skip
    return table


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"

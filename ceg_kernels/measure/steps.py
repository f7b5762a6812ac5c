"""What a row of a whole training step says beside a kernel's: tokens, utilisation, a prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ceg_kernels.measure.table import case, seconds

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Step:
    tokens: int
    extra_flops: int | None  # executed minus model FLOPs; None where a backend does not say
    predicted_s: float | None  # from the kernels' own times; None where nothing is predicted


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

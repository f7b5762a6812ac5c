"""Loss curves: what the estimator reads, and the checks that refuse a curve before it is used.

A curve is one training run: the evaluations of one arm at one scale, budget and seed. Two kinds of
trouble are kept apart. A file that cannot be read as curves raises CurveError, which names the line
and the column. A curve that reads well but cannot be trusted (NaN, a loss below zero, FLOPs that go
back) is kept with its `problems`, and the estimator answers "refused" for it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# What must agree between two arms before their losses or FLOPs may be compared.
IDENTITY = ("data", "eval_set", "tokenizer", "flop_convention")
GROWING = ("flops", "seconds", "executed_flops")
NUMBERS = ("flops", "step", "loss", "seconds", "tokens", "lr", "executed_flops")


class CurveError(ValueError):
    """The input is not a table of curves; the message names line and column."""


@dataclass(frozen=True, order=True)
class Key:
    """Where a curve belongs. Scale and budget are labels, compared in the order they appear."""

    arm: str
    scale: str = ""
    seed: str = "0"
    budget: str = ""


@dataclass(frozen=True)
class Curve:
    key: Key
    flops: Array
    loss: Array
    seconds: Array | None = None
    lr: Array | None = None
    executed_flops: Array | None = None
    identity: dict[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @cached_property
    def log_flops(self) -> Array:
        return np.log(self.flops)

    @cached_property
    def running_minimum(self) -> Array:
        return np.minimum.accumulate(self.loss)

    @cached_property
    def negated_minimum(self) -> Array:
        """It never falls, as a search needs."""
        return -self.running_minimum


def make_curve(
    key: Key,
    flops: Sequence[float] | Array,
    loss: Sequence[float] | Array,
    *,
    seconds: Sequence[float] | Array | None = None,
    lr: Sequence[float] | Array | None = None,
    executed_flops: Sequence[float] | Array | None = None,
    identity: dict[str, str] | None = None,
    lines: Sequence[int] | None = None,
    problems: tuple[str, ...] = (),
) -> Curve:
    """Checks one run's evaluations; the evaluation before the first step (0 FLOPs) is dropped."""
    columns: dict[str, Array | None] = {
        "flops": np.asarray(flops, dtype=np.float64),
        "loss": np.asarray(loss, dtype=np.float64),
        "seconds": None if seconds is None else np.asarray(seconds, dtype=np.float64),
        "lr": None if lr is None else np.asarray(lr, dtype=np.float64),
        "executed_flops": None
        if executed_flops is None
        else np.asarray(executed_flops, dtype=np.float64),
    }
    where = np.arange(1, len(flops) + 1) if lines is None else np.asarray(lines)
    found = [*problems, *_problems(columns, where, "evaluation" if lines is None else "line")]
    keep = columns["flops"] != 0  # ln C does not exist there
    kept = {name: None if col is None else col[keep] for name, col in columns.items()}
    assert kept["flops"] is not None
    assert kept["loss"] is not None
    return Curve(
        key=key,
        flops=kept["flops"],
        loss=kept["loss"],
        seconds=kept["seconds"],
        lr=kept["lr"],
        executed_flops=kept["executed_flops"],
        identity=dict(identity or {}),
        problems=tuple(found),
    )


def _problems(columns: dict[str, Array | None], where: NDArray[Any], word: str) -> Iterable[str]:
    present = {name: column for name, column in columns.items() if column is not None}
    growing = [present[name] for name in GROWING if name in present]
    values = np.array(list(present.values()))
    # Nearly always all is well, which is quickly seen; a NaN is not at or above 0.
    if ((values >= 0) & (values < np.inf)).all() and all((g[1:] > g[:-1]).all() for g in growing):
        return
    for name, column in present.items():
        bad = ~np.isfinite(column)
        if bad.any():
            yield f"{name} is {column[bad][0]} at {word} {where[bad][0]}"
            continue
        if (column < 0).any():
            first = int(np.argmax(column < 0))
            yield f"{name} is negative ({column[first]:g}) at {word} {where[first]}"
        if name in GROWING:
            back = np.diff(column) < 0 if name == "seconds" else np.diff(column) <= 0
            if back.any():
                first = int(np.argmax(back)) + 1
                yield (
                    f"{name} must grow, got {column[first]:g} after {column[first - 1]:g} "
                    f"at {word} {where[first]}"
                )


def read_csv(path: str | Path, *, flops_per_step: float | None = None) -> list[Curve]:
    """Reads `arm, loss` and `flops` (or `step` with flops_per_step), and the optional columns."""
    path = Path(path)
    if not path.is_file():
        raise CurveError(f"CURVES must be a CSV file, got {str(path)!r}, which does not exist")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CurveError(f"{path.name} must be UTF-8 text, got {error.reason}") from error
    reader = csv.reader(text.splitlines())
    header = [name.strip().lower() for name in next(reader, [])]
    _check_header(path.name, header, flops_per_step)
    groups: dict[Key, list[tuple[int, dict[str, str]]]] = {}
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        line = reader.line_num
        if len(cells) != len(header):
            raise CurveError(
                f"{path.name} line {line}: expected {len(header)} columns "
                f"({', '.join(header)}), got {len(cells)}"
            )
        row = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
        if not row["arm"]:
            raise CurveError(f"{path.name} line {line}, column 'arm': expected a name, got nothing")
        key = Key(row["arm"], row.get("scale", ""), row.get("seed", "0"), row.get("budget", ""))
        groups.setdefault(key, []).append((line, row))
    if not groups:
        raise CurveError(f"{path.name} line 1: expected rows below the header, got none")
    return [_from_rows(path.name, key, rows, flops_per_step) for key, rows in groups.items()]


def _check_header(name: str, header: list[str], flops_per_step: float | None) -> None:
    for column in ("arm", "loss"):
        if column not in header:
            raise CurveError(
                f"{name} line 1, column {column!r}: expected it in the header, "
                f"got {', '.join(header) or 'an empty file'}"
            )
    for column in header:
        if header.count(column) > 1:
            raise CurveError(f"{name} line 1, column {column!r}: expected once, got it twice")
    if "flops" in header:
        return
    if "step" not in header:
        raise CurveError(
            f"{name} line 1, column 'flops': expected 'flops', or 'step' with "
            f"--flops-per-step, got {', '.join(header)}"
        )
    if flops_per_step is None:
        raise CurveError(
            f"{name} line 1, column 'flops': expected it, or --flops-per-step for the column 'step'"
        )


def _from_rows(
    name: str, key: Key, rows: list[tuple[int, dict[str, str]]], flops_per_step: float | None
) -> Curve:
    present = [column for column in NUMBERS if column in rows[0][1]]
    # A column that is empty all through a run is an absent column; a single hole is an error.
    present = [
        c for c in present if c in ("loss", "flops", "step") or any(row[c] for _, row in rows)
    ]
    columns: dict[str, list[float]] = {column: [] for column in present}
    for line, row in rows:
        for column in present:
            columns[column].append(_number(name, line, column, row[column]))
    flops = columns.get("flops")
    if flops is None:
        assert flops_per_step is not None
        flops = [step * flops_per_step for step in columns["step"]]
    identity = {}
    problems: list[str] = []
    for column in IDENTITY:
        values = {row[column] for _, row in rows if row.get(column)}
        if len(values) > 1:
            problems.append(f"{column} changes within the run: {', '.join(sorted(values))}")
        elif values:
            identity[column] = values.pop()
    for line, row in rows:
        if row.get("smoothed", "").lower() in ("1", "true", "yes"):
            problems.append(f"loss is smoothed or adjusted at line {line}")
            break
    return make_curve(
        key,
        flops,
        columns["loss"],
        seconds=columns.get("seconds"),
        lr=columns.get("lr"),
        executed_flops=columns.get("executed_flops"),
        identity=identity,
        lines=[line for line, _ in rows],
        problems=tuple(problems),
    )


def _number(name: str, line: int, column: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise CurveError(
            f"{name} line {line}, column {column!r}: expected a number, got {text!r}"
        ) from None


def disagreement(a: Curve, b: Curve) -> str | None:
    """Why the losses or FLOPs of two runs may not be compared, or None."""
    for name in IDENTITY:
        left, right = a.identity.get(name), b.identity.get(name)
        if left != right and left is not None and right is not None:
            return f"{name} must be the same for both arms, got {left} and {right}"
    return None

"""What other tools wrote about a run: TensorBoard events, CSV exports, JSON lines.

Each reader gives `Log`s: a run's metrics by name, untouched. Which of them is the loss, and what
arm the run is, `curve_import` decides.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ceg_model.study.curves import CurveError

STEPS = ("_step", "step", "global_step", "trainer/global_step")  # as people call the step's column
WALL = "wall"  # TensorBoard's clock, as a metric
CHART = " - "  # W&B's charts name their columns "<run> - <metric>"
LEAST, MOST = "__MIN", "__MAX"


@dataclass
class Log:
    """One run. points: metric -> (step, value, line); the value is text where it came from text."""

    name: str
    source: str
    points: dict[str, list[tuple[float, Any, int | None]]] = field(default_factory=dict)
    smoothed: set[str] = field(default_factory=set)  # metrics known to be averages

    def add(self, metric: str, step: float, value: Any, line: int | None = None) -> None:
        self.points.setdefault(metric, []).append((step, value, line))


def read_source(path: str | Path) -> list[Log]:
    """The runs in an event file, a folder of them, a .csv export or a .jsonl history."""
    path = Path(path)
    if not path.exists():
        raise CurveError(
            f"SOURCE must be a file or a folder, got {str(path)!r}, which is not there"
        )
    if path.is_dir() or "tfevents" in path.name:
        return list(_events(path))
    if path.suffix not in (".csv", ".jsonl"):
        raise CurveError(
            f"SOURCE must be an event file (its name has 'tfevents'), a .csv or a .jsonl, "
            f"got {path.name!r}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CurveError(f"{path.name} must be UTF-8 text, got {error.reason}") from error
    return _json_lines(path, text) if path.suffix == ".jsonl" else _table(path, text)


def _events(path: Path) -> Iterable[Log]:
    """Each folder with event files is a run, as in TensorBoard."""
    try:
        from tensorboard.backend.event_processing import event_accumulator
        from tensorboard.util import tensor_util
    except ImportError as error:
        raise ModuleNotFoundError(
            "TensorBoard's event files need the package tensorboard (pip install tensorboard), "
            f"got {error}; its 'download as CSV' needs nothing"
        ) from error
    files = [path] if path.is_file() else [f for f in path.rglob("*tfevents*") if f.is_file()]
    if not files:
        raise CurveError(f"{path} must hold TensorBoard's event files (*tfevents*), got none")
    for place in sorted({path} if path.is_file() else {f.parent for f in files}):
        everything = {event_accumulator.SCALARS: 0, event_accumulator.TENSORS: 0}
        found = event_accumulator.EventAccumulator(str(place), size_guidance=everything)
        found.Reload()
        nested = place.is_dir() and place != path
        log = Log(str(place.relative_to(path)) if nested else place.resolve().name, str(place))
        clock: dict[float, float] = {}
        tags = found.Tags()
        for tag in tags["scalars"]:
            for event in found.Scalars(tag):
                _go_on(log, tag, event.step, event.value)
                clock.setdefault(event.step, event.wall_time)
        for tag in tags["tensors"]:  # where newer writers put scalars
            for event in found.Tensors(tag):
                value = tensor_util.make_ndarray(event.tensor_proto)
                if value.size == 1 and value.dtype.kind == "f":
                    _go_on(log, tag, event.step, float(value.reshape(())))
                    clock.setdefault(event.step, event.wall_time)
        for step in sorted(clock):
            log.add(WALL, step, clock[step])
        yield log


def _go_on(log: Log, tag: str, step: float, value: float) -> None:
    """A step that comes again is a restart: what was logged from there on was trained anew."""
    before = log.points.get(tag, [])
    while before and before[-1][0] >= step:
        before.pop()
    log.add(tag, step, value)


def _table(path: Path, text: str) -> list[Log]:
    reader = csv.reader(text.splitlines())
    header = [name.strip() for name in next(reader, [])]
    rows: list[tuple[int, list[str]]] = []
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise CurveError(
                f"{path.name} line {reader.line_num}: expected {len(header)} columns, "
                f"got {len(cells)}"
            )
        rows.append((reader.line_num, [cell.strip() for cell in cells]))
    if not rows:
        raise CurveError(f"{path.name} line 1: expected rows below a header, got none")
    if {"wall time", "step", "value"} <= {name.lower() for name in header}:
        return [_tensorboard_csv(path, header, rows)]
    if any(CHART in name for name in header):
        return _chart(path, header, rows)
    return [_history(path, header, rows)]


def _tensorboard_csv(path: Path, header: list[str], rows: list[tuple[int, list[str]]]) -> Log:
    """One tag of one run. TensorBoard names the file "run-<run>-tag-<tag>.csv"."""
    lower = [name.lower() for name in header]
    named = re.fullmatch(r"run-(.+)-tag-(.+)", path.stem)
    name, tag = named.groups() if named else (path.stem, "Value")
    log = Log(name, path.name)
    for line, cells in rows:
        row = dict(zip(lower, cells, strict=True))
        step = number(path.name, line, "Step", row["step"])
        log.add(tag, step, row["value"], line)
        log.add(WALL, step, row["wall time"], line)
    return log


def _chart(path: Path, header: list[str], rows: list[tuple[int, list[str]]]) -> list[Log]:
    """W&B's export of a chart: a column for each run, and its least and most where it averages."""
    logs: dict[str, Log] = {}
    columns: list[tuple[int, str, str]] = []
    for i, name in enumerate(header):
        run, separator, metric = name.rpartition(CHART)
        if separator:
            columns.append((i, run, metric))
    own_steps = {run: i for i, run, metric in columns if metric in STEPS}
    common = [i for i, name in enumerate(header) if name.lower() in STEPS]
    place = {name: i for i, name in enumerate(header)}
    for i, run, metric in columns:
        if metric.endswith((LEAST, MOST)) or metric in STEPS:
            continue
        step_at = own_steps.get(run, common[0] if common else None)
        if step_at is None:
            raise CurveError(
                f"{path.name} line 1, column {header[0]!r}: expected 'Step' as the chart's x axis, "
                f"got {header[0]!r}"
            )
        log = logs.setdefault(run, Log(run, path.name))
        low, high = place.get(f"{header[i]}{LEAST}"), place.get(f"{header[i]}{MOST}")
        for line, cells in rows:
            if not cells[i]:
                continue
            log.add(
                metric, number(path.name, line, header[step_at], cells[step_at]), cells[i], line
            )
            if low is not None and high is not None and cells[low] != cells[high]:
                log.smoothed.add(metric)  # a group of runs, or several steps in one point
    return list(logs.values())


def _history(path: Path, header: list[str], rows: list[tuple[int, list[str]]]) -> Log:
    """A run's history: a column for each metric."""
    step_at = next((i for i, name in enumerate(header) if name.lower() in STEPS), None)
    if step_at is None:
        raise CurveError(
            f"{path.name} line 1, column 'step': expected one of {', '.join(STEPS)}, "
            f"got {', '.join(header)}"
        )
    log = Log(path.stem, path.name)
    for line, cells in rows:
        step = number(path.name, line, header[step_at], cells[step_at])
        for i, cell in enumerate(cells):
            if cell and header[i] and i != step_at:  # pandas writes an index without a name
                log.add(header[i], step, cell, line)
    return log


def _json_lines(path: Path, text: str) -> list[Log]:
    """W&B's local history, or any object a line with a step; our own metrics.jsonl is one."""
    log = Log(path.stem, path.name)
    for line, content in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise CurveError(
                f"{path.name} line {line}: expected JSON, got {content[:40]!r}"
            ) from error
        steps = [key for key in STEPS if isinstance(row, dict) and key in row]
        if not steps:
            raise CurveError(
                f"{path.name} line {line}, column 'step': expected an object with one of "
                f"{', '.join(STEPS)}, got {content[:40]!r}"
            )
        step = number(path.name, line, steps[0], row[steps[0]])
        for key, value in row.items():
            if value is not None and key != steps[0]:
                log.add(key, step, value, line)
    return [log]


def number(source: str, line: int | None, column: str, value: Any) -> float:
    """`value` as a float; CurveError names the file, the line and the column."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        where = source if line is None else f"{source} line {line}"
        raise CurveError(f"{where}, column {column!r}: expected a number, got {value!r}") from None

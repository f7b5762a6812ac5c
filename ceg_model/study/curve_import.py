"""Anyone's runs as the table that `ceg estimate` reads.

What an export does not say is asked for: which arm a run is, its seed and scale, the FLOPs of a
step. A metric that a run did not log at the very step of an evaluation is taken from its
neighbours: a counter (flops, seconds, tokens, executed_flops) on the line between them, the
learning rate from the last one before. Where there is no neighbour the column stays empty for that
run and a note says so.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ceg_model.rundir import write_atomically
from ceg_model.study.curve_sources import WALL, Log, number, read_source
from ceg_model.study.curves import CurveError

LOSSES = (
    "eval_loss", "eval/loss", "val_loss", "val/loss", "valid_loss", "valid/loss",
    "validation_loss", "validation/loss",
)  # fmt: skip
# Never a training loss, nor a clock that counts evaluation: those must be asked for.
USUAL = {
    "flops": ("model_flops", "flops"),
    "seconds": ("train_s",),
    "tokens": ("tokens", "train/tokens"),
    "lr": ("lr", "learning_rate", "train/lr", "train/learning_rate"),
    "executed_flops": ("executed_flops",),
}
SINCE_1970 = (WALL, "_timestamp")  # counted from the log's first row instead
LABELS = ("arm", "scale", "seed", "budget")
HEADER = (*LABELS, "step", "loss", *USUAL, "smoothed")


@dataclass(frozen=True)
class Wanted:
    """What the exports do not say. The mappings go from a run's name, or "" for all runs."""

    loss: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)  # column of the table -> metric
    labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # arm, scale, seed ...
    flops_per_step: Mapping[str, float] = field(default_factory=dict)
    smoothed: bool = False

    def label(self, name: str, run: str) -> str | None:
        given = self.labels.get(name, {})
        return given.get(run, given.get(""))


@dataclass
class Imported:
    """One curve of the table. rows: column -> values, all as long as `step`."""

    run: str
    source: str
    labels: dict[str, str]
    rows: dict[str, list[float]]
    smoothed: bool
    notes: list[str] = field(default_factory=list)


def import_curves(sources: Sequence[str | Path], wanted: Wanted | None = None) -> list[Imported]:
    """The curves in `sources`. CurveError names the file, line and column of what is wrong."""
    wanted = wanted or Wanted()
    unknown = [name for name in wanted.columns if name not in USUAL]
    if unknown:
        raise CurveError(f"--column must name one of {', '.join(USUAL)}, got {unknown[0]!r}")
    logs = _merged(log for source in sources for log in read_source(source))
    _check_runs(wanted, logs)
    curves = [_curve(log, wanted) for log in logs if _loss_name(log, wanted, logs) is not None]
    places: dict[tuple[str, ...], str] = {}
    for curve in curves:
        place = tuple(curve.labels.values())
        if place in places:
            raise CurveError(
                f"runs must differ in arm, scale, seed or budget, got {curve.labels} for both "
                f"{places[place]!r} and {curve.run!r}: name them with --arm RUN=NAME, --seed RUN=N"
            )
        places[place] = curve.run
    if left := [log.name for log in logs if log.name not in {c.run for c in curves}]:
        curves[-1].notes.append(f"left out, for they have no such loss: {', '.join(left)}")
    having = [curve.run for curve in curves if "flops" in curve.rows]
    if having and len(having) < len(curves):
        without = next(c for c in curves if "flops" not in c.rows)
        raise CurveError(
            f"flops must be known for all runs or for none, got them for {having[0]!r} and not "
            f"for {without.run!r} ({without.source}): give --flops-per-step"
        )
    return curves


def table(curves: Sequence[Imported]) -> str:
    """The CSV text, with the columns that any curve has."""
    filled = {name for c in curves for name in (*c.labels, *c.rows)}
    filled |= {"smoothed"} if any(c.smoothed for c in curves) else set()
    header = [name for name in HEADER if name in filled]
    text = io.StringIO()
    writer = csv.DictWriter(text, header, restval="", lineterminator="\n")
    writer.writeheader()
    for curve in curves:
        fixed = {**curve.labels, **({"smoothed": "1"} if curve.smoothed else {})}
        for values in zip(*curve.rows.values(), strict=True):
            writer.writerow({**fixed, **dict(zip(curve.rows, map(_plain, values), strict=True))})
    return text.getvalue()


def write_table(curves: Sequence[Imported], path: str | Path) -> None:
    write_atomically(Path(path), table(curves))


def _plain(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


def _merged(logs: Iterable[Log]) -> list[Log]:
    """TensorBoard's CSVs hold one metric each: files of one run are put together."""
    runs: dict[str, Log] = {}
    for log in logs:
        if (known := runs.get(log.name)) is None:
            runs[log.name] = log
            continue
        for metric, points in log.points.items():
            if metric in known.points and metric != WALL:
                raise CurveError(
                    f"runs must have different names, got {log.name!r} with {metric!r} in both "
                    f"{known.source} and {log.source}: rename a file"
                )
            known.points.setdefault(metric, points)
        known.smoothed |= log.smoothed
    return list(runs.values())


def _check_runs(wanted: Wanted, logs: Sequence[Log]) -> None:
    names = [log.name for log in logs]
    for option, given in {**wanted.labels, "flops-per-step": wanted.flops_per_step}.items():
        for run in given:
            if run and run not in names:
                raise CurveError(f"--{option} must name one of {', '.join(names)}, got {run!r}")


def _loss_name(log: Log, wanted: Wanted, logs: Sequence[Log]) -> str | None:
    """The metric that is the loss; None for a run that has none where others have."""
    asked = LOSSES if wanted.loss is None else (wanted.loss,)
    known = [name for name in asked if name in log.points]
    if len(known) == 1:
        return known[0]
    if not known and any(name in other.points for other in logs for name in asked):
        return None
    names = [name for name in log.points if name != WALL and not name.startswith("_")]
    if wanted.loss is None and len(names) == 1 and "train" not in names[0]:
        return names[0]  # the only curve of an export was meant
    raise CurveError(
        f"--loss must name the metric of {log.source}, run {log.name!r}, that is the evaluation "
        f"loss, got {wanted.loss or 'none'}; there are: {', '.join(known or names)}"
    )


def _curve(log: Log, wanted: Wanted) -> Imported:
    loss = _loss_name(log, wanted, [log])
    assert loss is not None
    steps, losses = _series(log, loss)
    steps, losses, again = _once(log, loss, steps, losses)
    keep = steps > 0  # before the first step nothing was computed: ln C does not exist
    steps, losses = steps[keep], losses[keep]
    if not steps.size:
        raise CurveError(f"{log.source}, column {loss!r}: expected steps above 0, got none")
    labels = {"arm": wanted.label("arm", log.name) or log.name}
    labels |= {n: v for n in LABELS[1:] if (v := wanted.label(n, log.name)) is not None}
    smoothed = wanted.smoothed or loss in log.smoothed or "smooth" in loss.lower()
    curve = Imported(
        log.name, log.source, labels, {"step": steps.tolist(), "loss": losses.tolist()}, smoothed
    )
    if smoothed:
        curve.notes.append(f"{loss!r} holds averages: its rows are marked, no gain comes from them")
    if again:
        curve.notes.append(f"{again} evaluations came twice, as after a restart, with equal losses")
    per_step = wanted.flops_per_step.get(log.name, wanted.flops_per_step.get(""))
    if per_step is not None:
        curve.rows["flops"] = (steps * per_step).tolist()
    for column, usual in USUAL.items():
        metric = wanted.columns.get(column) or next((m for m in usual if m in log.points), None)
        if metric is None or column in curve.rows:
            continue
        if metric not in log.points:
            raise CurveError(
                f"--column {column} must name a metric of run {log.name!r} ({log.source}), "
                f"got {metric!r}; there are: {', '.join(log.points)}"
            )
        values, missing = _at(log, metric, steps, counter=column != "lr")
        if missing is not None:
            curve.notes.append(f"no {column}: {metric!r} is not known at step {missing:g}")
        else:
            curve.rows[column] = values.tolist()
    return curve


def _series(log: Log, metric: str) -> tuple[np.ndarray, np.ndarray]:
    points = log.points[metric]
    values = [number(log.source, line, metric, value) for _, value, line in points]
    steps = np.array([step for step, _, _ in points], dtype=np.float64)
    return steps, np.array(values, dtype=np.float64)


def _once(
    log: Log, metric: str, steps: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Each step once, and how many came again: a run that was killed trains some steps twice.

    Two losses at one step are two runs under one name, and no curve.
    """
    first: dict[float, float] = {}
    for (_, _, line), step, value in zip(log.points[metric], steps, values, strict=True):
        known = first.setdefault(step, value)
        if not np.array_equal(known, value, equal_nan=True):
            raise CurveError(
                f"{log.source}{'' if line is None else f' line {line}'}, column {metric!r}: "
                f"expected {known:g} again at step {step:g} of run {log.name!r}, got {value:g}"
            )
    order = sorted(first)
    return np.array(order), np.array([first[s] for s in order]), steps.size - len(order)


def _at(
    log: Log, metric: str, steps: np.ndarray, *, counter: bool
) -> tuple[np.ndarray, float | None]:
    """The metric at `steps`, and the first step at which it is not known."""
    known, values = _series(log, metric)
    order = np.argsort(known, kind="stable")
    known, values = known[order], values[order]
    last_of_step = np.append(np.diff(known) > 0, True)  # after a restart the second one counts
    known, values = known[last_of_step], values[last_of_step]
    if metric in SINCE_1970:
        values = values - values[0]
    last = np.searchsorted(known, steps, side="right") - 1
    missing = steps[(last < 0) | (counter & (steps > known[-1]))]
    if missing.size:
        return values, float(missing[0])
    return (np.interp(steps, known, values) if counter else values[last]), None


def summary(curves: Sequence[Imported]) -> list[dict[str, Any]]:
    """What `ceg curves import --json` prints."""
    return [
        {**c.labels, "run": c.run, "source": c.source, "rows": len(c.rows["step"]),
         "columns": list(c.rows), "smoothed": c.smoothed, "notes": c.notes}
        for c in curves
    ]  # fmt: skip

"""The folder of a study: study.json, runs/<id>/, throughput/<scale>.json, report/.

What is done is read from the runs themselves, never from a list beside them: a run counts when its
result.json is there, and that file is written last, by an atomic rename.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ceg_model.columns import Array, Columns, read_all
from ceg_model.rundir import RESULT, RUN, is_partial, read_json, write_json
from ceg_model.study.curves import Curve, Key, make_curve
from ceg_model.study.lockstep import common_clock

STUDY, RUNS, THROUGHPUT, REPORT = "study.json", "runs", "throughput", "report"
FIRST_FAILURE = "result.failed-1.json"


class Run(NamedTuple):
    """A run's metrics, and from run.json what makes curves comparable and each session's group."""

    columns: Columns
    identity: dict[str, str]
    lockstep: set[str | None]


class Store:
    """Reads and writes one study's folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.runs = self.folder / RUNS
        self.report = self.folder / REPORT
        self._read_runs: dict[str, Run] = {}

    def study(self) -> dict[str, Any] | None:
        return read_json(self.folder / STUDY)

    def begin(self, study: dict[str, Any]) -> dict[str, Any]:
        """Writes study.json, or checks that the one that is there is of the same study."""
        found = self.study()
        if found is None:
            foreign = self._foreign()
            if foreign:
                raise ValueError(
                    f"study folder {self.folder} must be new, empty or a study's, "
                    f"got one with {foreign[0]}"
                )
            self.runs.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / STUDY, study)
            return study
        for key in ("plan", "data_hash", "ours"):
            left, right = _identity(found, key), _identity(study, key)
            if left != right:
                raise ValueError(
                    f"study folder {self.folder} must hold the same {key}: "
                    f"{_difference(left, right)}; name another --out"
                )
        if found["plan"] != study["plan"]:
            found["plan"] = study["plan"]
            write_json(self.folder / STUDY, found)
        return found

    def _foreign(self) -> list[str]:
        """What is in the folder and none of ours; a kill may have come before study.json."""
        if not self.folder.exists():
            return []
        ours = {"lock", "data", "bench.json", "roofs.json"}
        if self.runs.is_dir() and not any(self.runs.iterdir()):
            ours.add(RUNS)
        names = {path.name for path in self.folder.iterdir() if not is_partial(path)}
        return sorted(names - ours)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time runs a study."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"study folder {self.folder} must be free, got one that another process runs"
                ) from error
            yield

    def path(self, run_id: str) -> Path:
        return self.runs / run_id

    def index(self) -> dict[str, dict[str, Any]]:
        """Every run's result by id; {"status": "unfinished"} where it has none yet."""
        found: dict[str, dict[str, Any]] = {}
        if not self.runs.is_dir():
            return found
        with os.scandir(self.runs) as entries:
            for entry in entries:
                if entry.is_dir():
                    result = read_json(f"{entry.path}/{RESULT}")
                    found[entry.name] = result or {"status": "unfinished"}
        return found

    def set_aside_failure(self, run_id: str) -> bool:
        """Makes room for the second try of a failed run; False when it already had one."""
        folder = self.path(run_id)
        if (folder / FIRST_FAILURE).exists():
            return False
        if (folder / RESULT).exists():
            os.replace(folder / RESULT, folder / FIRST_FAILURE)
        return True

    def failed_twice(self, run_id: str) -> bool:
        return (self.path(run_id) / FIRST_FAILURE).exists()

    def clocks(self, runs: Iterable[str]) -> dict[str, Array]:
        """Training seconds at each row, for the runs that were trained in lockstep: on their
        group's common clock (lockstep.py).
        """
        groups: dict[str, dict[str, Columns]] = {}
        for run, found in self._read(list(runs)).items():
            if len(found.lockstep) == 1 and (name := next(iter(found.lockstep))) is not None:
                groups.setdefault(name, {})[run] = found.columns
        clocks: dict[str, Array] = {}
        for group in groups.values():
            grids = {columns.step.tobytes() for columns in group.values()}
            if len(group) > 1 and len(grids) == 1:
                raw = np.array([columns.train_s for columns in group.values()])
                clocks |= dict(zip(group, common_clock(raw), strict=True))
        return clocks

    def flops_per_step(self, run_id: str) -> float:
        """Of a run that has an evaluation, as it counted them."""
        rows = self._read([run_id])[run_id].columns
        return float(rows.model_flops[-1] / rows.step[rows.evaluated[-1]])

    def _read(self, runs: list[str]) -> dict[str, Run]:
        """Those runs that have metrics; kept, so that each file is read once."""
        if missing := [run for run in runs if run not in self._read_runs]:
            for run, columns in read_all(self.runs, missing).items():
                self._read_runs[run] = Run(columns, *_about(f"{self.runs}/{run}"))
        return {run: self._read_runs[run] for run in runs if run in self._read_runs}

    def curve(self, run_id: str, key: Key, clock: Array | None = None) -> Curve | None:
        """The evaluations of a run that has any; `clock`, its seconds where not those measured."""
        found = self._read([run_id]).get(run_id)
        if found is None or not found.columns.evaluated.size:
            return None
        rows = found.columns
        known = not np.isnan(rows.executed_flops).any()  # null where a backend does not say
        return make_curve(
            key,
            rows.model_flops,
            rows.eval_loss,
            seconds=(rows.train_s if clock is None else clock)[rows.evaluated],
            lr=rows.lr,
            executed_flops=rows.executed_flops if known else None,
            identity=found.identity,
        )

    def throughput(self, scale: str) -> dict[str, Any] | None:
        return read_json(self.folder / THROUGHPUT / f"{scale}.json")

    def write_throughput(self, scale: str, content: dict[str, Any]) -> None:
        (self.folder / THROUGHPUT).mkdir(parents=True, exist_ok=True)
        write_json(self.folder / THROUGHPUT / f"{scale}.json", content)


def _about(folder: str) -> tuple[dict[str, str], set[str | None]]:
    run = read_json(f"{folder}/{RUN}")
    if run is None:
        raise ValueError(f"run folder {folder} must have {RUN}, got none")
    train, data = run["train"], run["data"]
    identity = {
        "data": data["hash"],
        "tokenizer": data["tokenizer"],
        "flop_convention": run["flop_convention"],
        "eval_set": f"{train['eval_batches']} x {train['batch_size']} x {run['model']['seq_len']}",
    }
    return identity, {session.get("lockstep") for session in run.get("sessions", [])}


def _identity(study: dict[str, Any], key: str) -> Any:
    """What must not change: all but who gets copies of the rows, and how long steps are timed."""
    value = study.get(key)
    if key != "plan" or value is None:
        return value
    train = {name: field for name, field in value["train"].items() if name != "log_to"}
    timing = ("timing_rounds", "timing_seconds")
    return {name: field for name, field in value.items() if name not in timing} | {"train": train}


def _difference(left: Any, right: Any) -> str:
    if isinstance(left, dict) and isinstance(right, dict):
        for name in right:
            if left.get(name) != right[name]:
                return f"{name} is {left.get(name)!r} there, {right[name]!r} asked for"
    return f"it is {left!r} there, {right!r} asked for"

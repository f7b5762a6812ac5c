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
from typing import Any

import numpy as np

from ceg_model.rundir import METRICS, RESULT, RUN, read_json, read_metrics, write_json
from ceg_model.study.curves import Curve, Key, make_curve
from ceg_model.study.lockstep import common_clock

STUDY, RUNS, THROUGHPUT, REPORT = "study.json", "runs", "throughput", "report"
FIRST_FAILURE = "result.failed-1.json"


class Store:
    """Reads and writes one study's folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.runs = self.folder / RUNS
        self.report = self.folder / REPORT

    def study(self) -> dict[str, Any] | None:
        return read_json(self.folder / STUDY)

    def begin(self, study: dict[str, Any]) -> dict[str, Any]:
        """Writes study.json, or checks that the one that is there is of the same study."""
        found = self.study()
        if found is None:
            others = [p.name for p in self.folder.iterdir()] if self.folder.exists() else []
            foreign = sorted(set(others) - {"lock", "data", "bench.json", "roofs.json"})
            if foreign:
                raise ValueError(
                    f"study folder {self.folder} must be new, empty or a study's, "
                    f"got one with {foreign[0]}"
                )
            self.runs.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / STUDY, study)
            return study
        for key in ("plan", "data_hash", "ours"):
            if _identity(found, key) != _identity(study, key):
                raise ValueError(
                    f"study folder {self.folder} must hold the same {key}: "
                    f"{_difference(key, found, study)}; name another --out"
                )
        return found

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

    def result(self, run_id: str) -> dict[str, Any] | None:
        return read_json(self.path(run_id) / RESULT)

    def index(self) -> dict[str, dict[str, Any]]:
        """Every run's result by id; {"status": "unfinished"} where it has none yet."""
        found: dict[str, dict[str, Any]] = {}
        if not self.runs.is_dir():
            return found
        with os.scandir(self.runs) as entries:
            for entry in entries:
                if entry.is_dir():
                    found[entry.name] = self.result(entry.name) or {"status": "unfinished"}
        return found

    def set_aside_failure(self, run_id: str) -> bool:
        """Makes room for the second try of a failed run; False when it already had one."""
        folder = self.path(run_id)
        if (folder / FIRST_FAILURE).exists():
            return False
        if (folder / RESULT).exists():
            os.replace(folder / RESULT, folder / FIRST_FAILURE)
        return True

    def clocks(self, runs: Iterable[str]) -> dict[str, list[float]]:
        """Training seconds at each row, for the runs that were trained in lockstep: on their
        group's common clock (lockstep.py).
        """
        groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for run in runs:
            sessions = (read_json(self.path(run) / RUN) or {}).get("sessions", [])
            names = {session.get("lockstep") for session in sessions}
            if len(names) == 1 and (name := names.pop()) is not None:
                groups.setdefault(name, {})[run] = read_metrics(self.path(run))
        clocks: dict[str, list[float]] = {}
        for group in groups.values():
            grids = {tuple(row["step"] for row in rows) for rows in group.values()}
            if len(group) > 1 and len(grids) == 1:
                raw = np.array([[row["train_s"] for row in rows] for rows in group.values()])
                clocks |= dict(zip(group, common_clock(raw).tolist(), strict=True))
        return clocks

    def curve(self, run_id: str, key: Key, clock: list[float] | None = None) -> Curve | None:
        """The evaluations of a run that has any; `clock`, its seconds where not those measured."""
        folder = self.path(run_id)
        run = read_json(folder / RUN)
        if run is None or not (folder / METRICS).is_file():
            return None
        rows = read_metrics(folder)
        for row, seconds in zip(rows, clock or [], strict=clock is not None):
            row["train_s"] = seconds
        rows = [row for row in rows if row["eval_loss"] is not None]
        if not rows:
            return None
        train, data = run["train"], run["data"]
        executed = [row["executed_flops"] for row in rows]  # null where a backend does not say
        return make_curve(
            key,
            [row["model_flops"] for row in rows],
            [row["eval_loss"] for row in rows],
            seconds=[row["train_s"] for row in rows],
            lr=[row["lr"] for row in rows],
            executed_flops=None if None in executed else executed,
            identity={
                "data": data["hash"],
                "tokenizer": data["tokenizer"],
                "flop_convention": run["flop_convention"],
                "eval_set": f"{train['eval_batches']} x {train['batch_size']} x "
                f"{run['model']['seq_len']}",
            },
        )

    def throughput(self, scale: str) -> dict[str, Any] | None:
        return read_json(self.folder / THROUGHPUT / f"{scale}.json")

    def write_throughput(self, scale: str, content: dict[str, Any]) -> None:
        (self.folder / THROUGHPUT).mkdir(parents=True, exist_ok=True)
        write_json(self.folder / THROUGHPUT / f"{scale}.json", content)


def _identity(study: dict[str, Any], key: str) -> Any:
    """What must not change: all but who gets copies of the rows."""
    value = study.get(key)
    if key != "plan" or value is None:
        return value
    train = {name: field for name, field in value["train"].items() if name != "log_to"}
    return {**value, "train": train}


def _difference(key: str, found: dict[str, Any], wanted: dict[str, Any]) -> str:
    left, right = found.get(key), wanted[key]
    if isinstance(left, dict) and isinstance(right, dict):
        for name in right:
            if left.get(name) != right[name]:
                return f"{name} is {left.get(name)!r} there, {right[name]!r} asked for"
    return f"it is {left!r} there, {right!r} asked for"

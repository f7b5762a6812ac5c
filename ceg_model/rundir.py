"""The folder of one run: run.json, metrics.jsonl, ckpt/, columns.bin, result.json.

run.json       what this run is; written before the first step
metrics.jsonl  one row per logged step, append-only; rows after the checkpoint are cut on resume
columns.bin    what a report needs of metrics.jsonl (columns.py), written when the last row is there
result.json    written last, by atomic rename: a run without it is unfinished and is resumed
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any

RUN, METRICS, RESULT, CHECKPOINTS = "run.json", "metrics.jsonl", "result.json", "ckpt"
PARTIAL = ".partial"


class RunDir:
    """Context manager over the folder; while it is open no other process can train there."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / CHECKPOINTS
        self._metrics: IO[str] | None = None
        self._lock: int | None = None

    def __enter__(self) -> RunDir:
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"run folder {self.path} must be a folder, got a file")
        if not (self.path / RUN).exists() and self.path.exists():
            # A kill may have come before run.json had its name.
            foreign = sorted(p.name for p in self.path.iterdir() if not is_partial(p))
            if foreign:
                raise ValueError(
                    f"run folder {self.path} must be new, empty or a run's, got one with "
                    f"{foreign[0]}"
                )
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path, os.O_RDONLY)  # the folder itself: no file is left behind
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise ValueError(
                f"run folder {self.path} must be free, got one that another process trains in"
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._metrics is not None:
            self._metrics.close()
        if self._lock is not None:
            os.close(self._lock)

    def check_is(self, run: dict[str, Any]) -> None:
        """Refuse the folder when it holds another run, and say in what it differs."""
        found = read_json(self.path / RUN)
        if found is None or found.get("id") == run["id"]:
            return
        differences = [
            f"{part}.{key} {(found.get(part) or {}).get(key)!r} here, {value!r} asked for"
            for part in ("model", "train", "data")
            for key, value in run[part].items()
            if (found.get(part) or {}).get(key) != value
        ]
        raise ValueError(
            f"run folder {self.path} must hold run {run['id']}, got {found.get('id')}: "
            + ("; ".join(differences) or "another version of the run format")
        )

    def run(self) -> dict[str, Any] | None:
        return read_json(self.path / RUN)

    def write_run(self, run: dict[str, Any]) -> None:
        write_json(self.path / RUN, run)

    def result(self) -> dict[str, Any] | None:
        return read_json(self.path / RESULT)

    def write_result(self, result: dict[str, Any]) -> None:
        write_json(self.path / RESULT, result)

    def start_metrics(self, last_step: int, donor: Path | None = None) -> None:
        """Open the metrics for appending, without rows after `last_step` or a torn last line.

        A run that grew on another's trunk begins with the rows of that `donor`.
        """
        rows = [row for row in read_metrics(donor or self.path) if row["step"] <= last_step]
        path = self.path / METRICS
        found = rows[-1]["step"] if rows else 0
        if found != last_step:  # never after a kill: rows are on disk before their checkpoint is
            raise ValueError(
                f"{path} must reach step {last_step} like the run's checkpoint, got its last row "
                f"at step {found}; remove the run's folder to train it anew"
            )
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._metrics = path.open("a")

    def append(self, row: dict[str, Any]) -> None:
        assert self._metrics is not None
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()

    def sync_metrics(self) -> None:
        """Before a checkpoint: its rows must not be younger than it."""
        assert self._metrics is not None
        os.fsync(self._metrics.fileno())


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a run, without a last line that a kill has torn."""
    file = Path(path) / METRICS
    if not file.is_file():
        return []
    lines = file.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{file} line {number} must be JSON, got {line[:60]!r}") from error
    return rows


def read_json(path: Path | str) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no file."""
    try:
        with open(path, "rb") as file:
            text = file.read()
    except FileNotFoundError:
        return None
    try:
        content = json.loads(text)
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{path} must be JSON, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {str(content)[:60]!r}")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def write_atomically(path: Path, content: str | bytes) -> None:
    """The file has its old content or the new one, whenever this process is killed."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    with partial.open("wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def is_partial(path: Path) -> bool:
    """Whether `path` is what a kill inside `write_atomically` leaves behind."""
    return path.name.startswith(".") and path.name.endswith(PARTIAL)

"""Copies of a run's rows for people to look at while it trains: TensorBoard, W&B, trackio.

metrics.jsonl is the record; each of its rows is forwarded as it is written, once. A resumed run
trains the steps since its checkpoint again. TensorBoard is told to forget those (`purge_step`);
W&B and trackio take no step back, so they keep the first copy of such a row (the same numbers but
for its seconds). How far a logger has got is kept beside the run, in logged-<name>: rows written
while there was none, or a broken one, are made up for when the run goes on.

Nothing that a logger does can end a run: the first error is said once, and the run goes on alone.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from ceg_model.rundir import read_metrics

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
PROJECT = "ceg"


class Sink(Protocol):
    """One run at one logger. __init__(folder, name, description, first step that will come)."""

    rewinds: bool  # whether the steps from `first` on are forgotten

    def log(self, step: int, metrics: dict[str, float]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    """Events in the run's own folder: `tensorboard --logdir runs` shows all of them."""

    rewinds = True

    def __init__(self, folder: Path, name: str, description: dict[str, Any], first: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for metric, value in metrics.items():
            self.writer.add_scalar(metric, value, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _WandB:
    """Where to and whether online is W&B's own affair: WANDB_PROJECT, WANDB_MODE and the like."""

    rewinds = False

    def __init__(self, folder: Path, name: str, description: dict[str, Any], first: int):
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=description["id"],
            name=name,
            dir=str(folder),
            config=description,
            resume="allow",
            reinit="create_new",  # the runs of a study take turns in one process
            settings=wandb.Settings(console="off"),  # rows only, not what is on the terminal
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step, commit=True)  # or it waits for the next step

    def flush(self) -> None:
        """It sends from a process of its own."""

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    """Resumed by name, so the name holds the run's id."""

    rewinds = False

    def __init__(self, folder: Path, name: str, description: dict[str, Any], first: int):
        import trackio

        def init() -> Any:
            return trackio.init(
                project=PROJECT, name=name, config=description, resume="allow", embed=False
            )

        # It keeps the current run in a context variable and finishes that when the next one
        # begins; the runs of a study take turns.
        self.run = contextvars.copy_context().run(init)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    def flush(self) -> None:
        """It writes from a thread of its own, every half second."""

    def close(self) -> None:
        self.run.finish()


SINKS: dict[str, Callable[[Path, str, dict[str, Any], int], Sink]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
}


def check(name: str | None) -> None:
    """ModuleNotFoundError where the logger's package cannot be imported; None needs nothing."""
    if name is None:
        return
    try:
        importlib.import_module(PACKAGES[name])
    except ImportError as error:
        raise ModuleNotFoundError(
            f"log_to {name!r} needs the package {PACKAGES[name]} (pip install {PACKAGES[name]}), "
            f"got {error}"
        ) from error


class Forward:
    """Context manager that forwards rows to the logger `name`; to nobody where that is None.

    `label` is what people call the run; `note` gets the one line about a logger that failed.
    """

    def __init__(self, name: str | None, label: str, note: Callable[[str], None]):
        self.name, self.label, self.note = name, label, note
        self._sink: Sink | None = None
        self._mark: IO[str] | None = None
        self._done = 0

    def __enter__(self) -> Forward:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._sink is not None:
            self._try("closing", self._sink.close)
        if self._mark is not None:
            self._mark.close()

    def start(self, folder: Path, description: dict[str, Any], step: int) -> None:
        """The run in `folder` goes on after `step`; rows up to there that are missing are sent."""
        if self.name is None:
            return
        name, run = self.name, f"{self.label} {description['id']}".strip()

        def begin() -> None:
            self._sink = SINKS[name](folder, run, description, step + 1)

        self._try("starting", begin)
        if self._sink is None:
            return
        path = folder / f"logged-{name}"
        path.touch()
        self._mark = path.open("r+")
        self._done = int(self._mark.read() or 0)
        if self._sink.rewinds:
            self._done = min(self._done, step)
        for row in read_metrics(folder):
            self.row(row)

    def row(self, row: dict[str, Any]) -> None:
        """Forward a row of metrics.jsonl, unless its step has been."""
        step, sink = row["step"], self._sink
        if sink is None or step <= self._done:
            return
        assert self._mark is not None
        self._done = step
        # Before it is sent: a kill between the two loses a row, never doubles it.
        self._mark.seek(0)
        self._mark.write(f"{step:<20}")
        self._mark.flush()
        metrics = {k: v for k, v in row.items() if k != "step" and v is not None}
        self._try(f"step {step}", lambda: sink.log(step, metrics))

    def flush(self) -> None:
        """Before a checkpoint: its rows will not come again."""
        if self._sink is not None:
            self._try("flushing", self._sink.flush)

    def _try(self, doing: str, call: Callable[[], None]) -> None:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
                call()
        except Exception as error:  # noqa: BLE001 - whatever a library raises, the run goes on
            self._sink = None
            self.note(
                f"{self.name} failed ({doing}: {type(error).__name__}: {error}); the run goes on "
                "without it, metrics.jsonl has every row"
            )

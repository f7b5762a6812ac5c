"""Progress of long work: a bar with an ETA on a terminal, a plain line now and then elsewhere.

Everything goes to stderr, so that stdout holds results only (`--json`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

# What long-running functions accept: (done, total, a few words about the present state); total 0
# where nobody knows it.
ProgressFn = Callable[[int, int, str], None]

LINE_INTERVAL_S = 10.0  # how often a log file gets a line


def duration(seconds: float) -> str:
    """Seconds as a person writes them: 9s, 2m05s, 1h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


class Progress:
    """A context manager that is also a `ProgressFn`: `with Progress("train") as show: ...`."""

    def __init__(
        self,
        title: str,
        *,
        stream: Any = None,
        line_interval_s: float = LINE_INTERVAL_S,
        quiet: bool = False,  # all but the first process of a group
    ):
        self._title = title
        self._quiet = quiet
        self._stream = stream if stream is not None else sys.stderr
        self._interval = line_interval_s
        self._bar: Any = None
        self._task: Any = None
        self._first: tuple[float, int] | None = None
        self._last_line = float("-inf")

    def __enter__(self) -> Progress:
        if self._stream.isatty() and not self._quiet:
            self._bar = _rich_bar(self._stream)
        if self._bar is not None:
            self._task = self._bar.add_task(self._title, total=None, state="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, state: str = "") -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total or None, state=state)
            return
        if self._quiet:
            return
        now = time.monotonic()
        if self._first is None:
            # A resumed run starts above zero: the rate is that of this process only.
            self._first = (now, done)
        if now - self._last_line < self._interval and (done < total or not total):
            return
        self._last_line = now
        print(self._line(now, done, total, state), file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """A line that stays: something happened that the reader must know."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self._quiet:
            print(text, file=self._stream, flush=True)

    def _line(self, now: float, done: int, total: int, state: str) -> str:
        assert self._first is not None
        start, first_done = self._first
        eta = ""
        if done > first_done and done < total:
            eta = f", {duration((now - start) / (done - first_done) * (total - done))} left"
        count = f"{done}/{total}{eta} " if total else f"{done}"
        return f"{self._title}: {count} {state}".rstrip()


def _rich_bar(stream: Any) -> Any:
    """A rich progress bar on `stream`, or None where rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress
    except ModuleNotFoundError:
        return None
    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
        console=Console(file=stream),
    )

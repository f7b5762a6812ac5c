"""A worker process of a study: takes jobs from a pipe until it gets None.

Torch takes seconds to import, so a worker stays for many runs. It ignores Ctrl-C (the
parent asks it to stop), and leaves when its parent is gone, even one that was killed before the
worker had started: a killed study leaves nothing running.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ceg_model.progress import ProgressFn
from ceg_model.study.plan import Plan, RunSpec, Scale

SEND_INTERVAL_S = 0.3


@dataclass(frozen=True)
class TrainJob:
    """Runs by id. In lockstep they take their rows in turn (the arms of a scale and seed); else one
    follows the other (the budgets of an arm, each on the trunk of the one before).
    """

    specs: dict[str, RunSpec]
    folder: str  # of all runs
    data_dir: str
    lockstep: str | None  # the group's name, the same whichever of its runs are left


@dataclass(frozen=True)
class TimingJob:
    plan: Plan
    scale: Scale
    ours: dict[str, str | None]
    data_dir: str


Job = TrainJob | TimingJob


def work(
    pipe: Connection, stop: Any, threads: int, deadline: float | None, gpu: int | None
) -> None:
    """Messages sent: ("step", share), ("ended", run id, result), ("done", result or None).

    The result of a run that failed has status "failed" and a reason; so has that of a timing.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)  # before torch looks for GPUs
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    send = _Sender(pipe)
    while (job := pipe.recv()) is not None:
        if isinstance(job, TimingJob):
            pipe.send(("done", _time(job, send)))
        else:
            _train(job, send, stop, deadline)
            pipe.send(("done", None))


class _Sender:
    """Progress over the pipe, a few times a second."""

    def __init__(self, pipe: Connection):
        self.pipe, self.last = pipe, 0.0

    def progress(self, done: float, total: float) -> None:
        if time.monotonic() - self.last > SEND_INTERVAL_S:
            self.last = time.monotonic()
            self.pipe.send(("step", done / total))


def _time(job: TimingJob, send: _Sender) -> dict[str, Any]:
    from ceg_model.study import throughput
    from ceg_model.study.lockstep import RUN_ERRORS

    def progress(done: int, total: int, text: str) -> None:
        send.progress(done, total)

    try:
        return throughput.measure(job.plan, job.scale, job.ours, job.data_dir, progress)
    except RUN_ERRORS as error:
        return _failed(error)


def _train(job: TrainJob, send: _Sender, stop: Any, deadline: float | None) -> None:
    from ceg_model.study.lockstep import Rows, in_turn
    from ceg_model.train import training

    shares = dict.fromkeys(job.specs, 0.0)

    def progress_of(run: str) -> ProgressFn:
        def progress(done: int, total: int, text: str) -> None:
            shares[run] = done / total
            send.progress(sum(shares.values()), len(shares))

        return progress

    def stops() -> bool:
        return stop.is_set() or (deadline is not None and time.time() > deadline)

    def rows_of(run: str, spec: RunSpec) -> Rows:
        donor = os.path.join(job.folder, spec.donor) if spec.donor else None
        return training(
            spec.model, spec.train, job.data_dir, os.path.join(job.folder, run),
            progress=progress_of(run), stop_at=stops, note=_say, lockstep=job.lockstep,
            donor=donor, label=f"{spec.arm} {spec.scale} {spec.seed}",
        )  # fmt: skip

    groups = [job.specs] if job.lockstep else [{run: spec} for run, spec in job.specs.items()]
    for group in groups:
        for run, result in in_turn({run: rows_of(run, spec) for run, spec in group.items()}):
            shares[run] = 1.0
            ended = _failed(result) if isinstance(result, Exception) else result
            send.pipe.send(("ended", run, ended))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _failed(error: Exception) -> dict[str, Any]:
    return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # by a pipe: an id could be another process's by now
    os._exit(1)

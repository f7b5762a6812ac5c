"""A worker process of a study: takes jobs from a pipe until it gets None.

Torch takes seconds to import, so a worker stays for many runs. It ignores Ctrl-C (the
parent asks it to stop), and leaves when its parent is gone: a killed study leaves nothing running.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ceg_model.study.plan import Plan, RunSpec, Scale

SEND_INTERVAL_S = 0.3


@dataclass(frozen=True)
class TrainJob:
    spec: RunSpec
    run_id: str
    run_dir: str
    data_dir: str


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
    """Messages sent: ("step", done, total, text), ("done", result), ("failed", reason)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)  # before torch looks for GPUs
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    while (job := pipe.recv()) is not None:
        try:
            pipe.send(("done", _do(job, pipe, stop, deadline)))
        # What a run can die of; anything else is a bug, ends the worker and is reported as such.
        except (
            ValueError,
            TypeError,
            RuntimeError,
            OSError,
            ArithmeticError,
            MemoryError,
        ) as error:
            pipe.send(("failed", f"{type(error).__name__}: {error}"))


def _do(job: Job, pipe: Connection, stop: Any, deadline: float | None) -> dict[str, Any]:
    from ceg_model.study import throughput
    from ceg_model.train import train

    last = 0.0

    def progress(done: int, total: int, text: str) -> None:
        nonlocal last
        if time.monotonic() - last > SEND_INTERVAL_S:
            last = time.monotonic()
            pipe.send(("step", done, total, text))

    def stops() -> bool:
        return stop.is_set() or (deadline is not None and time.time() > deadline)

    if isinstance(job, TimingJob):
        return throughput.measure(job.plan, job.scale, job.ours, job.data_dir, progress)
    return train(
        job.spec.model,
        job.spec.train,
        job.data_dir,
        job.run_dir,
        progress=progress,
        stop_at=stops,
    )


def _leave_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)

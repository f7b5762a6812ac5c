"""Runs a plan in local worker processes. Killed at any moment, the same call goes on.

A run without result.json is continued from its checkpoint. A failed run is tried once more and then
reported; it is never dropped. Ctrl-C asks the workers to save and stop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from ceg_kernels import OPS
from ceg_model import environment
from ceg_model.data import TokenData
from ceg_model.flops import model_flops
from ceg_model.progress import ProgressFn, duration
from ceg_model.study.plan import Plan, RunSpec, our_backend, runs
from ceg_model.study.store import Store
from ceg_model.study.worker import Job, TimingJob, TrainJob, work
from ceg_model.train import resolve_device, run_id

STOP_PATIENCE_S = 20.0
BAR = 1000  # the bar counts thousandths of the work, weighted by FLOPs


@dataclass
class Summary:
    """How a call ended. `failed`: (spec, reason) after the second try."""

    planned: int
    done: int
    failed: list[tuple[RunSpec, str]] = field(default_factory=list)
    stopped: bool = False


@dataclass
class _Worker:
    process: Any
    pipe: Any
    job: Job | None = None
    share: float = 0.0  # of the present job
    ended: set[str] = field(default_factory=set)  # runs of the present job


def our_kernels(device: str) -> dict[str, str | None]:
    """Our backend of each forward op on this device; None where none is built."""
    forward = [name for name in OPS if not name.endswith("_backward")]
    return {name: our_backend(name, torch.float32, device) for name in forward}


def planned(
    plan: Plan, ours: Mapping[str, str | None], data: TokenData
) -> list[tuple[str, RunSpec]]:
    """(run id, spec) of every run of the plan, in the order in which they run."""
    return [
        (run_id(spec.model, spec.train, data.hash), spec)
        for spec in runs(plan, ours, data.vocab_size)
    ]


def run_study(
    plan: Plan,
    out: str | Path,
    data_dir: str | Path,
    *,
    budget_minutes: float | None = None,
    progress: ProgressFn = lambda done, total, text: None,
    note: Callable[[str], None] = lambda text: None,
) -> Summary:
    """Does what of the plan is not done yet. Raises KeyboardInterrupt after a clean stop."""
    store, data = Store(out), TokenData(data_dir)
    device = resolve_device(dict(plan.train).get("device", "auto"))
    ours = our_kernels(device.type)
    with store.locked():
        study = {
            "plan": plan.to_dict(),
            "data_hash": data.hash,
            "ours": ours,
            "data_dir": str(Path(data_dir).resolve()),
            "environment": environment.describe(device),
        }
        # Lists and tuples are one after JSON.
        store.begin(_plain(study))
        specs = planned(plan, ours, data)
        deadline = None if budget_minutes is None else time.time() + 60 * budget_minutes
        gpus = torch.cuda.device_count() if device.type == "cuda" else 0
        pool = _Pool(plan, store, specs, gpus=gpus, deadline=deadline, progress=progress, note=note)
        pool.enqueue(ours, str(data_dir))
        return pool.run()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class _Pool:
    """The workers and what is left to do."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        specs: list[tuple[str, RunSpec]],
        *,
        gpus: int,
        deadline: float | None,
        progress: ProgressFn,
        note: Callable[[str], None],
    ):
        self.plan, self.store, self.specs, self.gpus = plan, store, specs, gpus
        self.deadline, self.progress, self.note = deadline, progress, note
        self.context = multiprocessing.get_context("spawn")
        self.stop = self.context.Event()
        self.queue: deque[Job] = deque()
        self.weights = {i: _weight(spec) for i, spec in specs}
        self.timing_weight = 0.5 * max(self.weights.values())
        self.left = 0.0
        self.total = 0.0
        self.summary = Summary(len(specs), 0)
        self.workers: list[_Worker] = []
        self.tried: set[str] = set()

    def enqueue(self, ours: Mapping[str, str | None], data_dir: str) -> None:
        """Timings first, while all workers are busy; then the runs that are not done."""
        for scale in reversed(self.plan.scales):
            if self.store.throughput(scale.name) is None:
                self.queue.append(TimingJob(self.plan, scale, dict(ours), data_dir))
        index = self.store.index()
        groups: dict[Any, dict[str, RunSpec]] = {}
        members: dict[Any, list[str]] = {}  # of each group, whether or not they are done
        for run, spec in self.specs:
            group = (spec.scale, spec.seed) if self.plan.lockstep else run
            members.setdefault(group, []).append(run)
            result = index.get(run, {"status": "unfinished"})
            if result["status"] == "done":
                self.summary.done += 1
            elif result["status"] == "failed" and not self.store.set_aside_failure(run):
                self.summary.failed.append((spec, result["reason"]))
            else:
                groups.setdefault(group, {})[run] = spec
        for group, specs in groups.items():
            # Not the name of those that are left: a kill must not part a group's clocks.
            name = "-".join(members[group]) if len(members[group]) > 1 else None
            self.queue.append(TrainJob(specs, str(self.store.runs), data_dir, name))
        self.total = sum(self.weights.values()) + len(self.plan.scales) * self.timing_weight
        self.left = sum(map(self._job_weight, self.queue))

    def run(self) -> Summary:
        if not self.queue:
            return self.summary
        try:
            # One process for each GPU; on a CPU as many as the plan says and the cores allow.
            cores = len(os.sched_getaffinity(0)) // self.plan.threads
            count = self.gpus or max(1, min(self.plan.workers, cores))
            for place in range(min(count, len(self.queue))):
                self.workers.append(self._start(place))
            while self.queue or any(w.job for w in self.workers):
                self._assign()
                self._listen()
        except KeyboardInterrupt:
            self._ask_to_stop()
            raise
        finally:
            self._end()
        return self.summary

    def _start(self, place: int) -> _Worker:
        ours, theirs = self.context.Pipe()
        gpu = place if self.gpus else None
        arguments = (theirs, self.stop, self.plan.threads, self.deadline, gpu)
        process = self.context.Process(target=work, args=arguments, daemon=True)
        process.start()
        theirs.close()  # so that its death ends our side of the pipe
        return _Worker(process, ours)

    def _assign(self) -> None:
        if self.deadline is not None and time.time() > self.deadline:
            self.summary.stopped = self.summary.stopped or bool(self.queue)
            self.queue.clear()
        for worker in self.workers:
            if worker.job is None and self.queue:
                worker.job, worker.share, worker.ended = self.queue.popleft(), 0.0, set()
                worker.pipe.send(worker.job)

    def _listen(self) -> None:
        ready = wait([w.pipe for w in self.workers if w.job is not None], timeout=1.0)
        for worker in [w for w in self.workers if w.pipe in ready]:
            try:
                kind, *content = worker.pipe.recv()
            except (EOFError, ConnectionResetError):
                self._replace(worker)
                continue
            if kind == "step":
                worker.share = content[0]
            elif kind == "ended":
                self._ended(worker, *content)
            else:
                self._done(worker, content[0])
        self._show()

    def _ended(self, worker: _Worker, run: str, result: dict[str, Any]) -> None:
        """A run is over; its job may have others that go on."""
        assert isinstance(worker.job, TrainJob)
        worker.ended.add(run)
        if result["status"] == "done":
            self.summary.done += 1
        elif result["status"] == "stopped":
            self.summary.stopped = True
        else:
            specs = {run: worker.job.specs[run]}
            alone = dataclasses.replace(worker.job, specs=specs, lockstep=None)
            self._retry(alone, result["reason"])

    def _done(self, worker: _Worker, timing: dict[str, Any] | None) -> None:
        job, worker.job = worker.job, None
        assert job is not None
        self.left -= self._job_weight(job)
        if isinstance(job, TimingJob) and timing is not None:
            if timing.get("status") == "failed":
                self._retry(job, timing["reason"])
            else:
                self.store.write_throughput(job.scale.name, timing)

    def _retry(self, job: Job, reason: str) -> None:
        name = _name(job)
        again = name not in self.tried
        if isinstance(job, TrainJob):
            free = [self.store.set_aside_failure(run) for run in job.specs]
            again = again and all(free)
        self.tried.add(name)
        if again:
            self.note(f"{name} failed ({reason}); trying once more")
            self.left += self._job_weight(job)
            self.queue.append(job)
            return
        self.note(f"{name} failed twice: {reason}")
        if isinstance(job, TrainJob):
            self.summary.failed += [(spec, reason) for spec in job.specs.values()]

    def _replace(self, worker: _Worker) -> None:
        """A worker died (killed, out of memory, or a bug whose traceback it printed)."""
        worker.process.join()
        code = worker.process.exitcode
        place = self.workers.index(worker)
        self.workers[place] = self._start(place)
        job = worker.job
        assert job is not None
        self.left -= self._job_weight(job)
        if isinstance(job, TrainJob):
            rest = {run: spec for run, spec in job.specs.items() if run not in worker.ended}
            if not rest:  # it died between its last result and saying so
                return
            job = dataclasses.replace(job, specs=rest)
        self._retry(job, f"its process ended with status {code}")

    def _ask_to_stop(self) -> None:
        self.stop.set()
        end = time.monotonic() + STOP_PATIENCE_S
        while time.monotonic() < end and any(w.job for w in self.workers):
            busy = [w for w in self.workers if w.job is not None]
            for worker in busy:
                if isinstance(worker.job, TimingJob):
                    worker.job = None  # nothing of it is kept
            ready = wait([w.pipe for w in busy], timeout=1.0)
            for worker in [w for w in busy if w.pipe in ready]:
                try:
                    if worker.pipe.recv()[0] == "done":
                        worker.job = None
                except (EOFError, ConnectionResetError):
                    worker.job = None

    def _end(self) -> None:
        for worker in self.workers:
            if worker.job is None and worker.process.is_alive():
                with contextlib.suppress(BrokenPipeError):
                    worker.pipe.send(None)
                worker.process.join(timeout=3)
            if worker.process.is_alive():
                worker.process.terminate()
                worker.process.join()
            worker.pipe.close()

    def _job_weight(self, job: Job) -> float:
        if isinstance(job, TimingJob):
            return self.timing_weight
        return sum(self.weights[run] for run in job.specs)

    def _show(self) -> None:
        running = [w for w in self.workers if w.job is not None]
        begun = sum(w.share * self._job_weight(w.job) for w in running if w.job is not None)
        done = 1 - (self.left - begun) / self.total if self.total else 1.0
        names = ", ".join(_name(w.job) for w in running if w.job is not None)
        text = f"{self.summary.done} of {self.summary.planned} runs; {names}"
        self.progress(min(int(done * BAR), BAR), BAR, text)


def _name(job: Job) -> str:
    if isinstance(job, TimingJob):
        return f"{job.scale.name} timing"
    first, *others = job.specs.values()
    arms = f"{len(others) + 1} arms" if others else first.arm
    return f"{first.scale} {arms} {first.seed}"


def _weight(spec: RunSpec) -> float:
    sequences = spec.train.batch_size * spec.train.grad_accum
    return float(model_flops(spec.model, batch=sequences).total * spec.train.steps)


def describe(summary: Summary, seconds: float) -> str:
    text = f"{summary.done} of {summary.planned} runs done in {duration(seconds)}"
    if summary.failed:
        text += f", {len(summary.failed)} failed"
    return text + (
        ", stopped by --budget-minutes: run it again to go on" if summary.stopped else ""
    )

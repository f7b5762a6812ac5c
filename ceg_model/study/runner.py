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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from ceg_kernels import OPS
from ceg_model import environment
from ceg_model.data import TokenData
from ceg_model.device import resolve_device
from ceg_model.flops import model_flops
from ceg_model.progress import ProgressFn, duration
from ceg_model.study.plan import STOCK, Plan, RunSpec
from ceg_model.study.schedule import schedule
from ceg_model.study.store import Store
from ceg_model.study.worker import Job, TimingJob, TrainJob, work
from ceg_model.train_config import decay_start

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


def our_backend(op: str, dtype: torch.dtype, device: str) -> str | None:
    """The first of our backends that would run the op here unasked, or None."""
    sample = next(iter(OPS[op].samples(dtype, device)))
    for backend in OPS[op].backends:
        if backend.name not in STOCK and backend.takes(*sample.args):
            return backend.name
    return None


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
        deadline = None if budget_minutes is None else time.time() + 60 * budget_minutes
        gpus = torch.cuda.device_count() if device.type == "cuda" else 0
        pool = _Pool(
            plan,
            store,
            str(data_dir),
            ours,
            gpus=gpus,
            deadline=deadline,
            progress=progress,
            note=note,
        )
        pool.begin()
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
        data_dir: str,
        ours: Mapping[str, str | None],
        *,
        gpus: int,
        deadline: float | None,
        progress: ProgressFn,
        note: Callable[[str], None],
    ):
        self.plan, self.store, self.data_dir, self.ours = plan, store, data_dir, dict(ours)
        self.gpus, self.deadline, self.progress, self.note = gpus, deadline, progress, note
        self.context = multiprocessing.get_context("spawn")
        self.stop = self.context.Event()
        self.queue: list[Job] = []
        self.index = store.index()
        self.order: dict[str, int] = {}
        self.weights: dict[str, float] = {}
        self.known: set[str] = set()  # runs that are queued, running or over
        self.summary = Summary(0, 0)
        self.timings = 0  # that this call has to do
        self.timing_weight = 0.0
        self.workers: list[_Worker] = []
        self.tried: set[str] = set()

    def begin(self) -> None:
        """Timings first; then the runs that are not done."""
        for scale in reversed(self.plan.scales):
            if self.store.throughput(scale.name) is None:
                self.queue.append(TimingJob(self.plan, scale, self.ours, self.data_dir))
        self.timings = len(self.queue)
        self._plan_runs()

    def _plan_runs(self) -> None:
        """Queues the runs that the results so far ask for; called again when a sweep's run ends."""
        data = TokenData(self.data_dir, verify=False)
        found = schedule(
            self.plan,
            self.ours,
            data_hash=data.hash,
            vocab_size=data.vocab_size,
            index=self.index,
            failed_for_good=self.store.failed_twice,
        )
        self.order = {run: place for place, run in enumerate(found.runs)}
        expected = {**found.pending, **found.runs}
        self.weights = {run: _weight(spec, expected) for run, spec in expected.items()}
        self.timing_weight = 0.5 * max(self.weights.values())
        self.summary.planned = len(expected)
        groups: dict[Any, dict[str, RunSpec]] = {}
        for run, spec in found.runs.items():
            if run in self.known:
                continue
            self.known.add(run)
            result = self.index.get(run, {"status": "unfinished"})
            if result["status"] == "done":
                self.summary.done += 1
            elif result["status"] == "failed" and not self.store.set_aside_failure(run):
                self.summary.failed.append((spec, result["reason"]))
            else:
                groups.setdefault(_group(self.plan, run, spec), {})[run] = spec
        folder = str(self.store.runs)
        for specs in groups.values():
            name = _together(self.plan, specs, found.runs)
            self.queue.append(TrainJob(specs, folder, self.data_dir, name))
        self.queue.sort(key=self._turn)

    def _is_over(self, run: str) -> bool:
        return self.index.get(run, {}).get("status") in ("done", "failed")

    def _turn(self, job: Job) -> int:
        return -1 if isinstance(job, TimingJob) else min(self.order[run] for run in job.specs)

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
            if worker.job is None and self.queue and self._may_start(self.queue[0]):
                worker.job, worker.share, worker.ended = self.queue.pop(0), 0.0, set()
                worker.pipe.send(worker.job)

    def _may_start(self, job: Job) -> bool:
        """Where G_hw rests on the timed segments alone, nothing else runs beside them."""
        busy = [w.job for w in self.workers if w.job is not None]
        if not self.plan.fast_curves or not busy:
            return True
        return not isinstance(job, TimingJob) and not any(isinstance(j, TimingJob) for j in busy)

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
        self.index[run] = result
        if result["status"] == "done":
            self.summary.done += 1
        elif result["status"] == "stopped":
            self.summary.stopped = True
        else:
            specs = {run: worker.job.specs[run]}
            alone = dataclasses.replace(worker.job, specs=specs, lockstep=None)
            self._retry(alone, result["reason"])
        if worker.job.specs[run].sweep and self._is_over(run):
            self._plan_runs()

    def _done(self, worker: _Worker, timing: dict[str, Any] | None) -> None:
        job, worker.job = worker.job, None
        assert job is not None
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
            if isinstance(job, TrainJob):
                self.index.update({run: {"status": "unfinished"} for run in job.specs})
            self.note(f"{name} failed ({reason}); trying once more")
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

    def _show(self) -> None:
        """Thousandths of the FLOPs, those of runs that are expected only included."""
        running = [w for w in self.workers if w.job is not None]
        timings = [job for job in self.queue if isinstance(job, TimingJob)]
        total = sum(self.weights.values()) + self.timings * self.timing_weight
        done = sum(weight for run, weight in self.weights.items() if self._is_over(run))
        done += (self.timings - len(timings)) * self.timing_weight
        for worker in running:
            assert worker.job is not None
            if isinstance(worker.job, TimingJob):
                done -= (1 - worker.share) * self.timing_weight
            else:
                weight = sum(self.weights[run] for run in worker.job.specs)
                over = sum(self.weights[run] for run in worker.job.specs if self._is_over(run))
                done += max(worker.share * weight - over, 0.0)
        names = ", ".join(_name(w.job) for w in running if w.job is not None)
        text = f"{self.summary.done} of {self.summary.planned} runs; {names}"
        self.progress(min(int(BAR * done / total), BAR), BAR, text)


def _group(plan: Plan, run: str, spec: RunSpec) -> Any:
    """Runs of one group are one job."""
    if plan.lockstep:
        return spec.scale, spec.seed
    return run if spec.sweep else (spec.scale, spec.seed, spec.arm)


def _together(plan: Plan, specs: dict[str, RunSpec], known: dict[str, RunSpec]) -> str | None:
    """The name of a lockstep group: of all its runs, so that a kill when some of them have ended
    does not part the group's clocks. In a sweep they are not all known: of those that start now.
    """
    if not plan.lockstep:
        return None
    first = next(iter(specs.values()))
    if plan.sweep is None:
        specs = {r: s for r, s in known.items() if (s.scale, s.seed) == (first.scale, first.seed)}
    return "-".join(specs) if len(specs) > 1 else None


def _name(job: Job) -> str:
    if isinstance(job, TimingJob):
        return f"{job.scale.name} timing"
    first, *others = job.specs.values()
    arms = f"{len(others) + 1} arms" if others and job.lockstep else first.arm
    what = f" at {first.train.lr:.3g}" if first.sweep else ""
    return f"{first.scale} {arms} {first.seed}{what}"


def _weight(spec: RunSpec, others: Mapping[str, RunSpec]) -> float:
    """FLOPs of the steps that are the run's own, not its donor's."""
    sequences = spec.train.batch_size * spec.train.grad_accum
    taken = (decay_start(others[spec.donor].train) or 0) if spec.donor in others else 0
    return float(model_flops(spec.model, batch=sequences).total * (spec.train.steps - taken))


def describe(summary: Summary, seconds: float) -> str:
    text = f"{summary.done} of {summary.planned} runs done in {duration(seconds)}"
    if summary.failed:
        text += f", {len(summary.failed)} failed"
    return text + (
        ", stopped by --budget-minutes: run it again to go on" if summary.stopped else ""
    )

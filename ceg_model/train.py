"""One training loop: one process, or several under torchrun.

What a second is. `train_s` is the sum of the steps' own wall-clock time: data, forward, backward,
clipping, optimizer; on a GPU between two device synchronisations. Evaluation, checkpoints, logging
and start-up are outside. Before the first step of each process, `timing_warmup` whole steps are
run on the first batch and then undone bit for bit: compilation, autotuning, memory allocation and
thread start-up happen there. So no step has to be left out or its time imputed, and every row
pairs measured seconds with exactly the FLOPs that were done in them.

What a FLOP is. `model_flops` is `ceg_model.flops.model_flops` times the steps done: what the maths
requires. `executed_flops` adds what the chosen backends recompute or pad, and the pairs that native
sparse attention computes and masks; null where a backend does not say.

What makes a run repeatable. Step s draws its data from (seed, s) and its dropout from (seed, s,
micro-batch), never from what ran before: resuming is exact, arms that share a seed are paired, and
two processes with one micro-batch each equal one process with two, up to fp32 rounding of the sum.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ceg_kernels import use_backend
from ceg_model import checkpoint, columns, environment
from ceg_model.config import GPTConfig
from ceg_model.data import TokenData
from ceg_model.device import resolve_device, resolve_dtype
from ceg_model.flops import masked_flops, model_flops
from ceg_model.gpt import build_model, parameter_groups
from ceg_model.loggers import Forward, check
from ceg_model.op_calls import OpCalls
from ceg_model.process_group import ProcessGroup
from ceg_model.progress import ProgressFn
from ceg_model.run_id import run_id
from ceg_model.rundir import CHECKPOINTS, RESULT, RunDir, read_metrics
from ceg_model.train_config import TrainConfig, decay_start, learning_rate
from ceg_model.trunk import TRUNK, grow

FLOP_CONVENTION = (
    "ceg-1: matmuls and op costs, masked-out pairs and recomputation not counted, backward included"
)


def train(
    model_config: GPTConfig,
    train_config: TrainConfig,
    data_dir: str | Path,
    run_dir: str | Path,
    *,
    progress: ProgressFn | None = None,
    stop_at: int | Callable[[], bool] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train, or go on training, the run in the folder `run_dir`; returns its result.json.

    A finished run is returned as it is. `stop_at` (a step, or a function asked after each row) ends
    this call early with a checkpoint and {"status": "stopped", "step": ...}; the next call goes on.
    A loss that is not finite ends the run with status "failed" and a reason. `note` gets the rare
    lines that a person must see.
    """
    rows = training(
        model_config, train_config, data_dir, run_dir, progress=progress, stop_at=stop_at, note=note
    )
    while True:
        try:
            next(rows)
        except StopIteration as end:
            return end.value


def training(
    model_config: GPTConfig,
    train_config: TrainConfig,
    data_dir: str | Path,
    run_dir: str | Path,
    *,
    progress: ProgressFn | None = None,
    stop_at: int | Callable[[], bool] | None = None,
    note: Callable[[str], None] = lambda text: None,
    lockstep: str | None = None,
    donor: str | Path | None = None,
    label: str = "",
) -> Generator[int, None, dict[str, Any]]:
    """`train`, a row at a time: yields the step of each row, and its value is the result.

    For whoever drives several runs in turn; `lockstep`, the name of their group, goes to run.json,
    and `label`, what people call the run, to its logger.
    The backend is a context variable: each generator must be advanced in a context of its own.
    `donor` is the folder of a shorter run of the same model and rate, whose trunk this run takes
    over where it can (trunk.py).
    """
    data = TokenData(data_dir)
    if data.vocab_size > model_config.vocab_size:
        raise ValueError(
            f"vocab_size must be at least the {data.vocab_size} of the data in {data_dir}, "
            f"got {model_config.vocab_size}"
        )
    description = run_description(model_config, train_config, data)
    check(train_config.log_to)
    with ProcessGroup.joined(resolve_device(train_config.device)) as group, ExitStack() as stack:
        if not (Path(run_dir) / RESULT).is_file():  # a backend that is not here makes no folder
            stack.enter_context(use_backend(train_config.backend))
        folder: RunDir | None = None
        finished: dict[str, Any] | None = None
        if group.rank == 0:
            folder = stack.enter_context(RunDir(run_dir))
            folder.check_is(description)
            finished = folder.result()
        if (finished := group.from_first(finished)) is not None:
            return finished
        trainer = Trainer(model_config, train_config, data, group)
        forward = stack.enter_context(Forward(train_config.log_to, label, note))
        return (
            yield from trainer.rows(
                folder, Path(run_dir), description, forward,
                progress=progress, stop_at=stop_at, note=note, lockstep=lockstep,
                donor=None if donor is None else Path(donor),
            )
        )  # fmt: skip


def run_description(
    model_config: GPTConfig, train_config: TrainConfig, data: TokenData
) -> dict[str, Any]:
    """What a run is, before anything ran: the part of run.json that its id covers."""
    return {
        "id": run_id(model_config, train_config, data.hash),
        "model": model_config.to_dict(),
        "train": train_config.to_dict(),
        "data": {k: v for k, v in data.manifest.items() if k not in ("shards", "source")},
        "flop_convention": FLOP_CONVENTION,
    }


class Trainer:
    """Model, optimizer and data of one run in this process."""

    def __init__(
        self, model_config: GPTConfig, config: TrainConfig, data: TokenData, group: ProcessGroup
    ):
        self.config, self.data, self.group = config, data, group
        self.seq_len = model_config.seq_len
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        if config.grad_accum % group.world:
            raise ValueError(
                f"grad_accum must be a multiple of the {group.world} processes, "
                f"got {config.grad_accum}"
            )
        self.model = build_model(model_config, seed=config.seed).to(self.device)
        compiled = torch.compile(self.model) if config.compile else self.model
        self.compiled = cast(nn.Module, compiled)
        self.parallel = group.data_parallel(self.compiled, self.device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        sequences = config.batch_size * config.grad_accum
        self.tokens_per_step = sequences * self.seq_len
        self.model_flops = model_flops(model_config, batch=sequences).total
        self.executed_flops: int | None = None  # known once `show` has seen the backends
        self.backends: dict[str, str] = {}

    def rows(
        self,
        folder: RunDir | None,
        run_dir: Path,
        description: dict[str, Any],
        forward: Forward,
        *,
        progress: ProgressFn | None,
        stop_at: int | Callable[[], bool] | None,
        note: Callable[[str], None],
        lockstep: str | None = None,
        donor: Path | None = None,
    ) -> Generator[int, None, dict[str, Any]]:
        """Train to the end or to `stop_at`, yielding after each row. Only rank 0 has a `folder`."""
        self._warm_up()
        state, grown = self._resume(run_dir, description, note, donor)
        step, train_s = state["step"], state["train_s"]
        if folder is not None:
            folder.write_run({**description, **self._circumstances(folder, step, lockstep)})
            folder.start_metrics(step, donor if grown else None)
            forward.start(folder.path, description, step)
        if isinstance(stop_at, int) and stop_at <= step < self.config.steps:
            return {"status": "stopped", "id": description["id"], "step": step}
        reason = ""
        while step < self.config.steps:
            until = self._next_row(step, stop_at)
            loss, norm, seconds, reason = self._timed_steps(step + 1, until)
            step, train_s = until, train_s + seconds
            row = self._row(step, loss, norm, train_s)
            if not reason and self._due(step, self.config.eval_every):
                row["eval_loss"] = self._evaluate()
                reason = _not_finite("eval_loss", step, row["eval_loss"])
            if folder is not None:
                written = {k: _finite_or_none(v) for k, v in row.items()}
                folder.append(written)
                forward.row(written)
            if progress is not None:
                progress(step, self.config.steps, _state(row))
            if reason:
                break
            stop = self._stops(step, stop_at)
            if step == decay_start(self.config):
                self._save(folder, step, train_s, description["id"], below=TRUNK)
            if stop or self._due(step, self.config.checkpoint_every):
                forward.flush()
                self._save(folder, step, train_s, description["id"])
            if stop:
                return {"status": "stopped", "id": description["id"], "step": step}
            yield step
        result = None
        if folder is not None:
            result = self._result(folder, description["id"], step, reason)
            columns.keep(folder.path)
            folder.write_result(result)
        return self.group.from_first(result)

    def _warm_up(self) -> None:
        """See the module's docstring. Every trace is undone; random numbers are seeded per step."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        before = [tensor.detach().clone() for tensor in tensors]
        self.show(OpCalls())
        for _ in range(self.config.timing_warmup):
            self.step(1)
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        self.optimizer.state.clear()

    def show(self, calls: OpCalls) -> None:
        """Lets `calls` see one micro-batch, and learns from it what the ops run on and execute."""
        x, y = self._micro_batch(1, 0)
        with calls:
            self._loss(self.model, x, y).backward()
        self.optimizer.zero_grad(set_to_none=True)
        self.backends = dict(sorted(calls.backends.items()))
        self.executed_flops = None
        if calls.extra_flops is not None:
            extra = calls.extra_flops + masked_flops(
                self.model.config, self.seq_len, self.config.batch_size
            )
            self.executed_flops = self.model_flops + extra * self.config.grad_accum

    def _resume(
        self,
        run_dir: Path,
        description: dict[str, Any],
        note: Callable[[str], None],
        donor: Path | None,
    ) -> tuple[dict[str, Any], bool]:
        """Where to go on, and whether that is on the trunk of `donor`."""
        model, optimizer = self.model, self.optimizer
        state = checkpoint.load(
            run_dir / CHECKPOINTS, model, optimizer, run_id=description["id"], note=note
        )
        grown = state is None and donor is not None
        if grown:
            state = grow(cast(Path, donor), description, model, optimizer, note=note)
        if state is None:
            return {"step": 0, "train_s": 0.0}, False
        found, here = (state["device"], state["dtype"]), (self.device.type, str(self.dtype))
        if found != here:
            raise ValueError(
                f"run {run_dir} must go on with the device and dtype it began with, "
                f"{' '.join(found)}, got {' '.join(here)}; set device and dtype"
            )
        return state, grown

    def _save(
        self,
        folder: RunDir | None,
        step: int,
        train_s: float,
        run_id: str,
        *,
        below: str = CHECKPOINTS,
    ) -> None:
        if folder is not None:
            folder.sync_metrics()
            state = {"step": step, "train_s": train_s, "run_id": run_id}
            state |= {"device": self.device.type, "dtype": str(self.dtype)}
            checkpoint.save(folder.path / below, self.model, self.optimizer, state)
        self.group.barrier()

    def _timed_steps(self, first: int, last: int) -> tuple[float, float, float, str]:
        """Steps first..last: mean loss, last gradient norm, seconds, and what is wrong or ""."""
        _synchronize(self.device)
        start = time.perf_counter()
        outcomes = [torch.stack(self.step(step)) for step in range(first, last + 1)]
        values = torch.stack(outcomes).double().cpu()  # waits for the device
        seconds = time.perf_counter() - start
        reason = ""
        for step, (loss, norm) in enumerate(values.tolist(), first):
            reason = reason or _not_finite("loss", step, loss) or _not_finite("grad", step, norm)
        return values[:, 0].mean().item(), values[-1, 1].item(), seconds, reason

    def step(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step; its mean loss over all processes, and the norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        own = range(self.group.rank, self.config.grad_accum, self.group.world)
        total = torch.zeros((), device=self.device)
        for i in own:
            x, y = self._micro_batch(step, i)
            _seed_dropout(_seed(self.config.seed, step, i), self.device)
            with self.group.accumulating(self.parallel, more=i != own[-1]):
                loss = self._loss(self.parallel, x, y) / len(own)
                loss.backward()
            total += loss.detach()
        total = self.group.mean(total)
        limit = math.inf if self.config.grad_clip is None else self.config.grad_clip
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.model.after_step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm

    def _micro_batch(self, step: int, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        size, count = self.config.batch_size, self.config.grad_accum
        x, y = self.data.train_batch(step, size * count, self.seq_len, self.config.seed)
        part = slice(i * size, (i + 1) * size)
        return self._to_device(x[part]), self._to_device(y[part])

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _loss(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        enabled = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled):
            return model(x, y)[1]

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Mean loss over the fixed batches of the validation split."""
        count = self.config.eval_batches
        batches = self.data.val_batches(self.config.batch_size, self.seq_len, count)
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, (x, y) in enumerate(batches):
            if i % self.group.world == self.group.rank:
                total += self._loss(self.compiled, self._to_device(x), self._to_device(y))
        self.model.train()
        return self.group.mean(total).item() * self.group.world / count

    def _next_row(self, step: int, stop_at: int | Callable[[], bool] | None) -> int:
        """The step at whose end something is due: a row, an evaluation, a checkpoint, a stop."""
        config = self.config
        periods = (config.log_every, config.eval_every, config.checkpoint_every or config.steps)
        ends = [config.steps, *((step // period + 1) * period for period in periods)]
        if (trunk := decay_start(config)) is not None and trunk > step:
            ends.append(trunk)
        if isinstance(stop_at, int) and stop_at > step:
            ends.append(stop_at)
        return min(ends)

    def _due(self, step: int, period: int | None) -> bool:
        return step == self.config.steps or (period is not None and step % period == 0)

    def _stops(self, step: int, stop_at: int | Callable[[], bool] | None) -> bool:
        if stop_at is None or step == self.config.steps:
            return False
        if callable(stop_at):
            # one process decides, or a clock could part them
            return self.group.from_first(stop_at() if self.group.rank == 0 else None)
        return step >= stop_at

    def _executed(self, steps: int) -> int | None:
        return None if self.executed_flops is None else steps * self.executed_flops

    def _row(self, step: int, loss: float, norm: float, train_s: float) -> dict[str, Any]:
        return {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "loss": loss,
            "eval_loss": None,
            "model_flops": step * self.model_flops,
            "executed_flops": self._executed(step),
            "train_s": train_s,
            "lr": learning_rate(self.config, step),
            "grad_norm": norm,
        }

    def _circumstances(self, folder: RunDir, step: int, lockstep: str | None) -> dict[str, Any]:
        """The part of run.json that depends on the machine, with one entry per session."""
        earlier = (folder.run() or {}).get("sessions", [])
        session = {"from_step": step, "processes": self.group.world, "lockstep": lockstep}
        return {
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "backends": self.backends,
            "n_params": sum(p.numel() for p in self.model.parameters()),
            "model_flops_per_step": self.model_flops,
            "executed_flops_per_step": self.executed_flops,
            "sessions": [*earlier, {**session, **environment.describe(self.device)}],
        }

    def _result(self, folder: RunDir, run_id: str, step: int, reason: str) -> dict[str, Any]:
        rows = read_metrics(folder.path)
        evaluated = [row["eval_loss"] for row in rows if row["eval_loss"] is not None]
        step_s = _median_step_s(rows)
        result = {"status": "failed", "reason": reason} if reason else {"status": "done"}
        return {
            **result,
            "id": run_id,
            "steps": step,
            "tokens": step * self.tokens_per_step,
            "eval_loss": evaluated[-1] if evaluated else None,
            "bits_per_byte": self.data.bits_per_byte(evaluated[-1]) if evaluated else None,
            "loss": rows[-1]["loss"],
            "model_flops": step * self.model_flops,
            "executed_flops": self._executed(step),
            "train_s": rows[-1]["train_s"],
            "step_s_median": step_s,
            "tokens_per_s": self.tokens_per_step / step_s,
            "n_params": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(self.dtype).removeprefix("torch."),
            "backends": self.backends,
            "device": environment.device_name(self.device),
            "versions": environment.versions(),
        }


def _seed(*parts: int) -> int:
    """One 63-bit seed out of several numbers, without the collisions of their sum."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def _seed_dropout(seed: int, device: torch.device) -> None:
    # torch.manual_seed formats a stack trace for each kind of device that is not there: 0.5 ms
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _median_step_s(rows: list[dict[str, Any]]) -> float:
    start = {"step": 0, "train_s": 0.0}
    return statistics.median(
        (b["train_s"] - a["train_s"]) / (b["step"] - a["step"])
        for a, b in zip([start, *rows], rows, strict=False)
    )


def _not_finite(name: str, step: int, value: float) -> str:
    return "" if math.isfinite(value) else f"{name} at step {step} must be finite, got {value}"


def _finite_or_none(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _state(row: dict[str, Any]) -> str:
    text = f"loss {row['loss']:.4f}"
    return text if row["eval_loss"] is None else f"{text}  eval {row['eval_loss']:.4f}"

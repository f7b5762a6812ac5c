"""A study of any size whose runs were never trained: its losses are formulas, its files real.

By hand:  python tests/synthetic_study.py DIR --runs 10000   writes it and times its report
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from ceg_model import columns, data, environment
from ceg_model.columns import COLUMNS
from ceg_model.device import resolve_device
from ceg_model.flops import model_flops
from ceg_model.rundir import METRICS, RESULT, RUN
from ceg_model.study.plan import Plan, RunSpec, Scale
from ceg_model.study.runner import our_kernels
from ceg_model.study.schedule import schedule
from ceg_model.study.store import FIRST_FAILURE, Store
from ceg_model.train import run_description

ARMS = (
    "baseline", "layer_norm", "rms_norm", "rope", "flash_attention", "ln_rope_fa", "mqa", "moe",
    "swiglu", "window",
)  # fmt: skip
GAIN = {arm: 1.0 + 0.2 * i for i, arm in enumerate(ARMS)}
SCALES, STEPS, EVAL_EVERY = 5, 500, 16
DISTINCT = 4  # runs of an arm and scale whose metrics differ; the others are hard links to theirs
ROW = (
    '{"step": %d, "tokens": %d, "loss": %r, "eval_loss": %s, "model_flops": %d, '
    '"executed_flops": %d, "train_s": %r, "lr": 0.002, "grad_norm": %r}\n'
)


def plan_of(runs: int) -> Plan:
    """ARMS at SCALES, with as many seeds as make at least `runs` runs."""
    train = {"lr": 2e-3, "warmup_steps": 0, "dtype": "float32", "device": "cpu", "log_every": 1}
    scales = tuple(
        Scale(
            f"S{i}",
            {"n_layer": 2, "d_model": 32 + 16 * i, "n_head": 2, "seq_len": 64},
            {"steps": STEPS, "batch_size": 4, "eval_every": EVAL_EVERY},
        )
        for i in range(SCALES)
    )
    seeds = tuple(range(-(-runs // (len(ARMS) * SCALES))))
    return Plan("synthetic", ARMS, scales, seeds, train=train, lockstep=True, timing_rounds=1)


def write_study(out: Path, runs: int) -> Plan:
    """A study's folder. Of 50 runs one has failed twice; one is unfinished, its last row torn."""
    text, tokens = out / "text", out / "data"
    text.mkdir(parents=True)
    for i in range(8):
        (text / f"{i}.txt").write_text(f"{i} words, which nothing reads but a manifest must have")
    data.prepare(data.Request(sources=(str(text),), val_fraction=0.5), tokens)
    store, plan = Store(out / "study"), plan_of(runs)
    token_data, ours = data.TokenData(tokens), our_kernels("cpu")
    about = environment.describe(resolve_device("cpu"))
    study = {"plan": plan.to_dict(), "data_hash": token_data.hash, "ours": ours}
    store.begin(json.loads(json.dumps(study | {"data_dir": str(tokens), "environment": about})))
    hash_, size = token_data.hash, token_data.vocab_size
    specs = schedule(plan, ours, data_hash=hash_, vocab_size=size, index={}).runs.items()
    together: dict[Any, list[str]] = {}
    for run, spec in specs:
        together.setdefault((spec.scale, spec.seed), []).append(run)
    written: dict[Any, Path] = {}
    for number, (run, spec) in enumerate(specs):
        folder = store.path(run)
        folder.mkdir()
        group = "-".join(together[spec.scale, spec.seed])
        description = run_description(spec.model, spec.train, token_data)
        session = {"from_step": 0, "processes": 1, "lockstep": group, **about}
        (folder / RUN).write_text(json.dumps({**description, "sessions": [session]}, indent=2))
        _write_metrics(folder / METRICS, spec, written)
        _write_state(folder, run, number % 50)
    return plan


def _write_metrics(path: Path, spec: RunSpec, written: dict[Any, Path]) -> None:
    key = (spec.arm, spec.scale, spec.seed % DISTINCT)
    if key in written:
        os.link(written[key], path)
        columns_of = written[key].with_name(COLUMNS)
        path.with_name(COLUMNS).write_bytes(columns_of.read_bytes())  # as true of the same file
        return
    written[key] = path
    random = np.random.default_rng([ARMS.index(spec.arm), spec.model.d_model, key[2]])
    step = np.arange(1, STEPS + 1)
    flops = model_flops(spec.model, batch=spec.train.batch_size).total
    loss = 1.5 + (GAIN[spec.arm] * step * flops / 1e6) ** -0.3
    loss = (loss * np.exp(1e-4 * random.standard_normal(STEPS))).tolist()
    seconds = np.cumsum(1e-11 * flops * np.exp(0.1 * random.standard_normal(STEPS))).tolist()
    norm = random.random(STEPS).tolist()
    with path.open("w") as file:
        for i in range(STEPS):
            evaluated = repr(loss[i]) if (i + 1) % EVAL_EVERY == 0 or i + 1 == STEPS else "null"
            at = (i + 1, 256 * (i + 1), loss[i], evaluated, (i + 1) * flops, (i + 1) * flops)
            file.write(ROW % (*at, seconds[i], norm[i]))
    columns.keep(path.parent)


def _write_state(folder: Path, run: str, number: int) -> None:
    result = {"status": "done", "id": run, "steps": STEPS, "tokens": 256 * STEPS}
    result |= {"eval_loss": 2.0, "bits_per_byte": 2.9, "loss": 2.0, "train_s": 1.0, "dtype": "x"}
    if number == 48:
        result = {"status": "failed", "reason": "loss at step 7 must be finite, got nan"}
        (folder / FIRST_FAILURE).write_text(json.dumps(result, indent=2))
    if number != 49:
        (folder / RESULT).write_text(json.dumps(result, indent=2))
        return
    rows = (folder / METRICS).read_text()
    (folder / METRICS).unlink()  # a link: the others keep their rows
    (folder / METRICS).write_text(rows[: len(rows) // 2])


def time_parts(folder: Path) -> dict[str, float]:
    """Seconds of the parts of `ceg study report` on a study's folder, without its imports."""
    from ceg_model.study.collect import collect
    from ceg_model.study.report import write_report

    clock = [time.perf_counter()]
    Store(folder).index()
    clock.append(time.perf_counter())
    results = collect(folder)
    clock.append(time.perf_counter())
    write_report(results, Store(folder).report)
    clock.append(time.perf_counter())
    return dict(zip(("index", "collect", "write_report"), np.diff(clock).tolist(), strict=True))


def time_command(folder: Path) -> float:
    """Seconds of `ceg study report` as one types it."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "ceg_model.cli", "study", "report", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


@contextmanager
def copied(folder: Path) -> Iterator[None]:
    """As a copy that did not keep the times of files."""
    times = {path: path.stat() for path in folder.glob(f"runs/*/{METRICS}")}
    for path in times:
        os.utime(path)
    yield
    for path, stat in times.items():
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@contextmanager
def without_columns(folder: Path) -> Iterator[None]:
    """As a version left it that knew no columns."""
    found = [path.parent for path in folder.glob(f"runs/*/{COLUMNS}")]
    for run in found:
        os.rename(run / COLUMNS, run / "aside")
    yield
    for run in found:
        os.rename(run / "aside", run / COLUMNS)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dir", type=Path)
    parser.add_argument("--runs", type=int, default=10_000)
    arguments = parser.parse_args()
    if not (arguments.dir / "study").exists():
        write_study(arguments.dir, arguments.runs)
    folder = arguments.dir / "study"
    parts = (f"{name} {seconds:.2f} s" for name, seconds in time_parts(folder).items())
    print("in one process:", *parts, flush=True)
    states = {"as it ended": nullcontext, "copied": copied, "without columns": without_columns}
    for name, state in states.items():
        with state(folder):
            print(f"ceg study report, {name}: {time_command(folder):.2f} s", flush=True)


if __name__ == "__main__":
    main()

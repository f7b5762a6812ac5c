"""A study that is killed with SIGKILL at any moment goes on to the results of an undisturbed one.

The studies here run in processes forked from one that has imported torch already, so that ten kills
take seconds. Kills of freshly spawned workers, which import it first, are a test of their own.
"""

import dataclasses
import functools
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
import types

import pytest
from kill_study import differences, processes_of, wait_until_gone, without_times

from ceg_model import data
from ceg_model.rundir import METRICS, RESULT
from ceg_model.study import runner
from ceg_model.study.collect import collect
from ceg_model.study.plan import Plan, Scale
from ceg_model.study.store import STUDY, THROUGHPUT, Store

SEED = 20260101  # of the moments; another one must pass as well
KILLS = 10
GONE_S = 5.0
PLAN = Plan(
    "killed",
    ("baseline", "layer_norm", "flash_attention"),
    tuple(
        Scale(
            name,
            {"n_layer": layers, "d_model": 32, "n_head": 2, "seq_len": 32},
            {"steps": 40, "batch_size": 4},
        )
        for name, layers in (("S", 1),)
    ),
    (0, 1),
    train={
        "lr": 3e-3, "warmup_steps": 2, "dtype": "float32", "device": "cpu", "eval_every": 4,
        "log_every": 1, "eval_batches": 2, "checkpoint_every": 10, "timing_warmup": 0,
    },
    timing_rounds=3,
    timing_seconds=0.1,
    workers=2,
    lockstep=True,
)  # fmt: skip
TIMED = "throughput is measured, not written"
# What a kill would leave half done: a function of os, and whose path it is called with. The whole
# process group dies instead of that call. One after the other.
WORST = {
    "study.json has no name yet": ("replace", r"/study\.json$"),
    TIMED: ("replace", r"/throughput/S\.json$"),
    "run.json has no name yet": ("replace", r"/run\.json$"),
    "no metrics yet": ("replace", r"/metrics\.jsonl$"),
    "in the middle of a checkpoint": ("fsync", r"/ckpt/\.partial-step-00000010/optimizer\.pt$"),
    "a checkpoint has no name yet": ("rename", r"/step-00000020$"),
    "in the removal of an old checkpoint": ("rmdir", r"/step-00000010$"),
    "all rows, no last checkpoint": ("rename", r"/step-00000040$"),
    "the last checkpoint, no columns": ("replace", r"/columns\.bin$"),
    "columns, no result": ("replace", r"/result\.json$"),
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    for i in range(40):
        body = " ".join(f"word{(j * j + i) % 97} and {j % 13}" for j in range(120))
        (folder / "text" / f"{i}.txt").write_text(body)
    request = data.Request(sources=(str(folder / "text"),), val_fraction=0.2)
    data.prepare(request, folder / "tokens")
    return folder / "tokens"


def session(out, tokens, plan, deadly):
    """The whole of a forked process: a study, in a process group of its own."""
    os.setsid()
    fork = multiprocessing.get_context("fork")
    runner.multiprocessing = types.SimpleNamespace(get_context=lambda method: fork)
    if deadly is not None:
        name, where = deadly
        setattr(os, name, functools.partial(_call_or_die, getattr(os, name), where))
    runner.run_study(plan, out, tokens)


def _call_or_die(call, where, *args, **kwargs):
    last = args[-1]
    path = os.readlink(f"/proc/self/fd/{last}") if isinstance(last, int) else str(last)
    if re.search(where, path):
        os.killpg(0, signal.SIGKILL)
    return call(*args, **kwargs)


def start(out, tokens, plan=PLAN, deadly=None):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["test_study_kill", "ceg_model.study.throughput", "torch._dynamo"]
    )
    process = context.Process(target=session, args=(out, tokens, plan, deadly))
    process.start()
    return process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tokens):
    """(its results, the seconds it took)"""
    out = tmp_path_factory.mktemp("study") / "undisturbed"
    short = dataclasses.replace(PLAN, arms=("baseline",), scales=PLAN.scales[:1], seeds=(0,))
    start(out.with_name("before"), tokens, short).join()  # it starts the server that forks
    begun = time.monotonic()
    process = start(out, tokens)
    process.join()
    assert process.exitcode == 0
    return collect(out), time.monotonic() - begun


def assert_goes_on_to(results, out, tokens):
    last = start(out, tokens)
    last.join()
    assert last.exitcode == 0
    assert differences(without_times(results), without_times(collect(out))) == []
    assert results["complete"] == {"planned": 6, "done": 6, "failed": []}


def test_ten_kills_at_random_moments(tmp_path, tokens, undisturbed):
    results, seconds = undisturbed
    moments = random.Random(SEED)
    for i in range(KILLS):
        process = start(tmp_path / "s", tokens)
        wait = moments.uniform(0, seconds / 6)
        print(f"kill {i} of seed {SEED}: after {wait:.3f} s")
        process.join(wait)
        group = process.pid
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:  # before its setsid
            process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it ended before its kill"
        assert wait_until_gone(group, GONE_S) == []
    assert_goes_on_to(results, tmp_path / "s", tokens)


def test_a_kill_at_each_of_the_worst_moments(tmp_path, tokens, undisturbed):
    """Training goes on while a timing is measured, and may be past the other moments by its end:
    that one has a study of its own.
    """
    folders = {moment: tmp_path / ("timed" if moment == TIMED else "s") for moment in WORST}
    for moment, deadly in WORST.items():
        process = start(folders[moment], tokens, deadly=deadly)
        process.join()
        assert process.exitcode == -signal.SIGKILL, (moment, Store(folders[moment]).index())
        assert wait_until_gone(process.pid, GONE_S) == []
    for out in set(folders.values()):
        assert_goes_on_to(undisturbed[0], out, tokens)


@pytest.mark.parametrize("after_s", [0.0, 4.0], ids=["start-up", "timing"])
def test_workers_do_not_outlive_a_killed_parent(tmp_path, tokens, after_s):
    """Real workers, which import torch for seconds while their first job waits in the pipe."""
    endless = dataclasses.replace(PLAN, timing_rounds=10**6)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = (
        "import sys, pickle; from ceg_model.study.runner import run_study; "
        f"run_study(pickle.loads({pickle.dumps(endless)!r}), *sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, tmp_path / "s", tokens]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    patient = time.monotonic() + 60
    # Itself, the resource tracker of multiprocessing and a worker for each of two cores at most.
    count = 2 + min(2, len(os.sched_getaffinity(0)))
    while len(processes_of(process.pid)) < count and time.monotonic() < patient:
        time.sleep(0.02)
    time.sleep(0.3 + after_s)
    assert len(processes_of(process.pid)) == count
    process.kill()
    process.wait()
    assert wait_until_gone(process.pid, 10 * GONE_S) == []


def test_damaged_files_are_refused_by_name_or_survived(tmp_path, tokens, undisturbed):
    one = dataclasses.replace(PLAN, arms=("baseline",), scales=PLAN.scales[:1], seeds=(0,))
    out = tmp_path / "s"
    start(out, tokens, one).join()
    before = without_times(collect(out))
    (folder,) = Store(out).runs.iterdir()
    for path in (out / STUDY, out / THROUGHPUT / "S.json", folder / RESULT):
        whole = path.read_text()
        for torn in (whole[: len(whole) // 2], "", "[]"):
            path.write_text(torn)
            with pytest.raises(ValueError, match=f"{re.escape(str(path))} must "):
                runner.run_study(one, out, tokens)
            with pytest.raises(ValueError, match=f"{re.escape(str(path))} must "):
                collect(out)
        path.write_text(whole)
    rows = (folder / METRICS).read_text()
    (folder / METRICS).write_text(rows + '{"step": 41, "lo')
    assert without_times(collect(out)) == before
    (folder / METRICS).write_text(rows.replace('"step": 7,', '"step": ,'))
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 7 must be JSON, got"):
        collect(out)
    (folder / METRICS).write_text("".join(rows.splitlines(keepends=True)[:30]))
    (folder / RESULT).unlink()
    notes = []
    summary = runner.run_study(one, out, tokens, note=notes.append)
    assert "must reach step 40 like the run's checkpoint, got its last row at step 30" in notes[0]
    assert len(summary.failed) == 1

"""From cases to rows: accuracy before time, passes, and the memory that it all lies in."""

from __future__ import annotations

import dataclasses
import mmap
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ceg_kernels
from ceg_kernels.measure import memory, run, suite
from ceg_kernels.measure.clock import Timing
from ceg_kernels.measure.roofline import ROW_KEYS
from ceg_kernels.measure.run import quick_bench, run_case, run_cases
from ceg_kernels.measure.suite import Case, cases
from ceg_kernels.measure.table import render
from tests.test_measure import ROOFS

RMS = Case("rms_norm", "fwd", "quick-2048x768", "float32", "cpu")


def test_rows_carry_the_declared_cost():
    results = run_case(RMS, ["torch", "reference"], roofs=ROOFS, min_time_s=0.02)
    cost = ceg_kernels.OPS["rms_norm"].cost(*RMS.args())
    for result in results.values():
        assert (result.row["flops"], result.row["bytes"]) == (cost.flops, cost.bytes)
        assert result.row["median_s"] == result.timing.median_s
    assert results["reference"].row["speedup_vs_reference"] == 1.0
    assert "rms_norm" in _text(render([result.row for result in results.values()]))


def test_a_broken_kernel_is_not_timed(monkeypatch):
    op = ceg_kernels.OPS["rms_norm"]
    ran = []

    def broken(*args):
        ran.append(args)
        y, summed, rstd = op.reference(*args)
        y[0] *= 1.01
        return y, summed, rstd

    ours = dataclasses.replace(op.backends[0], name="ours", run=broken, why_not=lambda *a: None)
    monkeypatch.setattr(op, "backends", (ours, *op.backends))
    results = run_case(RMS, ["ours", "reference"], roofs=ROOFS, min_time_s=0.02)
    row = results["ours"].row
    assert len(ran) == 1
    assert row["median_s"] is None
    assert row["max_error_over_slack"] > 1
    assert row["status"].startswith("not timed: error is ")
    assert results["reference"].row["status"] == "ok"
    assert row["status"] in _text(render([row]))


@pytest.mark.parametrize("backend", suite.STOCK)
def test_forward_backward_runs_under_autograd(backend):
    case = dataclasses.replace(RMS, direction="fwd_bwd")
    args = case.args()
    dx, dweight = case.call(backend, args)()[:2]
    assert dx.shape == args[0].shape
    assert dweight.shape == args[1].shape


def test_quick_bench_smoke():
    begun = time.process_time()  # of all threads: others' work does not count
    rows = quick_bench(smoke=True, budget_s=3.0, roofs=ROOFS)
    assert time.process_time() - begun < 60  # under 10 s on two idle cores
    assert {row["op"] for row in rows} == {case.op for case in cases("quick")}
    assert all(tuple(row) == ROW_KEYS for row in rows)


@pytest.fixture
def timed(monkeypatch):
    """Nothing is timed: every call takes a second more than the one before."""
    order = []

    def interleaved(calls, **options):
        order.append((len(calls), options["min_time_s"], options["min_rounds"]))
        return {name: Timing((float(len(order)),) * 3, hot_s=len(order) / 2) for name in calls}

    monkeypatch.setattr(run, "time_interleaved", interleaved)
    monkeypatch.setattr(run, "_call_s", lambda *args: None)
    return order


def test_cases_take_turns_in_passes(timed):
    told = []
    chosen = {RMS: ["reference"], dataclasses.replace(RMS, dtype="bfloat16"): ["reference"]}
    results = run_cases(
        chosen, roofs=ROOFS, passes=3, min_time_s=0.6, progress=lambda *a: told.append(a)
    )
    first, second = (found["reference"] for _, found in results)
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert timed == [(1, pytest.approx(0.2), 3)] * 6
    assert first.timing.samples == (1.0,) * 3 + (3.0,) * 3 + (5.0,) * 3
    assert second.timing.samples == (2.0,) * 3 + (4.0,) * 3 + (6.0,) * 3
    assert (first.row["median_s"], second.row["median_s"]) == (3.0, 4.0)
    assert (first.row["hot_s"], first.row["rounds"]) == (1.5, 9)


@pytest.mark.parametrize("broken", ["args", "call"])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_case_that_raises_takes_no_other_with_it(broken, passes, monkeypatch):
    """It raises as its inputs are made, or (`call`) not before it is timed."""
    bad, good = dataclasses.replace(RMS, dtype="bfloat16"), RMS
    whole = getattr(Case, broken)

    def fail(*args):
        raise RuntimeError("planted")

    def breaks(self, *args):
        if self != bad:
            return whole(self, *args)
        return fail if broken == "call" else fail()

    monkeypatch.setattr(Case, broken, breaks)
    chosen = {bad: ["reference"], good: ["reference"]}
    results = dict(run_cases(chosen, roofs=ROOFS, passes=passes, min_time_s=0.01))
    assert str(results[bad]) == "planted"
    assert results[good]["reference"].row["status"] == "ok"
    with pytest.raises(RuntimeError, match="planted"):
        run_case(bad, ["reference"], roofs=ROOFS)


@pytest.mark.parametrize("name", ["_HELD_BYTES", "_HELD_CASES"])
def test_what_is_held_at_a_time_is_bounded(name, timed, monkeypatch):
    monkeypatch.setattr(run, name, 1)
    told = []
    chosen = {RMS: ["reference"], dataclasses.replace(RMS, dtype="bfloat16"): ["reference"]}
    results = run_cases(chosen, roofs=ROOFS, passes=2, progress=lambda *a: told.append(a))
    assert [case for case, _ in results] == list(chosen)
    assert told == [(0, 1), (1, 1)] * 2


def test_what_is_compiled_is_timed_before_the_next_is(timed, monkeypatch):
    monkeypatch.setattr(Case, "fails", lambda *args: None)
    monkeypatch.setattr(Case, "errors", lambda self, names, args: dict.fromkeys(names, 0.0))
    told = []
    chosen = {RMS: ["compile"], dataclasses.replace(RMS, dtype="bfloat16"): ["compile"]}
    list(run_cases(chosen, roofs=ROOFS, passes=2, progress=lambda *a: told.append(a)))
    assert told == [(0, 1), (1, 1)] * 2


PROCESS = """
import mmap, re, resource, sys
import torch
from ceg_kernels.measure import memory

def number(name, path="/proc/self/smaps_rollup"):
    return int(re.search(name + r":\\s*([0-9]+)", open(path).read())[1]) << 10

if limit := int(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
# What the system grants to who asks, now: it may have none, or its memory in pieces.
size, before = 256 << 20, number("AnonHugePages")
asked = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
asked.madvise(mmap.MADV_HUGEPAGE)
asked.write(bytes(size))
granted = 2 * (number("AnonHugePages") - before) > size
asked.close()

before = [torch.ones(1 << 16, dtype=torch.uint8) for _ in range(2048)]  # too small to be mapped
assert not memory.prepared() and memory.page_size() == "4 KiB"
assert memory.prepare() and memory.prepared()
tensors = [torch.ones(32 << 20, dtype=torch.uint8) for _ in range(2)]  # less than was there
assert memory.page_size() == ("2 MiB" if granted else "4 KiB"), (granted, memory.page_size())
resident = number("VmRSS", "/proc/self/status")
del tensors
assert number("VmRSS", "/proc/self/status") > resident - (1 << 20)
"""


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="not Linux")
@pytest.mark.parametrize("limit", [0, 6 << 30], ids=["unlimited", "limited"])
def test_memory_is_kept_and_lies_in_huge_pages(limit):
    if limit and resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        pytest.skip("address space is limited already")
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, str(limit)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_page_size_is_unknown_where_nobody_says(monkeypatch):
    def missing(self):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert memory.page_size() is None


def _text(table) -> str:
    from rich.console import Console

    console = Console(width=250, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()

"""A store of many runs: what a report reads of it, how fast, and a cache that may be lost."""

import json
import os
import time

import numpy as np
import pytest
from synthetic_study import write_study

from ceg_model.rundir import METRICS, RUN, read_columns, read_metrics
from ceg_model.study.collect import collect
from ceg_model.study.store import CACHE, Store

RUNS = 500  # 10,000 by hand: python tests/synthetic_study.py DIR --runs 10000
# 10,000 runs in 10 s, index and collect together; a shared machine may take four times as long.
BOUND_S = 4 * 10.0 * RUNS / 10_000


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic")
    write_study(out, RUNS)
    return out / "study"


def run_of(store, status):
    return next(run for run, result in store.index().items() if result["status"] == status)


def test_many_runs_are_indexed_and_collected_in_time(study):
    collect(study)  # as after the study's own report
    start = time.monotonic()
    states = [result["status"] for result in Store(study).index().values()]
    results = collect(study)
    seconds = time.monotonic() - start
    assert {s: states.count(s) for s in set(states)} == {
        "done": 480,
        "failed": 10,
        "unfinished": 10,
    }
    assert results["complete"]["done"] == len(results["curves"]) == 480
    assert {f["reason"] for f in results["complete"]["failed"]} == {
        "loss at step 7 must be finite, got nan (twice)"
    }
    assert seconds < BOUND_S


def test_columns_are_the_rows(study):
    store = Store(study)
    for status in ("done", "unfinished"):  # of the second, the last row is torn
        folder = store.path(run_of(store, status))
        rows, columns = read_metrics(folder), read_columns(folder)
        assert columns.step.tolist() == [row["step"] for row in rows]
        assert columns.train_s.tolist() == [row["train_s"] for row in rows]
        evaluated = [row for row in rows if row["eval_loss"] is not None]
        assert [rows[i] for i in columns.evaluated] == evaluated
        for name in ("eval_loss", "model_flops", "executed_flops", "lr"):
            assert getattr(columns, name).tolist() == [row[name] for row in evaluated]


def test_null_is_nan_and_damage_in_the_middle_is_refused(tmp_path):
    row = {"step": 1, "train_s": 0.5, "eval_loss": 2.0, "model_flops": 10**18, "lr": 1e-3}
    row |= {"executed_flops": None}
    (tmp_path / METRICS).write_text(json.dumps(row) + "\n")
    assert np.isnan(read_columns(tmp_path).executed_flops).tolist() == [True]
    (tmp_path / METRICS).write_text("{\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 1 must be JSON, got '{'"):
        read_columns(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_cache_is_built_anew(study, damage):
    want, cache = collect(study), study / CACHE
    whole = cache.read_bytes()
    middle = len(whole) // 2
    broken = {
        "cut": whole[:middle],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "empty": b"",
        "text": b"not a cache",
    }[damage]
    cache.write_bytes(broken)
    assert collect(study) == want
    assert cache.stat().st_size == len(whole)


def test_a_run_that_was_trained_again_is_read_again(study):
    store = Store(study)
    folder = store.path(run_of(store, "done"))
    path = folder / METRICS
    old = read_columns(folder)
    text = path.read_text()
    first = json.loads(text.splitlines()[15])
    changed = text.replace(repr(first["eval_loss"]), repr(first["eval_loss"] + 1))
    try:
        path.unlink()  # of its hard links this one alone
        path.write_text(changed)
        os.utime(path, ns=(0, 0))  # an older time is another time, too
        runs = [run for run, result in store.index().items() if result["status"] == "done"]
        new = Store(study)._read(runs)[folder.name].columns
        assert new.eval_loss[0] == pytest.approx(old.eval_loss[0] + 1)
    finally:
        path.write_text(text)


def test_what_a_run_says_of_itself_is_read_again_where_it_changed(study):
    store = Store(study)
    runs = [run for run, result in store.index().items() if result["status"] == "done"]
    path = store.path(runs[0]) / RUN
    before = store._read(runs)[runs[0]].about
    text = path.read_text()
    other = before.identity["tokenizer"] + "-2"
    try:
        path.unlink()
        path.write_text(text.replace(json.dumps(before.identity["tokenizer"]), json.dumps(other)))
        assert Store(study)._read(runs)[runs[0]].about.identity["tokenizer"] == other
        path.unlink()
        with pytest.raises(ValueError, match=r"must have run\.json, got none"):
            Store(study)._read(runs)
    finally:
        path.write_text(text)

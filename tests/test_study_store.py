"""A store of many runs: what a report reads of it, how fast, and columns that may be lost."""

import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from synthetic_study import write_study

from ceg_model.columns import COLUMNS, HEADER, VERSION, Columns, read_all, read_columns
from ceg_model.rundir import METRICS, RUN, read_metrics
from ceg_model.study.collect import collect
from ceg_model.study.store import Store

ROOT = Path(__file__).parents[1]
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


def rows_of(columns):
    return {field.name: getattr(columns, field.name).tolist() for field in fields(Columns)}


def kept_of(folder):
    """What is read of a run where its lines may not be; None where they would be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ceg_model.columns.read_columns", lambda folder: None)
        return read_all(folder.parent, [folder.name])[folder.name]


@pytest.fixture
def run(study, tmp_path):
    """A copy of a run that is done, its times kept."""
    store = Store(study)
    return shutil.copytree(store.path(run_of(store, "done")), tmp_path / "run")


def test_kept_columns_are_those_of_the_lines(run):
    kept = kept_of(run)
    assert rows_of(kept) == rows_of(read_columns(run))
    assert [getattr(kept, f.name).dtype.name for f in fields(Columns)] == [
        "int64", "float64", "int64", *["float64"] * 4
    ]  # fmt: skip


@pytest.mark.parametrize("damage", ["none", "cut", "flipped", "count", "empty", "text", "version"])
def test_damaged_columns_are_not_believed(run, damage):
    path = run / COLUMNS
    whole = path.read_bytes()
    middle = len(whole) // 2

    def without(bit_at):
        return whole[:bit_at] + bytes([whole[bit_at] ^ 1]) + whole[bit_at + 1 :]

    path.write_bytes({
        "none": whole,
        "cut": whole[:middle],
        "flipped": without(middle),
        "count": without(HEADER.size - 8),
        "empty": b"",
        "text": b"not columns" * 9,
        "version": newer(whole),
    }[damage])  # fmt: skip
    assert (kept_of(run) is None) == (damage != "none")
    assert rows_of(read_all(run.parent, [run.name])[run.name]) == rows_of(read_columns(run))


def newer(content):
    rest = (VERSION + 1).to_bytes(8, "little") + content[16:]
    return zlib.crc32(rest).to_bytes(8, "little") + rest


@pytest.mark.parametrize("age", ["older", "newer"])
def test_columns_of_other_lines_are_not_believed(run, age):
    path = run / METRICS
    text, old = path.read_text(), kept_of(run)
    loss = json.loads(text.splitlines()[15])["eval_loss"]
    path.write_text(text.replace(repr(loss), repr(loss + 1)))
    assert path.stat().st_size == len(text)
    if age == "older":  # which is another time, too
        os.utime(path, ns=(0, 0))
    assert kept_of(run) is None
    new = read_all(run.parent, [run.name])[run.name]
    assert new.eval_loss[0] == pytest.approx(old.eval_loss[0] + 1)


def test_columns_of_fewer_lines_are_not_believed_whatever_the_time(run):
    path = run / METRICS
    time_ns = path.stat().st_mtime_ns
    with path.open("a") as file:
        file.write(path.read_text().splitlines()[-1] + "\n")
    os.utime(path, ns=(time_ns, time_ns))
    assert kept_of(run) is None


def test_columns_of_a_copy_without_times_are_believed(run):
    os.utime(run / METRICS)
    assert rows_of(kept_of(run)) == rows_of(read_columns(run))


def test_a_study_of_an_older_version_gives_the_same_report(study, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(study, older, ignore=shutil.ignore_patterns(COLUMNS, "report"))
    assert collect(older) == collect(study)


def test_a_report_needs_neither_torch_nor_what_is_slow_of_scipy(study):
    script = (
        "import sys; from ceg_model.cli import main; main(sys.argv[1:])\n"
        "heavy = {'torch', 'triton', 'scipy.stats', 'scipy.optimize', 'pyarrow', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, "study", "report", str(study)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['matplotlib']"


def test_what_a_run_says_of_itself_is_read_again_where_it_changed(study):
    store = Store(study)
    runs = [run for run, result in store.index().items() if result["status"] == "done"]
    path = store.path(runs[0]) / RUN
    before = store._read(runs)[runs[0]].identity
    text = path.read_text()
    other = before["tokenizer"] + "-2"
    try:
        path.unlink()
        path.write_text(text.replace(json.dumps(before["tokenizer"]), json.dumps(other)))
        assert Store(study)._read(runs)[runs[0]].identity["tokenizer"] == other
        path.unlink()
        with pytest.raises(ValueError, match=r"must have run\.json, got none"):
            Store(study)._read(runs)
    finally:
        path.write_text(text)

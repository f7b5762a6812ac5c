"""`pytest bench/` as its users type it, in processes of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ceg_kernels.measure import ROW_KEYS, Timing, bench_row, ceilings
from ceg_kernels.measure.plot import peak, roofline_figure
from ceg_kernels.op import Cost
from ceg_model.bench_commands import add_subcommands, newest_rows
from tests.test_measure import ROOFS

ROOT = Path(__file__).parents[1]
ONE = ("-k", "rms_norm-fwd-quick and float32", "-q")


def run(*arguments, cache=None):
    # One thread, so that other processes that take a core away do not stall a pool of two.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if cache is not None:
        environment["XDG_CACHE_HOME"] = str(cache)
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture
def known_roofs(tmp_path, monkeypatch):
    """A cache that holds roofs, so that no test waits for measuring them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # as in `run`
    ceilings._store(ceilings.cache_path(), ROOFS, seconds=10.0)
    return tmp_path


@pytest.mark.parametrize("arguments", [("bench/", "--benchmark"), ("--benchmark", "bench/")])
def test_benchmark_flag_in_either_order(arguments, tmp_path, known_roofs):
    written = f"--results={tmp_path}", f"--benchmark-json={tmp_path}/b.json"
    done = run(*arguments, *ONE, *written, cache=known_roofs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "% of roof" in done.stdout
    assert "GB/s read + written" in done.stdout
    results = tmp_path / "made-up.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    benchmarks = json.loads((tmp_path / "b.json").read_text())["benchmarks"]
    assert {row["backend"] for row in rows} >= {"torch", "reference"}
    for row, benchmark in zip(rows, benchmarks, strict=True):
        assert tuple(row) == ROW_KEYS
        assert benchmark["extra_info"] == row
        assert benchmark["stats"]["median"] == pytest.approx(row["median_s"])


def test_a_regression_fails_the_run(tmp_path, known_roofs):
    storage = f"--benchmark-storage={tmp_path}/saved"
    run("bench/", "--benchmark", *ONE, storage, "--benchmark-save=a", cache=known_roofs)
    [saved] = (tmp_path / "saved").rglob("*.json")
    content = json.loads(saved.read_text())
    for benchmark in content["benchmarks"]:  # as if everything had been 1000 times faster
        benchmark["stats"]["median"] *= 1e-3
    saved.write_text(json.dumps(content))
    compare = "--benchmark-compare=0001", "--benchmark-compare-fail=median:5%"
    done = run("bench/", "--benchmark", *ONE, storage, *compare, cache=known_roofs)
    assert done.returncode != 0
    assert "Performance has regressed" in done.stdout + done.stderr


def test_without_the_flag_each_body_runs_once():
    done = run("bench/", *ONE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    assert "% of roof" not in done.stdout


def test_no_peers_leaves_ours():
    done = run("bench/", *ONE, "--no-peers", "--collect-only")
    assert "-torch]" not in done.stdout
    assert "-reference]" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--shapes=huge",), "invalid choice: 'huge'"), (("--dtypes=int8",), "got 'int8'")],
)
def test_wrong_options_are_named(arguments, words):
    done = run("bench/", *arguments)
    assert done.returncode == 4
    assert words in done.stdout + done.stderr


def _row(dtype="float32", seconds=1e-6, **changes):
    arguments = {
        "op": "rms_norm", "direction": "fwd", "backend": "cpu", "peer": None, "shape": "s",
        "dtype": dtype, "device": "cpu", "cost": Cost(flops=100_000, bytes=1000), "roofs": ROOFS,
        "timing": Timing((seconds,) * 3),
    }  # fmt: skip
    return bench_row(**{**arguments, **changes})


def ceg(*arguments):
    parser = argparse.ArgumentParser()
    add_subcommands(parser.add_subparsers())
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)


def test_roofline_draws_the_newest_rows(tmp_path, capsys):
    results = tmp_path / "machine.jsonl"
    rows = [_row(seconds=1e-3), _row(), _row("float64", cost=Cost(0, 1000))]
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [(machine, newest)] = newest_rows(results).items()
    assert [row["median_s"] for row in newest] == [1e-6, 1e-6]
    assert ceg("roofline", str(results)) == 0
    assert f"{machine}: 2 rows" in capsys.readouterr().out
    assert "<svg" in results.with_suffix(".svg").read_text()


def test_the_figure_recovers_the_roofs():
    assert peak([_row()], "float32") == pytest.approx(400.0)
    assert peak([_row()], "bfloat16") is None
    with pytest.raises(ValueError, match="rows must hold a timed op that computes"):
        roofline_figure([_row(cost=Cost(0, 10))])


def test_roofline_refuses_what_is_no_row(tmp_path):
    results = tmp_path / "machine.jsonl"
    results.write_text(json.dumps(_row()) + "\n{}\n")
    with pytest.raises(ValueError, match=r"machine.jsonl:2 must be a benchmark row, got KeyError"):
        newest_rows(results)
    results.write_text("")
    with pytest.raises(ValueError, match="must hold benchmark rows, got none"):
        newest_rows(results)


def test_bench_hands_the_rest_to_pytest(monkeypatch):
    seen = []
    done = subprocess.CompletedProcess((), 3)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: seen.append(command) or done)
    assert ceg("bench", "--shapes", "gpt2", "--json", "x.json", "-k", "rope") == 3
    assert seen[0][2:] == [
        "pytest", str(ROOT / "bench"), "--benchmark", "--shapes", "gpt2", "-k", "rope",
        f"--benchmark-json={Path('x.json').resolve()}",
    ]  # fmt: skip

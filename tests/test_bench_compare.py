"""`ceg bench compare`: what two runs tell apart, and what they do not."""

import json
import math
import random

import numpy as np
import pytest

from ceg_kernels.measure import compare
from ceg_model import cli

PEERS = ("torch", "reference", "eager")


def bench(name, seconds, *, peer=None, spread=0.01, rounds=15, seed=0, machine="M", torch="2.13"):
    """One benchmark as pytest-benchmark writes it."""
    random.seed(f"{name} {peer} {seed}")
    samples = [seconds * math.exp(random.gauss(0, spread)) for _ in range(rounds)]
    row = {
        "op": name, "direction": "fwd", "shape": "s", "dtype": "float32", "device": "cpu",
        "backend": peer or "cpu", "peer": peer, "median_s": float(np.median(samples)),
        "p20_s": float(np.quantile(samples, 0.2)), "p80_s": float(np.quantile(samples, 0.8)),
        "rounds": rounds, "versions": {"machine": machine, "torch": torch},
    }  # fmt: skip
    return {"extra_info": row, "stats": {"data": samples}}


def run(change=1.0, drift=1.0, tau=0.02, seed=0, ops=20, **options):
    """Ours and three peers of some ops; `change` divides the first of ours, drift everything."""
    found = []
    generator = random.Random(seed)
    for op in range(ops):
        for peer in (None, *PEERS):
            mood = drift * math.exp(generator.gauss(0, tau))
            faster = change if op == 0 and peer is None else 1.0
            found.append(bench(f"op{op}", 1e-3 / (mood * faster), peer=peer, seed=seed, **options))
    return found


def written(tmp_path, name, benches, as_rows=False):
    path = tmp_path / name
    if as_rows:
        path.write_text("\n".join(json.dumps(b["extra_info"]) for b in benches))
    else:
        several = [{"extra_info": e, "stats": {}} for e in ({}, {"both_over_alone": 1.01})]
        path.write_text(json.dumps({"benchmarks": [*benches, *several]}))
    return path


def compared(tmp_path, before, after, **options):
    paths = [written(tmp_path, n, b, **options) for n, b in (("a.json", before), ("b.json", after))]
    return compare.compare(*map(compare.read, paths))


@pytest.mark.parametrize("as_rows", [False, True], ids=["samples", "rows"])
def test_a_change_is_seen_through_the_machines_drift(tmp_path, as_rows):
    found = compared(tmp_path, run(seed=1), run(change=1.3, drift=0.8, seed=2), as_rows=as_rows)
    assert found.controls == 60
    assert found.drift == pytest.approx(0.8, rel=0.02)
    first = found.changes[0]
    assert first.verdict == "faster"
    assert first.low < 1.3 < first.high
    assert first.before_s / first.after_s == pytest.approx(1.3 * 0.8, rel=0.1)
    slower = compared(tmp_path, run(seed=1), run(change=0.8, seed=2), as_rows=as_rows)
    assert slower.changes[0].verdict == "slower"


def test_noise_is_called_a_change_in_5_percent_of_rows(tmp_path):
    wrong = total = 0
    for seed in range(20):
        found = compared(tmp_path, run(seed=2 * seed), run(seed=2 * seed + 1, drift=1.25))
        wrong += sum(c.verdict != "no difference seen" for c in found.changes)
        total += len(found.changes)
    assert total == 400
    assert wrong <= 0.08 * total  # 5 % of 400, and two standard errors


def test_the_spread_between_runs_is_found(tmp_path):
    found = compared(tmp_path, run(tau=0.05, seed=3, ops=60), run(tau=0.05, seed=4, ops=60))
    assert found.tau == pytest.approx(0.05 * math.sqrt(2), rel=0.25)


@pytest.mark.parametrize(
    ("after", "why"),
    [
        ([bench("op0", 1e-3)], "needs 3 rows of peers in both runs, got 0"),
        (run(torch="2.14"), "got those of two versions of torch"),
    ],
)
def test_without_controls_there_is_no_verdict(tmp_path, capsys, after, why):
    paths = written(tmp_path, "a.json", run()), written(tmp_path, "b.json", after)
    assert cli.main(["bench", "compare", *map(str, paths)]) == 0
    out = capsys.readouterr().out
    assert why in out
    assert "unknown" in out
    assert "faster" not in out


def test_it_prints_and_fails_on_request(tmp_path, capsys):
    paths = [
        str(written(tmp_path, name, benches))
        for name, benches in (
            ("a.json", run(seed=1)),
            ("b.json", [*run(change=0.5, seed=2), bench("new", 1.0)]),
        )
    ]
    assert cli.main(["bench", "compare", *paths]) == 0
    out = capsys.readouterr().out
    assert out.startswith("op0-fwd-s-float32-cpu-cpu")
    assert "slower" in out.splitlines()[0]
    assert "1 rows are in the second run only: new-fwd-s-float32-cpu-cpu" in out
    assert cli.main(["bench", "compare", "--fail", *paths]) == 1
    assert cli.main(["bench", "compare", "--fail", *reversed(paths)]) == 0
    capsys.readouterr()
    assert cli.main(["bench", "compare", "--json", *paths]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["changes"][0]["verdict"] == "slower"
    assert found["controls"] == 60


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("nonsense", "must be of --benchmark-json or --results, got JSONDecodeError"),
        ('{"benchmarks": []}', "must hold timed benchmark rows, got none"),
        ('{"op": "rope"}', "must be of --benchmark-json or --results, got KeyError"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, capsys, content, match):
    path = tmp_path / "a.json"
    path.write_text(content)
    assert cli.main(["bench", "compare", str(path), str(path)]) == 2
    assert match in capsys.readouterr().err


def test_runs_of_two_machines_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be of one machine, got M and N"):
        compared(tmp_path, run(), run(machine="N"))
    with pytest.raises(ValueError, match="must share a row of ours, got none"):
        compared(tmp_path, [bench("a", 1.0)], [bench("b", 1.0)])

"""The row of a training step: tokens, utilisation, and what the kernels' own times predict."""

import importlib.util
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ceg_kernels import OPS, use_backend
from ceg_kernels.measure import steps
from ceg_kernels.measure.steps import Step, step_extras
from ceg_model.gpt import build_model

BENCH = Path(__file__).resolve().parent.parent / "bench" / "bench_train_step.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_train_step", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(backend, seconds, roof_fraction=0.4):
    return {
        "op": "gpt_step", "direction": "fwd_bwd", "shape": "d384", "dtype": "float32",
        "device": "cpu", "backend": backend, "median_s": seconds, "flops": 1000,
        "roof_fraction": roof_fraction,
    }  # fmt: skip


def test_utilisation_and_prediction():
    one = row("cpu", 2.0)
    step_extras(one, Step(tokens=100, extra_flops=500, predicted_s=1.6))
    assert one["tokens_per_s"] == 50
    assert one["mfu"] == 0.4
    assert one["hfu"] == pytest.approx(0.6)
    assert one["unexplained"] == pytest.approx(0.25)


@pytest.mark.parametrize(("extra", "roof"), [(None, 0.4), (500, None)])
def test_what_nobody_knows_stays_unknown(extra, roof):
    one = row("cpu", 2.0, roof)
    step_extras(one, Step(100, extra, None))
    assert one["hfu"] is None
    assert one["mfu"] == roof
    assert one["unexplained"] is None


def test_the_table_stands_beside_the_step_with_all_kernels_off():
    rows = [row("torch", 3.0), row("cpu", 2.0)]
    step_extras(rows[0], Step(100, None, 3.0))
    step_extras(rows[1], Step(100, None, 1.9))
    out = io.StringIO()
    Console(file=out, width=200).print(steps.render([{**row("cpu", 1.0), "op": "rope"}, *rows]))
    lines = out.getvalue().splitlines()
    assert len(lines) == 3  # no row of an op
    assert "1.50x" in lines[2]
    assert "+5.3%" in lines[2]
    assert "unknown" in lines[2]  # HFU
    assert steps.render([row("cpu", 1.0)]) is None


def test_every_call_of_a_step_is_counted_with_its_tensors(bench):
    model = build_model(bench.STEP, seed=0)
    tokens = torch.randint(bench.STEP.vocab_size, (1, 9))
    with use_backend("torch"), bench.OpArguments() as calls:
        _, loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
    layers = bench.STEP.n_layer
    total = {}
    for key, count in calls.counts.items():
        total[key[0]] = total.get(key[0], 0) + count
    assert total == {
        "attention": layers, "attention_backward": layers, "rope": 2 * layers,
        "rms_norm": 2 * layers + 1, "rms_norm_backward": 2 * layers + 1,
    }  # fmt: skip
    for key, args in calls.arguments.items():
        assert OPS[key[0]].backend("torch").run(*args) is not None
        assert not any(a.requires_grad for a in args if isinstance(a, torch.Tensor))


def test_savings_are_calls_times_the_difference(bench, monkeypatch):
    calls = bench.OpArguments()
    x = torch.zeros(2, 8)
    for _ in range(3):
        calls._record("rms_norm", (x, None, None, 1e-6, 0.0))
    calls._record("rope", (torch.zeros(1, 2, 1, 4),) * 2 + (torch.zeros(2, 2),) * 2 + (None, False, False))  # fmt: skip  # noqa: E501
    asked = []

    def timed(named, **options):
        asked.extend(named)
        seconds = {"torch": 5.0, "cpu": 2.0}
        return {n: type("T", (), {"median_s": seconds[n.split()[1]]}) for n in named}

    monkeypatch.setattr(steps, "time_interleaved", timed)
    assert bench.savings(calls, "cpu", "cpu") == {"attention": 0.0, "rope": 3.0, "rms_norm": 9.0}
    assert sorted(asked) == ["0 cpu", "0 torch", "1 cpu", "1 torch"]


def test_a_family_alone_leaves_the_others_to_torch(bench):
    assert bench.backends_of(("rope",), "cpu") == {
        "attention": "torch", "rope": "cpu", "rms_norm": "torch",
    }  # fmt: skip

"""G_hw and its parts, on machines whose speed, noise and kernels are known beforehand.

Left out: a GPU's energy counter (NVML is a fake here) and device seconds of op calls.
"""

import dataclasses
import itertools
import json
import math
import sys
import types

import numpy as np
import pytest
import torch

from ceg_model import data, energy
from ceg_model.mfu import AbovePeakError, mfu
from ceg_model.op_calls import OpArguments
from ceg_model.study import kernel_parts as kernel_parts_module
from ceg_model.study import rounds as rounds_module
from ceg_model.study.hardware import Side, amdahl, rates, split, utilisation
from ceg_model.study.kernel_parts import kernel_parts
from ceg_model.study.plan import Plan, RunSpec, Scale, backends_of, model_config, train_config
from ceg_model.study.rounds import WARM_UP, gain, rounds
from ceg_model.study.runner import our_kernels
from ceg_model.study.throughput import KINDS, _joules, measure

MODEL = {"n_layer": 2, "d_model": 32, "n_head": 2, "seq_len": 32}
PLAN = Plan(
    "test",
    ("baseline", "rope", "flash_attention"),
    (Scale("S", MODEL, {"steps": 5, "batch_size": 4, "grad_accum": 2, "eval_every": 5}),),
    (0,),
    train={"dtype": "float32", "device": "cpu"},
    timing_rounds=12,
    timing_seconds=0.1,
    threads=1,
)
OURS = {"attention": "cpu"}


class Machine:
    """A clock that only steps advance, at a speed that drifts and jumps; `perf_counter` reads it.

    Whichever comes after a step of "dirty" takes a fifth longer.
    """

    def __init__(self, costs, seed=0, noise=0.0):
        self.now, self.costs, self.noise = 0.0, costs, noise
        self.random = np.random.default_rng(seed)
        self.done, self.before = [], None

    def perf_counter(self):
        return self.now

    def step(self, name, number):
        self.done.append((name, number))
        speed = 1 + 0.3 * math.sin(self.now / 7) + (0.5 if int(self.now) % 5 == 0 else 0.0)
        slower = 1.2 if self.before == "dirty" else 1.0
        slower *= 10 if number == 0 and len(self.done) <= WARM_UP * len(self.costs) else 1
        noise = math.exp(self.noise * self.random.standard_normal())
        self.now += self.costs[name] * speed * slower * noise
        self.before = name

    def time(self, monkeypatch, **options):
        monkeypatch.setattr(rounds_module, "time", self)
        steps = {name: lambda n, name=name: self.step(name, n) for name in self.costs}
        return rounds(steps, **options)


def test_a_known_gain_on_a_drifting_machine(monkeypatch):
    machine = Machine({"base": 0.05, "new": 0.04, "other": 0.01}, noise=0.03)
    samples = machine.time(monkeypatch, least=5, seconds=30.0)
    assert np.ptp(samples["base"]) > 0.5 * np.median(samples["base"])  # the drift is there
    found = gain(samples["base"], samples["new"], work=2.0)
    assert found["gain"] == pytest.approx(2.5, rel=0.01)
    assert found["ci"][0] < 2.5 < found["ci"][1]
    assert found["ci"][1] / found["ci"][0] < 1.04


def test_no_step_always_follows_the_same_other(monkeypatch):
    machine = Machine({"dirty": 0.01, "a": 0.05, "b": 0.05, "c": 0.05, "d": 0.05})
    samples = machine.time(monkeypatch, least=300, seconds=0.0)
    assert gain(samples["a"], samples["b"])["gain"] == pytest.approx(1.0, abs=0.02)
    followers = {b for (a, _), (b, _) in itertools.pairwise(machine.done) if a == "dirty"}
    assert {"a", "b"} <= followers


def test_warm_up_is_left_out_and_rounds_are_counted(monkeypatch):
    machine = Machine({"a": 0.05, "b": 0.05})
    samples = machine.time(monkeypatch, least=4, seconds=0.0)
    assert [len(times) for times in samples.values()] == [4, 4]
    assert max(samples["a"]) < 0.2  # a step of the warm-up takes ten times that
    assert sorted(number for name, number in machine.done if name == "a") == [0] * (WARM_UP + 1) + [
        1, 2, 3,
    ]  # fmt: skip


def test_the_interval_covers_what_it_says():
    """Common drift, noise of either step, and a hiccup in one step of twenty."""
    random = np.random.default_rng(1)
    covered, draws, n = 0, 400, 60
    for _ in range(draws):
        speed = np.exp(np.cumsum(0.05 * random.standard_normal(n)))
        base, new = (
            cost * speed * np.exp(0.05 * random.standard_normal(n))
            * np.where(random.random(n) < 0.05, 3.0, 1.0)
            for cost in (0.05, 0.04)
        )  # fmt: skip
        low, high = gain(base, new)["ci"]
        covered += low < 1.25 < high
    assert 0.92 <= covered / draws <= 0.98


def test_equal_variants_gain_exactly_one_and_one_round_has_no_interval():
    times = np.array([0.1, 0.2, 0.3])
    assert gain(times, times) == {"gain": 1.0, "ci": [1.0, 1.0]}
    assert gain(times[:1], times[:1] / 2) == {"gain": 2.0, "ci": None}


def test_the_split_is_exact():
    base, own = Side("float32", 1.4e11), Side("bfloat16", 2.1e12, devices=2)
    parts, flags = utilisation(1.7, 6e10, base, own)
    logs = [math.log(parts[key]) for key in ("mfu_ratio", "peak_ratio", "device_ratio")]
    assert sum(logs) == pytest.approx(math.log(1.7), abs=1e-14)
    assert parts["peak_ratio"] == pytest.approx(15)
    assert parts["device_ratio"] == 2
    assert parts["mfu"] / parts["mfu_baseline"] == pytest.approx(parts["mfu_ratio"], abs=1e-14)
    assert parts["mfu_baseline"] == pytest.approx(6 / 14)
    assert flags == []


def test_an_unknown_peak_is_none_but_equal_ones_divide_out():
    same, flags = utilisation(1.7, 6e10, Side("float32", None), Side("float32", None))
    assert (same["mfu"], same["mfu_baseline"], flags) == (None, None, ["peak_unknown"])
    assert (same["peak_ratio"], same["mfu_ratio"]) == (1.0, 1.7)
    other, flags = utilisation(1.7, 6e10, Side("float32", 1e11), Side("bfloat16", None))
    assert other["mfu_baseline"] == pytest.approx(0.6)
    assert [other[k] for k in ("mfu", "peak_ratio", "mfu_ratio")] == [None] * 3
    assert flags == ["peak_unknown"]


def test_mfu_above_one_is_refused():
    with pytest.raises(AbovePeakError, match=r"MFU must be at most 1, got 1\.200"):
        mfu(1.2e11, 1, peak=1e11, dtype="float32")
    parts, flags = utilisation(2.0, 6e10, Side("float32", 1e11), Side("float32", 1e11))
    assert (parts["mfu"], flags) == (None, ["mfu_above_1"])
    assert parts["mfu_baseline"] == pytest.approx(0.6)
    # Of two peaks one of which is refuted there is no ratio.
    parts, _ = utilisation(2.0, 6e10, Side("float32", 1e11), Side("bfloat16", 1.1e11))
    assert (parts["peak_ratio"], parts["mfu_ratio"]) == (None, None)


def test_amdahl_is_exact_on_a_step_that_is_its_parts():
    parts = [
        {"op": "attention", "calls": 4, "baseline_s": 0.3, "own_s": 0.1},
        {"op": "attention_backward", "calls": 4, "baseline_s": 0.5, "own_s": 0.2},
        {"op": "rope", "calls": 8, "baseline_s": 0.05, "own_s": 0.06},
    ]
    step = {"own": "study", "baseline_s": 5.0, "measured_s": 5.0 - 0.8 - 1.2 + 0.08, "parts": parts}
    found = amdahl(step)
    assert found["predicted_s"] == pytest.approx(3.08)
    assert found["unexplained"] == pytest.approx(0.0, abs=1e-12)
    assert amdahl(step | {"baseline_s": 1.0})["unexplained"] is None  # saves more than all
    assert amdahl(None) is None


def row(seconds, *, reference=1.0, kernels=None, **more):
    against = {"gain": reference, "ci": [reference * 0.98, reference * 1.02]}
    return {
        "study": {"median_s": seconds}, "dtype": "float32", "model_flops": 1000,
        "executed_flops": 1250, "against_reference": against, "against_torch": {"gain": 1.5},
        "kernels": kernels, "joules_per_step": 3.0,
    } | more  # fmt: skip


@pytest.mark.parametrize(("measured", "flags"), [(1.04, []), (1.06, ["unexplained"])])
def test_what_a_benchmark_comes_to(measured, flags):
    part = {"op": "attention", "calls": 2, "baseline_s": 0.5, "own_s": 0.0}
    kernels = {"own": "study", "baseline_s": 2.0, "measured_s": measured, "parts": [part]}
    arms = {"baseline": row(2.0), "flash_attention": row(1.0, reference=2.0, kernels=kernels)}
    timing = {"arms": arms, "threads": 1, "device": "cpu", "peaks": {"float32": 4000.0}}
    # Roofs of other threads are another machine's.
    roofs = {"device": "cpu", "threads": 2, "flops": {"float32": 9e9}}
    found = split(PLAN, {"S": timing}, {}, roofs)["S"]
    assert list(found) == ["baseline", "flash_attention"]
    own = found["flash_attention"]
    assert (own["mfu_baseline"], own["mfu"], own["mfu_ratio"]) == (0.125, 0.25, 2.0)
    assert own["against_reference_ci"] == [1.96, 2.04]
    assert (own["ci"], own["against_torch_ci"]) == (None, None)
    assert (own["hfu_over_mfu"], own["joules_per_step"]) == (1.25, 3.0)
    assert own["amdahl"]["predicted_s"] == 1.0
    assert own["flags"] == flags
    assert found["baseline"]["amdahl"] is None
    higher = split(PLAN, {"S": timing}, {}, roofs | {"threads": 1})["S"]["baseline"]
    assert higher["mfu"] == pytest.approx(500 / 9e9)


def test_a_timing_without_the_newer_keys_is_read():
    old = row(2.0)
    for key in ("dtype", "executed_flops", "kernels", "joules_per_step"):
        del old[key]
    found = split(PLAN, {"S": {"arms": {"baseline": old}, "threads": 1}}, {}, None)["S"]["baseline"]
    assert found["flags"] == ["peak_unknown"]
    assert [found[k] for k in ("mfu", "amdahl", "hfu_over_mfu", "joules_per_step")] == [None] * 4
    assert found["mfu_ratio"] == 1.0


def specs_of(arms, backend_of):
    for arm in arms:
        train = train_config(PLAN, arm, PLAN.scales[0], 0, backend_of(arm))
        yield arm, RunSpec(arm, "S", 0, model_config(arm, PLAN.scales[0], 256), train)


def test_a_rate_comes_from_runs_on_the_arms_own_kernels_only():
    clocks = {
        "baseline": np.array([1.0, 2.0, 3.0, 4.0, 5.0]),
        "flash_attention": np.array([0.5, 1.0, 1.5, 2.1, 2.5]),
    }
    own = list(specs_of(clocks, lambda arm: backends_of(arm, OURS)))
    work = dict.fromkeys(clocks, 1e6)
    found = rates(PLAN, own, clocks, work, OURS)
    rate = found["S", "flash_attention"]
    assert rate.gain.mean == pytest.approx(math.log(2), abs=0.02)
    assert rate.base_flops_per_s == pytest.approx(1e6 * PLAN.scales[0].train["steps"] / 5)
    twice = rates(PLAN, own, clocks, work | {"flash_attention": 2e6}, OURS)
    assert twice["S", "flash_attention"].gain.mean == pytest.approx(math.log(2) + rate.gain.mean)
    answer = split(PLAN, {}, found, None)["S"]["flash_attention"]
    assert answer["source"] == "runs in lockstep"
    assert answer["ci"] == answer["against_reference_ci"] == list(rate.gain.ratio)
    peak = {"device": "cpu", "threads": 1, "flops": {"float32": 10 * rate.base_flops_per_s}}
    assert split(PLAN, {}, found, peak)["S"]["baseline"]["mfu"] == pytest.approx(0.1)
    others = {"attention": "torch"}
    fast = list(specs_of(clocks, lambda arm: others if arm == "flash_attention" else
                         backends_of(arm, OURS)))  # fmt: skip
    assert ("S", "flash_attention") not in rates(PLAN, fast, clocks, work, OURS)


def test_parts_are_calls_at_the_rounds_speed(monkeypatch):
    """Ten calls in five micro-batches; while the calls were timed all took twice as long."""
    x = torch.zeros(2, 8)
    calls = OpArguments()
    for width in (x, x, torch.zeros(2, 4)):
        calls._record("rms_norm", (width, None, None, 1e-6, 0.0))
    trainer = types.SimpleNamespace(
        config=types.SimpleNamespace(grad_accum=5, steps=3), device=torch.device("cpu")
    )
    plan = dataclasses.replace(PLAN, arms=("baseline", "flash_attention", "rope"))
    keys = {(arm, kind): "plain" for arm in plan.arms for kind in KINDS}
    keys["flash_attention", "study"] = keys["rope", "ours"] = "own"
    made = {
        "plain": kernel_parts_module.Variant(trainer, None, calls),
        "own": kernel_parts_module.Variant(trainer, {"rms_norm": "torch"}, calls),
    }
    asked = []

    def times(arguments, names, *, beside, **options):
        asked.append(sorted((call[0], tuple(sorted(names[call]))) for call in arguments))
        width = {call: args[0].shape[-1] for call, args in arguments.items()}
        seconds = {(c, b): width[c] * (2.0 if b == "reference" else 1.0)
                   for c in arguments for b in names[c]}  # fmt: skip
        return seconds, dict.fromkeys(beside, 200.0)

    monkeypatch.setattr(kernel_parts_module, "call_times", times)
    samples = {"plain": np.full(8, 100.0), "own": np.full(8, 70.0)}
    found = kernel_parts(plan, keys, made, samples)
    assert asked == [[("rms_norm", ("reference", "torch"))] * 2]  # each call once for both arms
    assert found["baseline"] is None
    part = {"op": "rms_norm", "calls": 15, "baseline_s": 20 / 3, "own_s": 10 / 3}
    assert found["flash_attention"]["parts"] == [pytest.approx(part)]
    assert [found[arm]["own"] for arm in ("flash_attention", "rope")] == ["study", "ours"]
    answer = amdahl(found["flash_attention"])
    assert answer["predicted_s"] == pytest.approx(100 - 50)
    assert answer["unexplained"] == pytest.approx(70 / 50 - 1)


class FakeNvml(types.ModuleType):
    """A counter that gains 250 mJ a reading, on one GPU."""

    class NVMLError(Exception):
        pass

    def __init__(self, counts=True):
        super().__init__("pynvml")
        self.counts, self.millijoules = counts, 7_000_000

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != "GPU-5a17":
            raise self.NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if not self.counts:
            raise self.NVMLError("Not Supported")
        return self.millijoules


def test_joules_come_from_the_counter_of_the_gpu_in_use(monkeypatch):
    nvml, gpu = FakeNvml(), torch.device("cuda", 0)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    properties = types.SimpleNamespace(uuid="5a17")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def step():
        nvml.millijoules += 250

    assert energy.joules_per_call(step, energy.meter(gpu), seconds=0.01) == pytest.approx(0.25)
    assert energy.joules_per_call(step, energy.meter(gpu), seconds=0.0) == pytest.approx(0.25)
    assert energy.meter(torch.device("cpu")) is None
    properties.uuid = "another"
    assert energy.meter(gpu) is None
    properties.uuid = "5a17"
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(counts=False))
    assert energy.meter(gpu) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert energy.meter(gpu) is None


def test_each_step_is_metered_alone_and_long_enough(monkeypatch):
    metered, gpu = {}, torch.device("cuda", 0)

    def joules(call, meter, *, seconds):
        call()
        return seconds

    monkeypatch.setattr(energy, "meter", lambda device: "meter")
    monkeypatch.setattr(energy, "joules_per_call", joules)
    steps = {name: lambda n, name=name: metered.setdefault(name, n) for name in "ab"}
    assert _joules(steps, gpu, 10.0) == {"a": 2.0, "b": 2.0}
    assert _joules(steps, gpu, 0.1) == {"a": 1.0, "b": 1.0}
    assert metered == {"a": 0, "b": 0}
    monkeypatch.setattr(energy, "meter", lambda device: None)
    assert _joules(steps, gpu, 10.0) == {}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    for i in range(8):
        (folder / "text" / f"{i}.txt").write_text(f"some words, {i} of them; " * 200)
    request = data.Request(sources=(str(folder / "text"),), val_fraction=0.2)
    data.prepare(request, folder / "tokens")
    return folder / "tokens"


def test_a_real_segment(tokens):
    ours = our_kernels("cpu")
    timing = json.loads(json.dumps(measure(PLAN, PLAN.scales[0], ours, tokens)))
    arms = timing["arms"]
    assert timing["rounds"] >= 12
    # The arms that differ in the kernel alone are one model, and the baseline's own backends are
    # the reference: the same step, not two that should agree.
    assert arms["baseline"]["study"] == arms["baseline"]["reference"]
    assert arms["baseline"]["ours"] == arms["flash_attention"]["study"]
    assert arms["baseline"]["torch"] == arms["flash_attention"]["torch"]
    assert arms["rope"]["torch"] != arms["baseline"]["torch"]
    parts = {part["op"]: part for part in arms["flash_attention"]["kernels"]["parts"]}
    assert {op: part["calls"] for op, part in parts.items()} == {
        "attention": 4, "attention_backward": 4,  # 2 layers, 2 micro-batches
    }  # fmt: skip
    assert {part["op"] for part in arms["rope"]["kernels"]["parts"]} >= {"rope", "attention"}
    assert all(0 < part["baseline_s"] < 1 for part in parts.values())
    hardware = split(PLAN, {"S": timing}, {}, None)["S"]
    assert hardware["baseline"]["against_reference_ci"] == [1.0, 1.0]
    assert hardware["baseline"]["hfu_over_mfu"] > 1  # the reference computes masked pairs
    for arm in ("rope", "flash_attention"):
        own = hardware[arm]
        assert own["ci"] is None
        assert own["against_reference_ci"][0] < own["against_reference"]
        assert own["against_torch_ci"][0] < own["against_torch"] < own["against_torch_ci"][1]
        assert 0 < own["mfu"] < 1
        assert own["joules_per_step"] is None
        assert own["amdahl"]["predicted_s"] < own["amdahl"]["baseline_s"] * 2

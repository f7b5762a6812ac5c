"""The clock, the roofs and the rows: numbers whose truth is known beforehand.

Left out: the CUDA clock (needs a GPU). Bounds are on ratios within one run where they can be, since
other work on the machine slows both sides alike.
"""

from __future__ import annotations

import dataclasses
import json
import time
from types import SimpleNamespace

import pytest
import torch

import ceg_kernels
from ceg_kernels.measure import ceilings, clock, host
from ceg_kernels.measure.ceilings import Roofs, measure
from ceg_kernels.measure.clock import Timing, call_seconds, quantile, time_interleaved
from ceg_kernels.measure.roofline import ROW_KEYS, attainable, bench_row, least_seconds
from ceg_kernels.measure.suite import cases
from ceg_kernels.measure.table import roofs_lines
from ceg_kernels.op import Cost

ROOFS = Roofs(
    device_name="made up", device="cpu", threads=2,
    flops={"float32": 400e9, "bfloat16": None}, flops_source={"float32": "fma", "bfloat16": None},
    copy_bytes_per_s=40e9, copy_source="native", fma_flops={}, matmul_flops={},
    cache_bytes=1 << 20, cpu_share=None, versions={"torch": "0"},
)  # fmt: skip


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def made_up(monkeypatch):
    """Measuring takes no time and never gives the same twice; the list says how often it was."""
    calls = []

    def measured(seconds):
        calls.append(seconds)
        return dataclasses.replace(ROOFS, copy_bytes_per_s=float(len(calls)))

    monkeypatch.setattr(ceilings, "_measure_cpu", measured)
    return calls


@pytest.fixture
def one_thread():
    """So that a thread of another process that takes a core away does not stop both of ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pass_time(monkeypatch):
    """A clock that only sleeps advance: what the timer does then depends on nothing else here."""
    fake = SimpleNamespace(now=0.0)
    fake.perf_counter = lambda: fake.now
    monkeypatch.setattr(clock, "time", fake)

    def sleep(seconds):
        fake.now += seconds

    return sleep


def assert_close_to_one(ratio, rel=0.1, tries=10):
    """Other work on the machine spoils a try now and then; a wrong clock spoils all of them."""
    seen = []
    for _ in range(tries):
        seen.append(ratio())
        if seen[-1] == pytest.approx(1, rel=rel):
            return
    pytest.fail(f"expected a ratio within {rel:.0%} of 1, got {seen}")


def test_quantile_is_numpys():
    import numpy as np

    values = torch.randn(17, generator=torch.Generator().manual_seed(0)).tolist()
    for q in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert quantile(values, q) == pytest.approx(np.quantile(values, q), rel=1e-12)


@pytest.mark.parametrize("seconds", [0.003, 0.02])
def test_a_sleep_is_timed_within_5_percent(seconds):
    """Against what the kernel says that the sleep took: it may oversleep, the clock may not."""
    slept = []

    def sleep():
        begun = time.monotonic_ns()
        time.sleep(seconds)
        slept.append((time.monotonic_ns() - begun) * 1e-9)

    timing = time_interleaved({"sleep": sleep})["sleep"]
    inner = (len(slept) - 2) // timing.rounds  # after the warm-up and the call that calibrates
    ends = range(len(slept) - inner * timing.rounds, len(slept), inner)
    means = [sum(slept[i : i + inner]) / inner for i in ends]
    assert timing.median_s == pytest.approx(quantile(means, 0.5), rel=0.05)
    assert min(timing.samples) >= seconds
    assert timing.p20_s <= timing.median_s <= timing.p80_s


def test_short_calls_are_looped_and_ratios_hold(one_thread):
    x = torch.ones(1000)

    def once():
        x.add_(1)

    def four_times():
        for _ in range(4):
            x.add_(1)

    def ratio():
        timings = time_interleaved({"one": once, "four": four_times}, min_time_s=0.1)
        assert timings["one"].rounds == timings["four"].rounds >= 5
        return timings["four"].median_s / timings["one"].median_s / 4

    assert_close_to_one(ratio)


def test_hot_is_the_first_variant_alone(pass_time):
    slow, fast = (lambda: pass_time(4e-3)), (lambda: pass_time(1e-3))
    timing = time_interleaved({"work": [fast, slow, slow]}, min_time_s=0.04)["work"]
    assert timing.hot_s == pytest.approx(1e-3)
    assert timing.median_s > 2e-3
    assert time_interleaved({"work": slow}, min_time_s=0.01)["work"].hot_s is None


def test_variants_take_turns():
    seen = []
    calls = [lambda: seen.append("a"), lambda: seen.append("b")]
    time_interleaved({"both": calls}, min_time_s=0.01)
    cold = seen[: len(seen) - seen[::-1].index("b")]  # what follows is the first variant, hot
    assert abs(cold.count("a") - cold.count("b")) <= 0.02 * len(cold)


def test_peers_are_interleaved(pass_time):
    order = []
    calls = {name: lambda name=name: (order.append(name), pass_time(2e-3)) for name in "abc"}
    time_interleaved(calls, min_time_s=0.01, min_rounds=6)
    rounds = ["".join(order[-18:][i : i + 3]) for i in range(0, 18, 3)]
    assert sorted(set(rounds)) == ["abc", "bca", "cab"]


def test_slow_calls_get_fewer_rounds(pass_time):
    timing = time_interleaved({"slow": lambda: pass_time(0.05)}, max_time_s=0.1)["slow"]
    assert timing.rounds == 3


def test_calls_that_slow_down_get_fewer_rounds(pass_time, monkeypatch):
    """As on a machine where others start to compute after the calibration."""
    pause = [1e-5]

    def rounds(*args):
        pause[0] = 5e-3
        return 30

    monkeypatch.setattr(clock, "_rounds", rounds)
    timing = time_interleaved({"slowing": lambda: pass_time(pause[0])}, min_time_s=0.05)
    assert timing["slowing"].rounds == 3


def test_call_seconds_is_the_callers_wait(pass_time):
    waits = iter([9.0, 0.005, 0.008, 0.004, 0.0035])  # the first is a warm-up
    assert call_seconds(lambda: pass_time(next(waits))) == pytest.approx(0.0045)


@pytest.mark.parametrize(
    ("calls", "options", "match"),
    [
        ({"f": []}, {}, r"calls\['f'\] must hold at least one callable, got none"),
        ({"f": print}, {"device": "tpu"}, "device must be cpu or cuda, got tpu"),
        ({"f": print}, {"min_rounds": 1}, "min_rounds must be at least 3 for p20 and p80, got 1"),
    ],
)
def test_clock_refuses(calls, options, match):
    with pytest.raises(ValueError, match=match):
        time_interleaved(calls, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("use", [lambda d: time_interleaved({"f": print}, device=d), measure])
def test_without_a_gpu_cuda_is_refused(use):
    with pytest.raises(RuntimeError, match="device cuda must be a CUDA GPU that torch can use"):
        use("cuda")


def test_roofs_of_this_machine():
    roofs = ceilings._measure_cpu(0.02)
    assert roofs.threads == torch.get_num_threads()
    assert 0 < roofs.cpu_share < 1.1
    for name, peak in roofs.flops.items():
        known = {"fma": roofs.fma_flops[name], "matmul": roofs.matmul_flops[name]}
        assert peak == max(value for value in known.values() if value)
        assert peak == known[roofs.flops_source[name]]
    assert roofs.copy_bytes_per_s > 1e8
    assert f"({roofs.copy_source})" in "\n".join(roofs_lines(roofs))


def test_what_the_host_took_is_the_kernels_steal(tmp_path, monkeypatch):
    """Columns of proc_stat(5): user nice system idle iowait irq softirq steal guest guest_nice."""
    monkeypatch.setattr(host, "STAT", stat := tmp_path / "stat")
    stat.write_text("cpu  100 0 50 9000 3 0 0 10 40 0\ncpu0 1 2 3\n")
    stolen = host.Stolen()
    assert stolen.share() == 0.0
    stat.write_text("cpu  150 5 55 9900 9 6 4 40 99 0\ncpu0 1 2 3\n")
    assert stolen.share() == 30 / (50 + 5 + 5 + 6 + 4 + 30)
    assert "took 30% of" in host.stolen_line(stolen.share(), "rows were timed")
    assert host.stolen_line(0.01, "rows were timed") == ""
    stat.write_text("intr 5 7\n")
    assert stolen.share() is None
    assert host.stolen_line(None, "rows were timed") == ""
    stat.unlink()
    assert host.Stolen().share() is None


def test_the_gpus_state_is_nvidia_smis(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\n"
        'test "$2" = --format=csv,noheader || exit 2\n'
        "echo '580.1, 1980 MHz, 3201 MHz, 1980 MHz, 41'\n"
        "echo '580.1, 345 MHz, 3201 MHz, 1980 MHz, 30'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = ceilings.gpu_state()
    assert found["driver_version"] == "580.1; 580.1"
    assert found["clocks.sm"] == "1980 MHz; 345 MHz"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert ceilings.gpu_state() is None


def test_roofs_are_cached(own_cache, made_up):
    first = measure()
    assert measure() == first
    assert len(made_up) == 1
    assert measure(seconds=10.0) != first  # more careful than what is there
    assert measure(refresh=True) != measure(seconds=10.0, refresh=True)
    assert len(list(own_cache.rglob("*"))) == 2  # the folder and one file


def test_roofs_of_a_busy_machine_are_not_kept(own_cache, monkeypatch):
    busy = dataclasses.replace(ROOFS, cpu_share=0.5)
    monkeypatch.setattr(ceilings, "_measure_cpu", lambda seconds: busy)
    with pytest.warns(UserWarning, match="left this one 50% of its threads' time"):
        assert measure() == busy
    assert not list(own_cache.rglob("*.json"))


@pytest.mark.parametrize("content", ['{"format": 2', '{"format": 1}', "[]"])
def test_a_broken_cache_is_measured_again(own_cache, made_up, content):
    path = ceilings.cache_path()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    roofs = measure()
    assert json.loads(path.read_text())["copy_bytes_per_s"] == roofs.copy_bytes_per_s


def test_an_unwritable_cache_costs_a_warning(tmp_path, monkeypatch, made_up):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="the roofs could not be kept"):
        measure()


def test_without_the_native_core_its_roofs_are_none(monkeypatch):
    monkeypatch.setattr(ceilings, "_native", lambda: None)
    monkeypatch.setattr(ceilings, "_matmul_flops", lambda *a: 1.0)
    monkeypatch.setattr(ceilings, "_copy_bytes_per_s", lambda *a: 1.0)
    roofs = ceilings._measure_cpu(0.01)
    assert set(roofs.fma_flops.values()) == {None}
    assert (roofs.copy_source, set(roofs.flops_source.values())) == ("torch", {"matmul"})


@pytest.mark.parametrize("work", ["copy", "matmul"])
def test_the_clock_gives_known_work_its_rate(work, one_thread):
    """Bytes and FLOP per second as the work itself, timed from inside, has them."""
    x, a = torch.ones(4 << 20), torch.randn(256, 256)
    y, out = torch.zeros_like(x), torch.empty_like(a)
    call = {"copy": lambda: y.copy_(x), "matmul": lambda: torch.mm(a, a, out=out)}[work]
    amount = {"copy": 2 * x.nbytes, "matmul": 2 * 256**3}[work]

    def ratio():
        inside = []

        def timed():
            begun = time.perf_counter()
            call()
            inside.append(time.perf_counter() - begun)

        samples = time_interleaved({work: timed}, min_time_s=0.2)[work].samples
        rate = amount * len(samples) / sum(samples)
        return rate / (amount * len(inside) / sum(inside))

    assert_close_to_one(ratio)


def test_bound_and_attainable():
    assert ROOFS.ridge("float32") == 10.0
    low, high = Cost(flops=5, bytes=1), Cost(flops=20, bytes=1)
    assert least_seconds(low, "float32", ROOFS) == (1 / 40e9, "memory")
    assert least_seconds(high, "float32", ROOFS) == (20 / 400e9, "compute")
    assert attainable(low, "float32", ROOFS) == 5 * 40e9
    assert attainable(high, "float32", ROOFS) == 400e9
    assert attainable(high, "bfloat16", ROOFS) is None
    # Nothing to compute needs no compute roof.
    assert least_seconds(Cost(0, 40), "bfloat16", ROOFS) == (1e-9, "memory")


def _row(timing=None, **changes):
    arguments = {
        "op": "rms_norm", "direction": "fwd", "backend": "cpu", "peer": None, "shape": "s",
        "dtype": "float32", "device": "cpu", "cost": Cost(flops=4000, bytes=8000), "roofs": ROOFS,
        "timing": timing,
    }  # fmt: skip
    return bench_row(**{**arguments, **changes})


def test_row_arithmetic():
    timing = Timing((1e-6, 2e-6, 4e-6), call_s=3e-6)
    row = _row(timing, reference=Timing((8e-6,) * 3), error_over_slack=0.5)
    assert tuple(row) == ROW_KEYS
    assert (row["median_s"], row["call_s"], row["status"]) == (2e-6, 3e-6, "ok")
    assert row["gflops"] == pytest.approx(2.0)
    assert row["gbytes_per_s"] == pytest.approx(4.0)
    assert (row["intensity"], row["bound"]) == (0.5, "memory")
    assert row["roof_fraction"] == pytest.approx(0.1)
    assert row["speedup_vs_reference"] == pytest.approx(4.0)
    assert json.loads(json.dumps(row)) == row


def test_unknown_roofs_stay_unknown():
    row = _row(Timing((1e-6,) * 3), dtype="bfloat16")
    assert row["bound"] is None
    assert row["roof_fraction"] is None


def test_cases_cover_every_op():
    found = list(cases("quick"))
    assert {op.name for case in found for op in case.ops} == set(ceg_kernels.OPS)
    assert len(set(map(str, found))) == len(found)
    with pytest.raises(ValueError, match=r"shapes must be one of quick, .*, got 'huge'"):
        next(cases("huge"))


def _text(table) -> str:
    from rich.console import Console

    console = Console(width=250, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()

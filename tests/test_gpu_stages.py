"""`make gpu` without a GPU: what it builds for, what it runs in which order, what it writes down.

Commands are stand-ins, reports are pytest's own with failures planted. Left out: that the real
commands end within their limits.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cuda_sim
import pytest
import torch
from cuda_sim import kernel_on_gpu

from ceg_kernels import OPS

ROOT = Path(__file__).resolve().parent.parent


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


gpu, validation, small_grid, fresh = map(tool, ("gpu", "validation", "small_grid", "fresh"))
HOPPER = gpu.Gpu("made up", (9, 0))


@pytest.mark.parametrize(
    ("capability", "family", "arch"),
    [((8, 6), "sm_86", "86-real"), ((9, 0), "sm_90", "90a-real"), ((12, 0), "sm_120", "120-real")],
)
def test_it_is_built_for_the_gpu_at_hand_only(monkeypatch, tmp_path, capability, family, arch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "made up")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    found = gpu.find_gpu()
    assert (found.family, found.arch) == (family, arch)
    (build,) = gpu.stages(found, tmp_path)[0].commands
    assert (build.env["CEG_CUDA"], build.env["CEG_CUDA_ARCHS"]) == ("1", arch)


@pytest.mark.parametrize("there", [False, True])
def test_without_a_gpu_or_with_an_old_one_it_says_one_line(monkeypatch, capsys, tmp_path, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    wanted = (
        "of sm_80 or newer, got sm_75 (Old)" if there else "that torch can use, got none: torch"
    )
    assert wanted in line
    assert not captured.out
    assert not (tmp_path / "out").exists()


def test_an_unknown_stage_is_named(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["tests"])
    assert "STAGE must be one of build, test, sanitize, bench, record, got tests" in (
        capsys.readouterr().err
    )


def test_the_stages_fit_into_nine_minutes_and_cover_every_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "sanitizer", lambda: "/compute-sanitizer")
    stages = gpu.stages(HOPPER, tmp_path)
    assert [s.name for s in stages] == ["build", "test", "sanitize", "bench", "record"]
    assert sum(s.limit_s for s in stages) <= gpu.ALL_S < 540
    on_cuda = {op.name for op in OPS.values() if "cuda" in [b.name for b in op.backends]}
    assert set(itertools.chain(*gpu.FAMILIES.values())) == on_cuda
    watched = [c.argv for c in stages[2].commands]
    assert {argv[0] for argv in watched} == {"/compute-sanitizer"}
    for check in ("memcheck", "racecheck"):
        ops = [op for argv in watched if argv[2] == check for op in argv[7:]]
        assert set(ops) == on_cuda
    for group in gpu.test_groups().values():
        assert all((ROOT / name).exists() for name in group if name.endswith(".py"))


def test_every_test_with_cases_on_a_gpu_is_run_for_both_of_our_backends():
    users = {
        f"tests/{path.name}"
        for path in (ROOT / "tests").glob("test_*.py")
        if re.search(r"^from devices import", path.read_text(), re.MULTILINE)
    }
    assert len(users) >= 5
    for backend in ("cuda and not triton", "cuda and triton"):
        run = [group for group in gpu.test_groups().values() if group[-1] == backend]
        assert {name for group in run for name in group if name.endswith(".py")} == users


def python(name, code):
    return gpu.Command(name, [sys.executable, "-c", code])


def test_a_failure_stops_neither_its_stage_nor_the_next(tmp_path, capsys):
    marker = tmp_path / "child"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(marker)!r}).touch()"
    hangs = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    stages = [
        gpu.Stage("one", 1.0, [python("hangs", hangs), python("works", "print('hello')")], 2),
        gpu.Stage("two", 9.0, [python("fails", "raise SystemExit(3)"),
                               gpu.Command("absent", ["/nowhere/tool"])]),
        gpu.Stage("three", 9.0, [], skipped="the tool is absent"),
        gpu.Stage("four", 9.0, [python("works", "")]),
    ]  # fmt: skip
    out = tmp_path / "out"
    began = time.monotonic()
    assert gpu.run(stages, out, {"gpu": "a"}) == 1
    results = json.loads((out / "results.json").read_text())
    assert results["stages"] == {
        "one": {"hangs": "timed out", "works": "ok"},
        "two": {"fails": "failed (3)", "absent": "failed (No such file or directory)"},
        "three": {},
        "four": {"works": "ok"},
    }
    assert (out / "one-works.log").read_text() == "hello\n"
    printed = capsys.readouterr().out
    assert "three: skipped: the tool is absent" in printed
    assert printed.endswith("failed: one hangs, two fails, two absent\n")
    time.sleep(max(0.0, 3.0 - (time.monotonic() - began)))
    assert not marker.exists()  # what the command started ended with it


def test_what_follows_a_build_that_failed_is_left_out(tmp_path):
    marker = tmp_path / "ran"
    tests = gpu.Stage("test", 9.0, [python("t", f"open({str(marker)!r}, 'w')")])
    assert gpu.run([gpu.Stage("build", 9.0, [python("build", "1 / 0")]), tests], tmp_path, {}) == 1
    assert not marker.exists()


def test_tests_that_run_out_of_time_leave_their_report(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import time\ndef test_errs():\n    assert False\ndef test_hangs():\n    time.sleep(60)\n"
    )
    command = gpu.Command("tests", [sys.executable, "-m", "pytest", str(tmp_path / "test_it.py"),
                                    f"--junitxml={tmp_path / 'report.xml'}", "--rootdir",
                                    str(tmp_path), "-c", os.devnull])  # fmt: skip
    log = tmp_path / "log"
    gpu.hear_interrupts()
    assert gpu.run_command(command, log, time.monotonic() + 20.0, grace_s=12.0) == "timed out"
    assert "test_errs" in (tmp_path / "report.xml").read_text()
    assert "KeyboardInterrupt" in log.read_text()


def test_what_it_started_ends_with_it(tmp_path):
    marker = tmp_path / "child"
    child = f"import time; time.sleep(3); open({str(marker)!r}, 'w')"
    code = f"""
import os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, {str(ROOT / "tools")!r})
import gpu
signal.signal(signal.SIGTERM, gpu.end_all)
threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
command = gpu.Command("c", [sys.executable, "-c", {child!r}])
gpu.run_command(command, Path({str(tmp_path / "log")!r}), time.monotonic() + 30)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 128 + signal.SIGTERM
    time.sleep(3.5)
    assert not marker.exists()


def test_a_stage_alone_adds_to_what_others_of_that_gpu_and_source_left(tmp_path):
    stage = gpu.Stage("two", 0.0, [python("works", "")])  # alone it has all of the time
    (tmp_path / "old.xml").touch()
    first = {"about": {"gpu": "a"}, "stages": {"one": {"x": "ok"}}}
    (tmp_path / "results.json").write_text(json.dumps(first))
    assert gpu.run([stage], tmp_path, {"gpu": "a"}) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["stages"] == {"one": {"x": "ok"}, "two": {"works": "ok"}}
    assert (tmp_path / "old.xml").exists()
    gpu.run([dataclasses.replace(stage, name="test")], tmp_path, {"gpu": "a"})
    assert not (tmp_path / "old.xml").exists()
    (tmp_path / "old.xml").touch()
    gpu.run([stage], tmp_path, {"gpu": "b"})
    assert set(json.loads((tmp_path / "results.json").read_text())["stages"]) == {"two"}
    assert not (tmp_path / "old.xml").exists()


@pytest.mark.parametrize(
    ("changed", "status"),
    [({}, 0), ({"stale": True}, 1), ({"cuda_archs": ""}, 1), ({"native": None}, 1)],
)
def test_only_a_build_of_these_sources_with_cuda_says_what_its_kernels_are(
    tmp_path, monkeypatch, changed, status
):
    built = {"native": "_C.so", "stale": False, "cuda_archs": "90a-real", **changed}
    monkeypatch.setattr(fresh, "build_info", lambda: built)
    monkeypatch.setattr(fresh.native, "kernel_hash", lambda op: f"of {op}")
    assert fresh.main(tmp_path / "kernels.json") == status
    assert (tmp_path / "kernels.json").exists() == (status == 0)
    if status == 0:
        assert json.loads((tmp_path / "kernels.json").read_text())["rope"] == "of rope"


def test_the_whole_has_a_limit(tmp_path):
    stages = [gpu.Stage(n, 60.0, [python("sleeps", "import time; time.sleep(9)")]) for n in "ab"]
    began = time.monotonic()
    assert gpu.run(stages, tmp_path, {}, total_s=0.5) == 1
    assert time.monotonic() - began < 5
    stages = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert stages == {"a": {"sleeps": "timed out"}, "b": {"sleeps": "timed out"}}


@cuda_sim.needed
@pytest.mark.parametrize("family", gpu.FAMILIES)
def test_what_the_sanitizers_watch_runs(sim, module, monkeypatch, family):

    def refuses(first, *rest):
        odd = first.dtype == torch.float32 or first.shape[-1] % 8
        return "only 16 bits, and heads of whole vectors" if odd else None

    monkeypatch.setattr(small_grid, "LARGEST", 1 << 12)
    for op in gpu.FAMILIES[family]:
        real, ours = OPS[op], sim(op)
        if "attention" in op:
            ours = dataclasses.replace(ours, why_not=refuses)
        monkeypatch.setattr(real, "backends", (ours, real.backends[-1]))
        module.launched()
        assert small_grid.run([op], "cpu") >= 3, op
        assert module.launched(), op


@pytest.mark.parametrize("op", gpu.FAMILIES["attention"])
def test_the_sanitizers_watch_every_width_of_attention_s_tiles(op):
    dtype = torch.bfloat16
    head_dims = {small_grid.longest_row(args, dtype) for args in small_grid.watched(op, dtype)}
    assert {next(w for w in (64, 128, 256) if d <= w) for d in head_dims} == {64, 128, 256}


def test_the_sanitizers_watch_decoding_in_several_chunks():
    shapes = [args[:2] for args in small_grid.watched("attention", torch.bfloat16)]
    assert any(q.shape[1] <= 16 and k.shape[1] > 256 for q, k in shapes if q.dim() == 4)


# ---- what is written into validated.json -----------------------------------------------------

TESTS = """
import pytest

@pytest.fixture
def broken():
    raise RuntimeError("as after an illegal access")

@pytest.mark.parametrize("op", ["rope", "rms_norm", "moe_index", "attention"])
def test_accuracy(op):
    if op == "moe_index":
        pytest.skip("refuses every sample")

@pytest.mark.parametrize("op", ["attention"])
def test_what_errs(op, broken):
    pass

@pytest.mark.parametrize("op", ["rope", "rms_norm", "moe_route"])
def test_same_bits_every_time(op):
    assert op != "rms_norm"

def test_of_no_kernel():
    assert False
"""
HOOK = """
def pytest_itemcollected(item):
    if hasattr(item, "callspec"):
        item.user_properties.append(("cuda_kernel", item.callspec.params["op"]))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "test_kernels.py").write_text(TESTS)
    (folder / "conftest.py").write_text(HOOK)
    command = [sys.executable, "-m", "pytest", "-q", "--junitxml=one.xml", "-p", "no:benchmark"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert "2 failed, 5 passed, 1 skipped, 1 error" in done.stdout, done.stdout
    return folder / "one.xml"


@pytest.fixture
def folder(tmp_path, report):
    (tmp_path / "one.xml").write_bytes(report.read_bytes())
    write(tmp_path)
    return tmp_path


KERNELS = {"rope": "of rope", "rms_norm": "of norms", "attention": "a", "moe_index": "m"}


def write(folder, commit="abc", sources="s", **stages):
    (folder / "kernels.json").write_text(json.dumps(KERNELS))
    about = {"gpu": "made up", "family": "sm_90", "sources": sources, "commit": commit}
    stages = {"test": {"fresh": "ok"}, **stages}
    (folder / "results.json").write_text(json.dumps({"about": about, "stages": stages}))


def recorded(folder, before=None):
    target = folder / "validated.json"
    target.write_text(json.dumps(before or {}))
    validation.record(folder, target)
    return json.loads(target.read_text())


def test_only_kernels_whose_tests_all_passed_are_recorded(folder, capsys):
    earlier = {"sm_90": {"gpu": "g", "commit": "c"}, "sm_80": {"gpu": "g", "commit": "c"}}
    found = recorded(folder, {"rms_norm": earlier, "died": {"sm_90": {}, "sm_80": {}}})
    assert found == {
        "died": {"sm_80": {}},
        "rms_norm": {"sm_80": earlier["sm_80"]},  # what failed now is not what passed then
        "rope": {
            "sm_90": {"gpu": "made up", "commit": "abc", "kernel": "of rope", "sanitized": ""}
        },
    }
    assert capsys.readouterr().out.splitlines() == [
        "attention: test_what_errs[attention] failed",
        "died: no report",
        "moe_index: no accuracy test ran",
        "moe_route: no accuracy test ran",
        "rms_norm: test_same_bits_every_time[rms_norm] failed",
        "rope: validated on sm_90",
    ]


def test_a_sanitizer_that_found_something_forbids_it(folder):
    write(folder, sanitize={"memcheck-rope": "ok", "racecheck-rope": "failed (9)"})
    assert recorded(folder) == {}
    write(folder, sanitize={"memcheck-rope": "ok", "racecheck-rope": "ok", "memcheck-moe": "no"})
    assert recorded(folder)["rope"]["sm_90"]["sanitized"] == "memcheck racecheck"


def test_a_sanitizer_that_ran_out_of_time_does_not_count_and_is_said(folder, capsys):
    write(folder, sanitize={"memcheck-rope": "ok", "racecheck-rope": "timed out"})
    assert recorded(folder)["rope"]["sm_90"]["sanitized"] == "memcheck"
    assert "racecheck-rope timed out: it does not count" in capsys.readouterr().out
    write(folder, sanitize={"memcheck-rope": "ok", "racecheck-rope": "failed (1)"})
    assert recorded(folder) == {}


@pytest.mark.parametrize("group", ["cuda-rope", "cuda-gradients"])
def test_tests_that_ran_out_of_time_forbid_it(folder, group):
    write(folder, test={"fresh": "ok", group: "timed out"})
    assert recorded(folder) == {}
    write(folder, test={"fresh": "ok", "cuda-moe": "timed out", "triton-rope": "timed out"})
    assert set(recorded(folder)) == {"rope"}


@pytest.mark.parametrize(
    ("written", "match"),
    [
        ({"commit": "abc-dirty"}, "must be of a commit, got abc-dirty"),
        ({"commit": None}, "must be of a commit, got sources that are not here"),
        ({"test": {}}, "must be of a build of these sources, got no tests"),
        ({"test": {"fresh": "failed (1)"}}, "these sources, got failed"),
    ],
)
def test_runs_that_do_not_say_what_they_tested_are_refused(folder, written, match):
    write(folder, **written)
    with pytest.raises(ValueError, match=match):
        recorded(folder)
    assert json.loads((folder / "validated.json").read_text()) == {}


def test_a_run_without_a_checkout_takes_its_commit_from_one_with_the_same_sources(
    folder, monkeypatch
):
    write(folder, commit=None, sources=validation.sources())
    monkeypatch.setattr(validation, "commit", lambda: "def")
    assert recorded(folder)["rope"]["sm_90"]["commit"] == "def"
    monkeypatch.setattr(validation, "commit", lambda: None)
    assert recorded(folder) == {}  # what passed is recorded where the checkout is


def test_a_checkout_that_git_refuses_is_none(tmp_path, monkeypatch):
    (tmp_path / ".git").write_text("gitdir: /nowhere")
    assert validation.commit(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert validation.commit(tmp_path) is None


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"FOLDER must hold results\.json, got"):
        validation.record(tmp_path, tmp_path / "validated.json")


def test_rows_and_validations_do_not_make_a_checkout_dirty(tmp_path):
    assert validation.commit(tmp_path) is None
    written = [tmp_path / "bench/results/gpu.jsonl", tmp_path / "ceg_kernels/validated.json"]
    for path in (*written, tmp_path / "kernel.cu"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("before")
    identity = ["-c", "user.name=n", "-c", "user.email=e@e"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "message"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    for path in written:
        path.write_text("after")
    clean = validation.commit(tmp_path)
    assert len(clean) == 12
    (tmp_path / "kernel.cu").write_text("after")
    assert validation.commit(tmp_path) == f"{clean}-dirty"


def test_sources_are_those_that_a_validation_depends_on(tmp_path):
    for name in ("CMakeLists.txt", "csrc/cuda/a.cu", "tests/test_a.py", "docs/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    seen = [validation.sources(tmp_path)]
    for name in ("CMakeLists.txt", "csrc/cuda/a.cu", "tests/test_a.py"):
        (tmp_path / name).write_text("after")
        seen.append(validation.sources(tmp_path))
    (tmp_path / "docs/a.py").write_text("after")
    assert len(set(seen)) == 4
    assert validation.sources(tmp_path) == seen[-1]


def test_reports_name_the_cuda_kernels_that_ran_on_a_gpu():
    cuda = OPS["rope"].backend("cuda")
    params = {"op": OPS["rope"], "backend": cuda, "dtype": torch.float32, "device": "cuda"}
    assert kernel_on_gpu(params, True) == "rope"
    assert kernel_on_gpu({"op": "rope", "backend": "cuda"}, True) == "rope"
    assert kernel_on_gpu(params, False) is None
    assert kernel_on_gpu({**params, "device": "cpu"}, True) is None
    assert kernel_on_gpu({**params, "backend": OPS["rope"].backend("torch")}, True) is None
    assert kernel_on_gpu({"op": "rope"}, True) is None

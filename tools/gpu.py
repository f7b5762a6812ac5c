"""Build, test, sanitize, benchmark and validate on the GPU at hand: what `make gpu` runs.

    python tools/gpu.py                    every stage, within nine minutes on 16 cores
    python tools/gpu.py test bench         some of them; one alone has all of the time

It needs torch with CUDA and what the tests import, and installs nothing. A stage that fails does
not stop the next, but for the build; the exit status is 1 if any failed, 2 where there is no GPU.
Each command's log, the tests' reports and results.json go to --out. Kernels are tested in processes
of their own, because an access to a wrong address ends every later call of its process.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = {
    "attention": ("attention", "attention_backward"),
    "rms_norm": ("rms_norm", "rms_norm_backward"),
    "rope": ("rope",),
    "moe": ("moe_route", "moe_route_backward", "moe_index", "moe_dispatch", "moe_combine",
            "moe_combine_backward"),
}  # fmt: skip
# The tests with the cases of tests/devices.py.
ON_EACH_DEVICE = {"gradients": ("autograd", "nn", "faults"), "models": ("model", "train_devices")}
OLDEST = (8, 0)
ALL_S = 530.0
GRACE_S = 10.0  # between asking a command to end, so that pytest writes its report, and its end

LIVE: set[subprocess.Popen] = set()


class NoGpuError(Exception):
    """Why there is nothing to run on, in one line."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]

    @property
    def family(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}"

    @property
    def arch(self) -> str:
        """As CMAKE_CUDA_ARCHITECTURES has it: wgmma and setmaxnreg are in sm_90a only."""
        return f"{self.family.removeprefix('sm_')}{'a' if self.capability == (9, 0) else ''}-real"


@dataclasses.dataclass(frozen=True)
class Command:
    name: str
    argv: Sequence[str]
    env: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Stage:
    """`limit_s` is its share of `ALL_S`; `at_once` of its commands run beside each other."""

    name: str
    limit_s: float
    commands: list[Command]
    at_once: int = 1
    skipped: str | None = None


def find_gpu() -> Gpu:
    """The first GPU that torch can use. Raises NoGpuError, with what torch and the driver say."""
    try:
        import torch
    except ImportError as error:
        raise NoGpuError(f"needs torch with CUDA, got none ({error})") from None
    if not torch.cuda.is_available():
        raise NoGpuError(
            f"needs a CUDA GPU that torch can use, got none: torch {torch.__version__},"
            f" nvidia-smi {'is there' if shutil.which('nvidia-smi') else 'is not'}"
        )
    gpu = Gpu(torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0))
    if gpu.capability < OLDEST:
        raise NoGpuError(f"needs a GPU of sm_80 or newer, got {gpu.family} ({gpu.name})")
    return gpu


def stages(gpu: Gpu, out: Path, shapes: str = "quick") -> list[Stage]:
    """All of them, in order."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-rf"]
    environment = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "cmake")))}
    beside_others = {**environment, "OMP_NUM_THREADS": "1"}
    build = {**environment, "CEG_CUDA": "1", "CEG_CUDA_ARCHS": gpu.arch}
    benchmark = [
        python, "-m", "pytest", "bench/bench_ops.py", "--benchmark", "-q", "-k",
        "cuda or cudnn or torch", "--peers", "torch,cudnn", "--device", "cuda",
        "--shapes", shapes, "--results", "bench/results",
    ]  # fmt: skip
    setup = [python, "setup.py", "build_ext", "--inplace"]
    made_of = str(out / "kernels.json")
    fresh = Command("fresh", [python, "tools/fresh.py", made_of], environment)
    tool = sanitizer()
    tests = [
        Command(name, [*pytest, *arguments, f"--junitxml={out / f'{name}.xml'}"], beside_others)
        for name, arguments in test_groups().items()
    ]
    # Blocks of torch's pool lie beside each other: nothing would be out of bounds.
    no_pool = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    watched = [
        Command(
            f"{check}-{family}",
            [tool or "", "--tool", check, "--error-exitcode", "9",
             python, "tools/small_grid.py", *ops],
            no_pool,
        )
        for check in ("memcheck", "racecheck")
        for family, ops in FAMILIES.items()
    ]  # fmt: skip
    missing = None if tool else "compute-sanitizer is not on PATH nor beside nvcc"
    validate = [python, "tools/validation.py", str(out)]
    return [
        Stage("build", 150, [Command("build", setup, build)]),
        Stage("test", 150, [fresh, *tests], at_once=12),
        Stage("sanitize", 90, watched, at_once=8, skipped=missing),
        Stage("bench", 125, [Command("bench", benchmark, environment)]),
        Stage("record", 15, [Command("record", validate, environment)]),
    ]


def test_groups() -> dict[str, list[str]]:
    """Arguments of pytest for each process; together, every test that has tensors on a GPU."""
    groups = {}
    of_ops = ["tests/test_ops.py", "tests/test_gpu.py", "-k"]
    # First what takes longest: Triton compiles each op's kernels for a minute or two.
    for op in (op for ops in FAMILIES.values() for op in ops):
        groups[f"triton-{op}"] = [*of_ops, f"{op}-triton"]
    for family, ops in FAMILIES.items():
        groups[f"cuda-{family}"] = [*of_ops, " or ".join(f"{op}-cuda" for op in ops)]
    for name, files in ON_EACH_DEVICE.items():
        paths = [f"tests/test_{file}.py" for file in files]
        groups[f"cuda-{name}"] = [*paths, "-k", "cuda and not triton"]
        groups[f"triton-{name}"] = [*paths, "-k", "cuda and triton"]
    stock = " or ".join(f"-{b}-{d}-cuda" for b in ("torch", "reference")
                        for d in ("float32", "bfloat16", "float16", "float64"))  # fmt: skip
    groups["stock"] = ["tests/test_ops.py", "-k", stock]
    groups["whole"] = ["tests/test_gpu.py", "-k", "whole"]
    # Without those that compile for every target, which takes long and needs no GPU.
    compiling = ("spill", "does_not_fit", "threads_wait", "descriptors", "the_host_pays")
    for name in ("triton", "triton_attention", "triton_moe", "tune"):
        without = " and ".join(f"not {test}" for test in compiling)
        groups[f"file-{name}"] = [f"tests/test_{name}.py", "-k", without]
    groups["others"] = [f"tests/test_{n}.py" for n in ("measure", "native", "cuda_build")]
    return groups


def sanitizer() -> str | None:
    beside = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc").resolve().parent
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(beside))


def run_command(command: Command, log: Path, deadline: float, grace_s: float = GRACE_S) -> str:
    """ "ok", "failed (STATUS)" or "timed out"; the whole process group ends with it."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **command.env}
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                command.argv, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            file.write(f"{error}\n")
            return f"failed ({error.strerror})"
        LIVE.add(process)
        try:
            left = deadline - time.monotonic()
            status = process.wait(max(left - grace_s, 0.5 * left, 0.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0.0))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "timed out"
        finally:
            LIVE.discard(process)
    return "ok" if status == 0 else f"failed ({status})"


def hear_interrupts() -> None:
    """Also where a shell started this in the background, whose children inherit deaf ears."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def end_all(number: int, _frame: object) -> None:
    """Commands have process groups of their own, which would outlive this one."""
    for process in list(LIVE):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    os._exit(128 + number)


def run_stage(stage: Stage, out: Path, limit_s: float) -> dict[str, str]:
    """The outcome of each command, by name."""
    if stage.skipped:
        print(f"{stage.name}: skipped: {stage.skipped}", flush=True)
        return {}
    began = time.monotonic()

    def one(command: Command) -> str:
        log = out / f"{stage.name}-{command.name}.log"
        outcome = run_command(command, log, began + limit_s)
        print(f"  {stage.name} {command.name}: {outcome}, {time.monotonic() - began:.0f} s"
              + ("" if outcome == "ok" else f"; see {log}"), flush=True)  # fmt: skip
        return outcome

    with ThreadPoolExecutor(stage.at_once) as pool:
        outcomes = list(pool.map(one, stage.commands))
    return {c.name: outcome for c, outcome in zip(stage.commands, outcomes, strict=True)}


def run(chosen: Sequence[Stage], out: Path, about: dict, total_s: float = ALL_S) -> int:
    """Runs the stages, keeps results.json in step with them; the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    deadline, failed = time.monotonic() + total_s, []
    results = json.loads(path.read_text()) if path.exists() else {}
    if results.get("about") != about:  # another GPU or other sources: nothing of it holds
        for old in out.glob("*.xml"):
            old.unlink()
        results = {"about": about, "stages": {}}
    for stage in chosen:
        if stage.name == "test":  # or a process that dies would leave its last report behind
            for old in out.glob("*.xml"):
                old.unlink()
        left = deadline - time.monotonic()
        limit = left if len(chosen) == 1 else min(stage.limit_s, left)
        outcomes = run_stage(stage, out, max(limit, 0.0))
        results["stages"][stage.name] = outcomes
        path.write_text(json.dumps(results, indent=1) + "\n")
        failed += [f"{stage.name} {n}" for n, outcome in outcomes.items() if outcome != "ok"]
        if stage.name == "build" and failed:
            break  # what follows would test another build
    print(f"failed: {', '.join(failed)}" if failed else "all stages passed", flush=True)
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    names = ("build", "test", "sanitize", "bench", "record")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", nargs="*", metavar="STAGE", help=f"of {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", metavar="FOLDER")
    parser.add_argument("--shapes", default="quick", help="of the benchmarks: quick, llama, all..")
    asked = parser.parse_args(arguments)
    if unknown := [name for name in asked.stage if name not in names]:
        parser.error(f"STAGE must be one of {', '.join(names)}, got {unknown[0]}")
    try:
        gpu = find_gpu()
    except NoGpuError as error:
        print(f"make gpu {error}", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT / "tools"))
    import validation

    out = asked.out.resolve()
    hear_interrupts()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end_all)
    print(f"{gpu.name} ({gpu.family}); logs in {out}", flush=True)
    chosen = [s for s in stages(gpu, out, asked.shapes) if not asked.stage or s.name in asked.stage]
    return run(chosen, out, validation.about(gpu.name, gpu.family))


if __name__ == "__main__":
    sys.exit(main())

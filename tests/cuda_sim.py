"""The functional simulator: the CUDA kernels as C++, one fiber a thread, on arrays of the CPU.

`build` compiles csrc/cuda once into a folder that later runs use again. With AddressSanitizer they
need a process of their own, because the sanitizer has to be loaded before everything else.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ceg_kernels import OPS, native
from ceg_kernels.op import Backend

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / f"sim-{sysconfig.get_config_var('SOABI')}"


def missing() -> str | None:
    """Why there can be no simulator here, or None."""
    if platform.machine() != "x86_64":
        return f"the simulator needs x86-64, got {platform.machine()}"
    for tool in ("cmake", "ninja", "c++"):
        if _tool(tool) is None:
            return f"the simulator needs {tool}"
    if importlib.util.find_spec("pybind11") is None:
        return "the simulator needs pybind11"
    return None


def _tool(name: str) -> str | None:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


needed = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def backend(module: ModuleType, op: str) -> Backend:
    """The backend `cuda` of an op, run by the simulator on any tensors of the CPU."""
    real = OPS[op].backend("cuda")
    run = functools.partial(real.run.func, launch=native.Cuda(module))
    return dataclasses.replace(
        real, run=run, why_not=lambda *args: None, unproven=lambda *args: None
    )


@dataclasses.dataclass(frozen=True)
class TwoPasses(native.Cuda):
    """Has no memory for the sums of dq, as where the backward in one pass needs too much."""

    def workspace(self, name: str, columns: int, dtype: torch.dtype, *of: Any) -> tuple:
        return (of[0].new_empty(0, columns, dtype=dtype),)


@functools.cache
def build(name: str = "_sim") -> Path:
    """The compiled module `_sim`, or `_sim_asan`."""
    import pybind11

    options = {
        "CMAKE_MAKE_PROGRAM": _tool("ninja"),
        "CEG_PYTHON_INCLUDE": sysconfig.get_path("include"),
        "CEG_PYBIND11_INCLUDE": pybind11.get_include(),
        "CEG_EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
    }
    cmake = str(_tool("cmake"))
    definitions = [f"-D{key}={value}" for key, value in options.items()]
    _run([cmake, "-S", str(ROOT), "-B", str(FOLDER), "-G", "Ninja", *definitions], CEG_CUDA="0")
    _run([cmake, "--build", str(FOLDER), "--target", name, "-j", str(os.cpu_count())])
    return FOLDER / "csrc" / "cuda" / "sim" / f"{name}{options['CEG_EXT_SUFFIX']}"


def _run(command: list[str], **environment: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr


@functools.cache
def load(name: str = "_sim") -> ModuleType:
    spec = importlib.util.spec_from_file_location("_sim", build(name))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_under_asan(code: str) -> subprocess.CompletedProcess[str]:
    """`code` in a new process, with `sim` the module under AddressSanitizer."""
    build("_sim_asan")
    library = subprocess.run(
        ["c++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    start = "import sys; sys.path.insert(0, 'tests'); import cuda_sim\n"
    start += "cuda_sim.build = lambda name: " + repr(str(build("_sim_asan"))) + "\n"
    start += "sim = cuda_sim.load('_sim_asan')\n"
    return subprocess.run(
        [sys.executable, "-c", start + code], cwd=ROOT, capture_output=True, text=True, check=False,
        # Python leaks by design.
        env={**os.environ, "LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"},
    )  # fmt: skip


class Elsewhere:
    """An array that claims to be on another device, as DLPack numbers them."""

    def __init__(self, array: Any, kind: int, index: int) -> None:
        self.array, self.device = array, (kind, index)

    def __dlpack__(self, **_: Any) -> Any:
        capsule = self.array.__dlpack__()  # a DLManagedTensor: data, then the device
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        managed = pointer(capsule, b"dltensor")
        ctypes.c_int32.from_address(managed + 8).value = self.device[0]
        ctypes.c_int32.from_address(managed + 12).value = self.device[1]
        return capsule


def kernel_on_gpu(params: dict[str, Any], there_is_a_gpu: bool) -> str | None:
    """The CUDA kernel that a test with these parameters runs on a GPU, not in the simulator."""
    op, backend = (getattr(params.get(n), "name", params.get(n)) for n in ("op", "backend"))
    on_gpu = there_is_a_gpu and params.get("device", "cuda") == "cuda"
    return op if on_gpu and backend == "cuda" else None

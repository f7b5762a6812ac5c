"""What goes wrong at run time: no memory, a launch that fails, a GPU asked for that is not there.

What a kernel refuses beforehand is in test_cuda*.py; a GPU out of memory is in test_gpu.py too.
"""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import cuda_sim
import pytest
import torch

from ceg_kernels import OPS, native, use_backend

ROOT = Path(__file__).resolve().parent.parent
LAUNCHES = """
#include <cstdio>
#include <exception>

#include "launch.h"

template <class F>
void attempt(F f) {
  try {
    f();
    std::puts("went well");
  } catch (const std::exception& error) {
    std::puts(error.what());
  }
}

int main() {
  const ceg::Launch at{
      .name = "some_kernel", .grid = dim3(7, 2), .block = 128, .shared_bytes = 50000};
  for (cudaError_t status :
       {cudaSuccess, cudaErrorNoKernelImageForDevice, cudaErrorLaunchOutOfResources}) {
    attempt([&] { ceg::check_launch(at, status); });
  }
  attempt([] { ceg::check_call(cudaErrorMemoryAllocation, "clear"); });
}
"""


def toolkit() -> Path | None:
    """Where the headers and the static runtime of CUDA are."""
    nvcc = shutil.which("nvcc")
    folders = [Path("/usr/local/cuda"), *([Path(nvcc).resolve().parents[1]] if nvcc else [])]
    found = (f for f in folders if (f / "lib64/libcudart_static.a").exists())
    return next(found, None)


@pytest.mark.skipif(toolkit() is None, reason="needs the CUDA toolkit")
def test_a_failed_launch_names_the_kernel_its_grid_and_the_reason(tmp_path):
    """The launcher's own code, given the statuses that a GPU would give."""
    (tmp_path / "main.cpp").write_text(LAUNCHES)
    folder = toolkit()
    command = ["c++", "-x", "c++", "-std=gnu++20", "-O0", f"-I{ROOT / 'csrc/cuda'}",
               f"-I{folder / 'include'}", "-o", str(tmp_path / "main"), str(tmp_path / "main.cpp"),
               str(ROOT / "csrc/cuda/launch.cu"), str(ROOT / "csrc/check.cpp"),
               f"-L{folder / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([tmp_path / "main"], check=True, capture_output=True, text=True)
    launch = "some_kernel with grid (7, 2, 1), block (128, 1, 1) and 50000 bytes of shared memory: "
    assert done.stdout.splitlines() == [
        "went well",
        launch + "no kernel image is available for execution on the device",
        launch + "too many resources requested for launch",
        "clear: out of memory",
    ]


@cuda_sim.needed
@pytest.mark.parametrize("op", [op.name for op in OPS.values() if op.name != "moe_index"])
def test_without_memory_for_outputs_torch_s_error_arrives_and_nothing_is_kept(
    sim, module, monkeypatch, op
):
    declared = OPS[op]
    ours = sim(op)
    monkeypatch.setattr(declared, "backends", (ours, declared.backends[-1]))
    monkeypatch.setattr(declared, "_chosen", {})
    dtype = torch.bfloat16 if "attention" in op else torch.float32
    samples = (s.args for s in declared.samples(dtype, "cpu"))
    fits = (a for a in samples if "attention" not in op or a[0].shape[-1] % 8 == 0)
    args = next(a for a in fits if a[0].numel())

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory (test)")

    module.launched()
    with use_backend("cuda"):
        with monkeypatch.context() as patch:
            for owner, names in ((torch, ("empty", "empty_like")), (torch.Tensor, ("new_empty",))):
                for name in names:
                    patch.setattr(owner, name, full)
            with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory \(test\)"):
                declared(*args)
        assert not module.launched()
        declared(*args)
    assert module.launched()


@cuda_sim.needed
def test_a_launch_that_the_gpu_cannot_make_is_an_error_of_the_op(sim, module, monkeypatch):
    """Less shared memory than the kernel was written for: named, and the next call is fine."""
    declared = OPS["attention"]
    monkeypatch.setattr(declared, "backends", (sim("attention"), declared.backends[-1]))
    monkeypatch.setattr(declared, "_chosen", {})
    samples = {s.name: s.args for s in declared.samples(torch.bfloat16, "cpu")}
    args = next(a for a in samples.values() if a[0].shape[-1] == 64 and a[0].numel())
    with use_backend("cuda"):
        module.set_device(shared_limit=1000)
        with pytest.raises(RuntimeError, match=r"attention_fwd_kernel: needs \d+ bytes of shared"):
            declared(*args)
        module.set_device()
        assert declared(*args)[0].isfinite().all()


@pytest.mark.parametrize(
    ("device", "text"),
    [
        ("cuda:0", "--device cuda:0 must be a GPU that torch can use, got none"),
        ("tpu", "--device must be cpu or cuda, got 'tpu'"),
    ],
)
def test_benchmarks_on_a_device_that_is_not_there(monkeypatch, device, text):
    """Said before anything is collected, for which inputs are made on the device."""
    spec = importlib.util.spec_from_file_location("options", ROOT / "conftest.py")
    options = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(options)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = {"dtypes": "float32", "peers": "", "--device": device}
    config = SimpleNamespace(addinivalue_line=lambda *a: None, getoption=given.__getitem__)
    config.option = SimpleNamespace(peers="")
    with pytest.raises(pytest.UsageError, match=re.escape(text)):
        options.pytest_configure(config)


def test_forcing_cuda_on_tensors_of_the_cpu_says_what_it_needs():
    x = torch.zeros(2, 8)
    with use_backend("cuda"), pytest.raises(RuntimeError, match="backend cuda was forced but ref"):
        OPS["rms_norm"](x, None, None, 1e-6, 0.0)
    if native.MISSING is None and hasattr(native._C, "cuda"):
        text = OPS["rms_norm"].explain(x, None, None, 1e-6, 0.0)
        assert "  cuda: needs tensors on cuda, got one on cpu" in text

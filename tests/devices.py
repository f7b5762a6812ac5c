"""Where tests of gradients, modules and models run: on the CPU, and on a GPU by either of our
backends for it, forced, since a kernel that is not validated does not run unasked.

The tests are the same ones, so that they run where no GPU is; `-k cuda` picks those of a GPU.
"""

from __future__ import annotations

import pytest
import torch

from ceg_kernels import OPS, native, triton


def missing(backend: str) -> str | None:
    """Why this backend cannot run on a GPU here, or None."""
    if not torch.cuda.is_available():
        return "needs a GPU"
    if backend == "triton":
        return triton.MISSING
    why_not = native.MISSING or native._C.build_info()["cuda_why_not"]
    return f"the extension has no CUDA: {why_not}" if why_not else None


def _on_gpu(backend: str, name: str) -> object:
    reason = missing(backend)
    marks = pytest.mark.skipif(reason is not None, reason=str(reason))
    return pytest.param("cuda", backend, id=name, marks=marks)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
on_each_device = pytest.mark.parametrize(
    ("device", "backend"),
    [
        pytest.param("cpu", "cpu", id="cpu"),
        _on_gpu("cuda", "cuda"),
        _on_gpu("triton", "cuda-triton"),
    ],
)


def forced(backend: str, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """For use_backend: every op on that backend, but attention in fp32, which the CUDA kernels
    refuse, on triton."""
    attention = "triton" if (backend, dtype) == ("cuda", torch.float32) else backend
    return {op: attention if "attention" in op else backend for op in OPS}

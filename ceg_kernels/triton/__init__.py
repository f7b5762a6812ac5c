"""The Triton kernels as seen by the op declarations: why they refuse, and how they are called.

Nothing here imports triton: a kernel's module is loaded when the backend first runs. The kernels'
modules hold @triton.jit functions first, then launchers that take the arguments of an op's schema,
then `compiled()`, the calls that compile.py compiles for every target.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

MOST_EXPERTS = 8192  # of one token in the registers of one program

MISSING = (
    None
    if importlib.util.find_spec("triton") is not None
    else "triton is not installed; run pip install 'triton>=3.6'"
)
# Read once, as Triton does: a kernel is compiled or interpreted for good when it is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def why_not(*args: Any) -> str | None:
    """Why the Triton kernels refuse these arguments (the first tensor decides on the dtype)."""
    if MISSING is not None:
        return MISSING
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    known = ("cuda", "cpu") if INTERPRETED else ("cuda",)
    for tensor in tensors:
        if tensor.device.type not in known:
            hint = "; TRITON_INTERPRET=1 at start interprets" if tensor.device.type == "cpu" else ""
            return f"needs tensors on a GPU, got one on {tensor.device.type}{hint}"
    if tensors[0].dtype.is_floating_point and tensors[0].dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        return f"needs dtype in {{{names}}}, got {str(tensors[0].dtype).removeprefix('torch.')}"
    return None


def why_not_experts(num_experts: int, *args: Any) -> str | None:
    """`why_not` of the rest, for kernels that hold a number for each expert in registers."""
    if (reason := why_not(*args)) is not None:
        return reason
    if num_experts > MOST_EXPERTS:
        return f"needs at most {MOST_EXPERTS} experts, got {num_experts}"
    return None


def launcher(module: str, name: str) -> Callable[..., Any]:
    """`ceg_kernels.triton.<module>.<name>`, loaded at its first call."""

    def run(*args: Any) -> Any:
        return _load(module, name)(*args)

    return run


@functools.cache
def _load(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"ceg_kernels.triton.{module}"), name)

"""The compiled extension as seen by the op declarations: whether it is there, and its CPU backends.

torch is imported before the extension on purpose: both need libgomp, and the copy that is mapped
first serves both, so that there is one pool of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ceg_kernels.op import Backend

try:
    from ceg_kernels import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    MISSING: str | None = f"the extension is not built ({error}); run pip install -e ."
else:
    MISSING = None

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def why_not(*args: Any) -> str | None:
    """Why the CPU kernels refuse these arguments (the first tensor decides on the dtype)."""
    if MISSING is not None:
        return MISSING
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"needs tensors on cpu, got one on {tensor.device.type}"
    if tensors[0].dtype.is_floating_point and tensors[0].dtype not in FLOATS:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        return f"needs dtype in {{{names}}}, got {str(tensors[0].dtype).removeprefix('torch.')}"
    return None


def cpu_backends(
    run: Callable[..., Any],
    refuses: Callable[..., str | None] = why_not,
    executed_flops: Callable[..., int] | None = None,
) -> tuple[Backend, ...]:
    """The backend `cpu`, and one for each ISA level this CPU has, which run only when forced.

    `run(*args, isa=...)` calls the launcher; isa "" is the best level.
    """
    levels: list[str] = [] if _C is None else _C.isa_levels()["available"]
    named = {"cpu": "", **{f"cpu:{level}": level for level in levels}}
    return tuple(
        Backend(name, partial(run, isa=isa), refuses, executed_flops, automatic=not isa)
        for name, isa in named.items()
    )


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and statistics are kept in: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_math(t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A small parameter (weight, sink, slopes) in the dtype the kernels do their maths in."""
    return None if t is None else dense(t.to(math_dtype(dtype)))


def unit_stride(t: torch.Tensor) -> torch.Tensor:
    """`t` itself where its last dimension is dense, which the kernels need, else a copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else dense(t)


def dense(t: torch.Tensor) -> torch.Tensor:
    """`t.contiguous()`, which returns an empty tensor as it is even where its strides are 0."""
    return t.contiguous() if t.numel() else t.new_empty(t.shape)

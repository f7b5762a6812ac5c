"""The compiled extension as seen by the op declarations: whether it is there, and its backends.

Launchers of the CPU and of CUDA take the same arguments but for the last ones, so one function of
an op allocates the outputs and calls `launch(name, *args)`, a `Cpu` or a `Cuda`.

torch is imported before the extension on purpose: both need libgomp, and the copy that is mapped
first serves both, so that there is one pool of threads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
CUDA_FLOATS = FLOATS[:3]
OLDEST_GPU = (8, 0)  # bf16 and cp.async

# Where a CUDA kernel passed its tests, at which commit, and what it was made of: {op: {"sm_90":
# {"gpu": name, "commit": hash, "kernel": hash, "sanitized": tools}}}.
VALIDATED: dict[str, dict[str, dict[str, str]]] = json.loads(
    Path(__file__).with_name("validated.json").read_text()
)


def why_not(*args: Any) -> str | None:
    """Why the CPU kernels refuse these arguments (the first tensor decides on the dtype)."""
    if MISSING is not None:
        return MISSING
    return _unfit(args, "cpu", FLOATS)


def cuda_why_not(*args: Any) -> str | None:
    """Why the CUDA kernels refuse these arguments (the first tensor decides on dtype and GPU)."""
    if MISSING is not None:
        return MISSING
    if reason := _C.build_info()["cuda_why_not"]:
        return f"the extension was built without CUDA ({reason})"
    if (reason := _unfit(args, "cuda", CUDA_FLOATS)) is not None:
        return reason
    if (gpu := _capability(args)) < OLDEST_GPU:
        return f"needs a GPU of {_family(OLDEST_GPU)} or newer, got {_family(gpu)}"
    archs = _C.build_info()["cuda_archs"]
    if not any(_runs_on(arch, gpu) for arch in archs.split()):
        return f"the extension was built for GPUs of {archs}, got {_family(gpu)}"
    return None


def _runs_on(arch: str, gpu: tuple[int, int]) -> bool:
    """Whether a GPU runs what CMake builds for an entry of CMAKE_CUDA_ARCHITECTURES, as CUDA's
    programming guide has it: machine code within the major version, PTX on all that is newer."""
    number, _, kind = arch.partition("-")
    if not number[0].isdigit():
        return True  # native, all, all-major: only the driver knows
    built = int(number.rstrip("af")) // 10, int(number.rstrip("af")) % 10
    if number.endswith("a"):
        return gpu == built
    same_major = gpu[0] == built[0] and gpu >= built
    return same_major if number.endswith("f") or kind == "real" else gpu >= built


def unvalidated(op: str, *args: Any) -> str | None:
    """Why `op` should not run on this GPU unasked, or None where its kernel passed its tests."""
    family = _family(_capability(args))
    if (record := VALIDATED.get(op, {}).get(family)) is None:
        return f"not yet validated on {family}"
    kernel = kernel_hash(op)
    if kernel is None or record.get("kernel") != kernel:
        at = f"on {family} as other sources (commit {record['commit']})"
        return f"was validated {at}: run `make gpu` again"
    return None


def kernel_hash(op: str) -> str | None:
    """Of what this build's CUDA kernels for `op` are made of; None where it has none for it."""
    hashes = dict(pair.split("=") for pair in _C.kernel_hashes().split())
    return next((h for family, h in hashes.items() if op.startswith(family)), None)


def _unfit(args: tuple, device: str, floats: tuple[torch.dtype, ...]) -> str | None:
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    for tensor in tensors:
        if tensor.device.type != device:
            return f"needs tensors on {device}, got one on {tensor.device.type}"
    if tensors[0].dtype.is_floating_point and tensors[0].dtype not in floats:
        names = ", ".join(str(d).removeprefix("torch.") for d in floats)
        return f"needs dtype in {{{names}}}, got {str(tensors[0].dtype).removeprefix('torch.')}"
    return None


def _capability(args: tuple) -> tuple[int, int]:
    first = next(a for a in args if isinstance(a, torch.Tensor))
    return torch.cuda.get_device_capability(first.device)


def _family(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


@dataclass(frozen=True)
class Cpu:
    """Launches on the CPU, at an ISA level; "" is the best that this CPU has.

    `executed` gets the FLOPs that a launcher says it executed.
    """

    isa: str = ""
    executed: list[int] | None = None

    def __call__(self, name: str, *args: Any) -> None:
        flops = getattr(_C, name)(*args, torch.get_num_threads(), self.isa)
        if self.executed is not None:
            self.executed.append(flops)

    def parameter(self, t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        """A small parameter beside data of this dtype, as the kernels take it."""
        return as_math(t, dtype)

    def rows(self, t: torch.Tensor) -> torch.Tensor:
        """`t` itself where the attention kernels can read its rows as they lie, else a copy."""
        return unit_stride(t)

    def workspace(self, name: str, columns: int, dtype: torch.dtype, *of: Any) -> tuple:
        """What the launcher `name` takes beyond its outputs for partial sums."""
        return ()

    def beside(self, t: torch.Tensor) -> tuple:
        """Scratch in the shape of t for a launcher that does not allocate its own."""
        return ()


@dataclass(frozen=True)
class Cuda:
    """Launches on the current stream of the first argument's GPU. `module`: None is `_C.cuda`."""

    module: Any = None  # the simulator, with tensors on the CPU, in tests

    def __call__(self, name: str, *args: Any) -> Any:
        device = args[0].device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        return getattr(self._launchers(), name)(*args, stream)

    def threads(self) -> int:
        """That fill the current GPU once, for what measures it."""
        return self._launchers().roofs_threads()

    def parameter(self, t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        # The kernels widen it themselves, which saves a launch.
        return None if t is None else dense(t)

    def rows(self, t: torch.Tensor) -> torch.Tensor:
        # In aligned pieces of 16 bytes.
        pieces = all(s * t.element_size() % 16 == 0 for s in t.stride()[:-1])
        return t if t.stride(-1) == 1 and pieces and t.data_ptr() % 16 == 0 else dense(t)

    def workspace(self, name: str, columns: int, dtype: torch.dtype, *of: Any) -> tuple:
        rows = getattr(self._launchers(), f"{name}_rows")(*of)
        return (of[0].new_empty(rows, columns, dtype=dtype),)

    def beside(self, t: torch.Tensor) -> tuple:
        return (empty_like(t),)

    def _launchers(self) -> Any:
        return _C.cuda if self.module is None else self.module


def native_backends(
    op: str,
    run: Callable[..., Any],
    refuses: Callable[..., str | None] = why_not,
    cuda_refuses: Callable[..., str | None] = cuda_why_not,
    *,
    counted: bool = False,
) -> tuple[Backend, ...]:
    """`cpu`, one for each ISA level this CPU has (run only when forced), and `cuda`.

    `run(*args, launch=...)` allocates and launches. `cuda` runs unforced where it is validated.
    `counted`: the CPU's launcher returns the FLOPs that it executed.
    """
    levels: list[str] = [] if _C is None else _C.isa_levels()["available"]
    named = {"cpu": "", **{f"cpu:{level}": level for level in levels}}
    on_cpu = [
        Backend(
            name,
            partial(run, launch=Cpu(isa)),
            refuses,
            automatic=not isa,
            executed_flops=partial(_executed, run, isa) if counted else None,
        )
        for name, isa in named.items()
    ]
    on_gpu = partial(run, launch=Cuda())
    return (*on_cpu, Backend("cuda", on_gpu, cuda_refuses, unproven=partial(unvalidated, op)))


def _executed(run: Callable[..., Any], isa: str, *args: Any) -> int:
    """What a call executes, from running it: that depends on masks, level, threads and schedule."""
    executed: list[int] = []
    run(*args, launch=Cpu(isa, executed))
    return sum(executed)


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and statistics are kept in: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_math(t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A small parameter (weight, sink, slopes) in the dtype the kernels do their maths in."""
    if t is None:
        return None
    wide = math_dtype(dtype)
    return dense(t if t.dtype == wide else t.to(wide))


def empty_like(t: torch.Tensor) -> torch.Tensor:
    """Dense in t's shape, dtype and device; half the time of t.new_empty(t.shape)."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def unit_stride(t: torch.Tensor) -> torch.Tensor:
    """`t` itself where its last dimension is dense, which the kernels need, else a copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else dense(t)


def dense(t: torch.Tensor) -> torch.Tensor:
    """`t.contiguous()`, which returns an empty tensor as it is even where its strides are 0."""
    return t.contiguous() if t.numel() else t.new_empty(t.shape)

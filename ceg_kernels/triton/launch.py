"""What all launchers share: which GPU they choose constants for, and the launch itself."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gpu:
    """What the choice of constants depends on."""

    arch: str  # sm_90, gfx942, ...
    warp: int  # threads that run in lockstep
    processors: int  # SMs or compute units

    @property
    def has_descriptors(self) -> bool:
        """Whether a copy engine (TMA: Hopper and later) loads blocks by a tensor's description."""
        return self.arch == "interpreter" or (self.arch[:3] == "sm_" and int(self.arch[3:]) >= 90)


@dataclass(frozen=True)
class Launch:
    """One launch as Triton would have been given it."""

    kernel: Any
    args: tuple
    constants: dict[str, Any]
    warps: int
    stages: int


@dataclass
class Recording:
    gpu: Gpu
    launches: list[Launch] = field(default_factory=list)


_RECORDING: ContextVar[Recording | None] = ContextVar("ceg_triton_recording", default=None)


@contextlib.contextmanager
def record(gpu: Gpu) -> Iterator[list[Launch]]:
    """Launchers called inside choose constants for `gpu` and launch nothing.

    Their launches are appended to the list. Arguments may be meta tensors.
    """
    recording = Recording(gpu)
    token = _RECORDING.set(recording)
    try:
        yield recording.launches
    finally:
        _RECORDING.reset(token)


def gpu_of(t: Tensor) -> Gpu:
    """The GPU that `t` is on; in the interpreter a small one, so that programs share the work."""
    recording = _RECORDING.get()
    if recording is not None:
        return recording.gpu
    if t.device.type == "cpu":
        return Gpu("interpreter", warp=32, processors=2)
    return _properties(t.device.index)


@functools.cache
def _properties(index: int) -> Gpu:
    found = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = found.gcnArchName.partition(":")[0]  # without its features (gfx942:sramecc+:xnack-)
    else:
        arch = f"sm_{found.major}{found.minor}"
    return Gpu(arch, found.warp_size, found.multi_processor_count)


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int = 1, **constants: Any
) -> None:
    """`kernel[grid]` on the device of the first argument, which is not always the current one."""
    if 0 in grid:
        return
    recording = _RECORDING.get()
    if recording is not None:
        recording.launches.append(Launch(kernel, args, constants, warps, stages))
        return
    device = args[0].device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[grid](*args, num_warps=warps, num_stages=stages, **constants)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. (`triton.cdiv` takes 3 us of the host; this is called for every launch.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


def empty_like(t: Tensor) -> Tensor:
    """Dense in t's shape, dtype and device; half the time of t.new_empty(t.shape)."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def unit_stride(t: Tensor) -> Tensor:
    """`t` itself where its last dimension is dense, which the kernels need, else a copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def as_rows(x: Tensor) -> Tensor:
    """(..., D) as (rows, D) with dense rows; a copy only where strides leave no other way."""
    flat = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return unit_stride(flat)

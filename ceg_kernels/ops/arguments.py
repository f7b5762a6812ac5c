"""Checks and conversions that several op declarations need for their arguments."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ceg_kernels import native

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_float(name: str, t: Tensor) -> None:
    if t.dtype not in FLOATS:
        names = ", ".join(map(dtype_name, FLOATS))
        raise TypeError(f"{name} must have dtype in {{{names}}}, got {dtype_name(t.dtype)}")


def check_like(
    name: str, t: Tensor, like: Tensor, shape: Sequence[int], *, dtypes: Sequence[torch.dtype]
) -> None:
    """`t` has this shape, one of these dtypes, and is where `like` is."""
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")
    if t.dtype not in dtypes:
        names = " or ".join(map(dtype_name, dict.fromkeys(dtypes)))
        raise TypeError(f"{name} must have dtype {names}, got {dtype_name(t.dtype)}")
    if t.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {t.device}")


def rows(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def as_rows(x: Tensor) -> Tensor:
    """(..., D) as (rows, D) with dense rows; a copy only where strides leave no other way."""
    return native.unit_stride(x if x.dim() == 2 else x.reshape(rows(x), x.shape[-1]))


def maker(dtype: torch.dtype, device: str) -> Callable[..., Tensor]:
    """A source of normal tensors of this dtype: the same values on every device and every call."""
    key = hashlib.sha256(b"ceg samples").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:6], "little"))

    def make(*shape: int) -> Tensor:
        wide = torch.randn(*shape, generator=generator, dtype=torch.float32)
        return wide.to(dtype).to(device)

    return make

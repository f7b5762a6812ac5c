"""On which device, and in which dtype, this process trains."""

from __future__ import annotations

import os

import torch

from ceg_model import environment


def resolve_device(device: str) -> torch.device:
    """The device of this process; "auto" is the GPU where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = torch.device(device)
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}")
    if resolved.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device must be one that torch can use here, got {device!r}")
        if resolved.index is None:
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # torchrun sets it
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast; "auto" is bf16 where the device has bf16 dot products."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = bool({"avx512_bf16", "amx_bf16", "bf16"} & environment.cpu_flags())
    return torch.bfloat16 if fast else torch.float32

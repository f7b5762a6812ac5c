"""Joules of a GPU, from the counter that it keeps itself. None where nobody counts.

NVML's counter (nvmlDeviceGetTotalEnergyConsumption, in mJ since the driver was loaded; data-centre
GPUs since Volta) is the whole board's: memory and idle power are in it, and so is the work of any
other process on the same GPU. It moves every 20 to 100 ms, so a second or more is asked for at a
time. On a CPU the answer is None: RAPL counts a whole package, with whatever runs beside.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class Meter:
    """The energy counter of one GPU."""

    def __init__(self, nvml: Any, handle: Any):
        self._nvml, self._handle = nvml, handle

    def joules(self) -> float:
        """Since the driver was loaded: only differences mean something."""
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000


def meter(device: torch.device) -> Meter | None:
    """The device's counter; None on a CPU, without nvidia-ml-py, or where the GPU has none."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    # NVML numbers the GPUs of the machine, torch those that CUDA_VISIBLE_DEVICES leaves.
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        pynvml.nvmlInit()
        found = Meter(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid))
        found.joules()
    except pynvml.NVMLError:  # no driver library, a part of a GPU (MIG), or a GPU without counter
        return None
    return found


def joules_per_call(call: Callable[[], Any], meter: Meter, *, seconds: float) -> float:
    """Mean joules of `call`, which must wait for the device, over `seconds` or one call of it."""
    calls, start, began = 0, meter.joules(), time.monotonic()
    while calls == 0 or time.monotonic() - began < seconds:
        call()
        calls += 1
    return (meter.joules() - start) / calls

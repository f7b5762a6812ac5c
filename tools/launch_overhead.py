"""What the host pays for a call of each Triton launcher, measured without a GPU.

    python tools/launch_overhead.py           # a table; --json: one object a line

Kernels are compiled for the GPU named and then launched by a stand-in for Triton's driver that does
nothing, so that what is timed is all that Python does: our launcher, and within it Triton's own
(arguments, specialisation, the look-up of the kernel). Left out are the driver's launch and the
dispatch of PyTorch. Tensors are small ones on the CPU, whose allocator stands for a GPU's cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton

from ceg_kernels.measure.clock import time_interleaved
from ceg_kernels.triton.attention_problem import case
from ceg_kernels.triton.compile import FAMILIES, TARGETS, Target
from ceg_kernels.triton.launch import record

Call = Callable[[], Any]


class Driver:
    """Loads and launches nothing, as if on a GPU of `target`."""

    def __init__(self, target: Target):
        self.get_current_target = lambda: target.triton
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.launcher_cls = lambda source, metadata: lambda *args: None
        self.utils = self

    def load_binary(self, *args: Any) -> tuple[int, ...]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, most threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 20}


@dataclasses.dataclass(frozen=True)
class Overhead:
    call: str
    launches: int
    host_us: float  # median seconds of a call, in microseconds
    triton_us: float  # of them, what its launches take by themselves


def measure(target: Target) -> Iterator[Overhead]:
    """One call after the other; each in turn with its own launches."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels must be compiled, got TRITON_INTERPRET=1: unset it")
    triton.runtime.driver.set_active(Driver(target))
    for family in FAMILIES:  # a CPU tensor means the interpreter to them
        vars(importlib.import_module(f"ceg_kernels.triton.{family}"))["gpu_of"] = lambda t: (
            target.gpu
        )
    for name, call in calls().items():
        with record(target.gpu) as launches:
            call()

        def launch_alone(launches: list[Any] = launches) -> None:
            for one in launches:
                one.kernel[1, 1, 1](
                    *one.args, num_warps=one.warps, num_stages=one.stages, **one.constants
                )

        timed = time_interleaved({"whole": call, "triton": launch_alone})
        whole, alone = (1e6 * timed[key].median_s for key in ("whole", "triton"))
        yield Overhead(name, len(launches), whole, alone)


def calls() -> dict[str, Call]:
    """Name -> a call of a launcher on bf16 tensors."""
    from ceg_kernels.triton import attention, attention_backward, rms_norm, rope

    def on_cpu(args: tuple) -> tuple:
        return tuple(torch.zeros_like(a, device="cpu") if torch.is_tensor(a) else a for a in args)

    args, one_query = on_cpu(case(1, 128, 4, 4, 64)), on_cpu(case(1, 128, 4, 4, 64, queries=1))
    q, k, v, *more = args
    lse = torch.zeros(1, 4, 128)
    x, weight = torch.zeros(64, 768, dtype=q.dtype), torch.zeros(768)
    angles = torch.zeros(128, 32)
    return {
        "rms_norm": lambda: rms_norm.forward(x, weight, None, 1e-6, 0.0),
        "rope": lambda: rope.rope(q, k, angles, angles, None, False, False),
        "attention": lambda: attention.forward(*args),
        "attention, one query": lambda: attention.forward(*one_query),
        "attention backward": lambda: attention_backward.backward(q, None, q, k, v, q, lse, *more),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", choices=list(TARGETS), default="sm_90")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    for row in measure(TARGETS[arguments.target]):
        if arguments.json:
            print(json.dumps(dataclasses.asdict(row)))
        else:
            print(
                f"{row.call:22} {row.launches} launches  {row.host_us:6.1f} us a call, "
                f"{row.triton_us:6.1f} of them in Triton"
            )


if __name__ == "__main__":
    main()

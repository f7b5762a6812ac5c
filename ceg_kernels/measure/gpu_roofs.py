"""A GPU's registers and memory at work (`csrc/cuda/roofs.cu`), as calls for the clock.

What multiplies depends on the dtype: `mma.sync.m16n8k16` with fp32 sums in bf16 and fp16, the only
tensor-core instruction of sm_80, which sm_90 still has but at a lower rate than its own `wgmma`; a
fused multiply-add in fp32 and fp64. Data is random: a GPU's clocks rise on zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ceg_kernels.native import Cuda, cuda_why_not

# About a millisecond on an A100 or H100, so that starting the blocks is within 1% of it.
ROUNDS = {"float32": 16384, "float64": 16384, "bfloat16": 4096, "float16": 4096}
# By instruction, as `Roofs.flops_source` names it.
SOURCE = {"float32": "fma", "float64": "fma", "bfloat16": "mma.sync", "float16": "mma.sync"}
_CHAINS, _TILE = 16, ((16, 16), (16, 64))  # of csrc/cuda/roofs.cu


def multiply(
    dtype: str, device: str = "cuda", *, launch: Cuda | None = None, rounds: int | None = None
) -> Callable[[], float]:
    """A call that fills the GPU once and returns the FLOPs that it does (a multiply-add is 2).

    dtype: a key of `ROUNDS`; `rounds` counts, in multiples of 16, how often each chain multiplies.
    """
    launch = launch or Cuda()
    rounds = rounds or ROUNDS[dtype]
    kind = getattr(torch, dtype)
    generator = torch.Generator(device=device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(kind)

    sums = torch.float32 if SOURCE[dtype] == "mma.sync" else kind
    out = torch.empty(launch.threads(), device=device, dtype=sums)
    if SOURCE[dtype] == "mma.sync":
        a, b = (random(*shape) for shape in _TILE)
        return lambda: launch("roofs_mma", a, b, out, rounds)
    start = random(_CHAINS)
    # x, addend - x, x, ...: stays where it is, and every bit of it changes with every round.
    return lambda: launch("roofs_fma", start, out, -1.0, 0.7390851, rounds)


def copy(
    source: torch.Tensor, target: torch.Tensor, *, launch: Cuda | None = None
) -> Callable[[], None]:
    """A call that copies `source` into `target` (both 1-D, whole vectors of 16 bytes)."""
    launch = launch or Cuda()
    return lambda: launch("roofs_copy", source, target)


def why_not(device: str = "cuda") -> str | None:
    """Why these kernels cannot run there, or None."""
    return cuda_why_not(torch.empty(0, device=device))

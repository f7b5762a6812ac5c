"""Some small samples of the ops named, by their CUDA kernels: what compute-sanitizer watches.

    compute-sanitizer --tool racecheck python tools/small_grid.py rope moe_route

Samples are made on the CPU, so that next to nothing but our kernels is instrumented.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from ceg_kernels import OPS

LARGEST = 80_000  # elements of a sample's largest tensor: a sanitizer is some 100 times slower


def run(ops: Sequence[str], device: str = "cuda") -> int:
    """Runs what is watched in each dtype; the number of samples that ran."""
    count = 0
    for name in ops:
        backend = OPS[name].backend("cuda")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for args in watched(name, dtype):
                moved = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)
                if backend.why_not(*moved) is None:
                    backend.run(*moved)
                    count += 1
        if device == "cuda":
            torch.cuda.synchronize()
    return count


def watched(op: str, dtype: torch.dtype) -> list[tuple]:
    """Every third small sample, and those with the longest rows and with most keys a query: kernels
    have tiles for the ones, and others decode."""
    samples = [s.args for s in OPS[op].samples(dtype, "cpu") if _size(s.args) <= LARGEST]
    longest = max(range(len(samples)), key=lambda i: longest_row(samples[i], dtype))
    decoding = max(range(len(samples)), key=lambda i: keys_a_query(samples[i]))
    return [samples[i] for i in sorted({*range(0, len(samples), 3), longest, decoding})]


def longest_row(args: tuple, dtype: torch.dtype) -> int:
    rows = (a for a in args if isinstance(a, torch.Tensor) and a.dtype == dtype and a.dim() > 1)
    return max((a.shape[-1] for a in rows), default=0)


def keys_a_query(args: tuple) -> float:
    lengths = [a.shape[1] for a in args if isinstance(a, torch.Tensor) and a.dim() == 4]
    return max(lengths) / min(lengths) if lengths and min(lengths) else 0


def _size(args: tuple) -> int:
    return max(a.numel() for a in args if isinstance(a, torch.Tensor))


if __name__ == "__main__":
    ran = run(sys.argv[1:])
    print(f"{ran} samples of {', '.join(sys.argv[1:])}")
    sys.exit(0 if ran else 1)

"""Our kernels and torch's matmuls in turn: neither may slow the other down.

    pytest bench/bench_alternating.py --benchmark

In a training step every kernel stands between two matmuls. Two thread pools, tile registers that
are set up anew or denormals left switched off would show here and nowhere else. The claim needs a
machine without other work; without `--benchmark` the bodies only run. All operands fit into the
second-level cache together: what one evicts of the other's is not at issue.
"""

from __future__ import annotations

import pytest
import torch

from ceg_kernels import flash_attention, rms_norm
from ceg_kernels.measure.clock import time_interleaved

ALLOWED = 1.05  # of the sum of both alone


def attention(dtype: torch.dtype):
    q, k, v = (torch.randn(1, 512, 4, 64).to(dtype) for _ in range(3))
    return lambda: flash_attention(q, k, v, causal=True)


def norm(dtype: torch.dtype):
    x, weight = torch.randn(512, 512).to(dtype), torch.ones(512)
    return lambda: rms_norm(x, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make", [attention, norm], ids=["attention", "rms_norm"])
def test_alternating_with_a_matmul(make, dtype, benchmark):
    ours = make(dtype)
    a, b = torch.randn(384, 384).to(dtype), torch.randn(384, 384).to(dtype)

    def matmul():
        return a @ b

    def both():
        ours()
        matmul()

    if benchmark.disabled:
        benchmark.pedantic(both)
        return
    timed = time_interleaved(
        {"ours": ours, "matmul": matmul, "both": both}, min_time_s=1.0, min_rounds=40
    )
    alone = timed["ours"].median_s + timed["matmul"].median_s
    ratio = timed["both"].median_s / alone
    benchmark.extra_info["both_over_alone"] = ratio
    benchmark.pedantic(both, rounds=20)
    assert ratio <= ALLOWED

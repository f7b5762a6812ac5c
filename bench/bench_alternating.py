"""Our kernels and torch's matmuls in turn: neither may slow the other down.

    pytest bench/bench_alternating.py --benchmark

In a training step every kernel stands between two matmuls. Two thread pools, tile registers that
are set up anew or denormals left switched off would show here and nowhere else. The sizes are those
of a step of 10M parameters (B 8, T 512, six heads of 64). Every call takes the next of several sets
of operands, and alone there are more sets than in turn: being alone does not mean to find one's own
operands in the cache, where a matmul between would have pushed them out. A stock op stands beside
ours, to compare; the bound is on ours alone. The claim needs a machine without other work; without
`--benchmark` the bodies only run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ceg_kernels.measure import memory
from ceg_kernels.measure.clock import time_interleaved

_C = pytest.importorskip("ceg_kernels._C", reason="the native module is not built")

ALLOWED = 0.05  # of the sum of both alone
SETS = 8  # of operands
BATCH, LENGTH, HEADS, HEAD_DIM = 8, 512, 6, 64
ROWS, WIDTH = BATCH * LENGTH, HEADS * HEAD_DIM

Call = Callable[[], object]


# Ours, a stock op on as much memory, and how much. Outputs are there before: no allocator at issue.
def attention(dtype: torch.dtype) -> tuple[Call, Call, int]:
    q, k, v = (torch.randn(BATCH, LENGTH, HEADS, HEAD_DIM).to(dtype) for _ in range(3))
    out, lse = torch.empty_like(q), torch.empty(BATCH, HEADS, LENGTH)
    tail = None, None, LENGTH, LENGTH, None, None, out, lse, HEAD_DIM**-0.5, True, -1, -1, 0.0
    heads_first = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    return (
        lambda: _C.attention_fwd(q, k, v, *tail, threads=torch.get_num_threads()),
        lambda: F.scaled_dot_product_attention(*heads_first, is_causal=True),
        sum(t.nbytes for t in (q, k, v, out)),
    )


def norm(dtype: torch.dtype) -> tuple[Call, Call, int]:
    x, weight, rstd = torch.randn(ROWS, WIDTH).to(dtype), torch.ones(WIDTH), torch.empty(ROWS)
    tail = None, torch.empty_like(x), None, rstd, 1e-6
    stock = torch.empty_like(x)
    return (
        lambda: _C.rms_norm_fwd(x, weight, *tail, threads=torch.get_num_threads()),
        lambda: torch.neg(x, out=stock),
        x.nbytes + stock.nbytes,
    )


def matmul(dtype: torch.dtype) -> tuple[Call, int]:
    """The first of a feed-forward layer, and on how much memory."""
    a, b = torch.randn(ROWS, WIDTH).to(dtype), torch.randn(WIDTH, 4 * WIDTH).to(dtype)
    out = torch.empty(ROWS, 4 * WIDTH, dtype=dtype)
    return lambda: torch.mm(a, b, out=out), a.nbytes + b.nbytes + out.nbytes


def in_turn(first: Sequence[Call], second: Sequence[Call]) -> list[Call]:
    def both(one: Call, other: Call) -> Call:
        def run() -> None:
            one()
            other()

        return run

    return [both(one, other) for one, other in zip(first, second, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make", [attention, norm], ids=["attention", "rms_norm"])
def test_alternating_with_a_matmul(make, dtype, benchmark):
    one, stock_one, bytes_of_one = make(dtype)
    multiply, bytes_of_matmul = matmul(dtype)
    if benchmark.disabled:
        for call in in_turn([one, stock_one], [multiply] * 2):
            call()
        benchmark.pedantic(one)
        return
    memory.prepare()
    # Alone, a set of operands comes again after as many bytes of others as in turn.
    passed = SETS * (bytes_of_one + bytes_of_matmul)
    pairs = [make(dtype) for _ in range(math.ceil(passed / bytes_of_one))]
    ours, stock = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    matmuls = [matmul(dtype)[0] for _ in range(math.ceil(passed / bytes_of_matmul))]
    with_ours = in_turn(ours[:SETS], matmuls[:SETS])
    calls = {
        "with_ours": with_ours, "ours": ours,
        "with_stock": in_turn(stock[:SETS], matmuls[:SETS]), "stock": stock, "matmul": matmuls,
    }  # fmt: skip
    timed = time_interleaved(calls, min_time_s=1.0, min_rounds=30)
    # Round by round: what slows the machine for a while slows all of them.
    samples = {name: np.array(timed[name].samples) for name in calls}
    alone = samples["ours"] + samples["matmul"]
    more = np.median((samples["with_ours"] - alone) / alone)
    stock_alone = samples["stock"] + samples["matmul"]
    stock_more = np.median((samples["with_stock"] - stock_alone) / stock_alone)
    benchmark.extra_info["more_of_alone"] = float(more)
    benchmark.extra_info["stock_more_of_alone"] = float(stock_more)
    benchmark.pedantic(with_ours[0], rounds=20)
    assert more <= ALLOWED, f"in turn ours costs {more:.1%} more, a stock op {stock_more:.1%}"

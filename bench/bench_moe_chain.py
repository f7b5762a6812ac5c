"""Ops as they are used: a mixture's routing from end to end.

    pytest bench/bench_moe_chain.py --benchmark --peers torch,reference,eager

The rows of single ops say what a kernel does; these say what is left of it in use. A chain costs
the sum of what its ops declare.
"""

from __future__ import annotations

import pytest
import torch

from ceg_kernels import OPS, moe_combine, moe_dispatch, moe_route, use_backend
from ceg_kernels.measure import peers
from ceg_kernels.measure.accuracy import error_fraction
from ceg_kernels.measure.run import LOOSE
from ceg_kernels.measure.suite import STOCK
from ceg_kernels.op import Cost

MOE_SHAPES = {  # tokens, experts, top_k, D
    "quick-n2048-e16-k2-d512": (2048, 16, 2, 512),
    "moe-n4096-e128-k8-d2048": (4096, 128, 8, 2048),
}
DTYPES = (torch.float32, torch.bfloat16)


def moe_public(x, logits, top_k):
    routing = moe_route(logits, top_k)
    rows, plan = moe_dispatch(x, routing)
    return moe_combine(rows, plan, routing.weights)


def moe_formula(x, logits, top_k):
    """argsort, index_select and index_add_, as models have it."""
    weights, ids, _ = peers.moe_route(logits, None, top_k, "softmax", True)
    slots, sources, _ = peers.moe_index(ids, logits.shape[1], -1)
    rows = peers.moe_dispatch(x, sources, slots)
    return peers.moe_combine(rows, slots, sources, weights)


def moe_cost(x, logits, top_k) -> Cost:
    weights, ids, _ = OPS["moe_route"](logits, None, top_k, "softmax", True)
    slots, sources, _ = OPS["moe_index"](ids, logits.shape[1], -1)
    parts = (
        OPS["moe_route"].cost(logits, None, top_k, "softmax", True),
        OPS["moe_index"].cost(ids, logits.shape[1], -1),
        OPS["moe_dispatch"].cost(x, sources, slots),
        OPS["moe_combine"].cost(x.new_empty(ids.numel(), x.shape[1]), slots, sources, weights),
    )
    return Cost(sum(p.flops for p in parts), sum(p.bytes for p in parts))


def with_backend(name: str, run):
    def call():
        with use_backend(name):
            return run()

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", MOE_SHAPES)
def test_moe(shape, dtype, device, ours, benchmark, report, request):
    n, experts, top_k, width = MOE_SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, width, generator=generator).to(device, dtype)
    logits = torch.randn(n, experts, generator=generator).to(device, dtype)
    calls = {ours: with_backend(ours, lambda: moe_public(x, logits, top_k))}
    if benchmark.disabled:
        benchmark.pedantic(calls[ours])
        return
    for name in filter(None, request.config.getoption("peers").split(",")):
        if name in STOCK:
            calls[name] = with_backend(name, lambda: moe_public(x, logits, top_k))
        elif name in ("eager", "compile", "loop"):
            formula = peers.moe_loop if name == "loop" else moe_formula
            formula = torch.compile(formula) if name == "compile" else formula
            calls[name] = lambda formula=formula: formula(x, logits, top_k)
    with use_backend("reference"):
        gold = moe_public(x.double(), logits.double(), top_k)
        base = moe_public(x.float(), logits.float(), top_k)
    for name, call in calls.items():
        off = error_fraction(call(), gold, base, OPS["moe_combine"].slack)
        assert off <= (1 if name in (ours, *STOCK) else LOOSE), f"{name}: {off:.2g}"
    report("moe_chain", "fwd", shape, dtype, calls, moe_cost(x, logits, top_k), 20.0)
    benchmark.pedantic(calls[ours], rounds=3)

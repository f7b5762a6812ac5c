"""A whole mixture-of-experts layer, forward and backward: what routing costs beside its experts.

    pytest bench/bench_moe_layer.py --benchmark --peers torch,reference,eager,loop

Router, SwiGLU experts and all between them, as `ceg_kernels.nn.MoE` has it, on our backends and on
those of the peers. "eager" is a sort, torch's grouped matmul and index_add_; "loop" one expert
after the other, as Hugging Face's eager mixtures. FLOPs are what FlopCounterMode counts over our
layer.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ceg_kernels import OPS, nn, use_backend
from ceg_kernels.measure import peers
from ceg_kernels.measure.accuracy import error_fraction
from ceg_kernels.measure.run import LOOSE
from ceg_kernels.measure.suite import STOCK
from ceg_kernels.op import Cost

SHAPES = {  # tokens, experts, top_k, D, width of an expert
    "quick-n2048-e16-k2-d512-f512": (2048, 16, 2, 512, 512),
    "moe-n2048-e64-k6-d1024-f512": (2048, 64, 6, 1024, 512),
}
DTYPES = (torch.float32, torch.bfloat16)


def eager_layer(layer: nn.MoE, x: torch.Tensor) -> torch.Tensor:
    logits, experts = layer.gate(x), layer.experts
    weights, ids, _ = peers.moe_route(logits, None, layer.top_k, "softmax", True)
    slots, sources, offsets = peers.moe_index(ids, logits.shape[1], -1)
    rows, ends = peers.moe_dispatch(x, sources, slots), offsets[1:].int()
    gate, up = F.grouped_mm(rows, experts.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, -1)
    y = F.grouped_mm(F.silu(gate) * up, experts.down_proj.transpose(1, 2), offs=ends)
    return peers.moe_combine(y, slots, sources, weights)


def loop_layer(layer: nn.MoE, x: torch.Tensor) -> torch.Tensor:
    experts = layer.experts
    weights, ids, counts = peers.moe_route(layer.gate(x), None, layer.top_k, "softmax", True)
    out = torch.zeros_like(x)
    for expert in counts.nonzero().flatten().tolist():
        tokens, choices = torch.where(ids == expert)
        gate, up = F.linear(x[tokens], experts.gate_up_proj[expert]).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, experts.down_proj[expert])
        out.index_add_(0, tokens, y * weights[tokens, choices].unsqueeze(-1).to(y.dtype))
    return out


FORMULAS = {"eager": eager_layer, "loop": loop_layer}


def training(layer: nn.MoE, x: torch.Tensor, dout: torch.Tensor, name: str):
    """One forward and backward of the layer by that backend or peer; returns out and gradients."""
    run = FORMULAS.get(name, nn.MoE.__call__)
    leaves = [x, *layer.parameters()]

    def call():
        with use_backend(None if name in FORMULAS else name):
            out = run(layer, x)
            return out.detach(), torch.autograd.grad(out, leaves, dout)

    return call


def in_precision(layer: nn.MoE, x: torch.Tensor, dout: torch.Tensor, dtype: torch.dtype):
    """Out and gradients of the reference in another dtype: what the accuracy rule asks for."""
    layer = copy.deepcopy(layer).to(dtype)
    x = x.detach().to(dtype).requires_grad_(True)
    out, grads = training(layer, x, dout.to(dtype), "reference")()
    return out, *grads


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES)
def test_moe_layer(shape, dtype, device, ours, benchmark, report, request):
    group = request.config.getoption("--shapes")
    if not shape.startswith("quick") and group not in ("moe", "all"):
        pytest.skip("--shapes moe runs it")
    n, experts, top_k, dim, width = SHAPES[shape]
    torch.manual_seed(0)
    layer = nn.MoE(dim, width, experts, top_k).to(device, dtype)
    x, dout = (torch.randn(n, dim).to(device, dtype) for _ in range(2))
    x.requires_grad_(True)
    if benchmark.disabled:
        benchmark.pedantic(training(layer, x, dout, ours))
        return
    asked = request.config.getoption("peers").split(",")
    names = (ours, *(name for name in asked if name in STOCK or name in FORMULAS))
    calls = {name: training(layer, x, dout, name) for name in names}
    golds, bases = (in_precision(layer, x, dout, t) for t in (torch.float64, torch.float32))

    def errors(call) -> list[float]:
        out, grads = call()
        return [
            error_fraction(one, gold, base, OPS["moe_combine"].slack)
            for one, gold, base in zip((out, *grads), golds, bases, strict=True)
        ]

    # The layer itself rounds between its steps: on the reference it may err more than one op may.
    allowed = [max(1.0, 1.1 * off) for off in errors(training(layer, x, dout, "reference"))]
    for name, call in calls.items():
        for off, most in zip(errors(call), allowed, strict=True):
            assert off <= (LOOSE if name in FORMULAS else most), f"{name}: {off:.2g}"
    with FlopCounterMode(display=False) as counter:
        layer(x).backward(dout)  # not a call of `calls`: its hooks do not know autograd.grad
    layer.zero_grad()
    report("moe_layer", "fwd_bwd", shape, dtype, calls, Cost(counter.get_total_flops(), 0), 10.0)
    benchmark.pedantic(calls[ours], rounds=3)

"""The CPU kernels at the edges: long sequences, memory, denormals, NaN and infinity."""

import math
import subprocess
import sys
import time

import pytest
import torch

from ceg_kernels.measure.accuracy import compare
from ceg_kernels.ops.attention import ATTENTION, ATTENTION_BACKWARD
from ceg_kernels.ops.attention_reference import reference

_C = pytest.importorskip("ceg_kernels._C", reason="the native module is not built")

LEVELS = _C.isa_levels()["available"]
TWO_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def run_attention(q, k, v, dout, *, threads, isa):
    tail = None, None, q.shape[1], k.shape[1], None, None
    flags = q.shape[-1] ** -0.5, True, -1, -1, 0.0
    out, lse = torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1])
    _C.attention_fwd(q, k, v, *tail, out, lse, *flags, threads, isa)
    grads = [torch.empty_like(t) for t in (q, k, v)]
    _C.attention_bwd(
        dout, None, q, k, v, out, lse, *tail, *grads, None, *flags, threads, isa
    )  # fmt: skip
    return out, lse, *grads


# ---- long sequences ------------------------------------------------------------------------


def check_long(q, k, v, dout, isa):
    rest = None, None, q.shape[1], k.shape[1], None, None, q.shape[-1] ** -0.5, True, -1, -1, 0.0
    out, lse, *grads = run_attention(q, k, v, dout, threads=2, isa=isa)
    assert compare(ATTENTION, (out, lse), (q, k, v, *rest)) <= 1
    gold, gold_lse = reference(*(t.double() for t in (q, k, v)), *rest)
    args = dout, None, q, k, v, gold.to(q.dtype), gold_lse.float(), *rest
    out, lse = args[5:7]
    _C.attention_bwd(
        dout, None, q, k, v, out, lse, *rest[:6], *grads, None, *rest[6:], 2, isa
    )  # fmt: skip
    assert compare(ATTENTION_BACKWARD, (*grads, torch.empty(0)), args) <= 1


@TWO_DTYPES
@pytest.mark.parametrize("isa", LEVELS)
def test_the_last_queries_of_16k(isa, dtype):
    # 64 of 16,384 queries: the reference materialises what is left.
    q, dout = (normal(1, 64, 2, 32, dtype=dtype, seed=i) for i in range(2))
    k, v = (normal(1, 16384, 1, 32, dtype=dtype, seed=i) for i in range(2))
    check_long(q, k, v, dout, isa)


@TWO_DTYPES
def test_all_of_4k(dtype):
    q, k, v, dout = (normal(1, 4096, 1, 32, dtype=dtype, seed=i) for i in range(4))
    check_long(q, k, v, dout, "")


# ---- memory --------------------------------------------------------------------------------

RSS = """
import resource, torch
from ceg_kernels import flash_attention
torch.set_num_threads(2)
def make(t):
    return [torch.ones(1, t, 1, 64, dtype=torch.{dtype}) for _ in range(4)]
def train(q, k, v, dout):
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    out = flash_attention(q, k, v, causal=True)
    out.backward(dout)
    return out, q.grad, k.grad, v.grad
train(*make(256))  # what every process pays once
inputs = make(16384)
outputs = {work}
bytes = sum(t.nbytes for t in [*inputs, *outputs]) + 16384 * 4  # and lse
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, bytes)
"""


def peak_rss(dtype, work):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RSS.format(dtype=dtype, work=work)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_at_16k_needs_little_beside_its_tensors(dtype):
    alone, nbytes = peak_rss(dtype, "[t + 1 for t in inputs]")  # as many as the work leaves
    peak, same = peak_rss(dtype, "train(*inputs)")
    assert nbytes == same
    assert peak - alone <= 0.2 * nbytes


# ---- pointwise kernels ---------------------------------------------------------------------


def pointwise(dtype, size, isa):
    """name -> (run(), the input that was filled with `size` normal numbers, its output)."""
    one = {"threads": 1, "isa": isa}
    x, dy, heads = (normal(*s, dtype=dtype) * size for s in ((64, 512), (64, 512), (1, 64, 2, 64)))
    weight, rstd = torch.ones(512), torch.ones(64)
    y, dx, turned = torch.empty_like(x), torch.empty_like(x), torch.empty_like(heads)
    cos, sin = (normal(64, 32, seed=i) for i in (1, 2))
    slots = torch.arange(64, dtype=torch.int32).reshape(32, 2)
    weights, combined = torch.ones(32, 2), torch.empty(32, 512, dtype=dtype)
    dweights, rows = torch.empty(32, 2), torch.empty_like(x)
    return {
        "rms_norm": (lambda: _C.rms_norm_fwd(x, weight, None, y, None, rstd, 1e-6, **one), x, y),
        "rms_norm_bwd": (
            lambda: _C.rms_norm_bwd(
                dy, None, x, weight, rstd, dx, torch.empty(512), 0.0, **one
            ), x, dx,
        ),
        "rope": (
            lambda: _C.rope(heads, None, cos, sin, None, turned, None, False, **one),
            heads, turned,
        ),
        "moe_combine": (lambda: _C.moe_combine(x, slots, weights, combined, **one), x, combined),
        "moe_combine_bwd": (
            lambda: _C.moe_combine_bwd(
                dy[:32], x, slots.flatten(), slots, weights, rows, dweights, **one
            ), x, rows,
        ),
    }  # fmt: skip


def attention(dtype, size, isa):
    q, k, v, dout = (normal(1, 160, 2, 64, dtype=dtype, seed=i) * size for i in range(4))
    return {"attention": (lambda: run_attention(q, k, v, dout, threads=1, isa=isa), q, None)}


def cpu_seconds(run):
    start = time.thread_time()
    for _ in range(5):
        run()
    return time.thread_time() - start


@TWO_DTYPES
@pytest.mark.parametrize("isa", LEVELS)
def test_denormals_cost_no_more_than_three_times_a_normal_number(isa, dtype):
    # The least of some rounds in turn: CPU time on this thread, other processes only add to it.
    cases = [pointwise(dtype, size, isa) | attention(dtype, size, isa) for size in (1.0, 1e-39)]
    for name in cases[0]:
        ordinary, tiny = (case[name] for case in cases)
        assert 0 < tiny[1].abs().max() < torch.finfo(torch.float32).tiny
        rounds = [(cpu_seconds(ordinary[0]), cpu_seconds(tiny[0])) for _ in range(8)]
        assert min(t for _, t in rounds) <= 3 * min(t for t, _ in rounds), name


@TWO_DTYPES
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("isa", LEVELS)
def test_bad_values_stay_where_they_belong(isa, bad, dtype):
    # Row 7, column 5: its row for the norm, its pair for rope, its token's column for combine.
    for name, (run, x, out) in pointwise(dtype, 1.0, isa).items():
        run()
        clean = out.clone()
        spot = x[0, 7, 1] if x.dim() == 4 else x[7]
        spot[5] = bad
        run()
        touched = torch.zeros_like(out, dtype=torch.bool)
        if name == "rope":
            touched[0, 7, 1, [5, 37]] = True
        elif name == "moe_combine":
            touched[3, 5] = True
        elif name != "moe_combine_bwd":  # whose y reaches dweights only
            touched[7] = True
        assert torch.equal(out[~touched], clean[~touched]), name
        if name == "rms_norm" and math.isinf(bad):  # x / inf, and inf / inf
            others = [c for c in range(512) if c != 5]
            assert (out[7, others] == 0).all()
            assert out[7, 5].isnan()
        elif name == "moe_combine":
            assert torch.equal(out[3, 5].isnan(), torch.tensor(math.isnan(bad)))
            assert math.isnan(bad) or out[3, 5] == bad
        else:
            assert not out[touched].isfinite().any(), name

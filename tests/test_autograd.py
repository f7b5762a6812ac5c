"""Gradients of the public functions: fp64 gradcheck through the C++ kernels, the wiring of the
backward ops, autocast, and torch.compile without a graph break.

Upstream gradients are random everywhere: `.sum().backward()` cannot see errors that sum to zero.
"""

import itertools

import pytest
import torch
from devices import forced, on_each_device
from numerics import as_tuple
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from ceg_kernels import (
    OPS,
    Routing,
    flash_attention,
    flash_attention_varlen,
    moe_combine,
    moe_dispatch,
    moe_route,
    rms_norm,
    rope,
    rope_table,
    triton,
    use_backend,
)
from ceg_kernels.measure.accuracy import (
    EAGER_SLACK,
    FP32_REDUCTION_SLACK,
    _off_by_half_an_ulp,
    error_fraction,
    promote,
)
from ceg_kernels.ops import arguments


def _randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _moe(x, logits, bias=None, score="softmax", capacity=None):
    routing = moe_route(logits, 2, bias=bias, score=score)
    rows, plan = moe_dispatch(x, routing, capacity=capacity)
    return moe_combine(torch.tanh(rows), plan, routing.weights)


def _moe_of_another_router(x, logits):
    weights, ids = logits.softmax(-1).topk(2)
    routing = Routing.of(weights, ids, logits.shape[1])
    rows, plan = moe_dispatch(x, routing)
    return moe_combine(torch.tanh(rows), plan, routing.weights)


def _packed(q, k, v):
    # No row sees nothing: its lse of -inf has no numerical derivative.
    cu_q = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    cu_k = torch.tensor([0, 2, 3, 7], dtype=torch.int32)
    return flash_attention_varlen(q, k, v, cu_q, cu_k, 3, 4, causal=True, return_lse=True)


def _cases():
    table = [t.double() for t in rope_table(8, 4)]
    # Small: gradcheck calls the function twice per input element.
    q, k, v = _randn(1, 3, 2, 3), _randn(1, 5, 1, 3, seed=1), _randn(1, 5, 1, 3, seed=2)
    slopes = torch.tensor([0.3, 0.7], dtype=torch.float64)
    x, w = _randn(3, 6), _randn(6)
    yield "rms_norm", rms_norm, (x, w)
    yield "rms_norm no weight", rms_norm, (x,)
    yield "rms_norm residual", lambda x, r, w: rms_norm(x, w, residual=r), (x, _randn(3, 6), w)
    yield "rms_norm offset", lambda x, w: rms_norm(x, w, weight_offset=1.0), (x, w)
    yield "rope", lambda q, k: rope(q, k, *table), (_randn(1, 4, 2, 6), _randn(1, 4, 1, 6))
    yield (
        "rope and its table",
        lambda q, k: rope(q, k, *rope_table(4, 6)),
        (_randn(1, 4, 2, 6), _randn(1, 4, 1, 6)),
    )
    yield (
        "rope interleaved at positions",
        lambda q, k: rope(
            q, k, *table, positions=torch.arange(4).view(1, 4) * 5 % 8, interleaved=True
        ),
        (_randn(1, 4, 2, 6), _randn(1, 4, 1, 6)),
    )
    yield "attention", lambda *a: flash_attention(*a, return_lse=True), (q, k, v)
    yield "attention causal", lambda *a: flash_attention(*a, causal=True), (q, k, v)
    yield "attention window", lambda *a: flash_attention(*a, window=(2, 1)), (q, k, v)
    yield "attention softcap", lambda *a: flash_attention(*a, softcap=1.5), (q, k, v)
    yield "attention alibi", lambda *a: flash_attention(*a, alibi_slopes=slopes), (q, k, v)
    yield (
        "attention sink",
        lambda q, k, v, s: flash_attention(q, k, v, sink=s, causal=True, return_lse=True),
        (q, k, v, _randn(2)),
    )
    packed = _randn(5, 2, 3), _randn(7, 1, 3), _randn(7, 1, 3, seed=3)
    yield "attention varlen", _packed, packed
    yield "moe softmax", _moe, (_randn(6, 4), _randn(6, 3))
    yield "moe sigmoid", lambda x, z: _moe(x, z, score="sigmoid"), (_randn(6, 4), _randn(6, 3))
    yield "moe capacity", lambda x, z: _moe(x, z, capacity=2), (_randn(6, 4), _randn(6, 3))
    yield "moe of another router", _moe_of_another_router, (_randn(6, 4), _randn(6, 3))
    yield (
        "moe bias",
        lambda x, z: _moe(x, z, bias=torch.tensor([0.5, 0.0, -0.5], dtype=z.dtype)),
        (_randn(6, 4), _randn(6, 3)),
    )


def _grid(backends):
    for (name, call, inputs), backend in itertools.product(_cases(), backends):
        family = [op for op in OPS.values() if op.name.startswith(name.split()[0])]
        has = all(backend in [b.name for b in op.backends] for op in family)
        if has and not (backend == "torch" and "softcap" in name):  # which stock torch has not
            yield pytest.param(call, inputs, backend, id=f"{name}-{backend}")


# `cpu` is the best level; those between are held to the fp64 reference in test_ops.py.
CHECKED = ("cpu", "cpu:portable", "torch", "reference")


@pytest.mark.parametrize(("call", "inputs", "backend"), list(_grid(CHECKED)))
def test_gradcheck(call, inputs, backend):
    with use_backend(backend):
        assert gradcheck(call, [t.clone().requires_grad_() for t in inputs], atol=1e-7)


# exp(score - lse) of scores that 16 bits hold to within 16 is any number.
CHAOTIC = ("huge logits",)


@on_each_device
@pytest.mark.parametrize(
    "op", [op for op in OPS.values() if op.backward is not None], ids=lambda op: op.name
)
def test_gradients_are_those_of_the_formula(op, device, backend):
    """Every third sample through the op's own forward and backward, which round to 16 bits between
    them for attention: held to the rule for that, the others to the rule for sums in fp32."""
    attention = op.name == "attention"
    dtype = torch.bfloat16 if attention else torch.float32
    ran = 0
    for sample in list(op.samples(dtype, device))[::3]:
        if sample.name in CHAOTIC or op.backend(backend).why_not(*sample.args) is not None:
            continue
        ran += 1
        make = arguments.maker(dtype, device)
        upstream = [make(*out.shape).to(out.dtype) for out in _differentiable(op, sample.args)]
        held = (sample.args, upstream)
        ours = _gradients(op, *held, backend)
        gold = _gradients(op, *(promote(tuple(a), torch.float64) for a in held), "reference")
        alike = _off_by_half_an_ulp if attention else lambda a: promote(a, torch.float32)
        base = _gradients(op, *(alike(tuple(a)) for a in held), "reference")
        slack = EAGER_SLACK if attention else FP32_REDUCTION_SLACK
        assert len(ours) == len(gold) > 0
        for our, true, near in zip(ours, gold, base, strict=True):
            worst = error_fraction(our, true, near, slack)
            assert worst <= 1, f"{sample.name}: error is {worst:.2f} times what the rule allows"
    assert ran


def _differentiable(op, args):
    """The outputs that hand a gradient on."""
    leaves = [a.detach().requires_grad_() if _floats(a) else a for a in args]
    with use_backend("reference"):
        return [out for out in as_tuple(op(*leaves)) if out.requires_grad]


def _gradients(op, args, upstream, backend):
    leaves = [a.detach().requires_grad_() if _floats(a) else a for a in args]
    with use_backend(backend):
        outs = [out for out in as_tuple(op(*leaves)) if out.requires_grad]
        wanted = [leaf for leaf in leaves if _floats(leaf)]
        grads = torch.autograd.grad(outs, wanted, list(upstream), allow_unused=True)
    return [grad for grad in grads if grad is not None]


def _floats(a):
    return isinstance(a, torch.Tensor) and a.is_floating_point()


COMPILED = ["cpu", "torch", "reference"]
if triton.MISSING is None and triton.INTERPRETED:
    COMPILED.append("triton")


@pytest.mark.parametrize(("call", "inputs", "backend"), list(_grid(COMPILED)))
def test_compiles_without_a_graph_break_to_the_same_numbers(call, inputs, backend):
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    eager_in = [t.float().requires_grad_() for t in inputs]
    compiled_in = [t.float().requires_grad_() for t in inputs]
    with use_backend(backend):
        eager, out = _flat(call(*eager_in)), _flat(compiled(*compiled_in))
        grads = [torch.randn_like(o) for o in eager]
        torch.autograd.backward(eager, grads)
        torch.autograd.backward(out, grads)
    for a, b in zip((*eager, *eager_in), (*out, *compiled_in), strict=True):
        torch.testing.assert_close(a, b)
        if a.is_leaf:
            torch.testing.assert_close(a.grad, b.grad)


@on_each_device
def test_compiles_with_inductor(device, backend):
    torch._dynamo.reset()
    x = torch.randn(4, 32, device=device, requires_grad=True)
    w = torch.randn(32, device=device, requires_grad=True)

    def block(x, w):
        y = rms_norm(x * 2, w)
        q = y.view(1, 4, 4, 8)
        return flash_attention(q, q, q, causal=True) + 1

    with use_backend(forced(backend)):
        out, expected = torch.compile(block, fullgraph=True)(x, w), block(x, w)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    for ours, eager in zip(
        torch.autograd.grad(out, (x, w), dout),
        torch.autograd.grad(expected, (x, w), dout),
        strict=True,
    ):
        torch.testing.assert_close(ours, eager)


@on_each_device
def test_unused_outputs_cost_no_gradient(device, backend):
    q = torch.randn(1, 4, 2, 8, device=device, requires_grad=True)
    with use_backend(forced(backend)):
        _, lse = flash_attention(q, q, q, return_lse=True)
    lse.backward(torch.randn_like(lse))  # the gradient of out is absent
    assert torch.isfinite(q.grad).all()


@on_each_device
def test_autocast_casts_q_k_v(device, backend):
    q = torch.randn(1, 8, 2, 16, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16), use_backend(backend):
        out = flash_attention(q, q, q)
    assert out.dtype == torch.bfloat16
    out.backward(torch.randn_like(out))
    assert q.grad.dtype == torch.float32


def test_the_backward_runs_on_the_backend_of_the_forward():
    ran = []
    backend = OPS["rms_norm_backward"].backend("reference")
    original = backend.run
    object.__setattr__(backend, "run", lambda *a: ran.append("reference") or original(*a))
    try:
        x = torch.randn(2, 8, requires_grad=True)
        OPS["rms_norm_backward"]._chosen.clear()
        with use_backend({"rms_norm": "reference"}):
            y = rms_norm(x)
        y.backward(torch.randn_like(y))
    finally:
        object.__setattr__(backend, "run", original)
        OPS["rms_norm_backward"]._chosen.clear()
    assert ran == ["reference"]


def test_routing_of_another_router_equals_ours():
    logits, x = torch.randn(16, 4), torch.randn(16, 8)
    ours = moe_route(logits, 2)
    theirs = Routing.of(ours.weights, ours.expert_ids.long(), 4)
    assert torch.equal(theirs.tokens_per_expert, ours.tokens_per_expert)
    a, plan = moe_dispatch(x, ours)
    b, _ = moe_dispatch(x, theirs)
    assert torch.equal(a, b)
    assert torch.equal(plan.offsets[1:] - plan.offsets[:-1], ours.tokens_per_expert)


def _flat(out):
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)


class _Seen(TorchDispatchMode):
    """The names of our ops that reach the dispatcher below autograd."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ceg":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wanted", [True, False], ids=["gradients", "no gradients"])
def test_a_mode_sees_the_ops_that_run_directly_without_one(wanted):
    x = torch.randn(3, 8, requires_grad=wanted)
    with _Seen() as seen:
        y = rms_norm(x)
        if wanted:
            y.backward(torch.ones_like(y))
    assert seen.names == ["rms_norm", "rms_norm_backward"][: 1 + wanted]
    again = rms_norm(x)
    assert torch.equal(again, y)
    assert (again.grad_fn is not None) == wanted


def test_lazily_negated_input_is_negated():
    x = torch.randn(3, 8)
    assert torch.equal(rms_norm(torch._neg_view(x)), rms_norm(-x))


def test_a_second_derivative_is_refused():
    x = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="ceg::rms_norm must be differentiated once only"):
        torch.autograd.grad(rms_norm(x).sum(), x, create_graph=True)


@on_each_device
def test_outputs_can_be_changed_in_place(device, backend):
    for op in OPS.values():
        if op.backward is None:
            continue
        first, *rest = next(iter(op.samples(torch.float32, device))).args
        with use_backend(forced(backend)):
            for out in as_tuple(op(first.detach().requires_grad_(), *rest)):
                assert not out._is_view(), op.name
                if out.requires_grad:
                    out.add_(1)

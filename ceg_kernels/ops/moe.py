"""Moving tokens to their experts and back: dispatch, combine, and combine's backward.

`moe_index` (its file defines choices, slots and sources) says where each token goes. Dispatch
copies token rows into the sorted buffer; combine sums them back, weighted. Each is the other's
backward (combine without weights), so no float is ever added atomically and the same inputs give
the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ceg_kernels import native, triton
from ceg_kernels.op import Backend, Cost, ErrorInput, Op, Sample, Shape
from ceg_kernels.ops import arguments, moe_index
from ceg_kernels.ops.moe_route import Routing, moe_route

# x: (N, D), y: (R, D) with R = N * K, slots: (N, K) int32, sources: (R,) int32, weights: (N, K)


def reference_dispatch(x, sources, slots):
    rows = (
        x[sources.long().clamp(min=0) // slots.shape[1]]
        if x.shape[0]
        else x.new_zeros(0, x.shape[1])
    )
    return rows.masked_fill((sources < 0).unsqueeze(-1), 0)


def reference_combine(y, slots, sources, weights):
    if y.shape[0] == 0:
        return y.new_zeros(slots.shape[0], y.shape[1])
    rows = y[slots.long().clamp(min=0)].to(native.math_dtype(y.dtype))  # (N, K, D)
    rows = rows.masked_fill((slots < 0).unsqueeze(-1), 0)
    if weights is not None:
        rows = rows * weights.unsqueeze(-1)
    return rows.sum(1).to(y.dtype)


def reference_combine_backward(dout, y, slots, sources, weights):
    wide = native.math_dtype(y.dtype)
    if y.shape[0] == 0:
        return torch.zeros_like(y), torch.zeros_like(weights)
    choice, empty = sources.long().clamp(min=0), (sources < 0).unsqueeze(-1)
    dy = dout[choice // slots.shape[1]].to(wide) * weights.reshape(-1)[choice].unsqueeze(-1)
    products = dout.to(wide).unsqueeze(1) * y[slots.long().clamp(min=0)].to(wide)
    dweights = products.sum(-1).masked_fill(slots < 0, 0)
    return dy.masked_fill(empty, 0).to(y.dtype), dweights.to(weights.dtype)


def cost_dispatch(x, sources, slots):
    """No floating-point work; slots are for the backward only."""
    return Cost(0, x.nbytes + sources.nbytes + sources.numel() * x.shape[1] * x.element_size())


def cost_combine(y, slots, sources, weights):
    """2 FLOP an element with weights, 1 without."""
    per_element = 1 if weights is None else 2
    out = slots.shape[0] * y.shape[1] * y.element_size()
    tables = slots.nbytes + (0 if weights is None else weights.nbytes)
    return Cost(per_element * y.numel(), y.nbytes + out + tables)


def cost_combine_backward(dout, y, slots, sources, weights):
    """3 FLOP an element: dy 1, dweights 2."""
    tables = sources.nbytes + slots.nbytes + 2 * weights.nbytes
    return Cost(3 * y.numel(), dout.nbytes + 2 * y.nbytes + tables)


def samples_dispatch(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = arguments.maker(dtype, device)
    for name, ids, e, capacity, d in moe_index.cases(device):
        slots, sources, _ = moe_index.reference(ids, e, capacity)
        yield Sample(name, (make(ids.shape[0], d), sources, slots))
    slots, sources, _ = moe_index.reference(moe_index.random_ids(20, 4, 2, device), 4, -1)
    yield Sample("row stride", (make(20, 50)[:, 3:35], sources, slots))
    yield Sample("transposed", (make(32, 20).t(), sources, slots))


def samples_combine(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = arguments.maker(dtype, device)
    for name, ids, e, capacity, d in moe_index.cases(device):
        slots, sources, _ = moe_index.reference(ids, e, capacity)
        weights = make(*ids.shape).to(native.math_dtype(dtype))
        yield Sample(name, (make(ids.numel(), d), slots, sources, weights))
        yield Sample(f"{name} no weights", (make(ids.numel(), d), slots, sources, None))


def samples_combine_backward(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = arguments.maker(dtype, device)
    for sample in samples_combine(dtype, device):
        if sample.args[-1] is not None:
            dout = make(sample.args[1].shape[0], sample.args[0].shape[1])
            yield Sample(sample.name, (dout, *sample.args))


def _shape(group: str, n: int, e: int, k: int, d: int) -> dict[str, Shape]:
    """The three ops at one size."""

    def index(dtype, device):
        slots, sources, _ = moe_index.reference(moe_index.random_ids(n, e, k, device), e, -1)
        make = arguments.maker(dtype, device)
        return make, slots, sources, make(n, k).float()

    def dispatch(dtype, device):
        make, slots, sources, _ = index(dtype, device)
        return make(n, d), sources, slots

    def combine(dtype, device):
        make, slots, sources, weights = index(dtype, device)
        return make(n * k, d), slots, sources, weights

    def combine_backward(dtype, device):
        make, slots, sources, weights = index(dtype, device)
        return make(n, d), make(n * k, d), slots, sources, weights

    makes = {"dispatch": dispatch, "combine": combine, "combine_backward": combine_backward}
    return {name: Shape(group, make) for name, make in makes.items()}


_SHAPES = {
    "quick-n2048-e16-k2-d512": _shape("quick", 2048, 16, 2, 512),
    "moe-n4096-e128-k8-d2048": _shape("moe", 4096, 128, 8, 2048),
}


def run_native_dispatch(x, sources, slots, *, launch):
    x = native.unit_stride(x)
    out = x.new_empty((sources.numel(), x.shape[1]))
    launch("moe_dispatch", x, sources, slots.shape[1], out)
    return out


def run_native_combine(y, slots, sources, weights, *, launch):
    y = native.unit_stride(y)
    out = y.new_empty((slots.shape[0], y.shape[1]))
    launch("moe_combine", y, slots, native.as_math(weights, y.dtype), out)
    return out


def run_native_combine_backward(dout, y, slots, sources, weights, *, launch):
    dout, y = native.unit_stride(dout), native.unit_stride(y)
    w = native.dense(weights.to(native.math_dtype(y.dtype)))
    dy, dweights = native.empty_like(y), native.empty_like(w)
    launch("moe_combine_bwd", dout, y, sources, slots, w, dy, dweights)
    return dy, dweights.to(weights.dtype)


def fake_dispatch(x, sources, slots):
    return x.new_empty((sources.shape[0], x.shape[1]))


def fake_combine(y, slots, sources, weights):
    return y.new_empty((slots.shape[0], y.shape[1]))


def fake_combine_backward(dout, y, slots, sources, weights):
    return y.new_empty(y.shape), weights.new_empty(weights.shape)


def error_inputs_dispatch() -> Iterator[ErrorInput]:
    x, routing = torch.zeros(4, 8), moe_route(torch.zeros(4, 3), 2)
    bad = Routing(routing.weights, routing.expert_ids + 5, routing.tokens_per_expert)
    yield ErrorInput(lambda: moe_dispatch(x[0], routing), r"x must be \(N, D\), got \(8,\)")
    yield ErrorInput(
        lambda: moe_dispatch(x[:3], routing), "routing must be for N = 3 tokens, got 4"
    )
    yield ErrorInput(
        lambda: moe_dispatch(x, routing, capacity=-2), "capacity must be >= 0 or None, got -2"
    )
    yield ErrorInput(lambda: moe_dispatch(x, bad), r"expert_ids must be in \[0, 3\)")
    yield ErrorInput(lambda: moe_dispatch(x.int(), routing), "x must have dtype", TypeError)


def error_inputs_combine() -> Iterator[ErrorInput]:
    routing = moe_route(torch.zeros(4, 3), 2)
    y, plan = moe_dispatch(torch.zeros(4, 8), routing)
    w = routing.weights
    yield ErrorInput(lambda: moe_combine(y[:7], plan, w), r"y_sorted must be \(8, D\), got \(7, 8")
    yield ErrorInput(
        lambda: moe_combine(y, plan, w[:3]), r"weights must have shape \(4, 2\), got \(3, 2\)"
    )


def save_dispatch(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def backward_dispatch(ctx, dx_sorted):
    sources, slots = ctx.saved_tensors
    return MOE_COMBINE(dx_sorted, slots, sources, None), None, None


def save_combine(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward_combine(ctx, dout):
    y, slots, sources, weights = ctx.saved_tensors
    if weights is None:
        return MOE_DISPATCH(dout, sources, slots), None, None, None
    dy, dweights = MOE_COMBINE_BACKWARD(dout, y, slots, sources, weights)
    return dy, None, None, dweights


def _backends(op, run, launcher, stock):
    return (
        *native.native_backends(op, run),
        Backend("triton", triton.launcher("moe", launcher), triton.why_not, automatic=False),
        # Stock torch moves tokens with the same indexing and sums as the reference.
        Backend("torch", stock),
        Backend("reference", stock),
    )


MOE_DISPATCH = Op(
    name="moe_dispatch",
    schema="(Tensor x, Tensor sources, Tensor slots) -> Tensor",
    reference=reference_dispatch,
    fake=fake_dispatch,
    cost=cost_dispatch,
    samples=samples_dispatch,
    shapes={name: shape["dispatch"] for name, shape in _SHAPES.items()},
    backends=_backends("moe_dispatch", run_native_dispatch, "dispatch", reference_dispatch),
    error_inputs=error_inputs_dispatch,
    save=save_dispatch,
    backward=backward_dispatch,
)

MOE_COMBINE = Op(
    name="moe_combine",
    schema="(Tensor y, Tensor slots, Tensor sources, Tensor? weights) -> Tensor",
    reference=reference_combine,
    fake=fake_combine,
    cost=cost_combine,
    samples=samples_combine,
    shapes={name: shape["combine"] for name, shape in _SHAPES.items()},
    backends=_backends("moe_combine", run_native_combine, "combine", reference_combine),
    error_inputs=error_inputs_combine,
    save=save_combine,
    backward=backward_combine,
)

MOE_COMBINE_BACKWARD = Op(
    name="moe_combine_backward",
    schema="(Tensor dout, Tensor y, Tensor slots, Tensor sources, Tensor weights)"
    " -> (Tensor dy, Tensor dweights)",
    reference=reference_combine_backward,
    fake=fake_combine_backward,
    cost=cost_combine_backward,
    samples=samples_combine_backward,
    shapes={name: shape["combine_backward"] for name, shape in _SHAPES.items()},
    backends=_backends(
        "moe_combine_backward",
        run_native_combine_backward,
        "combine_backward",
        reference_combine_backward,
    ),
    fp32_reductions=(1,),
)


@dataclass(frozen=True)
class DispatchPlan:
    """Where each token went: what `moe_combine` needs, and `offsets` for the grouped matmul."""

    slots: Tensor  # (N, K) int32: row of each choice in the sorted buffer, -1 if dropped
    sources: Tensor  # (N * K,) int32: choice token * K + k in each row, -1 if empty
    offsets: Tensor  # (E + 1,) int32: first row of each expert; the last is the rows in use


def moe_dispatch(
    x: Tensor, routing: Routing, *, capacity: int | None = None
) -> tuple[Tensor, DispatchPlan]:
    """Copy each token's row once per chosen expert, sorted by expert (stable in the token).

    x: (N, D), fp32, bf16, fp16 or fp64. routing: of the same N tokens. capacity: tokens an expert
    keeps at most, the first ones in token order; None keeps all (dropless). Returns x_sorted
    (N * K, D), zeros in rows that hold nothing, and the plan; expert e has rows
    plan.offsets[e] to plan.offsets[e + 1]. No host sync on a GPU. Differentiable in x. Raises
    TypeError for a dtype and ValueError for a shape, capacity or (on CPU) an expert id.
    """
    arguments.check_float("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must be (N, D), got {tuple(x.shape)}")
    if routing.expert_ids.shape[0] != x.shape[0]:
        got = routing.expert_ids.shape[0]
        raise ValueError(f"routing must be for N = {x.shape[0]} tokens, got {got}")
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity must be >= 0 or None, got {capacity}")
    experts = routing.tokens_per_expert.shape[0]
    limit = -1 if capacity is None else capacity
    plan = DispatchPlan(*moe_index.MOE_INDEX(routing.expert_ids, experts, limit))
    return MOE_DISPATCH(x, plan.sources, plan.slots), plan


def moe_combine(y_sorted: Tensor, plan: DispatchPlan, weights: Tensor | None) -> Tensor:
    """Sum each token's expert outputs: out[n] = sum over k of weights[n, k] * y_sorted[slot].

    y_sorted: (N * K, D) in `moe_dispatch`'s order. weights: (N, K) fp32 (fp64 with fp64 outputs),
    or None for plain sums. Dropped choices add nothing. Returns (N, D), summed in fp32 and rounded
    once. Differentiable in y_sorted and weights. Raises TypeError and ValueError as above.
    """
    arguments.check_float("y_sorted", y_sorted)
    n, k = plan.slots.shape
    if y_sorted.dim() != 2 or y_sorted.shape[0] != n * k:
        raise ValueError(f"y_sorted must be ({n * k}, D), got {tuple(y_sorted.shape)}")
    if weights is not None:
        wide = (native.math_dtype(y_sorted.dtype), torch.float32)
        arguments.check_like("weights", weights, y_sorted, (n, k), dtypes=wide)
    return MOE_COMBINE(y_sorted, plan.slots, plan.sources, weights)

"""RMSNorm, with an optional residual added first, and its backward.

    h = x + residual;  rstd = 1 / sqrt(mean(h^2) + eps);  y = h * rstd * (weight + weight_offset)

Backward, with g = dy * (weight + weight_offset) and D the normalised size:

    dx = rstd * (g - h * rstd^2 * mean(g * h)) + dh;   dweight = sum over rows of dy * h * rstd

dx is the gradient of x and of residual alike; dh is that of the returned sum. `weight_offset` is 1
in models that store the weight's distance from one. Zhang and Sennrich 2019, arXiv 1910.07467.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ceg_kernels import native, triton
from ceg_kernels.op import Backend, Cost, ErrorInput, Op, Sample, Shape
from ceg_kernels.ops import arguments

# x: (..., D), weight: (D,) or None, residual: like x or None


def reference(x, weight, residual, eps, weight_offset):
    h = x if residual is None else x + residual
    wide = h.to(native.math_dtype(x.dtype))
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = wide * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * (weight.to(wide.dtype) + weight_offset)
    return y.to(x.dtype), x.new_empty(0) if residual is None else h, rstd


def reference_backward(dy, dh, h, weight, rstd, weight_offset):
    wide, grad, scale = h.to(rstd.dtype), dy.to(rstd.dtype), rstd.unsqueeze(-1)
    g = grad if weight is None else grad * (weight.to(rstd.dtype) + weight_offset)
    dx = scale * (g - wide * scale.square() * (g * wide).mean(-1, keepdim=True))
    if dh is not None:
        dx = dx + dh
    if weight is None:
        return dx.to(h.dtype), h.new_empty(0)
    dweight = (grad * wide * scale).reshape(-1, h.shape[-1]).sum(0)
    return dx.to(h.dtype), dweight.to(weight.dtype)


def cost(x, weight, residual, eps, weight_offset):
    """4 FLOP an element: square, add, times rstd, times weight.

    The sum with the residual is not among them: no residual sum of a model is counted, and one that
    moves into this op must not change the model's FLOPs.
    """
    tensors = 2 if residual is None else 4  # x, y; residual, residual_out
    weight_bytes = 0 if weight is None else weight.nbytes
    rows = arguments.rows(x)
    return Cost(
        4 * x.numel(),
        tensors * x.nbytes + weight_bytes + rows * native.math_dtype(x.dtype).itemsize,
    )


def cost_backward(dy, dh, h, weight, rstd, weight_offset):
    """8 FLOP an element: g, g*h and its sum, h*scale, the difference, its scale, dweight (2)."""
    tensors = 3 if dh is None else 4  # dy, h, dx; dh
    weight_bytes = 0 if weight is None else 2 * weight.nbytes
    return Cost(8 * h.numel(), tensors * h.nbytes + weight_bytes + rstd.nbytes)


def samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    # Left out: D above 4099 (same loops, only slower to check).
    make = arguments.maker(dtype, device)
    shapes = (1, 1), (300, 1), (3, 63), (5, 257), (2, 7, 760), (300, 128), (8, 4099), (0, 64)
    for shape in (*shapes, (19, 2056)):  # an odd number of rows that are taken two at a time
        weight = make(shape[-1])
        yield Sample(f"x{list(shape)}", (make(*shape), weight, None, 1e-6, 0.0))
    x, weight = make(9, 96), make(96)
    yield Sample("no weight", (x, None, None, 1e-5, 0.0))
    yield Sample("residual", (x, weight, make(9, 96), 1e-6, 0.0))
    yield Sample("offset", (x, weight, None, 1e-6, 1.0))
    yield Sample("small", (x * 1e-3, weight, None, 1e-6, 0.0))  # eps decides
    yield Sample("fp32 weight", (x, weight.float(), make(9, 96), 1e-6, 0.0))
    yield Sample("row stride", (make(9, 200)[:, 3:99], weight, make(9, 200)[:, 5:101], 1e-6, 0.0))
    yield Sample("transposed", (make(96, 9).t(), weight, None, 1e-6, 0.0))


def samples_backward(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    # Left out: a single number (D = 1), for which the rule would compare one rounding with another:
    # its dx is the difference of equal terms, so that of 300 rows is here; and its dweight.
    make = arguments.maker(dtype, device)
    for sample in samples(dtype, device):
        x, weight, residual, eps, offset = sample.args
        if x.shape == (1, 1):
            continue
        weight = None if x.shape[-1] == 1 else weight
        h = x if residual is None else (x + residual)
        rstd = reference(h.double(), weight, None, eps, offset)[2].to(native.math_dtype(dtype))
        dh = None if residual is None else make(*x.shape)
        yield Sample(sample.name, (make(*x.shape), dh, h, weight, rstd, offset))


def _shape(group: str, rows: int, size: int, residual: bool = False) -> Shape:
    def args(dtype, device):
        make = arguments.maker(dtype, device)
        extra = make(rows, size) if residual else None
        return make(rows, size), make(size), extra, 1e-6, 0.0

    return Shape(group, args)


def _shape_backward(forward: Shape) -> Shape:
    def args(dtype, device):
        x, weight, _, eps, offset = forward.make(dtype, device)
        dy = arguments.maker(dtype, device)(*x.shape)
        return dy, None, x, weight, reference(x, None, None, eps, 0)[2], offset

    return Shape(forward.group, args)


SHAPES = {
    "quick-2048x768": _shape("quick", 2048, 768),
    "gpt2-8192x768": _shape("gpt2", 8192, 768),
    "gpt2-8192x768-residual": _shape("gpt2", 8192, 768, residual=True),
    "llama-8192x4096": _shape("llama", 8192, 4096),
}


def run_native(x, weight, residual, eps, weight_offset, *, launch):
    y, rstd = native.empty_like(x), x.new_empty(x.shape[:-1], dtype=native.math_dtype(x.dtype))
    summed = x.new_empty(0) if residual is None else native.empty_like(x)
    rows = arguments.as_rows
    launch(
        "rms_norm_fwd", rows(x), launch.parameter(weight, x.dtype),
        None if residual is None else rows(residual), rows(y),
        None if residual is None else rows(summed), rstd.view(-1), eps, weight_offset,
    )  # fmt: skip
    return y, summed, rstd


def run_native_backward(dy, dh, h, weight, rstd, weight_offset, *, launch):
    rows, dx = arguments.as_rows(h), native.empty_like(h)
    scale = launch.parameter(weight, h.dtype)
    dweight = None if scale is None else native.empty_like(scale)
    columns = 0 if dweight is None else h.shape[-1]
    partials = launch.workspace("rms_norm_bwd", columns, torch.float32, rows)
    launch(
        "rms_norm_bwd", arguments.as_rows(dy), None if dh is None else arguments.as_rows(dh), rows,
        scale, rstd.reshape(-1), arguments.as_rows(dx), dweight, *partials, weight_offset,
    )  # fmt: skip
    return dx, h.new_empty(0) if dweight is None else dweight.to(weight.dtype)


def run_torch(x, weight, residual, eps, weight_offset):
    if weight is not None and weight.dtype != x.dtype:
        # F.rms_norm takes one dtype; with fp32 weights its users write the formula out.
        return reference(x, weight, residual, eps, weight_offset)
    h = x if residual is None else x + residual
    w = None if weight is None else weight + weight_offset
    y, rstd = torch.ops.aten._fused_rms_norm(h, [x.shape[-1]], w, eps)
    return y, x.new_empty(0) if residual is None else h, rstd.squeeze(-1)


def fake(x, weight, residual, eps, weight_offset):
    rstd = x.new_empty(x.shape[:-1], dtype=native.math_dtype(x.dtype))
    summed = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), summed, rstd


def fake_backward(dy, dh, h, weight, rstd, weight_offset):
    return h.new_empty(h.shape), h.new_empty(0) if weight is None else weight.new_empty(
        weight.shape
    )


def error_inputs() -> Iterator[ErrorInput]:
    x = torch.zeros(2, 8)
    yield ErrorInput(lambda: rms_norm(x.int()), r"x must have dtype in .*, got int32", TypeError)
    yield ErrorInput(lambda: rms_norm(torch.zeros(())), r"x must have at least 1 dimension, got 0")
    yield ErrorInput(lambda: rms_norm(x, torch.ones(7)), r"weight must have shape \(8,\), got \(7,")
    yield ErrorInput(lambda: rms_norm(x, eps=-1.0), r"eps must be >= 0, got -1.0")
    yield ErrorInput(
        lambda: rms_norm(x, residual=torch.zeros(2, 7)),
        r"residual must have shape \(2, 8\), got \(2, 7\)",
    )
    yield ErrorInput(
        lambda: rms_norm(x, residual=x.half()), r"residual must have dtype float32", TypeError
    )
    yield ErrorInput(
        lambda: rms_norm(x, torch.ones(8, device="meta")), r"weight must be on cpu, got meta"
    )


def save(ctx, inputs, output):
    x, weight, residual, _, offset = inputs
    _, summed, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(x if residual is None else summed, weight, rstd)
    ctx.residual, ctx.offset = residual is not None, offset


def backward(ctx, dy, dh, drstd):
    h, weight, rstd = ctx.saved_tensors
    dy = torch.zeros_like(h) if dy is None else dy
    dx, dweight = RMS_NORM_BACKWARD(dy, dh if ctx.residual else None, h, weight, rstd, ctx.offset)
    return dx, None if weight is None else dweight, dx if ctx.residual else None, None, None


RMS_NORM = Op(
    name="rms_norm",
    schema="(Tensor x, Tensor? weight, Tensor? residual, float eps, float weight_offset)"
    " -> (Tensor y, Tensor residual_out, Tensor rstd)",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    shapes=SHAPES,
    backends=(
        *native.native_backends("rms_norm", run_native),
        Backend("triton", triton.launcher("rms_norm", "forward"), triton.why_not, automatic=False),
        Backend("torch", run_torch),
        Backend("reference", reference),
    ),
    fp32_reductions=(2,),
    error_inputs=error_inputs,
    save=save,
    backward=backward,
)

RMS_NORM_BACKWARD = Op(
    name="rms_norm_backward",
    schema="(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor rstd, float weight_offset)"
    " -> (Tensor dx, Tensor dweight)",
    reference=reference_backward,
    fake=fake_backward,
    cost=cost_backward,
    samples=samples_backward,
    shapes={name: _shape_backward(SHAPES[name]) for name in SHAPES if "residual" not in name},
    backends=(
        *native.native_backends("rms_norm_backward", run_native_backward),
        Backend("triton", triton.launcher("rms_norm", "backward"), triton.why_not, automatic=False),
        # Stock torch differentiates F.rms_norm through these same pointwise steps.
        Backend("torch", reference_backward),
        Backend("reference", reference_backward),
    ),
    fp32_reductions=(1,),
)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension: `h / sqrt(mean(h^2) + eps) * (weight + weight_offset)`.

    x: (..., D), fp32, bf16, fp16 or fp64; any strides. weight: (D,) in x's dtype or fp32, or None
    for no scale (weight_offset is then unused). residual: like x; with it h = x + residual and the
    result is `(y, h)`, otherwise h = x and the result is y. y and h: x's shape and dtype; the maths
    is fp32 inside (fp64 for fp64). Differentiable in x, weight and residual. Raises TypeError for a
    dtype and ValueError for a shape, device or eps that does not fit.
    """
    arguments.check_float("x", x)
    if x.dim() < 1:
        raise ValueError("x must have at least 1 dimension, got 0")
    if weight is not None:
        arguments.check_like("weight", weight, x, (x.shape[-1],), dtypes=(x.dtype, torch.float32))
    if residual is not None:
        arguments.check_like("residual", residual, x, x.shape, dtypes=(x.dtype,))
    if eps < 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    y, summed, _ = RMS_NORM(x, weight, residual, eps, weight_offset)
    return y if residual is None else (y, summed)

"""Rotary position embedding of queries and keys in one call; the backward is the inverse rotation.

With (a, b) a pair of features and angle t = position * base^(-2i / rotary_dim) for pair i:

    a' = a cos t - b sin t;   b' = b cos t + a sin t

Pairs are (i, i + rotary_dim / 2) (GPT-NeoX, Llama) or, interleaved, (2i, 2i + 1) (GPT-J). A
rotation is orthogonal, so the gradient is rotated by -t: `inverse`. Features beyond rotary_dim pass
through. cos and sin carry no gradient. Su et al. 2021, arXiv 2104.09864.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ceg_kernels import native, triton
from ceg_kernels.op import Backend, Cost, ErrorInput, Op, Sample, Shape
from ceg_kernels.ops import arguments

# q: (B, T, H, D), k: (B, T, H_kv, D), cos sin: (T_table, R / 2), positions: (B, T) or None; R <= D


def _rotate(x, cos, sin, interleaved):
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    # cos is fp32, so a half-precision x is rotated in fp32 and rounded once.
    return torch.cat((out.to(x.dtype), rest), -1)


def reference(q, k, cos, sin, positions, interleaved, inverse):
    if positions is not None:
        _check_positions(positions, cos.shape[0])
        cos, sin = cos[positions.long()], sin[positions.long()]  # (B, T, R / 2)
    else:
        cos, sin = cos[: q.shape[1]], sin[: q.shape[1]]
    cos, sin = cos.unsqueeze(-2), (-sin if inverse else sin).unsqueeze(-2)
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


def cost(q, k, cos, sin, positions, interleaved, inverse):
    """6 FLOP a pair: four products and two sums."""
    pairs = cos.shape[1] * (q.numel() + k.numel()) // max(q.shape[-1], 1)
    tables = 2 * q.shape[1] * cos.shape[1] * cos.element_size()
    if positions is not None:
        tables = tables * q.shape[0] + positions.nbytes
    return Cost(6 * pairs, 2 * (q.nbytes + k.nbytes) + tables)


def samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = arguments.maker(dtype, device)

    def table(length: int, rotary_dim: int) -> tuple[Tensor, Tensor]:
        cos, sin = rope_table(length, rotary_dim, device=device)
        wide = native.math_dtype(dtype)
        return cos.to(wide), sin.to(wide)

    for b, t, h, kv, d, r in [
        (1, 1, 1, 1, 2, 2), (2, 63, 3, 1, 40, 40), (1, 257, 2, 2, 64, 32), (2, 5, 4, 2, 80, 16),
        (1, 40, 2, 2, 128, 128), (1, 9, 1, 1, 6, 6), (0, 8, 2, 2, 16, 16), (2, 0, 2, 2, 16, 16),
    ]:  # fmt: skip
        for interleaved in (False, True):
            name = f"B{b} T{t} H{h}/{kv} D{d} R{r} interleaved={interleaved}"
            q, k = make(b, t, h, d), make(b, t, kv, d)
            yield Sample(name, (q, k, *table(t + 3, r), None, interleaved, False))
    q, k = make(2, 33, 4, 64), make(2, 33, 2, 64)
    yield Sample("inverse", (q, k, *table(40, 64), None, False, True))
    positions = (torch.arange(66, device=device) * 7 % 40).view(2, 33)
    yield Sample("positions", (q, k, *table(40, 64), positions, False, False))
    yield Sample("int32 positions", (q, k, *table(40, 32), positions.int(), True, False))
    packed = make(2, 33, 8, 64)  # q and k are views of one projection
    views = packed[:, :, :4], packed[:, :, 4:6]
    yield Sample("views", (*views, *table(40, 64), None, False, False))
    heads_first = make(2, 4, 33, 64).transpose(1, 2), make(2, 2, 33, 64).transpose(1, 2)
    yield Sample("transposed", (*heads_first, *table(33, 64), None, True, False))


def _shape(group: str, b: int, t: int, h: int, kv: int, d: int) -> Shape:
    def args(dtype, device):
        make = arguments.maker(dtype, device)
        cos, sin = rope_table(t, d, device=device)
        return make(b, t, h, d), make(b, t, kv, d), cos, sin, None, False, False

    return Shape(group, args)


SHAPES = {
    "quick-2x512-h8-d64": _shape("quick", 2, 512, 8, 8, 64),
    "gpt2-8x1024-h12-d64": _shape("gpt2", 8, 1024, 12, 12, 64),
    "llama-1x4096-h32/8-d128": _shape("llama", 1, 4096, 32, 8, 128),
}


def run_native(q, k, cos, sin, positions, interleaved, inverse, *, launch):
    q, k = native.unit_stride(q), native.unit_stride(k)
    q_out, k_out = native.empty_like(q), native.empty_like(k)
    cos, sin = native.as_math(cos, q.dtype), native.as_math(sin, q.dtype)
    positions = None if positions is None else positions.contiguous()
    launch("rope", q, k, cos, sin, positions, q_out, k_out, interleaved, inverse)
    return q_out, k_out


launch_triton = triton.launcher("rope", "rope")


def run_triton(q, k, cos, sin, positions, interleaved, inverse):
    if positions is not None:
        _check_positions(positions, cos.shape[0])
    return launch_triton(q, k, cos, sin, positions, interleaved, inverse)


def fake(q, k, cos, sin, positions, interleaved, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def error_inputs() -> Iterator[ErrorInput]:
    q, (cos, sin) = torch.zeros(1, 4, 2, 8), rope_table(4, 8)
    long_cos, long_sin = rope_table(4, 16)
    at = torch.full((1, 4), 9)
    yield ErrorInput(
        lambda: rope(q.int(), q.int(), cos, sin), r"q must have dtype in .*, got int32", TypeError
    )
    yield ErrorInput(lambda: rope(q[0], q[0], cos, sin), r"q must be \(B, T, H, D\), got \(4, 2, 8")
    yield ErrorInput(
        lambda: rope(q, q[:, :3], cos, sin),
        r"k must have B, T and D of q, \(1, 4, H_kv, 8\), got \(1, 3, 2, 8\)",
    )
    yield ErrorInput(lambda: rope(q, q.half(), cos, sin), "k must have dtype float32", TypeError)
    yield ErrorInput(
        lambda: rope(q, q, long_cos, long_sin), r"cos must have at most D / 2 = 4 columns, got 8"
    )
    yield ErrorInput(lambda: rope(q, q, cos[:3], sin[:3]), r"cos must have at least T = 4 rows")
    yield ErrorInput(lambda: rope(q, q, cos, sin[:3]), r"sin must have shape \(4, 4\), got \(3, 4")
    yield ErrorInput(
        lambda: rope(q, q, cos, sin, positions=at[0]), r"positions must have shape \(1, 4\)"
    )
    yield ErrorInput(
        lambda: rope(q, q, cos, sin, positions=at.float()), "positions must have dtype", TypeError
    )
    yield ErrorInput(lambda: rope(q, q, cos, sin, positions=at), r"positions must be in \[0, 4\)")
    yield ErrorInput(lambda: rope_table(4, 7), "rotary_dim must be even and positive, got 7")


def save(ctx, inputs, output):
    _, _, cos, sin, positions, ctx.interleaved, ctx.inverse = inputs
    q_out, k_out = output
    ctx.save_for_backward(cos, sin, positions)
    ctx.shapes = q_out.shape, k_out.shape


def backward(ctx, dq, dk):
    cos, sin, positions = ctx.saved_tensors
    like = dq if dq is not None else dk
    dq = like.new_zeros(ctx.shapes[0]) if dq is None else dq
    dk = like.new_zeros(ctx.shapes[1]) if dk is None else dk
    dq, dk = ROPE(dq, dk, cos, sin, positions, ctx.interleaved, not ctx.inverse)
    return dq, dk, None, None, None, None, None


def _check_positions(positions, length):
    if positions.device.type == "cpu" and positions.numel():  # on a GPU this would wait for it
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= length:
            bad = low if low < 0 else high
            raise ValueError(f"positions must be in [0, {length}) (the rows of cos), got {bad}")


ROPE = Op(
    name="rope",
    schema="(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, bool interleaved,"
    " bool inverse) -> (Tensor q_out, Tensor k_out)",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    shapes=SHAPES,
    # Stock torch has no rotary embedding: what its users run is the reference.
    backends=(
        *native.native_backends("rope", run_native),
        Backend("triton", run_triton, triton.why_not, automatic=False),
        Backend("torch", reference),
        Backend("reference", reference),
    ),
    error_inputs=error_inputs,
    save=save,
    backward=backward,
)


def rope_table(
    seq_len: int,
    rotary_dim: int,
    *,
    base: float = 10000.0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2i / rotary_dim): two fp32 (seq_len, rotary_dim / 2).

    Angles are computed in fp64, so that far positions are as exact as near ones. Raises ValueError
    for an odd or non-positive rotary_dim.
    """
    if rotary_dim <= 0 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even and positive, got {rotary_dim}")
    pair = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device)
    position = torch.arange(seq_len, dtype=torch.float64, device=device)
    angle = torch.outer(position, base ** (-pair / rotary_dim))
    return angle.cos().float(), angle.sin().float()


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions, in one launch.

    q: (B, T, H, D) and k: (B, T, H_kv, D) of one dtype (fp32, bf16, fp16, fp64), any strides; D may
    exceed rotary_dim, the rest is copied. cos, sin: (rows, rotary_dim / 2), see `rope_table`.
    positions: (B, T) int32 or int64 rows of the table; None is 0..T-1. interleaved: pairs are
    (2i, 2i + 1) instead of (i, i + rotary_dim / 2). Returns (q, k) rotated, contiguous, rounded
    once from fp32. Differentiable in q and k. Raises TypeError for a dtype, ValueError for a shape,
    device, or (on CPU, where looking costs no synchronisation) a position outside the table.
    """
    arguments.check_float("q", q)
    if q.dim() != 4:
        raise ValueError(f"q must be (B, T, H, D), got {tuple(q.shape)}")
    b, t, _, d = q.shape
    if k.dim() != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (b, t, d):
        expected = f"({b}, {t}, H_kv, {d})"
        raise ValueError(f"k must have B, T and D of q, {expected}, got {tuple(k.shape)}")
    arguments.check_like("k", k, q, k.shape, dtypes=(q.dtype,))
    arguments.check_like("cos", cos, q, cos.shape, dtypes=(torch.float32, torch.float64))
    arguments.check_like("sin", sin, q, cos.shape, dtypes=(cos.dtype,))
    if cos.dim() != 2 or 2 * cos.shape[1] > d:
        raise ValueError(f"cos must have at most D / 2 = {d // 2} columns, got {cos.shape[-1]}")
    if positions is not None:
        integers = (torch.int32, torch.int64)
        arguments.check_like("positions", positions, q, (b, t), dtypes=integers)
    elif cos.shape[0] < t:
        raise ValueError(f"cos must have at least T = {t} rows, got {cos.shape[0]}")
    return ROPE(q, k, cos, sin, positions, interleaved, False)

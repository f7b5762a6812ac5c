"""Flash attention: the declarations and the public functions.

The formula, masks and backward are stated in attention_reference.py, the stock-torch backend in
attention_torch.py, the samples in attention_samples.py. FLOPs: with P visible (query, key) pairs a
head, forward 2 (D + Dv) P a head (scores and output), backward 4 (D + Dv) P (dV, dP, dQ, dK). What
the CPU kernels execute beyond that (scores once or twice more, masked pairs inside a block) depends
on threads and level: unknown.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import pairwise

import torch
from torch import Tensor

from ceg_kernels import native, triton
from ceg_kernels.op import Backend, Cost, ErrorInput, Op, Shape
from ceg_kernels.ops import arguments, attention_torch
from ceg_kernels.ops.attention_reference import boundaries, reference, reference_backward
from ceg_kernels.ops.attention_samples import samples, samples_backward

# q: (B, Tq, H, D), k: (B, Tk, H_kv, D), v: (B, Tk, H_kv, Dv), out: (B, Tq, H, Dv), lse: (B, H, Tq);
# varlen: (total, H, D), lse (H, total), cu_seqlens (B + 1,) int32


@lru_cache(maxsize=4096)
def pairs(tq: int, tk: int, causal: bool, left: int, right: int) -> int:
    """How many (query, key) pairs are visible."""
    right = 0 if causal else right
    if left < 0 and right < 0:
        return tq * tk
    at = range(tk - tq, tk)  # the key that stands beside each query
    last = (tk - 1 if right < 0 else min(tk - 1, i + right) for i in at)
    first = (0 if left < 0 else max(0, i - left) for i in at)
    return sum(max(0, b - a + 1) for a, b in zip(first, last, strict=True))


def _all_pairs(q, k, cu_q, cu_k, causal, left, right):
    if cu_q is None:
        return q.shape[0] * pairs(q.shape[1], k.shape[1], causal, left, right)
    at_q = boundaries(cu_q, "cu_seqlens_q", q.shape[0])
    at_k = boundaries(cu_k, "cu_seqlens_k", k.shape[0])
    lengths = zip(at_q, at_q[1:], at_k, at_k[1:], strict=False)
    return sum(pairs(b - a, d - c, causal, left, right) for a, b, c, d in lengths)


def _nbytes(*tensors):
    return sum(t.nbytes for t in tensors if t is not None)


def cost(q, k, v, cu_q, cu_k, max_q, max_k, slopes, sink, scale, causal, left, right, softcap):
    heads, d, dv = q.shape[-2], q.shape[-1], v.shape[-1]
    flops = 2 * (d + dv) * heads * _all_pairs(q, k, cu_q, cu_k, causal, left, right)
    rows = q.numel() // d  # out and lse have one row per query and head
    outputs = rows * (dv * q.element_size() + native.math_dtype(q.dtype).itemsize)
    return Cost(flops, _nbytes(q, k, v, cu_q, cu_k, slopes, sink) + outputs)


def cost_backward(dout, dlse, q, k, v, out, lse, *tail):
    forward = cost(q, k, v, *tail)
    cu_q, cu_k, slopes, sink = tail[0], tail[1], tail[4], tail[5]
    read = _nbytes(dout, dlse, q, k, v, out, lse, cu_q, cu_k, slopes, sink)
    return Cost(2 * forward.flops, read + _nbytes(q, k, v, sink))


def executed_materialised(q, k, v, cu_q, cu_k, *tail):
    """All Tq x Tk pairs, masked or not."""
    heads, d, dv = q.shape[-2], q.shape[-1], v.shape[-1]
    return 2 * (d + dv) * heads * _all_pairs(q, k, cu_q, cu_k, False, -1, -1)


def executed_materialised_backward(dout, dlse, q, k, v, out, lse, *tail):
    """All pairs, and the scores once more."""
    forward = executed_materialised(q, k, v, *tail)
    return 2 * forward + forward * q.shape[-1] // (q.shape[-1] + v.shape[-1])


def _shape(group, b, t, h, kv, d, causal=True, keys=None) -> Shape:
    keys = t if keys is None else keys

    def args(dtype, device):
        make = arguments.maker(dtype, device)
        qkv = make(b, t, h, d), make(b, keys, kv, d), make(b, keys, kv, d)
        return *qkv, None, None, t, keys, None, None, d**-0.5, causal, -1, -1, 0.0

    return Shape(group, args)


def _shape_backward(forward: Shape) -> Shape:
    def args(dtype, device):
        q, k, v, *tail = forward.make(dtype, device)
        # fp64 scores of a large shape would not fit, so the saved tensors come from the op itself.
        out, lse = ATTENTION(q, k, v, *tail)
        dout = arguments.maker(dtype, device)(*out.shape)
        return dout, None, q, k, v, out, lse, *tail

    return Shape(forward.group, args)


SHAPES = {
    "quick-b2-t512-h4-d64-causal": _shape("quick", 2, 512, 4, 4, 64),
    "gpt2-b4-t1024-h12-d64-causal": _shape("gpt2", 4, 1024, 12, 12, 64),
    "gpt2-b4-t512-h8-d64-causal": _shape("gpt2", 4, 512, 8, 8, 64),
    "gpt2-b16-t256-h4-d16-causal": _shape("gpt2", 16, 256, 4, 4, 16),
    "gpt2-b16-t128-h4-d16-causal": _shape("gpt2", 16, 128, 4, 4, 16),
    "gpt2-b1-t4096-h8-d64-full": _shape("gpt2", 1, 4096, 8, 8, 64, causal=False),
    "llama-b1-t2048-h8-d128-causal": _shape("llama", 1, 2048, 8, 8, 128),
    "llama-b1-t2048-h8-d128-full": _shape("llama", 1, 2048, 8, 8, 128, causal=False),
    "llama-b1-t2048-h32/8-d128-causal": _shape("llama", 1, 2048, 32, 8, 128),
}
DECODE_SHAPES = {
    "llama-b4-t1-k4096-h32/8-d128-causal": _shape("llama", 4, 1, 32, 8, 128, keys=4096),
    "llama-b1-t1-k16384-h32/8-d128-causal": _shape("llama", 1, 1, 32, 8, 128, keys=16384),
}


def refuses(q, k, v, *tail, why_not=native.why_not):
    if (reason := why_not(q, k, v, *tail)) is not None:
        return reason
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"needs head_dim <= 256, got {max(q.shape[-1], v.shape[-1])}"
    return None


def cuda_refuses(q, k, v, *tail):
    """Tensor cores take operands of 16 bits, and the loads take 16 bytes."""
    if (reason := native.cuda_why_not(q, k, v, *tail)) is not None:
        return reason
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"needs dtype in {{bfloat16, float16}}, got {str(q.dtype).removeprefix('torch.')}"
    for name, width in (("q and k", q.shape[-1]), ("v", v.shape[-1])):
        if width % 8 or width > 256:
            return f"needs head_dim of {name} divisible by 8 and <= 256, got {width}"
    return None


def run_native(
    q, k, v, cu_q, cu_k, max_q, max_k, slopes, sink, scale, causal, left, right, softcap, *, launch
):  # fmt: skip
    wide = native.math_dtype(q.dtype)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    shape = (q.shape[1], q.shape[0]) if cu_q is not None else (q.shape[0], q.shape[2], q.shape[1])
    lse = q.new_empty(shape, dtype=wide)
    problem = *map(launch.rows, (q, k, v)), cu_q, cu_k, max_q, max_k
    parts = launch.workspace("attention_fwd", v.shape[-1] + 2, torch.float32, *problem, left)
    launch(
        "attention_fwd", *problem, native.as_math(slopes, q.dtype), native.as_math(sink, q.dtype),
        out, lse, *parts, scale, causal, left, right, softcap,
    )  # fmt: skip
    return out, lse


def run_native_backward(
    dout, dlse, q, k, v, out, lse, cu_q, cu_k, max_q, max_k,
    slopes, sink, scale, causal, left, right, softcap, *, launch,
):  # fmt: skip
    dq, dk, dv = map(native.empty_like, (q, k, v))
    dsink = None if sink is None else lse.new_empty(sink.shape)
    dout, q, k, v, out = map(launch.rows, (dout, q, k, v, out))
    lse = native.dense(lse)
    shape = dout, q, k, v, cu_q, cu_k, max_q, max_k
    sums = launch.workspace("attention_bwd", 64, torch.float32, *shape)
    launch(
        "attention_bwd", dout, None if dlse is None else native.dense(dlse), q, k, v, out, lse,
        cu_q, cu_k, max_q, max_k, native.as_math(slopes, q.dtype), native.as_math(sink, q.dtype),
        dq, dk, dv, dsink, *launch.beside(lse), *sums, scale, causal, left, right, softcap,
    )  # fmt: skip
    return dq, dk, dv, lse.new_zeros(0) if dsink is None else dsink


refuses_triton = partial(refuses, why_not=triton.why_not)


launch_triton = triton.launcher("attention", "forward")
launch_triton_backward = triton.launcher("attention_backward", "backward")


def run_triton(q, k, v, cu_q, cu_k, max_q, max_k, *tail):
    _check_packed(q, k, cu_q, cu_k, max_q, max_k)
    return launch_triton(q, k, v, cu_q, cu_k, max_q, max_k, *tail)


def run_triton_backward(dout, dlse, q, k, v, out, lse, *tail):
    _check_packed(q, k, *tail[:4])
    return launch_triton_backward(dout, dlse, q, k, v, out, lse, *tail)


def _check_packed(q, k, cu_q, cu_k, max_q, max_k):
    # On CPU only, in Triton's interpreter: looking at them on a GPU would wait for it.
    if cu_q is None or q.device.type != "cpu":
        return
    for name, cu, rows, most in (("q", cu_q, q, max_q), ("k", cu_k, k, max_k)):
        at = boundaries(cu, f"cu_seqlens_{name}", rows.shape[0])
        longest = max((b - a for a, b in pairwise(at)), default=0)
        if longest > most:
            raise ValueError(
                f"cu_seqlens_{name} must hold sequences of at most max_seqlen {most}, got {longest}"
            )


def fake(q, k, v, cu_q, *tail):
    wide = native.math_dtype(q.dtype)
    shape = (q.shape[1], q.shape[0]) if cu_q is not None else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(shape, dtype=wide)


def fake_backward(dout, dlse, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, slopes, sink, *rest):
    grads = (t.new_empty(t.shape) for t in (q, k, v))
    return *grads, lse.new_empty(0 if sink is None else sink.shape)


def error_inputs() -> Iterator[ErrorInput]:
    q, k = torch.zeros(2, 5, 4, 8), torch.zeros(2, 7, 2, 8)
    flash, packed = flash_attention, partial(flash_attention_varlen, max_seqlen_q=4, max_seqlen_k=4)
    cu = torch.tensor([0, 4, 2, 5], dtype=torch.int32)
    good = torch.tensor([0, 5], dtype=torch.int32)
    yield ErrorInput(lambda: flash(q[0], k, k), r"q must be \(B, T, H, D\), got \(5, 4, 8\)")
    yield ErrorInput(lambda: flash(q.int(), k, k), "q must have dtype in .*, got int32", TypeError)
    yield ErrorInput(
        lambda: flash(q, k.half(), k), "k must have dtype float32, got float16", TypeError
    )
    yield ErrorInput(
        lambda: flash(q, k[..., :7], k), r"k must be \(2, Tk, H_kv, 8\), got \(2, 7, 2, 7"
    )
    yield ErrorInput(
        lambda: flash(q, k, k[:, :6]), r"v must be \(2, 7, 2, Dv\), got \(2, 6, 2, 8\)"
    )
    yield ErrorInput(
        lambda: flash(q[:, :, :3], k, k), "heads of k and v must divide the 3 heads of q, got 2"
    )
    yield ErrorInput(lambda: flash(q, k, k, window=(-2, 0)), r"window must be .*, got \(-2, 0\)")
    yield ErrorInput(lambda: flash(q, k, k, softcap=-1.0), "softcap must be >= 0 .*, got -1.0")
    yield ErrorInput(
        lambda: flash(q, k, k, sink=torch.zeros(3)), r"sink must have shape \(4,\), got \(3,\)"
    )
    yield ErrorInput(
        lambda: flash(q, k, k, alibi_slopes=torch.zeros(3)),
        r"alibi_slopes must have shape \(4,\) or \(2, 4\), got \(3,\)",
    )
    yield ErrorInput(
        lambda: packed(q[0], q[0], q[0], cu, cu),
        "cu_seqlens_q must not decrease, got 4 then 2",
    )
    yield ErrorInput(
        lambda: packed(q[0], q[0], q[0], good.long(), good),
        "cu_seqlens_q must have dtype int32, got int64", TypeError,
    )  # fmt: skip
    yield ErrorInput(
        lambda: packed(q[0], q[0], q[0], good, cu),
        r"cu_seqlens_k must have shape \(2,\), got \(4,\)",
    )


def save(ctx, inputs, output):
    q, k, v, cu_q, cu_k, max_q, max_k, slopes, sink, *ctx.rest = inputs
    out, lse = output
    ctx.max = max_q, max_k
    ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k, slopes, sink)


def backward(ctx, dout, dlse):
    q, k, v, out, lse, cu_q, cu_k, slopes, sink = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dsink = ATTENTION_BACKWARD(
        dout, dlse, q, k, v, out, lse, cu_q, cu_k, *ctx.max, slopes, sink, *ctx.rest
    )
    dsink = None if sink is None else dsink.to(sink.dtype)
    return dq, dk, dv, None, None, None, None, None, dsink, None, None, None, None, None


def autocast(dtype, q, k, v, *tail):
    if any(t.dtype == torch.float64 for t in (q, k, v)):
        return q, k, v, *tail
    return q.to(dtype), k.to(dtype), v.to(dtype), *tail


_TAIL = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int max_seqlen_q, int max_seqlen_k,"
    " Tensor? alibi_slopes, Tensor? sink, float softmax_scale, bool causal, int window_left,"
    " int window_right, float softcap"
)

ATTENTION = Op(
    name="attention",
    schema=f"(Tensor q, Tensor k, Tensor v, {_TAIL}) -> (Tensor out, Tensor lse)",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    shapes=SHAPES | DECODE_SHAPES,
    backends=(
        *native.native_backends("attention", run_native, refuses, cuda_refuses, counted=True),
        Backend("triton", run_triton, refuses_triton, automatic=False),
        Backend("torch", attention_torch.run, attention_torch.why_not),
        Backend("reference", reference, executed_flops=executed_materialised),
    ),
    slack=3.0,
    fp32_reductions=(1,),
    error_inputs=error_inputs,
    save=save,
    backward=backward,
    autocast=autocast,
)

ATTENTION_BACKWARD = Op(
    name="attention_backward",
    schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" {_TAIL}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsink)",
    reference=reference_backward,
    fake=fake_backward,
    cost=cost_backward,
    samples=samples_backward,
    shapes={name: _shape_backward(shape) for name, shape in SHAPES.items()},
    backends=(
        *native.native_backends(
            "attention_backward",
            run_native_backward,
            lambda dout, dlse, q, k, v, out, lse, *tail: refuses(q, k, v, *tail),
            lambda dout, dlse, q, k, v, out, lse, *tail: cuda_refuses(q, k, v, *tail),
            counted=True,
        ),
        Backend(
            "triton",
            run_triton_backward,
            lambda dout, dlse, q, k, v, out, lse, *tail: refuses_triton(q, k, v, *tail),
            automatic=False,
        ),
        Backend(
            "torch",
            attention_torch.run_backward,
            lambda dout, dlse, q, k, v, out, lse, *tail: attention_torch.why_not(q, k, v, *tail),
        ),
        Backend("reference", reference_backward, executed_flops=executed_materialised_backward),
    ),
    slack=3.0,
    fp32_reductions=(3,),
)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + mask) v, without ever storing the scores.

    q: (B, Tq, H, D); k: (B, Tk, H_kv, D); v: (B, Tk, H_kv, Dv); H_kv divides H (GQA, MQA); one
    dtype of fp32, bf16, fp16, fp64; any strides. softmax_scale: default 1 / sqrt(D). Masks are
    aligned bottom-right: query i stands beside key i + Tk - Tq. causal: no key to its right.
    window: (left, right) keys visible beside it, -1 for no limit. softcap c > 0: scores become
    c tanh(s / c). alibi_slopes: (H,) or (B, H) fp32, no gradient. sink: (H,) logits that only enter
    the denominator. Returns out (B, Tq, H, Dv) in q's dtype; with return_lse also the natural
    log-sum-exp (B, H, Tq), fp32 (fp64 for fp64), differentiable too. A row that sees no key has
    out 0, lse -inf. Raises TypeError for a dtype, ValueError for a shape, device or flag.
    """
    if q.dim() != 4:
        raise ValueError(f"q must be (B, T, H, D), got {tuple(q.shape)}")
    return _attend(
        q, k, v, None, None, q.shape[1], k.shape[1], causal=causal, softmax_scale=softmax_scale,
        window=window, softcap=softcap, alibi_slopes=alibi_slopes, sink=sink, return_lse=return_lse,
    )  # fmt: skip


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attention` over sequences packed behind each other, none seeing another.

    q: (total_q, H, D); k: (total_k, H_kv, D); v: (total_k, H_kv, Dv). cu_seqlens_q, cu_seqlens_k:
    (B + 1,) int32, first rows of the sequences and the total behind them; a sequence may be empty.
    max_seqlen: the longest. The rest as in `flash_attention`; lse is (H, total_q). Raises
    ValueError also for cu_seqlens that fall or do not end at the total (looked at on CPU only: on
    a GPU looking would wait for it).
    """
    if q.dim() != 3:
        raise ValueError(f"q must be (total, H, D), got {tuple(q.shape)}")
    integer = (torch.int32,)
    shape = (cu_seqlens_q.numel(),)
    arguments.check_like("cu_seqlens_q", cu_seqlens_q, q, shape, dtypes=integer)
    arguments.check_like("cu_seqlens_k", cu_seqlens_k, q, shape, dtypes=integer)
    return _attend(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal,
        softmax_scale=softmax_scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
        sink=sink, return_lse=return_lse,
    )  # fmt: skip


def _attend(
    q, k, v, cu_q, cu_k, max_q, max_k, *,
    causal, softmax_scale, window, softcap, alibi_slopes, sink, return_lse,
):  # fmt: skip
    batch = q.shape[0] if cu_q is None else cu_q.numel() - 1
    _check(q, k, v, batch, window, softcap, alibi_slopes, sink)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = ATTENTION(
        q, k, v, cu_q, cu_k, max_q, max_k, alibi_slopes, sink, float(scale), causal, *window,
        float(softcap),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _check(q, k, v, batch, window, softcap, alibi_slopes, sink):
    arguments.check_float("q", q)
    lead, heads, d = tuple(q.shape[:-3]), q.shape[-2], q.shape[-1]
    where = "".join(f"{size}, " for size in lead)
    if k.dim() != q.dim() or tuple(k.shape[:-3]) != lead or k.shape[-1] != d:
        raise ValueError(f"k must be ({where}Tk, H_kv, {d}), got {tuple(k.shape)}")
    if v.dim() != q.dim() or v.shape[:-1] != k.shape[:-1]:
        expected = f"({where}{k.shape[-3]}, {k.shape[-2]}, Dv)"
        raise ValueError(f"v must be {expected}, got {tuple(v.shape)}")
    if k.shape[-2] == 0 or heads % k.shape[-2]:
        got = k.shape[-2]
        raise ValueError(f"heads of k and v must divide the {heads} heads of q, got {got}")
    arguments.check_like("k", k, q, k.shape, dtypes=(q.dtype,))
    arguments.check_like("v", v, q, v.shape, dtypes=(q.dtype,))
    if len(window) != 2 or min(window) < -1:
        raise ValueError(
            f"window must be (left, right), each >= 0 or -1 for no limit, got {window}"
        )
    if softcap < 0:
        raise ValueError(f"softcap must be >= 0 (0 is off), got {softcap}")
    if sink is not None:
        arguments.check_like("sink", sink, q, (heads,), dtypes=arguments.FLOATS)
    if alibi_slopes is not None and tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
        expected, got = f"({heads},) or ({batch}, {heads})", tuple(alibi_slopes.shape)
        raise ValueError(f"alibi_slopes must have shape {expected}, got {got}")

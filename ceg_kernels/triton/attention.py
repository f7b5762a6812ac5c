"""Flash attention forward; the formula is in ops/attention_reference.py.

A program takes BLOCK_M queries of one head and visits the keys they see in blocks of BLOCK_N, with
the running maximum and sum of each row (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al.
2022, arXiv 2205.14135). Heads of a group read the same K and V; nothing is expanded. Blocks that
every row sees whole have no mask code, blocks that nobody sees are not visited.

    q: (B, Tq, H, D), k: (B, Tk, H_kv, D), v: (B, Tk, H_kv, DV), out: like q with DV, lse: (B, H, Tq)
    packed: (total, H, D), lse (H, total), cu: (B + 1,);  s_: strides;  M: queries, N: keys of a tile
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ceg_kernels.triton.attention_config import forward_tile
from ceg_kernels.triton.attention_tile import (
    LOG2E,
    dot,
    load_rows,
    logits,
    partners,
    sequence,
    store_rows,
    view,
    visible,
)
from ceg_kernels.triton.launch import Gpu, gpu_of, launch, unit_stride


@triton.jit
def _visit(
    acc, top, total, q, keys, values, o_m, first, last, n_k, shift, left, right, slope, scale,
    softcap, to_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CAPPED: tl.constexpr,
    BIASED: tl.constexpr, FOLDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys [first, last) enter the output, maximum and sum of the rows."""
    for start in tl.range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)

        # Logits.
        k = load_rows(keys, start, n_k, MASKED, D, BLOCK_N, BLOCK_D)
        s = dot(q, tl.trans(k))
        distance = o_n[None, :] - o_m[:, None] - shift
        if not FOLDED:
            s, _ = logits(s, distance, slope, scale, softcap, CAPPED, BIASED)
        if MASKED:
            m = visible(distance, o_n[None, :], n_k, left, right, HAS_LEFT, HAS_RIGHT)
            s = tl.where(m, s, float("-inf"))

        # Softmax. The maximum is subtracted before the factor to base 2 is applied: in one fma the
        # product's rounding would leave exp(0) != 1 where logits are huge.
        now = tl.maximum(top, tl.max(s, axis=1))
        # Nothing visible yet: any finite number keeps exp(-inf - base) at 0 instead of NaN.
        base = tl.where(now == float("-inf"), 0.0, now)
        p = tl.exp2((s - base[:, None]) * to_log2)
        rescale = tl.exp2((top - base) * to_log2)
        total = total * rescale + tl.sum(p, axis=1)
        top = now

        # Values.
        v = load_rows(values, start, n_k, MASKED, DV, BLOCK_N, BLOCK_DV)
        acc = acc * rescale[:, None] + dot(p.to(v.dtype), v)
    return acc, top, total


@triton.jit(do_not_specialize=["n_q", "n_k", "heads", "n_heads", "left", "right"])
def attention_fwd_kernel(
    p_q, p_k, p_v, d_k, d_v, p_out, p_lse, p_cu_q, p_cu_k, p_slopes, p_sink,
    n_q, n_k, heads, n_heads,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_ob, s_ot, s_oh, s_lb, s_lh, s_slopes,
    left, right, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, CAPPED: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    # All heads of a tile of queries are neighbours, the last queries first: under a causal mask
    # they see most keys, and short tiles fill the processors at the end.
    tile = (tl.num_programs(0) // n_heads - 1) - tl.program_id(0) // n_heads
    o_bh = tl.program_id(0) % n_heads
    b, h = (o_bh // heads).to(tl.int64), (o_bh % heads).to(tl.int64)
    first_q, n_q = sequence(p_cu_q, b, n_q)
    first_k, n_k = sequence(p_cu_k, b, n_k)
    if tile * BLOCK_M >= n_q:
        return
    shift = n_k - n_q
    last = tl.minimum(tile * BLOCK_M + BLOCK_M, n_q) - 1
    o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)

    # Load.
    queries = view(p_q, s_qb, s_qt, s_qh, None, p_cu_q, b, h, first_q)
    q = load_rows(queries, tile * BLOCK_M, n_q, True, D, BLOCK_M, BLOCK_D)
    keys = view(p_k, s_kb, s_kt, s_kh, d_k, p_cu_k, b, h // GROUP, first_k)
    values = view(p_v, s_vb, s_vt, s_vh, d_v, p_cu_k, b, h // GROUP, first_k)
    BIASED: tl.constexpr = p_slopes is not None
    slope = 0.0
    if BIASED:
        slope = tl.load(p_slopes + b * s_slopes + h)
    # FOLDED: only the scale is missing, which commutes with the maximum.
    to_log2 = scale * LOG2E if FOLDED else LOG2E

    # Visit the keys.
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    start, whole, rest, stop = partners(
        tile * BLOCK_M, last, shift, left, right, n_k, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    if HAS_LEFT:
        acc, top, total = _visit(
            acc, top, total, q, keys, values, o_m, start, tl.minimum(whole, stop), n_k,
            shift, left, right, slope, scale, softcap, to_log2, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
            HAS_LEFT, HAS_RIGHT, CAPPED, BIASED, FOLDED, True,
        )  # fmt: skip
    acc, top, total = _visit(
        acc, top, total, q, keys, values, o_m, whole, rest, n_k,
        shift, left, right, slope, scale, softcap, to_log2, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        HAS_LEFT, HAS_RIGHT, CAPPED, BIASED, FOLDED, False,
    )  # fmt: skip
    acc, top, total = _visit(
        acc, top, total, q, keys, values, o_m, rest, stop, n_k,
        shift, left, right, slope, scale, softcap, to_log2, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        HAS_LEFT, HAS_RIGHT, CAPPED, BIASED, FOLDED, True,
    )  # fmt: skip

    # Normalise. The sink joins the sum as one more logit.
    if FOLDED:
        # Not of -inf, which stays: a scale of a NaN in the maximum is NaN either way.
        top = top * scale
    if p_sink is not None:
        sink = tl.load(p_sink + h)
        now = tl.maximum(top, sink)
        base = tl.where(now == float("-inf"), 0.0, now)
        rescale = tl.exp2((top - base) * LOG2E)
        total = total * rescale + tl.exp2((sink - base) * LOG2E)
        acc, top = acc * rescale[:, None], now
    blind = total == 0.0
    safe = tl.where(blind, 1.0, total)

    # Write.
    lse = tl.where(blind, float("-inf"), top + tl.log(safe))
    p_lse += b * s_lb + h * s_lh + first_q
    tl.store(p_lse + o_m, lse, mask=o_m < n_q)
    p_out += b * s_ob + first_q * s_ot + h * s_oh
    store_rows(p_out, s_ot, o_m, n_q, acc * (1.0 / safe)[:, None], DV, BLOCK_DV)


MOST = 2**30  # rows of a sequence or of a packed batch: positions and windows add up in 32 bits


@dataclass(frozen=True)
class Problem:
    """What forward and backward derive from the schema's arguments alike."""

    batch: int
    n_q: int
    n_k: int
    cu_q: Any
    cu_k: Any
    slopes: Any
    sink: Any
    left: int
    right: int
    constants: dict[str, Any]  # of every kernel

    @property
    def slopes_stride(self) -> int:
        return 0 if self.slopes is None or self.slopes.dim() == 1 else self.slopes.stride(0)


def problem_of(
    q, k, v, cu_q, cu_k, max_q, max_k, slopes, sink, causal, left, right, softcap
) -> Problem:  # fmt: skip
    """ValueError where positions would not fit into 32 bits."""
    packed = cu_q is not None
    for name, t in (("q", q), ("k", k)):
        if t.shape[-3] >= MOST:
            raise ValueError(f"{name} must have fewer than 2^30 rows, got {t.shape[-3]}")
    right = 0 if causal else right
    d, dv = q.shape[-1], v.shape[-1]
    constants = {
        "D": d, "DV": dv, "GROUP": q.shape[-2] // k.shape[-2],
        # A matrix instruction sums over 16 or more.
        "BLOCK_D": max(16, triton.next_power_of_2(d)),
        "BLOCK_DV": max(16, triton.next_power_of_2(dv)),
        "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0, "CAPPED": softcap > 0,
    }  # fmt: skip
    return Problem(
        batch=cu_q.numel() - 1 if packed else q.shape[0],
        n_q=max_q if packed else q.shape[1],
        n_k=max_k if packed else k.shape[1],
        cu_q=cu_q, cu_k=cu_k, slopes=_single(slopes), sink=_single(sink),
        left=min(left, MOST - 2**16), right=min(right, MOST - 2**16), constants=constants,
    )  # fmt: skip


def strides(t, packed: bool) -> tuple[int, int, int]:
    """Of sequence, row and head; packed sequences lie behind each other's rows."""
    return (0 if packed else t.stride(0)), t.stride(-3), t.stride(-2)


def lse_strides(lse, packed: bool) -> tuple[int, int]:
    """Of sequence and head."""
    return (0, lse.stride(0)) if packed else (lse.stride(0), lse.stride(1))


def described(tensors, rows: int, p: Problem, gpu: Gpu) -> list[TensorDescriptor | None]:
    """Descriptors (B, H, T, D) to load blocks of `rows` rows with the GPU's copy engine (TMA).

    None for each where the GPU has none or a tensor is not laid out for it: 16 bytes apart (CUDA
    driver API, cuTensorMapEncodeTiled).
    """
    if not gpu.has_descriptors:
        return [None] * len(tensors)
    found: list[TensorDescriptor | None] = []
    for t in tensors:
        t4 = (t if t.dim() == 4 else t[None]).transpose(1, 2)
        width = p.constants["BLOCK_D" if t.shape[-1] == p.constants["D"] else "BLOCK_DV"]
        apart = [s * t.element_size() % 16 == 0 and s > 0 for s in t4.stride()[:-1]]
        if t.element_size() != 2 or t.data_ptr() % 16 or not all(apart) or not t.numel():
            return [None] * len(tensors)
        found.append(TensorDescriptor.from_tensor(t4, [1, 1, rows, width]))
    return found


def _single(t):
    return None if t is None else t.to(torch.float32).contiguous()


def forward(
    q, k, v, cu_q, cu_k, max_q, max_k, slopes, sink, scale, causal, left, right, softcap
):  # fmt: skip
    """Schema of ceg::attention."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    p = problem_of(q, k, v, cu_q, cu_k, max_q, max_k, slopes, sink, causal, left, right, softcap)
    packed, heads = cu_q is not None, q.shape[-2]
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    shape = (heads, q.shape[0]) if packed else (q.shape[0], heads, q.shape[1])
    lse = q.new_empty(shape, dtype=torch.float32)
    gpu = gpu_of(q)
    tile = forward_tile(gpu, p.constants, q.element_size(), p.n_q)
    launch(
        attention_fwd_kernel, (triton.cdiv(p.n_q, tile.m) * p.batch * heads,),
        q, k, v, *described((k, v), tile.n, p, gpu), out, lse, p.cu_q, p.cu_k, p.slopes, p.sink,
        p.n_q, p.n_k, heads, p.batch * heads,
        *strides(q, packed), *strides(k, packed), *strides(v, packed), *strides(out, packed),
        *lse_strides(lse, packed), p.slopes_stride, p.left, p.right, scale, softcap,
        **p.constants, BLOCK_M=tile.m, BLOCK_N=tile.n,
        FOLDED=softcap == 0 and slopes is None and scale > 0,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return out, lse


def case(
    b, t, heads, heads_kv, d, dtype=torch.bfloat16, *, causal=True, left=-1, softcap=0.0,
    slopes=False, sink=False, packed=False, queries=None,
):  # fmt: skip
    """Arguments on meta tensors, for `compiled()` here and in attention_backward.py."""

    def meta(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    tq = t if queries is None else queries
    lead_q, lead_k = ((b * tq,), (b * t,)) if packed else ((b, tq), (b, t))
    cu = meta(b + 1, dtype=torch.int32) if packed else None
    per_head = meta(heads, dtype=torch.float32)
    return (
        meta(*lead_q, heads, d), meta(*lead_k, heads_kv, d), meta(*lead_k, heads_kv, d), cu, cu,
        tq, t, per_head if slopes else None, per_head if sink else None, 0.125, causal, left, -1,
        softcap,
    )  # fmt: skip


CASES: dict[str, tuple] = {
    "D64 bf16 causal": case(4, 1024, 12, 12, 64),
    "D64 bf16 full": case(4, 1024, 12, 12, 64, causal=False),
    "D128 bf16 causal 32/8": case(2, 2048, 32, 8, 128),
    "D128 bf16 full": case(2, 2048, 32, 8, 128, causal=False),
    "D256 bf16 causal": case(2, 2048, 8, 8, 256),
    "D80 fp16 causal": case(2, 2048, 8, 8, 80, torch.float16),
    "D16 bf16 causal": case(2, 2048, 8, 8, 16),
    "D64 fp32 causal": case(2, 1024, 8, 8, 64, torch.float32),
    "D128 fp32 causal": case(2, 1024, 8, 8, 128, torch.float32),
    "D256 fp32 causal": case(2, 1024, 8, 8, 256, torch.float32),
    "D128 bf16 everything packed": case(
        4, 1024, 16, 4, 128, left=256, softcap=30.0, slopes=True, sink=True, packed=True
    ),
    "D128 bf16 decode": case(8, 4096, 32, 8, 128, queries=1),
}


def compiled() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The calls whose kernels are compiled ahead of time, by name; see compile.py."""
    for name, args in CASES.items():
        yield name, partial(forward, *args)

"""Flash attention backward; the formula is in ops/attention_reference.py.

Three kernels, no atomics, so that the same GPU gives the same bits: delta of every row; dK and dV,
a program for BLOCK_N keys of one key head, which visits the queries that see them and all heads of
the group; dQ, a program for BLOCK_M queries of one head. A fourth sums dsink. Scores are computed
twice that way (14 D executed FLOPs a pair, where 10 D are possible).

Letters and strides as in attention.py;  delta: (B, H, Tq) or (H, total), like lse
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ceg_kernels.triton.attention_problem import (
    CASES,
    described,
    lse_strides,
    problem_of,
    strides,
)
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
from ceg_kernels.triton.launch import cdiv, gpu_of, launch, unit_stride


@triton.jit(do_not_specialize=["n_q", "n_tiles", "heads"])
def attention_bwd_delta_kernel(
    p_dout, p_out, p_dlse, p_delta, n_q, n_tiles, heads,
    s_dob, s_dot, s_doh, s_ob, s_ot, s_oh, s_dlb, s_dlh, s_lb, s_lh,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout * out) - dlse. Packed sequences are one long one here."""
    o_bh = tl.program_id(0) // n_tiles
    b, h = (o_bh // heads).to(tl.int64), (o_bh % heads).to(tl.int64)
    douts = view(p_dout, s_dob, s_dot, s_doh, None, b, h, 0)
    outs = view(p_out, s_ob, s_ot, s_oh, None, b, h, 0)
    first = tl.program_id(0) % n_tiles * BLOCK_M
    dout = load_rows(douts, None, first, n_q, True, DV, BLOCK_M, BLOCK_DV).to(tl.float32)
    out = load_rows(outs, None, first, n_q, True, DV, BLOCK_M, BLOCK_DV).to(tl.float32)
    delta = tl.sum(dout * out, axis=1)
    o_m = first + tl.arange(0, BLOCK_M)
    if p_dlse is not None:
        delta -= tl.load(p_dlse + b * s_dlb + h * s_dlh + o_m, mask=o_m < n_q, other=0.0)
    tl.store(p_delta + b * s_lb + h * s_lh + o_m, delta, mask=o_m < n_q)


@triton.jit(do_not_specialize=["n_q", "n_batch"])
def attention_bwd_dsink_kernel(
    p_lse, p_delta, p_sink, p_dsink, n_q, n_batch, s_lb, s_lh, BLOCK: tl.constexpr
):
    """dsink = -sum of p_sink * delta over all rows of a head, in order; in fp64: terms cancel."""
    h = tl.program_id(0).to(tl.int64)
    sink = tl.load(p_sink + h)
    dsink = tl.zeros((BLOCK,), tl.float64)
    o_row = h * s_lh
    for _ in tl.range(0, n_batch):
        for start in tl.range(0, n_q, BLOCK):
            o_m = start + tl.arange(0, BLOCK)
            m = o_m < n_q
            lse = tl.load(p_lse + o_row + o_m, mask=m, other=float("inf"))
            delta = tl.load(p_delta + o_row + o_m, mask=m, other=0.0)
            dsink -= tl.exp2((sink - lse) * LOG2E).to(tl.float64) * delta.to(tl.float64)
        o_row += s_lb
    tl.store(p_dsink + h, tl.sum(dsink, axis=0).to(tl.float32))


@triton.jit
def _probabilities(
    dots, distance, lse, m, slope, scale, softcap,
    CAPPED: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """exp(logit - lse), and tanh for the softcap's derivative. lse: one number a query."""
    s, t = logits(dots, distance, slope, scale, softcap, CAPPED, BIASED)
    p = tl.exp2((s - lse) * LOG2E)
    if MASKED:
        p = tl.where(m, p, 0.0)
    return p, t


@triton.jit
def _load_statistics(p_lse, p_delta, o_m, n_q, BOUNDED: tl.constexpr):
    # A row that sees nothing has -inf, where +inf makes its probabilities 0 instead of NaN; so it
    # does for rows that are not there.
    if BOUNDED:
        lse = tl.load(p_lse + o_m, mask=o_m < n_q, other=float("inf"))
        delta = tl.load(p_delta + o_m, mask=o_m < n_q, other=0.0)
    else:
        lse, delta = tl.load(p_lse + o_m), tl.load(p_delta + o_m)
    return delta, tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def _visit_queries(
    dk, dv, k, v, queries, douts, d_q, d_dout, p_lse, p_delta, o_n, first, last, n_q, n_k, shift,
    left, right, slope, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CAPPED: tl.constexpr,
    BIASED: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Queries [first, last) of one head enter dk and dv. Tiles are [N, M]: no transposed dots."""
    for start in tl.range(first, last, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)

        # Probabilities.
        q = load_rows(queries, d_q, start, n_q, BOUNDED, D, BLOCK_M, BLOCK_D)
        delta, lse = _load_statistics(p_lse, p_delta, o_m, n_q, BOUNDED)
        distance = o_n[:, None] - o_m[None, :] - shift
        m = visible(distance, o_n[:, None], n_k, left, right, HAS_LEFT, HAS_RIGHT)
        p, t = _probabilities(
            dot(k, tl.trans(q)), distance, lse[None, :], m, slope, scale, softcap,
            CAPPED, BIASED, MASKED,
        )  # fmt: skip

        # dV.
        dout = load_rows(douts, d_dout, start, n_q, BOUNDED, DV, BLOCK_M, BLOCK_DV)
        dv += dot(p.to(dout.dtype), dout)

        # dK.
        ds = p * (dot(v, tl.trans(dout)) - delta[None, :])
        if CAPPED:
            ds *= 1.0 - t * t
        dk += dot(ds.to(q.dtype), q)
    return dk, dv


@triton.jit(do_not_specialize=["n_q", "n_k", "heads_kv", "n_heads", "left", "right"])
def attention_bwd_dkdv_kernel(
    p_dout, p_q, p_k, p_v, d_dout, d_q, p_lse, p_delta, p_dk, p_dv, p_cu_q, p_cu_k, p_slopes,
    n_q, n_k, heads_kv, n_heads,
    s_dob, s_dot, s_doh, s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh,
    s_dkb, s_dkt, s_dkh, s_dvb, s_dvt, s_dvh, s_lb, s_lh, s_slopes, left, right, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    # The first keys come first: under a causal mask most queries see them.
    tile = tl.program_id(0) // n_heads
    o_bh = tl.program_id(0) % n_heads
    b, h_kv = (o_bh // heads_kv).to(tl.int64), (o_bh % heads_kv).to(tl.int64)
    first_q, n_q = sequence(p_cu_q, b, n_q)
    first_k, n_k = sequence(p_cu_k, b, n_k)
    if tile * BLOCK_N >= n_k:
        return
    shift = n_k - n_q
    last = tl.minimum(tile * BLOCK_N + BLOCK_N, n_k) - 1
    o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)

    # Load.
    keys = view(p_k, s_kb, s_kt, s_kh, p_cu_k, b, h_kv, first_k)
    values = view(p_v, s_vb, s_vt, s_vh, p_cu_k, b, h_kv, first_k)
    k = load_rows(keys, None, tile * BLOCK_N, n_k, True, D, BLOCK_N, BLOCK_D)
    v = load_rows(values, None, tile * BLOCK_N, n_k, True, DV, BLOCK_N, BLOCK_DV)
    o_lse = b * s_lb + first_q
    BIASED: tl.constexpr = p_slopes is not None

    # Visit the queries. A key has its partners mirrored: its queries are those of
    # [j - shift - right, j - shift + left].
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    start, whole, rest, stop = partners(
        tile * BLOCK_N, last, -shift, right, left, n_q, BLOCK_M, HAS_RIGHT, HAS_LEFT
    )
    # Borders of packed sequences are nothing that a descriptor knows.
    b_q = None if p_cu_q is not None else d_q
    b_dout = None if p_cu_q is not None else d_dout
    for g in tl.range(0, GROUP):
        h = h_kv * GROUP + g
        slope = 0.0
        if BIASED:
            slope = tl.load(p_slopes + b * s_slopes + h)
        queries = view(p_q, s_qb, s_qt, s_qh, p_cu_q, b, h, first_q)
        douts = view(p_dout, s_dob, s_dot, s_doh, p_cu_q, b, h, first_q)
        p_lseh, p_deltah = p_lse + o_lse + h * s_lh, p_delta + o_lse + h * s_lh
        if HAS_RIGHT:
            dk, dv = _visit_queries(
                dk, dv, k, v, queries, douts, b_q, b_dout, p_lseh, p_deltah, o_n, start,
                tl.minimum(whole, stop), n_q, n_k, shift, left, right, slope, scale, softcap,
                D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, HAS_LEFT, HAS_RIGHT, CAPPED, BIASED, True, True,
            )  # fmt: skip
        # Past the last query there is nothing to mask: it has the weight 0. One loop less is fewer
        # registers, but a packed sequence would lose its descriptors.
        APART: tl.constexpr = HAS_LEFT or p_cu_q is not None
        dk, dv = _visit_queries(
            dk, dv, k, v, queries, douts, d_q, d_dout, p_lseh, p_deltah, o_n, whole,
            rest if APART else stop, n_q, n_k, shift, left, right, slope, scale, softcap,
            D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, HAS_LEFT, HAS_RIGHT, CAPPED, BIASED, False,
            not APART,
        )  # fmt: skip
        if APART:
            dk, dv = _visit_queries(
                dk, dv, k, v, queries, douts, b_q, b_dout, p_lseh, p_deltah, o_n, rest,
                stop, n_q, n_k, shift, left, right, slope, scale, softcap,
                D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, HAS_LEFT, HAS_RIGHT, CAPPED, BIASED, HAS_LEFT,
                True,
            )  # fmt: skip

    # Write.
    p_dk += b * s_dkb + first_k * s_dkt + h_kv * s_dkh
    p_dv += b * s_dvb + first_k * s_dvt + h_kv * s_dvh
    store_rows(p_dk, s_dkt, o_n, n_k, dk * scale, D, BLOCK_D)
    store_rows(p_dv, s_dvt, o_n, n_k, dv, DV, BLOCK_DV)


@triton.jit
def _visit_keys(
    dq, q, dout, lse, delta, keys, values, d_k, d_v, o_m, first, last, n_k, shift, left, right,
    slope, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CAPPED: tl.constexpr,
    BIASED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys [first, last) enter dq."""
    for start in tl.range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)

        # Probabilities.
        k = load_rows(keys, d_k, start, n_k, MASKED, D, BLOCK_N, BLOCK_D)
        distance = o_n[None, :] - o_m[:, None] - shift
        m = visible(distance, o_n[None, :], n_k, left, right, HAS_LEFT, HAS_RIGHT)
        p, t = _probabilities(
            dot(q, tl.trans(k)), distance, lse[:, None], m, slope, scale, softcap,
            CAPPED, BIASED, MASKED,
        )  # fmt: skip

        # dQ. dS sums to 0 over the keys and rounded dS does not: what all keys have in common
        # would come back times the difference. So what rounding leaves over is multiplied too.
        v = load_rows(values, d_v, start, n_k, MASKED, DV, BLOCK_N, BLOCK_DV)
        ds = p * (dot(dout, tl.trans(v)) - delta[:, None])
        if CAPPED:
            ds *= 1.0 - t * t
        rounded = ds.to(k.dtype)
        dq += dot(rounded, k)
        if k.dtype != tl.float32:
            dq += dot((ds - rounded.to(tl.float32)).to(k.dtype), k)
    return dq


@triton.jit(do_not_specialize=["n_q", "n_k", "heads", "n_heads", "left", "right"])
def attention_bwd_dq_kernel(
    p_dout, p_q, p_k, p_v, d_k, d_v, p_lse, p_delta, p_dq, p_cu_q, p_cu_k, p_slopes,
    n_q, n_k, heads, n_heads,
    s_dob, s_dot, s_doh, s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh,
    s_dqb, s_dqt, s_dqh, s_lb, s_lh, s_slopes, left, right, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    # The last queries first, as in the forward.
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
    queries = view(p_q, s_qb, s_qt, s_qh, p_cu_q, b, h, first_q)
    douts = view(p_dout, s_dob, s_dot, s_doh, p_cu_q, b, h, first_q)
    q = load_rows(queries, None, tile * BLOCK_M, n_q, True, D, BLOCK_M, BLOCK_D)
    dout = load_rows(douts, None, tile * BLOCK_M, n_q, True, DV, BLOCK_M, BLOCK_DV)
    o_lse = b * s_lb + h * s_lh + first_q
    delta, lse = _load_statistics(p_lse + o_lse, p_delta + o_lse, o_m, n_q, True)
    keys = view(p_k, s_kb, s_kt, s_kh, p_cu_k, b, h // GROUP, first_k)
    values = view(p_v, s_vb, s_vt, s_vh, p_cu_k, b, h // GROUP, first_k)
    BIASED: tl.constexpr = p_slopes is not None
    slope = 0.0
    if BIASED:
        slope = tl.load(p_slopes + b * s_slopes + h)

    # Visit the keys.
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    start, whole, rest, stop = partners(
        tile * BLOCK_M, last, shift, left, right, n_k, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    b_k = None if p_cu_k is not None else d_k
    b_v = None if p_cu_k is not None else d_v
    if HAS_LEFT:
        dq = _visit_keys(
            dq, q, dout, lse, delta, keys, values, b_k, b_v, o_m, start, tl.minimum(whole, stop),
            n_k, shift, left, right, slope, scale, softcap, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
            HAS_LEFT, HAS_RIGHT, CAPPED, BIASED, True,
        )  # fmt: skip
    dq = _visit_keys(
        dq, q, dout, lse, delta, keys, values, d_k, d_v, o_m, whole, rest,
        n_k, shift, left, right, slope, scale, softcap, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        HAS_LEFT, HAS_RIGHT, CAPPED, BIASED, False,
    )  # fmt: skip
    dq = _visit_keys(
        dq, q, dout, lse, delta, keys, values, b_k, b_v, o_m, rest, stop,
        n_k, shift, left, right, slope, scale, softcap, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        HAS_LEFT, HAS_RIGHT, CAPPED, BIASED, True,
    )  # fmt: skip

    # Write.
    p_dq += b * s_dqb + first_q * s_dqt + h * s_dqh
    store_rows(p_dq, s_dqt, o_m, n_q, dq * scale, D, BLOCK_D)


def backward(
    dout, dlse, q, k, v, out, lse, cu_q, cu_k, max_q, max_k,
    slopes, sink, scale, causal, left, right, softcap,
):  # fmt: skip
    """Schema of ceg::attention_backward."""
    dout, q, k, v, out = (unit_stride(t) for t in (dout, q, k, v, out))
    p = problem_of(q, k, v, cu_q, cu_k, max_q, max_k, slopes, sink, causal, left, right, softcap)
    packed, heads, heads_kv = cu_q is not None, q.shape[-2], k.shape[-2]
    lse = lse.contiguous()
    at_lse = lse_strides(lse, packed)
    delta = _delta(dout, out, dlse, lse, packed, p)
    dsink = lse.new_zeros(0) if sink is None else _dsink(lse, delta, p.sink, at_lse, packed)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    read = [s for t in (dout, q, k, v) for s in strides(t, packed)]
    flags = p.left, p.right, scale, softcap
    gpu = gpu_of(q)
    keys, queries = p.tile("bwd_dkdv", gpu), p.tile("bwd_dq", gpu)
    launch(
        attention_bwd_dkdv_kernel, (cdiv(p.n_k, keys.n) * p.batch * heads_kv,),
        dout, q, k, v, *described((dout, q), keys.m, p, gpu), lse, delta, dk, dv,
        p.cu_q, p.cu_k, p.slopes,
        p.n_q, p.n_k, heads_kv, p.batch * heads_kv,
        *read, *strides(dk, packed), *strides(dv, packed), *at_lse, p.slopes_stride, *flags,
        **p.constants, BLOCK_M=keys.m, BLOCK_N=keys.n, warps=keys.warps, stages=keys.stages,
    )  # fmt: skip
    launch(
        attention_bwd_dq_kernel, (cdiv(p.n_q, queries.m) * p.batch * heads,),
        dout, q, k, v, *described((k, v), queries.n, p, gpu), lse, delta, dq,
        p.cu_q, p.cu_k, p.slopes,
        p.n_q, p.n_k, heads, p.batch * heads,
        *read, *strides(dq, packed), *at_lse, p.slopes_stride, *flags,
        **p.constants, BLOCK_M=queries.m, BLOCK_N=queries.n,
        warps=queries.warps, stages=queries.stages,
    )  # fmt: skip
    return dq, dk, dv, dsink


def _delta(dout, out, dlse, lse, packed, p):
    delta = torch.empty_like(lse)
    rows, heads = lse.shape[-1], out.shape[-2]
    block = max(1, 65536 // (p.bits * p.constants["BLOCK_DV"]))
    tiles = cdiv(rows, block)
    more = (0, 0) if dlse is None else lse_strides(dlse := unit_stride(dlse), packed)
    launch(
        attention_bwd_delta_kernel, (tiles * lse.numel() // max(rows, 1),),
        dout, out, dlse, delta, rows, tiles, heads,
        *strides(dout, packed), *strides(out, packed), *more, *lse_strides(lse, packed),
        DV=p.constants["DV"], BLOCK_DV=p.constants["BLOCK_DV"], BLOCK_M=block, warps=4,
    )  # fmt: skip
    return delta


def _dsink(lse, delta, sink, at_lse, packed):
    dsink = lse.new_empty(sink.shape)
    batch = 1 if packed else lse.shape[0]
    launch(
        attention_bwd_dsink_kernel, (sink.numel(),),
        lse, delta, sink, dsink, lse.shape[-1], batch, *at_lse, BLOCK=1024, warps=4,
    )  # fmt: skip
    return dsink


def compiled() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The calls whose kernels are compiled ahead of time, by name; see compile.py."""
    for name, args in CASES.items():
        q, _, v, cu = args[:4]
        if q.dtype == torch.float32 and q.shape[-1] > 128:
            continue  # refused: see ops/attention.py
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        shape = out.shape[-2::-1] if cu is not None else (out.shape[0], *out.shape[-2:0:-1])
        lse = q.new_empty(shape, dtype=torch.float32)
        dlse = lse if "everything" in name else None
        given = (out, dlse, *args[:3], out, lse, *args[3:])
        yield name, partial(backward, *given)

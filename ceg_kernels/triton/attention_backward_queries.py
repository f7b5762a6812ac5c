"""Flash attention backward by blocks of queries: dQ where it is not summed beside dK and dV.

A program holds dQ of BLOCK_M queries of one head and visits the keys they see. Scores are computed
a second time that way: 14 D executed FLOPs a pair with attention_bwd_dkdv_kernel, not 10 D.

Letters and strides as in attention.py
"""

from __future__ import annotations

import triton
import triton.language as tl

from ceg_kernels.triton.attention_slices import dot_rows
from ceg_kernels.triton.attention_tile import (
    dot,
    load_row,
    load_rows,
    load_statistics,
    partners,
    probabilities,
    sequence,
    store_rows,
    view,
    visible,
)


@triton.jit
def _visit_keys(
    dq, lost, queries, douts, lse, delta, keys, values, d_k, d_v, o_m, first, last, n_k, shift,
    left, right, slope, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SLICE: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, CAPPED: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys [first, last) enter dq, and what rounding takes from their dS enters lost.

    queries, douts: (tile, its rows); the tile is there without slices (attention_slices.py).
    """
    q, rows_q = queries
    dout, rows_dout = douts
    for start in tl.range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)

        # Probabilities.
        if SLICE == 0:
            k = load_rows(keys, d_k, start, n_k, MASKED, D, BLOCK_N, BLOCK_D)
        else:
            s = dot_rows(rows_q, (keys, start, n_k), D, BLOCK_M, BLOCK_N, SLICE)
        distance = o_n[None, :] - o_m[:, None] - shift
        m = visible(distance, o_n[None, :], n_k, left, right, HAS_LEFT, HAS_RIGHT)
        if SLICE == 0:
            s = dot(q, tl.trans(k))
        p, t = probabilities(
            s, distance, lse[:, None], m, slope, scale, softcap, CAPPED, BIASED, MASKED
        )

        # dQ.
        if SLICE == 0:
            v = load_rows(values, d_v, start, n_k, MASKED, DV, BLOCK_N, BLOCK_DV)
            dp = dot(dout, tl.trans(v))
        else:
            dp = dot_rows(rows_dout, (values, start, n_k), DV, BLOCK_M, BLOCK_N, SLICE)
            k = load_rows(keys, d_k, start, n_k, MASKED, D, BLOCK_N, BLOCK_D)
        ds = p * (dp - delta[:, None])
        if CAPPED:
            ds *= 1.0 - t * t
        rounded = ds.to(k.dtype)
        dq += dot(rounded, k)
        if k.dtype != tl.float32:
            lost += tl.sum(ds - rounded.to(tl.float32), axis=1)
    return dq, lost


@triton.jit(do_not_specialize=["n_q", "n_k", "heads", "n_heads", "left", "right"])
def attention_bwd_dq_kernel(
    p_dout, p_q, p_k, p_v, d_k, d_v, p_lse, p_delta, p_dq, p_cu_q, p_cu_k, p_slopes,
    n_q, n_k, heads, n_heads,
    s_dob, s_dot, s_doh, s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh,
    s_dqb, s_dqt, s_dqh, s_lb, s_lh, s_slopes, left, right, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SLICE: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CAPPED: tl.constexpr,
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
    q, dout = None, None
    if SLICE == 0:
        q = load_rows(queries, None, tile * BLOCK_M, n_q, True, D, BLOCK_M, BLOCK_D)
        dout = load_rows(douts, None, tile * BLOCK_M, n_q, True, DV, BLOCK_M, BLOCK_DV)
    of_q, of_dout = (q, (queries, tile * BLOCK_M, n_q)), (dout, (douts, tile * BLOCK_M, n_q))
    o_lse = b * s_lb + h * s_lh + first_q
    delta, lse = load_statistics(p_lse + o_lse, p_delta + o_lse, o_m, n_q, True)
    keys = view(p_k, s_kb, s_kt, s_kh, p_cu_k, b, h // GROUP, first_k)
    values = view(p_v, s_vb, s_vt, s_vh, p_cu_k, b, h // GROUP, first_k)
    BIASED: tl.constexpr = p_slopes is not None
    slope = 0.0
    if BIASED:
        slope = tl.load(p_slopes + b * s_slopes + h)

    # Visit the keys.
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    lost = tl.zeros((BLOCK_M,), tl.float32)
    start, whole, rest, stop = partners(
        tile * BLOCK_M, last, shift, left, right, n_k, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    b_k = None if p_cu_k is not None else d_k
    b_v = None if p_cu_k is not None else d_v
    if HAS_LEFT:
        dq, lost = _visit_keys(
            dq, lost, of_q, of_dout, lse, delta, keys, values, b_k, b_v, o_m, start,
            tl.minimum(whole, stop), n_k, shift, left, right, slope, scale, softcap,
            D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, SLICE,
            HAS_LEFT, HAS_RIGHT, CAPPED, BIASED, True,
        )  # fmt: skip
    dq, lost = _visit_keys(
        dq, lost, of_q, of_dout, lse, delta, keys, values, d_k, d_v, o_m, whole, rest,
        n_k, shift, left, right, slope, scale, softcap, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        SLICE, HAS_LEFT, HAS_RIGHT, CAPPED, BIASED, False,
    )  # fmt: skip
    dq, lost = _visit_keys(
        dq, lost, of_q, of_dout, lse, delta, keys, values, b_k, b_v, o_m, rest, stop,
        n_k, shift, left, right, slope, scale, softcap, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        SLICE, HAS_LEFT, HAS_RIGHT, CAPPED, BIASED, True,
    )  # fmt: skip

    # A row of dS sums to 0 and a rounded one does not: what all keys have in common would come back
    # times the difference. So one key is given what rounding has lost.
    if p_q.dtype.element_ty != tl.float32:  # noqa: SIM102 - known to the compiler, unlike the next
        if start < stop:
            one_key = load_row(keys, start, 0, D, BLOCK_D)
            dq += lost[:, None] * one_key[None, :]

    # Write.
    p_dq += b * s_dqb + first_q * s_dqt + h * s_dqh
    store_rows(p_dq, s_dqt, o_m, n_q, dq * scale, D, BLOCK_D)

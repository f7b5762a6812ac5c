"""Flash attention backward by blocks of keys: dK and dV, and in one pass dQ too.

A program holds dK and dV of BLOCK_N keys of one key head and visits the queries that see them, of
all heads of the group. `attention_bwd_dkdv_kernel` has a program for each block of keys and leaves
dQ to a second pass. `attention_bwd_kernel` computes scores once: a program takes several blocks of
keys, one after another, and adds their share of dQ to a slice of a workspace that no other program
touches. The slices are added up in order by attention_bwd_sum_kernel. So there are no float atomics
and nobody waits for anybody.

Letters and strides as in attention.py
    workspace: (splits, B, H, tiles, BLOCK_M, BLOCK_D) fp32, packed (splits, H, tiles, ...);  s_w
"""

from __future__ import annotations

import triton
import triton.language as tl

from ceg_kernels.triton.attention_backward_pairs import clear_dq, visit_queries
from ceg_kernels.triton.attention_slices import store_slices, zeros_in_slices
from ceg_kernels.triton.attention_tile import (
    first_tile,
    load_row,
    load_rows,
    partners,
    sequence,
    store_rows,
    view,
)


@triton.jit
def _key_block(
    tile, p_dq, s_wh, seen, of_dout, of_q, of_k, of_v, of_dk, of_dv, of_rows, of_slopes,
    p_cu_q, p_cu_k, b, h_kv, first_q, n_q, first_k, n_k, left, right, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SLICE: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys, and its share of dQ; returns up to which query dQ is there."""
    p_dout, d_dout, s_dob, s_dot, s_doh = of_dout
    p_q, d_q, s_qb, s_qt, s_qh = of_q
    p_k, s_kb, s_kt, s_kh = of_k
    p_v, s_vb, s_vt, s_vh = of_v
    p_dk, s_dkb, s_dkt, s_dkh = of_dk
    p_dv, s_dvb, s_dvt, s_dvh = of_dv
    p_lse, p_delta, s_lb, s_lh = of_rows
    p_slopes, s_slopes = of_slopes
    shift = n_k - n_q
    last = tl.minimum(tile * BLOCK_N + BLOCK_N, n_k) - 1
    o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)

    # Load.
    keys = view(p_k, s_kb, s_kt, s_kh, p_cu_k, b, h_kv, first_k)
    values = view(p_v, s_vb, s_vt, s_vh, p_cu_k, b, h_kv, first_k)
    k, v, one_key = None, None, None
    if SLICE == 0:
        k = load_rows(keys, None, tile * BLOCK_N, n_k, True, D, BLOCK_N, BLOCK_D)
        v = load_rows(values, None, tile * BLOCK_N, n_k, True, DV, BLOCK_N, BLOCK_DV)
        if p_dq is not None:
            one_key = load_row(keys, tile * BLOCK_N, 0, D, BLOCK_D)
    of_keys, of_values = (k, (keys, tile * BLOCK_N, n_k)), (v, (values, tile * BLOCK_N, n_k))
    o_lse = b * s_lb + first_q
    BIASED: tl.constexpr = p_slopes is not None

    # Visit the queries. A key has its partners mirrored: its queries are those of
    # [j - shift - right, j - shift + left].
    if SLICE == 0:
        dk, dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    else:
        dk, dv = zeros_in_slices(BLOCK_N, D, SLICE), zeros_in_slices(BLOCK_N, DV, SLICE)
    start, whole, rest, stop = partners(
        tile * BLOCK_N, last, -shift, right, left, n_q, BLOCK_M, HAS_RIGHT, HAS_LEFT
    )
    if p_dq is not None:
        clear_dq(p_dq, s_wh, seen, tl.minimum(start, n_q), GROUP, BLOCK_M, BLOCK_D)
    # Borders of packed sequences are nothing that a descriptor knows.
    b_q = None if p_cu_q is not None else d_q
    b_dout = None if p_cu_q is not None else d_dout
    p_dqh = p_dq  # steps by heads: times their stride, 32 bits may not do
    for g in tl.range(0, GROUP):
        h = h_kv * GROUP + g
        slope = 0.0
        if BIASED:
            slope = tl.load(p_slopes + b * s_slopes + h)
        queries = view(p_q, s_qb, s_qt, s_qh, p_cu_q, b, h, first_q)
        douts = view(p_dout, s_dob, s_dot, s_doh, p_cu_q, b, h, first_q)
        p_lseh, p_deltah = p_lse + o_lse + h * s_lh, p_delta + o_lse + h * s_lh
        # Past the last query there is nothing to mask: it has the weight 0. One loop less is fewer
        # registers, but a packed sequence would lose its descriptors. Where dQ wants registers too
        # one loop with all masks has to do.
        ONE: tl.constexpr = p_dq is not None
        ANY: tl.constexpr = HAS_LEFT or HAS_RIGHT
        APART: tl.constexpr = not ONE and (HAS_LEFT or p_cu_q is not None)
        if HAS_RIGHT and not ONE:
            dk, dv = visit_queries(
                dk, dv, of_keys, of_values, one_key, queries, douts, b_q, b_dout, p_lseh, p_deltah,
                p_dqh, o_n, start, tl.minimum(whole, stop), seen, n_q, n_k, shift, left, right,
                slope, scale, softcap, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, SLICE, HAS_LEFT,
                HAS_RIGHT, CAPPED, BIASED, True, True,
            )  # fmt: skip
        dk, dv = visit_queries(
            dk, dv, of_keys, of_values, one_key, queries, douts, b_q if ONE else d_q,
            b_dout if ONE else d_dout, p_lseh, p_deltah, p_dqh, o_n, start if ONE else whole,
            rest if APART else stop, seen, n_q, n_k, shift, left, right, slope, scale, softcap,
            D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, SLICE, HAS_LEFT, HAS_RIGHT, CAPPED, BIASED,
            ONE and ANY, not APART,
        )  # fmt: skip
        if APART:
            dk, dv = visit_queries(
                dk, dv, of_keys, of_values, one_key, queries, douts, b_q, b_dout, p_lseh, p_deltah,
                p_dqh, o_n, rest, stop, seen, n_q, n_k, shift, left, right, slope, scale, softcap,
                D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, SLICE, HAS_LEFT, HAS_RIGHT, CAPPED,
                BIASED, HAS_LEFT, True,
            )  # fmt: skip
        if p_dq is not None:
            p_dqh += s_wh

    # Write.
    p_dk += b * s_dkb + first_k * s_dkt + h_kv * s_dkh
    p_dv += b * s_dvb + first_k * s_dvt + h_kv * s_dvh
    if SLICE == 0:
        store_rows(p_dk, s_dkt, o_n, n_k, dk * scale, D, BLOCK_D)
        store_rows(p_dv, s_dvt, o_n, n_k, dv, DV, BLOCK_DV)
    else:
        store_slices(p_dk, s_dkt, o_n, n_k, dk, scale, D, SLICE)
        store_slices(p_dv, s_dvt, o_n, n_k, dv, 1.0, DV, SLICE)
    return tl.maximum(seen, tl.maximum(start, tl.cdiv(tl.maximum(stop, 0), BLOCK_M) * BLOCK_M))


@triton.jit(do_not_specialize=["n_q", "n_k", "heads_kv", "n_heads", "left", "right"])
def attention_bwd_dkdv_kernel(
    p_dout, p_q, p_k, p_v, d_dout, d_q, p_lse, p_delta, p_dk, p_dv, p_cu_q, p_cu_k, p_slopes,
    n_q, n_k, heads_kv, n_heads,
    s_dob, s_dot, s_doh, s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh,
    s_dkb, s_dkt, s_dkh, s_dvb, s_dvt, s_dvh, s_lb, s_lh, s_slopes, left, right, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SLICE: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    # The first keys come first: under a causal mask most queries see them.
    tile = tl.program_id(0) // n_heads
    o_bh = tl.program_id(0) % n_heads
    b, h_kv = (o_bh // heads_kv).to(tl.int64), (o_bh % heads_kv).to(tl.int64)
    first_q, n_q = sequence(p_cu_q, b, n_q)
    first_k, n_k = sequence(p_cu_k, b, n_k)
    if tile * BLOCK_N >= n_k:
        return
    _key_block(
        tile, None, 0, 0, (p_dout, d_dout, s_dob, s_dot, s_doh), (p_q, d_q, s_qb, s_qt, s_qh),
        (p_k, s_kb, s_kt, s_kh), (p_v, s_vb, s_vt, s_vh), (p_dk, s_dkb, s_dkt, s_dkh),
        (p_dv, s_dvb, s_dvt, s_dvh), (p_lse, p_delta, s_lb, s_lh), (p_slopes, s_slopes),
        p_cu_q, p_cu_k, b, h_kv, first_q, n_q, first_k, n_k, left, right, scale, softcap,
        D, DV, GROUP, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, SLICE, HAS_LEFT, HAS_RIGHT, CAPPED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_q", "n_k", "heads_kv", "n_heads", "splits", "left", "right"])
def attention_bwd_kernel(
    p_dout, p_q, p_k, p_v, d_dout, d_q, p_lse, p_delta, p_dk, p_dv, p_work, p_cu_q, p_cu_k,
    p_slopes, n_q, n_k, heads_kv, n_heads, splits,
    s_dob, s_dot, s_doh, s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh,
    s_dkb, s_dkt, s_dkh, s_dvb, s_dvt, s_dvh, s_lb, s_lh, s_ws, s_wb, s_wh, s_slopes,
    left, right, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SLICE: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0) // n_heads
    o_bh = tl.program_id(0) % n_heads
    b, h_kv = (o_bh // heads_kv).to(tl.int64), (o_bh % heads_kv).to(tl.int64)
    first_q, n_q = sequence(p_cu_q, b, n_q)
    first_k, n_k = sequence(p_cu_k, b, n_k)
    o_dq = first_tile(p_cu_q, b, first_q, BLOCK_M) * BLOCK_D
    p_dq = p_work + split.to(tl.int64) * s_ws + b * s_wb + h_kv * GROUP * s_wh + o_dq

    # To and fro over the splits, so that under a causal mask each has as much to do. The program's
    # blocks rise, so do their queries: those below `seen` have been visited or cleared.
    seen = 0
    for turn in tl.range(0, tl.cdiv(tl.cdiv(n_k, BLOCK_N), splits), disable_licm=True):
        tile = turn * splits + (split if turn % 2 == 0 else splits - 1 - split)
        if tile * BLOCK_N < n_k:
            # dQ of the last block is read by other threads than those that wrote it.
            tl.debug_barrier()
            seen = _key_block(
                tile, p_dq, s_wh, seen, (p_dout, d_dout, s_dob, s_dot, s_doh),
                (p_q, d_q, s_qb, s_qt, s_qh), (p_k, s_kb, s_kt, s_kh), (p_v, s_vb, s_vt, s_vh),
                (p_dk, s_dkb, s_dkt, s_dkh), (p_dv, s_dvb, s_dvt, s_dvh),
                (p_lse, p_delta, s_lb, s_lh), (p_slopes, s_slopes),
                p_cu_q, p_cu_k, b, h_kv, first_q, n_q, first_k, n_k, left, right, scale, softcap,
                D, DV, GROUP, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, SLICE, HAS_LEFT, HAS_RIGHT,
                CAPPED,
            )  # fmt: skip
    clear_dq(p_dq, s_wh, seen, n_q, GROUP, BLOCK_M, BLOCK_D)

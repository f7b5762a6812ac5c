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

from ceg_kernels.triton.attention_tile import (
    dot,
    first_tile,
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
def _add_to_dq(p_tile, part, there, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of the workspace, of which nothing is read unless it is `there`."""
    p = p_tile + tl.arange(0, BLOCK_D)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    tl.store(p, part + tl.load(p, mask=there, other=0.0))


@triton.jit
def _clear_dq(
    p_dq, s_wh, first, last,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tiles of queries from [first, last) that see none of the program's keys."""
    none = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
    for start in tl.range(first, last, BLOCK_M):
        p_tile = p_dq + tl.cast(start, tl.int64) * BLOCK_D
        for g in tl.range(0, GROUP):
            _add_to_dq(p_tile + g * s_wh, none, False, BLOCK_M, BLOCK_D)


@triton.jit
def _visit_queries(
    dk, dv, k, v, one_key, queries, douts, d_q, d_dout, p_lse, p_delta, p_dq, o_n, first, last,
    seen, n_q, n_k, shift, left, right, slope, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CAPPED: tl.constexpr,
    BIASED: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Queries [first, last) of one head enter dk and dv, and the keys their dq where it is given.

    Tiles are [N, M]: no transposed dots for dk and dv.
    """
    for start in tl.range(first, last, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)

        # Probabilities.
        q = load_rows(queries, d_q, start, n_q, BOUNDED, D, BLOCK_M, BLOCK_D)
        delta, lse = load_statistics(p_lse, p_delta, o_m, n_q, BOUNDED)
        distance = o_n[:, None] - o_m[None, :] - shift
        m = visible(distance, o_n[:, None], n_k, left, right, HAS_LEFT, HAS_RIGHT)
        p, t = probabilities(
            dot(k, tl.trans(q)), distance, lse[None, :], m, slope, scale, softcap,
            CAPPED, BIASED, MASKED,
        )  # fmt: skip

        if p_dq is not None and not MASKED:
            # Keys past the end are zeros, but what they are multiplied by need not be finite.
            p = tl.where(o_n[:, None] < n_k, p, 0.0)

        # dV.
        dout = load_rows(douts, d_dout, start, n_q, BOUNDED, DV, BLOCK_M, BLOCK_DV)
        dv += dot(p.to(dout.dtype), dout)

        # dK.
        ds = p * (dot(v, tl.trans(dout)) - delta[None, :])
        if CAPPED:
            ds *= 1.0 - t * t
        rounded = ds.to(q.dtype)
        dk += dot(rounded, q)

        # dQ. Rows are read back where an earlier block of this program has left something.
        if p_dq is not None:
            part = dot(tl.trans(k), rounded)
            if k.dtype != tl.float32:
                lost = tl.sum(ds - rounded.to(tl.float32), axis=0)
                part += one_key[:, None] * lost[None, :]
            p_tile = p_dq + tl.cast(start, tl.int64) * BLOCK_D
            _add_to_dq(p_tile, part, start < seen, BLOCK_M, BLOCK_D)
    return dk, dv


@triton.jit
def _key_block(
    tile, p_dq, s_wh, seen, of_dout, of_q, of_k, of_v, of_dk, of_dv, of_rows, of_slopes,
    p_cu_q, p_cu_k, b, h_kv, first_q, n_q, first_k, n_k, left, right, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, CAPPED: tl.constexpr,
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
    k = load_rows(keys, None, tile * BLOCK_N, n_k, True, D, BLOCK_N, BLOCK_D)
    v = load_rows(values, None, tile * BLOCK_N, n_k, True, DV, BLOCK_N, BLOCK_DV)
    one_key = None
    if p_dq is not None:
        one_key = load_row(keys, tile * BLOCK_N, D, BLOCK_D)
    o_lse = b * s_lb + first_q
    BIASED: tl.constexpr = p_slopes is not None

    # Visit the queries. A key has its partners mirrored: its queries are those of
    # [j - shift - right, j - shift + left].
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    start, whole, rest, stop = partners(
        tile * BLOCK_N, last, -shift, right, left, n_q, BLOCK_M, HAS_RIGHT, HAS_LEFT
    )
    if p_dq is not None:
        _clear_dq(p_dq, s_wh, seen, tl.minimum(start, n_q), GROUP, BLOCK_M, BLOCK_D)
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
        p_dqh = None if p_dq is None else p_dq + g * s_wh
        # Past the last query there is nothing to mask: it has the weight 0. One loop less is fewer
        # registers, but a packed sequence would lose its descriptors. Where dQ wants registers too
        # one loop with all masks has to do.
        ONE: tl.constexpr = p_dq is not None
        ANY: tl.constexpr = HAS_LEFT or HAS_RIGHT
        APART: tl.constexpr = not ONE and (HAS_LEFT or p_cu_q is not None)
        if HAS_RIGHT and not ONE:
            dk, dv = _visit_queries(
                dk, dv, k, v, one_key, queries, douts, b_q, b_dout, p_lseh, p_deltah, p_dqh, o_n,
                start, tl.minimum(whole, stop), seen, n_q, n_k, shift, left, right, slope, scale,
                softcap, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, HAS_LEFT, HAS_RIGHT, CAPPED, BIASED,
                True, True,
            )  # fmt: skip
        dk, dv = _visit_queries(
            dk, dv, k, v, one_key, queries, douts, b_q if ONE else d_q, b_dout if ONE else d_dout,
            p_lseh, p_deltah, p_dqh, o_n, start if ONE else whole, rest if APART else stop, seen,
            n_q, n_k, shift, left, right, slope, scale, softcap,
            D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, HAS_LEFT, HAS_RIGHT, CAPPED, BIASED, ONE and ANY,
            not APART,
        )  # fmt: skip
        if APART:
            dk, dv = _visit_queries(
                dk, dv, k, v, one_key, queries, douts, b_q, b_dout, p_lseh, p_deltah, p_dqh, o_n,
                rest, stop, seen, n_q, n_k, shift, left, right, slope, scale,
                softcap, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, HAS_LEFT, HAS_RIGHT, CAPPED, BIASED,
                HAS_LEFT, True,
            )  # fmt: skip

    # Write.
    p_dk += b * s_dkb + first_k * s_dkt + h_kv * s_dkh
    p_dv += b * s_dvb + first_k * s_dvt + h_kv * s_dvh
    store_rows(p_dk, s_dkt, o_n, n_k, dk * scale, D, BLOCK_D)
    store_rows(p_dv, s_dvt, o_n, n_k, dv, DV, BLOCK_DV)
    return tl.maximum(seen, tl.maximum(start, tl.cdiv(tl.maximum(stop, 0), BLOCK_M) * BLOCK_M))


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
    _key_block(
        tile, None, 0, 0, (p_dout, d_dout, s_dob, s_dot, s_doh), (p_q, d_q, s_qb, s_qt, s_qh),
        (p_k, s_kb, s_kt, s_kh), (p_v, s_vb, s_vt, s_vh), (p_dk, s_dkb, s_dkt, s_dkh),
        (p_dv, s_dvb, s_dvt, s_dvh), (p_lse, p_delta, s_lb, s_lh), (p_slopes, s_slopes),
        p_cu_q, p_cu_k, b, h_kv, first_q, n_q, first_k, n_k, left, right, scale, softcap,
        D, DV, GROUP, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, HAS_LEFT, HAS_RIGHT, CAPPED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_q", "n_k", "heads_kv", "n_heads", "splits", "left", "right"])
def attention_bwd_kernel(
    p_dout, p_q, p_k, p_v, d_dout, d_q, p_lse, p_delta, p_dk, p_dv, p_work, p_cu_q, p_cu_k,
    p_slopes, n_q, n_k, heads_kv, n_heads, splits,
    s_dob, s_dot, s_doh, s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh,
    s_dkb, s_dkt, s_dkh, s_dvb, s_dvt, s_dvh, s_lb, s_lh, s_ws, s_wb, s_wh, s_slopes,
    left, right, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, CAPPED: tl.constexpr,
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
                D, DV, GROUP, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, HAS_LEFT, HAS_RIGHT, CAPPED,
            )  # fmt: skip
    _clear_dq(p_dq, s_wh, seen, n_q, GROUP, BLOCK_M, BLOCK_D)

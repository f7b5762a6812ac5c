"""A tile of keys against the tiles of queries that see it, for attention_backward_keys.py: their share
of dK, dV and, in one pass, of dQ.

Letters and strides as in attention.py;  workspace: as in attention_backward_keys.py
"""  # noqa: E501

from __future__ import annotations

import triton
import triton.language as tl

from ceg_kernels.triton.attention_slices import add_products, dot_rows, load_slice
from ceg_kernels.triton.attention_tile import (
    dot,
    load_row,
    load_rows,
    load_statistics,
    probabilities,
    visible,
)


@triton.jit
def _add_to_dq(p_tile, part, there, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of the workspace, of which nothing is read unless it is `there`."""
    p = p_tile + tl.arange(0, BLOCK_D)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    tl.store(p, part + tl.load(p, mask=there, other=0.0))


@triton.jit
def clear_dq(
    p_dq, s_wh, first, last,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tiles of queries from [first, last) that see none of the program's keys."""
    none = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
    for start in tl.range(first, last, BLOCK_M):
        p_tile = p_dq + tl.cast(start, tl.int64) * BLOCK_D
        for g in tl.range(0, GROUP):
            _add_to_dq(p_tile + tl.cast(g, tl.int64) * s_wh, none, False, BLOCK_M, BLOCK_D)


@triton.jit
def visit_queries(
    dk, dv, keys, values, one_key, queries, douts, d_q, d_dout, p_lse, p_delta, p_dq, o_n, first,
    last, seen, n_q, n_k, shift, left, right, slope, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SLICE: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, CAPPED: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """Queries [first, last) of one head enter dk and dv, and the keys their dq where it is given.

    Tiles are [N, M]: no transposed dots for dk and dv. keys, values: (tile, its rows); the tile is
    there without slices.
    """
    k, rows_k = keys
    v, rows_v = values
    # Of what is hoisted most would be spilled where slices are needed.
    for start in tl.range(first, last, BLOCK_M, disable_licm=SLICE > 0):
        o_m = start + tl.arange(0, BLOCK_M)
        rows_q, rows_dout = (queries, start, n_q), (douts, start, n_q)

        # Probabilities.
        if SLICE == 0:
            q = load_rows(queries, d_q, start, n_q, BOUNDED, D, BLOCK_M, BLOCK_D)
        else:
            s = dot_rows(rows_k, rows_q, D, BLOCK_N, BLOCK_M, SLICE)
        delta, lse = load_statistics(p_lse, p_delta, o_m, n_q, BOUNDED)
        distance = o_n[:, None] - o_m[None, :] - shift
        m = visible(distance, o_n[:, None], n_k, left, right, HAS_LEFT, HAS_RIGHT)
        if SLICE == 0:
            s = dot(k, tl.trans(q))
        p, t = probabilities(
            s, distance, lse[None, :], m, slope, scale, softcap, CAPPED, BIASED, MASKED
        )
        if p_dq is not None and not MASKED:
            # Keys past the end are zeros, but what they are multiplied by need not be finite.
            p = tl.where(o_n[:, None] < n_k, p, 0.0)

        # dV.
        if SLICE == 0:
            dout = load_rows(douts, d_dout, start, n_q, BOUNDED, DV, BLOCK_M, BLOCK_DV)
            dv += dot(p.to(dout.dtype), dout)
            dp = dot(v, tl.trans(dout))
        else:
            dp = dot_rows(rows_v, rows_dout, DV, BLOCK_N, BLOCK_M, SLICE)

        # dK.
        ds = p * (dp - delta[None, :])
        if CAPPED:
            ds *= 1.0 - t * t
        rounded = ds.to(queries[0].dtype.element_ty)
        if SLICE == 0:
            dk += dot(rounded, q)

        # dQ. Rows are read back where an earlier block of this program has left something.
        if p_dq is not None:
            p_tile = p_dq + tl.cast(start, tl.int64) * BLOCK_D
            lost = None
            if rounded.dtype != tl.float32:
                lost = tl.sum(ds - rounded.to(tl.float32), axis=0)
            if SLICE == 0:
                part = dot(tl.trans(k), rounded)
                if lost is not None:
                    part += one_key[:, None] * lost[None, :]
                _add_to_dq(p_tile, part, start < seen, BLOCK_M, BLOCK_D)
            else:
                for column in tl.range(0, D, SLICE):
                    part = dot(tl.trans(load_slice(rows_k, column, D, BLOCK_N, SLICE)), rounded)
                    if lost is not None:
                        one = load_row(rows_k[0], rows_k[1], column, D, SLICE)
                        part += one[:, None] * lost[None, :]
                    _add_to_dq(p_tile + column * BLOCK_M, part, start < seen, BLOCK_M, SLICE)

        # In slices dV and dK come last: the compiler puts products that only the next turn needs
        # behind all loops over slices, with all that they are made of in registers.
        if SLICE > 0:
            dv = add_products(dv, p, rows_dout, DV, BLOCK_M, SLICE)
            dk = add_products(dk, rounded, rows_q, D, BLOCK_M, SLICE)
    return dk, dv

"""Products of the attention backward in slices of head_dim, for tiles that registers do not hold whole.

In fp32 a product is one of scalars: a thread keeps whole rows of both operands in registers, which
at a head_dim above 128 do not fit. In half precision it is k, v and the sums that do not. So scores
and dP are summed over slices of columns, which are loaded anew for every pair of tiles (from L1
mostly), dK and dV are a tuple of slices, and dQ is made a slice at a time. No pair is computed more
often than without slices.

Letters as in attention.py;  rows: (view, first row, number of rows) of a tile
"""  # noqa: E501

from __future__ import annotations

import triton
import triton.language as tl

from ceg_kernels.triton.attention_tile import dot, store_rows


@triton.jit
def load_slice(rows, column, D: tl.constexpr, ROWS: tl.constexpr, SLICE: tl.constexpr):
    """Columns [column, column + SLICE) of the rows, zeros past the last row and column."""
    view, start, count = rows
    p_t, stride, _, _, _ = view
    o_row, o_col = tl.arange(0, ROWS), column + tl.arange(0, SLICE)
    p = p_t + tl.cast(start, tl.int64) * stride
    p = p + o_row.to(tl.int64)[:, None] * stride + o_col[None, :]
    return tl.load(p, mask=(o_row < count - start)[:, None] & (o_col < D)[None, :], other=0.0)


@triton.jit
def dot_rows(
    rows_a, rows_b, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, SLICE: tl.constexpr
):  # fmt: skip
    """a @ b^T: [A, B]."""
    sums = tl.zeros((A, B), tl.float32)
    for column in tl.range(0, D, SLICE):
        a, b = load_slice(rows_a, column, D, A, SLICE), load_slice(rows_b, column, D, B, SLICE)
        sums += dot(a, tl.trans(b))
    return sums


@triton.jit
def zeros_in_slices(ROWS: tl.constexpr, D: tl.constexpr, SLICE: tl.constexpr):
    """A tuple of [SLICE, ROWS]."""
    zeros = ()
    for _ in tl.static_range(0, D, SLICE):
        zeros += (tl.zeros((SLICE, ROWS), tl.float32),)  # type: ignore[assignment]
    return zeros


@triton.jit
def add_products(sums, a, rows_b, D: tl.constexpr, B: tl.constexpr, SLICE: tl.constexpr):
    """(a @ b)^T added to a tuple of slices.

    Transposed, the rows that a thread holds of `a`, which all slices share, are half as many.
    """
    added = ()
    for i in tl.static_range(len(sums)):
        b = load_slice(rows_b, i * SLICE, D, B, SLICE)
        product = dot(tl.trans(b), tl.trans(a.to(b.dtype)))
        added += (sums[i] + product,)  # type: ignore[assignment]
    return added


@triton.jit
def store_slices(p_t, stride, o_row, count, sums, factor, D: tl.constexpr, SLICE: tl.constexpr):
    for i in tl.static_range(len(sums)):
        tile = tl.trans(sums[i]) * factor
        store_rows(p_t + i * SLICE, stride, o_row, count, tile, D - i * SLICE, SLICE)

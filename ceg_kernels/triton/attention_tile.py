"""What the attention kernels share: where rows lie, who sees whom, and the logit of a pair.

    i: a query, j: a key, both counted in their sequence;  shift = Tk - Tq: the key beside query 0
    j is visible to i iff  i + shift - left <= j <= i + shift + right

All sequences are read through (first row, length), so that packed ones need no code of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ceg_kernels.triton import INTERPRETED

LOG2E = tl.constexpr(1.4426950408889634)
# The interpreter multiplies the bits of bf16 as integers. In fp32 the products are the same.
WIDEN = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b):
    """a @ b, summed in fp32; fp32 operands are never rounded to tf32."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def sequence(p_cu, b, length):
    """The first row of sequence b in its tensor, and how many rows it has."""
    if p_cu is None:
        first = 0
    else:
        first = tl.load(p_cu + b)
        length = tl.load(p_cu + b + 1) - first
        first = first.to(tl.int64)  # times a stride it may pass 2^31
    return first, length


@triton.jit
def first_tile(p_cu, b, first, BLOCK: tl.constexpr):
    """The row of the workspace at which the tiles of sequence b start: none has a part of two."""
    row = first * 0
    if p_cu is not None:
        row = (first // BLOCK + b) * BLOCK
    return row


@triton.jit
def view(p_t, s_b, s_t, s_h, p_cu, b, h, first):
    """Where the rows of one sequence and head lie: pointer, stride, place in a descriptor."""
    p_first = p_t + b * s_b + first * s_t + h * s_h
    o_b, o_h, o_t = tl.cast(b, tl.int32), tl.cast(h, tl.int32), tl.cast(first, tl.int32)
    if p_cu is not None:
        o_b = 0  # all packed sequences are sequence 0 of a descriptor
    return p_first, s_t, o_b, o_h, o_t


@triton.jit
def load_rows(
    view, d_t, start, count, BOUNDED: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows from `start` as they are stored: [ROWS, BLOCK], zeros beyond column D.

    d_t: descriptor of the tensor as (B, H, T, D), or None. BOUNDED says that rows may lie at or
    beyond `count`: they are zeros too. A descriptor sees to that by itself, but knows no border
    between packed sequences.
    """
    p_t, stride, o_b, o_h, o_t = view
    if d_t is None:
        # The sum of a start and an offset inside the block is one of pointers, not of tensors.
        o_row, o_col = tl.arange(0, ROWS), tl.arange(0, BLOCK)
        p = p_t + tl.cast(start, tl.int64) * stride
        p = p + o_row.to(tl.int64)[:, None] * stride + o_col[None, :]
        if BOUNDED:
            m = (o_row < count - start)[:, None]
            if D != BLOCK:
                m = m & (o_col < D)[None, :]
            tile = tl.load(p, mask=m, other=0.0)
        else:
            if D == BLOCK:
                tile = tl.load(p)
            else:
                tile = tl.load(p, mask=(o_col < D)[None, :], other=0.0)
    else:
        tile = d_t.load([o_b, o_h, o_t + start, 0]).reshape((ROWS, BLOCK))
    return tile


@triton.jit
def load_row(view, row, column, D: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns from `column` of one row, in fp32."""
    p_t, stride, _, _, _ = view
    o_col = column + tl.arange(0, BLOCK)
    p = p_t + tl.cast(row, tl.int64) * stride + o_col
    return tl.load(p, mask=o_col < D, other=0.0).to(tl.float32)


@triton.jit
def store_rows(p_t, stride, o_row, count, tile, D: tl.constexpr, BLOCK: tl.constexpr):
    o_col = tl.arange(0, BLOCK)
    p = p_t + o_row.to(tl.int64)[:, None] * stride + o_col[None, :]
    m = (o_row < count)[:, None] & (o_col < D)[None, :]
    tl.store(p, tile.to(p_t.dtype.element_ty), mask=m)


@triton.jit
def partners(
    first, last, offset, before, after, count,
    BLOCK: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_AFTER: tl.constexpr,
):  # fmt: skip
    """Blocks of the other side that rows [first, last] have a pair with, as four bounds.

    Row r has the pairs r + offset - before ... r + offset + after of [0, count). Blocks from
    `start` to `whole` and from `rest` to `stop` need a mask, those from `whole` to `rest` do not:
    every row has all of them. All but `stop` are multiples of BLOCK.
    """
    if HAS_BEFORE:
        start = tl.maximum(first + offset - before, 0) // BLOCK * BLOCK
        whole = tl.cdiv(tl.maximum(last + offset - before, 0), BLOCK) * BLOCK
    else:
        start, whole = 0, 0
    if HAS_AFTER:
        stop = tl.minimum(last + offset + after + 1, count)
        rest = tl.maximum(tl.minimum(first + offset + after + 1, count), 0) // BLOCK * BLOCK
    else:
        stop, rest = count, count // BLOCK * BLOCK
    return start, whole, tl.maximum(rest, whole), stop


@triton.jit
def visible(
    distance, o_key, n_k, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):  # fmt: skip
    """Of pairs whose key stands `distance` after the query's own place."""
    m = o_key < n_k
    if HAS_LEFT:
        m = m & (distance >= -left)
    if HAS_RIGHT:
        m = m & (distance <= right)
    return m


@triton.jit
def tanh(x):
    # Near 0 the formula with exp loses digits; a polynomial with error < 2e-7 takes over.
    a = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp2(a * (2.0 * LOG2E)) + 1.0)
    s = x * x
    t = s * -0.008863235 + 0.021869488
    t = t * s - 0.053968254
    t = t * s + 0.13333333
    t = t * s - 0.33333333
    return tl.where(a < 0.35, x * s * t + x, tl.where(x < 0, -large, large))


@triton.jit
def logits(dots, distance, slope, scale, softcap, CAPPED: tl.constexpr, BIASED: tl.constexpr):
    """Logits of q.k, and what the softcap's derivative is made of (tanh; 0 without a softcap)."""
    s = dots * scale
    t = 0.0
    if CAPPED:
        t = tanh(s / softcap)
        s = softcap * t
    if BIASED:
        s -= slope * tl.abs(distance).to(tl.float32)
    return s, t


@triton.jit
def probabilities(
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
def load_statistics(p_lse, p_delta, o_m, n_q, BOUNDED: tl.constexpr):
    # A row that sees nothing has -inf, where +inf makes its probabilities 0 instead of NaN; so it
    # does for rows that are not there.
    if BOUNDED:
        lse = tl.load(p_lse + o_m, mask=o_m < n_q, other=float("inf"))
        delta = tl.load(p_delta + o_m, mask=o_m < n_q, other=0.0)
    else:
        lse, delta = tl.load(p_lse + o_m), tl.load(p_delta + o_m)
    return delta, tl.where(lse == float("-inf"), float("inf"), lse)

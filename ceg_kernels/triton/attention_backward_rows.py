"""Flash attention backward beside the pairs: delta = rowsum(dout * out) - dlse before them, dQ from
its partial sums and the sink's gradient after them.

Letters and strides as in attention.py;  delta: (B, H, Tq) or (H, total), like lse
"""

from __future__ import annotations

import triton
import triton.language as tl

from ceg_kernels.triton.attention_tile import (
    LOG2E,
    first_tile,
    load_rows,
    sequence,
    store_rows,
    view,
)


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


@triton.jit(do_not_specialize=["n_q", "n_tiles", "heads", "splits"])
def attention_bwd_sum_kernel(
    p_work, p_dq, p_cu, n_q, n_tiles, heads, splits,
    s_ws, s_wb, s_wh, s_dqb, s_dqt, s_dqh, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dQ from the slices that attention_bwd_kernel leaves, added in their order."""
    tile = tl.program_id(0) % n_tiles
    o_bh = tl.program_id(0) // n_tiles
    b, h = (o_bh // heads).to(tl.int64), (o_bh % heads).to(tl.int64)
    first, n_q = sequence(p_cu, b, n_q)
    if tile * BLOCK_M >= n_q:
        return
    o_row = first_tile(p_cu, b, first, BLOCK_M) + tile.to(tl.int64) * BLOCK_M
    o_m, o_col = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    p = p_work + b * s_wb + h * s_wh + o_row * BLOCK_D
    p = p + o_col[:, None] * BLOCK_M + o_m[None, :]
    dq = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
    # In slices nobody writes columns past D.
    m = None if D == BLOCK_D else (o_col < D)[:, None]
    for _ in tl.range(0, splits):
        dq += tl.load(p, mask=m)
        p += s_ws
    p_dq += b * s_dqb + first * s_dqt + h * s_dqh
    store_rows(p_dq, s_dqt, tile * BLOCK_M + o_m, n_q, tl.trans(dq) * scale, D, BLOCK_D)

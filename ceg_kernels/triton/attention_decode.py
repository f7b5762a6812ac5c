"""Flash attention forward for a few queries (decoding).

A program takes a chunk of the keys of one key head and all queries of the heads that share it: row
r of its tile is query r // GROUP of head r % GROUP, so that keys and values are read once. Where
the keys are in several chunks it leaves output, maximum and sum, which a second kernel joins in
order. The chunks follow from the shape and the table of tiles alone, and are counted from the first
key that anybody sees.

    acc: (chunks, rows of lse, DV), tops, totals: (chunks, rows of lse), fp32; the rest as in
    attention.py
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ceg_kernels.triton.attention_config import Tile
from ceg_kernels.triton.attention_problem import Problem, described, lse_strides, strides
from ceg_kernels.triton.attention_softmax import join, normalise, visit
from ceg_kernels.triton.attention_tile import LOG2E, partners, sequence, view
from ceg_kernels.triton.launch import Gpu, cdiv, launch, next_power_of_2

# A chunk of fewer blocks would leave more partial results than it is worth.
LEAST_BLOCKS = 4


@triton.jit(do_not_specialize=["n_q", "n_k", "heads_kv", "n_heads", "left", "right"])
def attention_decode_kernel(
    p_q, p_k, p_v, d_k, d_v, p_out, p_lse, p_acc, p_tops, p_totals, p_cu_q, p_cu_k, p_slopes,
    p_sink, n_q, n_k, heads_kv, n_heads, n_rows, size,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_ob, s_ot, s_oh, s_lb, s_lh, s_slopes,
    left, right, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, CAPPED: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    chunk = (tl.program_id(0) // n_heads).to(tl.int64)
    o_bh = tl.program_id(0) % n_heads
    b, h_kv = (o_bh // heads_kv).to(tl.int64), (o_bh % heads_kv).to(tl.int64)
    first_q, n_q = sequence(p_cu_q, b, n_q)
    first_k, n_k = sequence(p_cu_k, b, n_k)
    o_row = tl.arange(0, BLOCK_M)
    o_m, o_h = o_row // GROUP, h_kv * GROUP + o_row % GROUP
    there = o_m < n_q

    # Load.
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    p = p_q + b * s_qb + (first_q + o_m).to(tl.int64) * s_qt + o_h * s_qh
    q = tl.load(
        p[:, None] + o_d[None, :], mask=there[:, None] & (o_d < D)[None, :], other=0.0
    )  # fmt: skip
    keys = view(p_k, s_kb, s_kt, s_kh, p_cu_k, b, h_kv, first_k)
    values = view(p_v, s_vb, s_vt, s_vh, p_cu_k, b, h_kv, first_k)
    BIASED: tl.constexpr = p_slopes is not None
    slope = 0.0
    if BIASED:
        slope = tl.load(p_slopes + b * s_slopes + o_h, mask=there, other=0.0)[:, None]
    to_log2 = scale * LOG2E if FOLDED else LOG2E

    # Visit the chunk. Memory is the limit here, so that masks in every block cost nothing.
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    start, _, _, stop = partners(
        0, n_q - 1, n_k - n_q, left, right, n_k, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    start += tl.cast(chunk, tl.int32) * size
    # Borders of packed sequences are nothing that a descriptor knows.
    acc, top, total = visit(
        acc, top, total, q, keys, values, None if p_cu_k is not None else d_k,
        None if p_cu_k is not None else d_v, o_m, start, tl.minimum(start + size, stop), n_k,
        n_k - n_q, left, right, slope, scale, softcap, to_log2, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        HAS_LEFT, HAS_RIGHT, CAPPED, BIASED, FOLDED, True,
    )  # fmt: skip
    if FOLDED:
        top = top * scale

    # Write.
    o_lse = b * s_lb + o_h * s_lh + first_q + o_m
    m = there[:, None] & (o_dv < DV)[None, :]
    if p_acc is None:
        SINK: tl.constexpr = p_sink is not None
        sink = 0.0
        if SINK:
            sink = tl.load(p_sink + o_h, mask=there, other=0.0)
        out, lse = normalise(acc, top, total, sink, SINK)
        tl.store(p_lse + o_lse, lse, mask=there)
        p = p_out + b * s_ob + (first_q + o_m) * s_ot + o_h * s_oh
        tl.store(p[:, None] + o_dv[None, :], out.to(p_out.dtype.element_ty), mask=m)
    else:
        o_lse += chunk * n_rows
        tl.store(p_tops + o_lse, top, mask=there)
        tl.store(p_totals + o_lse, total, mask=there)
        tl.store(p_acc + (o_lse * DV)[:, None] + o_dv[None, :], acc, mask=m)


@triton.jit(do_not_specialize=["n_rows", "n_t", "heads", "chunks"])
def attention_decode_join_kernel(
    p_acc, p_tops, p_totals, p_out, p_lse, p_sink, n_rows, n_t, heads, chunks, s_ob, s_ot, s_oh,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The chunks' partial results, joined in order. Packed sequences are one long one here."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_dv = tl.arange(0, BLOCK_DV)
    there = o_row < n_rows
    m = there[:, None] & (o_dv < DV)[None, :]
    h = o_row // n_t % heads

    # Join.
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    o_part = o_row
    for _ in tl.range(0, chunks):
        acc, top, total = join(
            acc, top, total,
            tl.load(p_acc + (o_part * DV)[:, None] + o_dv[None, :], mask=m, other=0.0),
            tl.load(p_tops + o_part, mask=there, other=float("-inf")),
            tl.load(p_totals + o_part, mask=there, other=0.0),
        )  # fmt: skip
        o_part += n_rows
    SINK: tl.constexpr = p_sink is not None
    sink = 0.0
    if SINK:
        sink = tl.load(p_sink + h, mask=there, other=0.0)
    out, lse = normalise(acc, top, total, sink, SINK)

    # Write.
    tl.store(p_lse + o_row, lse, mask=there)
    p = p_out + o_row // (n_t * heads) * s_ob + o_row % n_t * s_ot + h * s_oh
    tl.store(p[:, None] + o_dv[None, :], out.to(p_out.dtype.element_ty), mask=m)


def chunks_of(tile: Tile, p: Problem, heads_kv: int) -> tuple[int, int]:
    """Chunks of keys for each (sequence, key head), and keys of a chunk."""
    keys = p.n_k
    if p.left >= 0 and p.right >= 0:  # whatever the first block has before the first key
        keys = min(keys, p.left + p.right + p.n_q + tile.n - 1)
    wanted = max(1, cdiv(tile.programs, max(p.batch * heads_kv, 1)))
    size = max(LEAST_BLOCKS, cdiv(cdiv(keys, wanted), tile.n)) * tile.n
    return max(1, cdiv(keys, size)), size


def decode(q, k, v, out, lse, p: Problem, tile: Tile, gpu: Gpu, *, scale: float, softcap: float):
    """Fills out and lse."""
    packed, heads, heads_kv = p.cu_q is not None, q.shape[-2], k.shape[-2]
    chunks, size = chunks_of(tile, p, heads_kv)
    acc = tops = totals = None
    if chunks > 1:
        acc = q.new_empty((chunks, lse.numel(), v.shape[-1]), dtype=torch.float32)
        tops, totals = q.new_empty((2, chunks, lse.numel()), dtype=torch.float32)
    at_out = strides(out, packed)
    launch(
        attention_decode_kernel, (chunks * p.batch * heads_kv,),
        q, k, v, *described((k, v), tile.n, p, gpu), out, lse, acc, tops, totals,
        p.cu_q, p.cu_k, p.slopes, p.sink,
        p.n_q, p.n_k, heads_kv, p.batch * heads_kv, lse.numel(), size,
        *strides(q, packed), *strides(k, packed), *strides(v, packed), *at_out,
        *lse_strides(lse, packed), p.slopes_stride, p.left, p.right, scale, softcap,
        **p.constants, BLOCK_M=max(16, next_power_of_2(p.n_q * p.constants["GROUP"])),
        BLOCK_N=tile.n, FOLDED=softcap == 0 and p.slopes is None and scale > 0,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    if chunks > 1:
        block = p.constants["BLOCK_DV"]
        rows = max(1, 512 // block)
        launch(
            attention_decode_join_kernel, (cdiv(lse.numel(), rows),),
            acc, tops, totals, out, lse, p.sink, lse.numel(), lse.shape[-1], heads, chunks,
            *at_out, DV=p.constants["DV"], BLOCK_DV=block, ROWS=rows, warps=4,
        )  # fmt: skip

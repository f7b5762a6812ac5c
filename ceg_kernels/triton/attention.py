"""Flash attention forward; the formula is in ops/attention_reference.py.

A tile is BLOCK_M queries of one head, whose program visits the keys they see in blocks of BLOCK_N;
a program has one tile, or takes one after another (attention_config.py says where). Heads of a
group read the same K and V; nothing is expanded. Blocks that every row sees whole have no mask
code, blocks that nobody sees are not visited. A few queries are for attention_decode.py.

    q: (B, Tq, H, D), k: (B, Tk, H_kv, D), v: (B, Tk, H_kv, DV), out: like q with DV, lse: (B, H, Tq)
    packed: (total, H, D), lse (H, total), cu: (B + 1,);  s_: strides;  M: queries, N: keys of a tile
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ceg_kernels.triton.attention_config import for_queries
from ceg_kernels.triton.attention_decode import decode
from ceg_kernels.triton.attention_problem import (
    CASES,
    described,
    lse_strides,
    problem_of,
    strides,
)
from ceg_kernels.triton.attention_softmax import normalise, visit
from ceg_kernels.triton.attention_tile import (
    LOG2E,
    load_rows,
    partners,
    sequence,
    store_rows,
    view,
)
from ceg_kernels.triton.launch import cdiv, gpu_of, launch, unit_stride


@triton.jit(do_not_specialize=["n_q", "n_k", "heads", "n_heads", "n_tiles", "left", "right"])
def attention_fwd_kernel(
    p_q, p_k, p_v, d_k, d_v, p_out, p_lse, p_cu_q, p_cu_k, p_slopes, p_sink,
    n_q, n_k, heads, n_heads, n_tiles,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_ob, s_ot, s_oh, s_lb, s_lh, s_slopes,
    left, right, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, CAPPED: tl.constexpr, FOLDED: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    # All heads of a tile of queries are neighbours, the last queries first: under a causal mask
    # they see most keys, and short tiles fill the processors at the end. PERSISTENT programs take
    # one after another, every other time in the opposite direction: who had the longest of one
    # turn has the shortest of the next. Hoisted out of this loop, offsets of the inner ones would
    # be spilled.
    n_programs = tl.num_programs(0)
    for turn in tl.range(0, tl.cdiv(n_tiles, n_programs) if PERSISTENT else 1, disable_licm=True):
        place = tl.program_id(0)
        if PERSISTENT:
            place = turn * n_programs + tl.where(turn % 2 == 0, place, n_programs - 1 - place)
        first_m = ((n_tiles - 1 - place) // n_heads) * BLOCK_M
        o_bh = place % n_heads
        b, h = (o_bh // heads).to(tl.int64), (o_bh % heads).to(tl.int64)
        first_q, len_q = sequence(p_cu_q, b, n_q)
        first_k, len_k = sequence(p_cu_k, b, n_k)
        if (place < n_tiles) & (first_m < len_q):
            shift = len_k - len_q
            last = tl.minimum(first_m + BLOCK_M, len_q) - 1
            o_m = first_m + tl.arange(0, BLOCK_M)

            # Load.
            queries = view(p_q, s_qb, s_qt, s_qh, p_cu_q, b, h, first_q)
            q = load_rows(queries, None, first_m, len_q, True, D, BLOCK_M, BLOCK_D)
            keys = view(p_k, s_kb, s_kt, s_kh, p_cu_k, b, h // GROUP, first_k)
            values = view(p_v, s_vb, s_vt, s_vh, p_cu_k, b, h // GROUP, first_k)
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
                first_m, last, shift, left, right, len_k, BLOCK_N, HAS_LEFT, HAS_RIGHT
            )
            # Borders of packed sequences are nothing that a descriptor knows.
            b_k = None if p_cu_k is not None else d_k
            b_v = None if p_cu_k is not None else d_v
            if HAS_LEFT:
                acc, top, total = visit(
                    acc, top, total, q, keys, values, b_k, b_v, o_m, start,
                    tl.minimum(whole, stop), len_k, shift, left, right, slope, scale, softcap,
                    to_log2, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, HAS_LEFT, HAS_RIGHT, CAPPED,
                    BIASED, FOLDED, True,
                )  # fmt: skip
            acc, top, total = visit(
                acc, top, total, q, keys, values, d_k, d_v, o_m, whole, rest, len_k,
                shift, left, right, slope, scale, softcap, to_log2, D, DV, BLOCK_N, BLOCK_D,
                BLOCK_DV, HAS_LEFT, HAS_RIGHT, CAPPED, BIASED, FOLDED, False,
            )  # fmt: skip
            acc, top, total = visit(
                acc, top, total, q, keys, values, b_k, b_v, o_m, rest, stop, len_k,
                shift, left, right, slope, scale, softcap, to_log2, D, DV, BLOCK_N, BLOCK_D,
                BLOCK_DV, HAS_LEFT, HAS_RIGHT, CAPPED, BIASED, FOLDED, True,
            )  # fmt: skip

            # Normalise.
            if FOLDED:
                # Not of -inf, which stays: a scale of a NaN in the maximum is NaN either way.
                top = top * scale
            SINK: tl.constexpr = p_sink is not None
            sink = 0.0
            if SINK:
                sink = tl.load(p_sink + h)
            out, lse = normalise(acc, top, total, sink, SINK)

            # Write.
            tl.store(p_lse + b * s_lb + h * s_lh + first_q + o_m, lse, mask=o_m < len_q)
            p_first = p_out + b * s_ob + first_q * s_ot + h * s_oh
            store_rows(p_first, s_ot, o_m, len_q, out, DV, BLOCK_DV)


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
    few = p.tile("decode", gpu)
    if 0 < p.n_q * p.constants["GROUP"] <= few.m:
        decode(q, k, v, out, lse, p, few, gpu, scale=scale, softcap=softcap)
        return out, lse
    tile = for_queries(p.tile("fwd", gpu), p.n_q, p.bits)
    n_tiles, programs = cdiv(p.n_q, tile.m) * p.batch * heads, tile.programs * gpu.processors
    launch(
        attention_fwd_kernel, (min(n_tiles, programs or n_tiles),),
        q, k, v, *described((k, v), tile.n, p, gpu), out, lse, p.cu_q, p.cu_k, p.slopes, p.sink,
        p.n_q, p.n_k, heads, p.batch * heads, n_tiles,
        *strides(q, packed), *strides(k, packed), *strides(v, packed), *strides(out, packed),
        *lse_strides(lse, packed), p.slopes_stride, p.left, p.right, scale, softcap,
        **p.constants, BLOCK_M=tile.m, BLOCK_N=tile.n,
        FOLDED=softcap == 0 and slopes is None and scale > 0, PERSISTENT=programs > 0,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return out, lse


def compiled() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The calls whose kernels are compiled ahead of time, by name; see compile.py."""
    for name, args in CASES.items():
        yield name, partial(forward, *args)

"""The softmax of a tile of queries while it visits the keys: running maximum and sum of each row
(Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135).

Letters as in attention.py
"""

from __future__ import annotations

import triton
import triton.language as tl

from ceg_kernels.triton.attention_tile import LOG2E, dot, load_rows, logits, visible


@triton.jit
def visit(
    acc, top, total, q, keys, values, d_k, d_v, o_m, first, last, n_k, shift, left, right, slope,
    scale, softcap, to_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CAPPED: tl.constexpr,
    BIASED: tl.constexpr, FOLDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys [first, last) enter the output, maximum and sum of the rows."""
    for start in tl.range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)

        # Logits.
        k = load_rows(keys, d_k, start, n_k, MASKED, D, BLOCK_N, BLOCK_D)
        s = dot(q, tl.trans(k))
        distance = o_n[None, :] - o_m[:, None] - shift
        if not FOLDED:
            s, _ = logits(s, distance, slope, scale, softcap, CAPPED, BIASED)
        if MASKED:
            m = visible(distance, o_n[None, :], n_k, left, right, HAS_LEFT, HAS_RIGHT)
            s = tl.where(m, s, float("-inf"))

        # Softmax. The maximum is subtracted before the factor to base 2 is applied: in one fma the
        # product's rounding would leave exp(0) != 1 where logits are huge.
        now = tl.maximum(top, tl.max(s, axis=1))
        # Nothing visible yet: any finite number keeps exp(-inf - base) at 0 instead of NaN.
        base = tl.where(now == float("-inf"), 0.0, now)
        p = tl.exp2((s - base[:, None]) * to_log2)
        rescale = tl.exp2((top - base) * to_log2)
        total = total * rescale + tl.sum(p, axis=1)
        top = now

        # Values.
        v = load_rows(values, d_v, start, n_k, MASKED, DV, BLOCK_N, BLOCK_DV)
        acc = acc * rescale[:, None] + dot(p.to(v.dtype), v)
    return acc, top, total


@triton.jit
def join(acc, top, total, acc_more, top_more, total_more):
    """Output, maximum and sum over the keys of both."""
    now = tl.maximum(top, top_more)
    # Nothing visible: any finite number keeps exp(-inf - base) at 0 instead of NaN.
    base = tl.where(now == float("-inf"), 0.0, now)
    old, new = tl.exp2((top - base) * LOG2E), tl.exp2((top_more - base) * LOG2E)
    return acc * old[:, None] + acc_more * new[:, None], now, total * old + total_more * new


@triton.jit
def normalise(acc, top, total, sink, SINK: tl.constexpr):
    """Output and log-sum-exp. The sink joins the sum as one more logit."""
    if SINK:
        now = tl.maximum(top, sink)
        base = tl.where(now == float("-inf"), 0.0, now)
        rescale = tl.exp2((top - base) * LOG2E)
        total = total * rescale + tl.exp2((sink - base) * LOG2E)
        acc, top = acc * rescale[:, None], now
    blind = total == 0.0
    safe = tl.where(blind, 1.0, total)
    lse = tl.where(blind, float("-inf"), top + tl.log(safe))
    return acc * (1.0 / safe)[:, None], lse

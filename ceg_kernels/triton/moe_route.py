"""The router of a mixture of experts and its backward; the formulas are in ops/moe_route.py.

A program takes ROWS tokens with the logits of all experts in registers. The choice is K rounds of a
maximum over one integer per expert, in which NaN and infinities have their place without a special
case, and of the lowest index that has it.

    logits dlogits: (N, E);  bias: (E,);  weights dweights ids: (N, K);  counts: (E,)
    s_: row stride
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from ceg_kernels.triton.launch import (
    Gpu,
    cdiv,
    empty_like,
    gpu_of,
    launch,
    next_power_of_2,
    unit_stride,
)


@triton.jit
def _load_logits(p_row, o_e, m_row, E: tl.constexpr):
    """[ROWS, BLOCK] in fp32, -inf where there is no expert."""
    m = m_row[:, None] & (o_e < E)[None, :]
    logits = tl.load(p_row[:, None] + o_e[None, :], mask=m, other=0.0).to(tl.float32)
    return tl.where((o_e < E)[None, :], logits, float("-inf"))


@triton.jit
def _softmax_parts(logits):
    """Maximum and sum of exponentials of each row."""
    highest = tl.max(logits, axis=1)
    return highest, tl.sum(tl.exp(logits - highest[:, None]), axis=1)


@triton.jit
def _sigmoid(x):
    """Sigmoid and 1 - sigmoid, neither by a difference; (0, 1) of -inf, which pads rows."""
    small = tl.exp(-tl.abs(x))
    low, high = tl.div_rn(small, 1.0 + small), tl.div_rn(1.0, 1.0 + small)
    return tl.where(x < 0.0, low, high), tl.where(x < 0.0, high, low)


@triton.jit
def _load_chosen(p_row, ids, o_k, m_chosen, K: tl.constexpr):
    """Logits [ROWS, CHOSEN] in fp32, -inf behind K; from cache, as the row is read anyway."""
    logits = tl.load(p_row[:, None] + ids, mask=m_chosen, other=0.0).to(tl.float32)
    return tl.where((o_k < K)[None, :], logits, float("-inf"))


@triton.jit
def _exp_of_chosen(chosen, highest, RENORMALIZE: tl.constexpr):
    """Their exponentials less the row's maximum; renormalised, their own is enough."""
    if RENORMALIZE:
        highest = tl.max(chosen, axis=1)
    return tl.exp(chosen - highest[:, None])


@triton.jit
def _over(x, total):
    """Each row over its total, correctly rounded."""
    return tl.div_rn(x, tl.broadcast_to(total[:, None], x.shape))


@triton.jit
def _reciprocal(x):
    """1 / x in fp64 to 14 digits, by a Newton step: a division in fp64 is a call, which spills."""
    first = tl.div_rn(1.0, x.to(tl.float32)).to(tl.float64)
    return first * (2.0 - x * first)


@triton.jit
def _ranks(v):
    """int32 in the order of fp32 `v`: NaN above all, zeros equal, nothing as low as TAKEN."""
    bits = tl.where(v == 0.0, 0.0, v).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the magnitude of negative numbers counts down
    return tl.where(v == v, bits, 0x7FFFFFFF)


TAKEN = tl.constexpr(-(2**31))


@triton.jit(do_not_specialize=["n_tokens"])
def moe_route_kernel(
    p_logits, p_bias, p_weights, p_ids, p_counts, n_tokens, s_logits,
    E: tl.constexpr, K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n_tokens
    o_e, o_k = tl.arange(0, BLOCK), tl.arange(0, CHOSEN)
    p_row = p_logits + o_row * s_logits

    # Rank: by logit, or by score + bias.
    logits = _load_logits(p_row, o_e, m_row, E)
    highest, total = logits, logits  # of softmax, where all scores are needed
    if SOFTMAX and (p_bias is not None or not RENORMALIZE):
        highest, total = _softmax_parts(logits)
    ranked = logits
    if p_bias is not None:
        bias = tl.load(p_bias + o_e, mask=o_e < E, other=0.0).to(tl.float32)[None, :]
        if SOFTMAX:
            ranked = _over(tl.exp(logits - highest[:, None]), total) + bias
        else:
            ranked = _sigmoid(logits)[0] + bias
    ranks = tl.where((o_e < E)[None, :], _ranks(ranked), TAKEN)

    # Choose. Rank and index in one int64 would save a reduction and made LLVM's AMD backend abort.
    ids = tl.zeros((ROWS, CHOSEN), tl.int32)
    for k in tl.range(0, K):
        m_best = ranks == tl.max(ranks, axis=1)[:, None]
        best = tl.min(tl.where(m_best, o_e[None, :], BLOCK), axis=1)[:, None]
        ids = tl.where((o_k == k)[None, :], best, ids)
        ranks = tl.where(o_e[None, :] == best, TAKEN, ranks)

    # Weigh.
    m_chosen = m_row[:, None] & (o_k < K)[None, :]
    chosen = _load_chosen(p_row, ids, o_k, m_chosen, K)
    if SOFTMAX:
        weights = _exp_of_chosen(chosen, highest, RENORMALIZE)
    else:
        weights = _sigmoid(chosen)[0]
    if RENORMALIZE:
        total = tl.sum(weights, axis=1)
    if SOFTMAX or RENORMALIZE:
        weights = _over(weights, total)
    o_out = o_row[:, None] * K + o_k[None, :]
    tl.store(p_weights + o_out, weights, mask=m_chosen)
    tl.store(p_ids + o_out, ids, mask=m_chosen)

    # Count. Integers: in whatever order programs add theirs, the sum has the same bits.
    taken = (ranks == TAKEN) & m_row[:, None]
    counts = tl.sum(taken.to(tl.int32), axis=0)
    tl.atomic_add(p_counts + o_e, counts, mask=(o_e < E) & (counts > 0), sem="relaxed")


@triton.jit(do_not_specialize=["n_tokens"])
def moe_route_bwd_kernel(
    p_dweights, p_logits, p_ids, p_dlogits, n_tokens, s_logits,
    E: tl.constexpr, K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n_tokens
    o_e, o_k = tl.arange(0, BLOCK), tl.arange(0, CHOSEN)
    p_row = p_logits + o_row * s_logits
    m_chosen = m_row[:, None] & (o_k < K)[None, :]
    o_in = o_row[:, None] * K + o_k[None, :]
    ids = tl.load(p_ids + o_in, mask=m_chosen, other=0).to(tl.int32)
    dweights = tl.load(p_dweights + o_in, mask=m_chosen, other=0.0).to(tl.float64)
    chosen = _load_chosen(p_row, ids, o_k, m_chosen, K)

    # Gradient of the chosen, in fp64: differences of a few numbers a token, and they cancel.
    dlogits = tl.zeros((ROWS, BLOCK), tl.float32)
    if SOFTMAX:
        if RENORMALIZE:
            e = _exp_of_chosen(chosen, chosen, RENORMALIZE).to(tl.float64)
            weights = e * _reciprocal(tl.sum(e, axis=1))[:, None]
        else:
            logits = _load_logits(p_row, o_e, m_row, E)
            highest, total = _softmax_parts(logits)
            e = _exp_of_chosen(chosen, highest, RENORMALIZE).to(tl.float64)
            weights = e * _reciprocal(total.to(tl.float64))[:, None]
        along = tl.sum(dweights * weights, axis=1)[:, None]
        dchosen = weights * (dweights - along)
        if not RENORMALIZE:
            # The only case in which experts that were not chosen have a gradient.
            dlogits = _over(tl.exp(logits - highest[:, None]), total) * -along.to(tl.float32)
    else:
        scores, rest = _sigmoid(chosen)
        weights = scores.to(tl.float64)
        dchosen = dweights
        if RENORMALIZE:
            if K == 1:
                weights = tl.full(scores.shape, 1.0, tl.float64)  # exactly, so that nothing is left
            else:
                weights = weights * _reciprocal(tl.sum(weights, axis=1))[:, None]
            dchosen = dchosen - tl.sum(dweights * weights, axis=1)[:, None]
        dchosen *= weights * rest.to(tl.float64)
    dchosen = dchosen.to(tl.float32)

    # Put them in their columns, in registers: two stores to one address would have no order.
    for k in tl.range(0, K):
        m_k = (o_k == k)[None, :]
        expert = tl.sum(tl.where(m_k, ids, 0), axis=1)[:, None]
        d = tl.sum(tl.where(m_k, dchosen, 0.0), axis=1)[:, None]
        dlogits = tl.where(o_e[None, :] == expert, d, dlogits)
    m = m_row[:, None] & (o_e < E)[None, :]
    tl.store(p_dlogits + o_row[:, None] * E + o_e[None, :], dlogits, mask=m)


PER_THREAD = 8  # logits in a thread, beside as many ranks and scores
LEAST_THREADS, MOST_THREADS = 128, 1024


def _tile(experts: int, top_k: int, gpu: Gpu) -> dict[str, int]:
    """Tokens, experts and choices of a tile. Not yet measured on any GPU."""
    block = next_power_of_2(experts)
    threads = min(max(block // PER_THREAD, LEAST_THREADS), MOST_THREADS)
    rows = max(1, threads * PER_THREAD // block)
    chosen = next_power_of_2(top_k)
    return {"ROWS": rows, "BLOCK": block, "CHOSEN": chosen, "warps": threads // gpu.warp}


def forward(logits, bias, top_k, score, renormalize):
    """Schema of ceg::moe_route."""
    logits = unit_stride(logits)
    n, experts = logits.shape
    weights = logits.new_empty((n, top_k), dtype=torch.float32)
    ids = logits.new_empty((n, top_k), dtype=torch.int32)
    counts = logits.new_zeros(experts, dtype=torch.int32)
    tile = _tile(experts, top_k, gpu_of(logits))
    launch(
        moe_route_kernel, (cdiv(n, tile["ROWS"]),),
        logits, None if bias is None else bias.contiguous(), weights, ids, counts, n,
        logits.stride(0), E=experts, K=top_k, SOFTMAX=score == "softmax", RENORMALIZE=renormalize,
        **tile,
    )  # fmt: skip
    return weights, ids, counts


def backward(dweights, logits, expert_ids, score, renormalize):
    """Schema of ceg::moe_route_backward."""
    logits, (n, top_k) = unit_stride(logits), expert_ids.shape
    dlogits = empty_like(logits)
    tile = _tile(logits.shape[1], top_k, gpu_of(logits))
    launch(
        moe_route_bwd_kernel, (cdiv(n, tile["ROWS"]),),
        dweights.contiguous(), logits, expert_ids.contiguous(), dlogits, n, logits.stride(0),
        E=logits.shape[1], K=top_k, SOFTMAX=score == "softmax", RENORMALIZE=renormalize, **tile,
    )  # fmt: skip
    return dlogits


def compiled() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The calls whose kernels are compiled ahead of time, by name; see compile.py."""

    def case(experts, top_k, score, renormalize, dtype=torch.bfloat16, biased=False):
        def both():
            logits = torch.empty(4096, experts, dtype=dtype, device="meta")
            bias = torch.empty(experts, dtype=torch.float32, device="meta") if biased else None
            weights, ids, _ = forward(logits, bias, top_k, score, renormalize)
            backward(weights, logits, ids, score, renormalize)

        return both

    single = torch.float32
    yield "E8 K2 bf16 softmax", case(8, 2, "softmax", True)
    yield "E128 K8 bf16 softmax", case(128, 8, "softmax", True)
    yield "E128 K8 fp32 softmax bias", case(128, 8, "softmax", True, single, biased=True)
    yield "E256 K8 fp32 sigmoid bias", case(256, 8, "sigmoid", True, single, biased=True)
    yield "E60 K4 fp16 softmax not renormalised", case(60, 4, "softmax", False, torch.float16)
    yield "E512 K10 bf16 sigmoid not renormalised", case(512, 10, "sigmoid", False)
    yield "E8192 K64 fp32 softmax bias", case(8192, 64, "softmax", False, single, biased=True)

"""Moving tokens to their experts and back; ops/moe.py says what the ops mean.

A program takes ROWS tokens and BLOCK columns. By token, a row of x or dout is read once for all its
K choices, and sums over choices meet in registers: no atomics. Rows of the sorted buffer that hold
nothing are filled by the program that has the choice of the same number.

    x dout out(combine): (N, D), y dy out(dispatch): (N * K, D), slots weights: (N, K),
    sources: (N * K,);  s_: row strides
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from ceg_kernels.triton.launch import cdiv, empty_like, gpu_of, launch, next_power_of_2, unit_stride


@triton.jit
def _slot(p_slots, o_choice, m_token, n_rows):
    """The row of a choice, and whether it has one."""
    slot = tl.load(p_slots + o_choice, mask=m_token, other=-1).to(tl.int64)
    return slot, (slot >= 0) & (slot < n_rows)


@triton.jit
def _clear_empty(p_rows, p_sources, o_choice, o_col, m_token, m_col, D: tl.constexpr):
    """Zeros to those of the rows with these numbers that hold nothing; m_col: [1, BLOCK]."""
    empty = tl.load(p_sources + o_choice, mask=m_token, other=0) < 0
    m = empty[:, None] & m_col
    tl.store(p_rows + o_choice[:, None] * D + o_col[None, :], 0.0, mask=m)


@triton.jit(do_not_specialize=["n_tokens", "n_rows"])
def moe_dispatch_kernel(
    p_x, p_slots, p_sources, p_out, n_tokens, n_rows, s_x,
    D: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    o_token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_token, m_col = o_token < n_tokens, (o_col < D)[None, :]
    m = m_token[:, None] & m_col
    x = tl.load(p_x + o_token[:, None] * s_x + o_col[None, :], mask=m)
    for k in tl.range(0, K, loop_unroll_factor=UNROLL):
        o_choice = o_token * K + k
        slot, kept = _slot(p_slots, o_choice, m_token, n_rows)
        p = p_out + slot[:, None] * D + o_col[None, :]
        tl.store(p, x, mask=kept[:, None] & m_col)
        _clear_empty(p_out, p_sources, o_choice, o_col, m_token, m_col, D)


@triton.jit(do_not_specialize=["n_tokens", "n_rows"])
def moe_combine_kernel(
    p_y, p_slots, p_weights, p_out, n_tokens, n_rows, s_y,
    D: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    o_token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_token, m_col = o_token < n_tokens, (o_col < D)[None, :]
    out = tl.zeros((ROWS, BLOCK), tl.float32)
    for k in tl.range(0, K, loop_unroll_factor=UNROLL):
        slot, kept = _slot(p_slots, o_token * K + k, m_token, n_rows)
        p = p_y + slot[:, None] * s_y + o_col[None, :]
        y = tl.load(p, mask=kept[:, None] & m_col, other=0.0).to(tl.float32)
        if p_weights is not None:
            # Zero for a dropped choice: its weight may be infinite, and 0 * inf is NaN.
            weight = tl.load(p_weights + o_token * K + k, mask=kept, other=0.0).to(tl.float32)
            y = y * weight[:, None]
        out += y
    m = m_token[:, None] & m_col
    tl.store(p_out + o_token[:, None] * D + o_col[None, :], out, mask=m)


@triton.jit(do_not_specialize=["n_tokens", "n_rows"])
def moe_combine_bwd_kernel(
    p_dout, p_y, p_slots, p_sources, p_weights, p_dy, p_dweights, n_tokens, n_rows, s_dout, s_y,
    D: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    o_token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_token = o_token < n_tokens
    o_k = tl.arange(0, CHOSEN)
    dweights = tl.zeros((ROWS, CHOSEN), tl.float32)
    for start in tl.range(0, D, BLOCK):
        o_col = start + tl.arange(0, BLOCK)
        m_col = (o_col < D)[None, :]
        m = m_token[:, None] & m_col
        p = p_dout + o_token[:, None] * s_dout + o_col[None, :]
        dout = tl.load(p, mask=m, other=0.0).to(tl.float32)
        for k in tl.range(0, K, loop_unroll_factor=UNROLL):
            o_choice = o_token * K + k
            slot, kept = _slot(p_slots, o_choice, m_token, n_rows)
            m_row = kept[:, None] & m_col
            p = p_y + slot[:, None] * s_y + o_col[None, :]
            y = tl.load(p, mask=m_row, other=0.0).to(tl.float32)
            weight = tl.load(p_weights + o_choice, mask=kept, other=0.0).to(tl.float32)
            p = p_dy + slot[:, None] * D + o_col[None, :]
            tl.store(p, dout * weight[:, None], mask=m_row)
            # 0 * inf of a dropped choice is NaN, so the mask comes after the product.
            along = tl.sum(tl.where(m_row, dout * y, 0.0), axis=1)
            dweights += tl.where((o_k == k)[None, :], along[:, None], 0.0)
            _clear_empty(p_dy, p_sources, o_choice, o_col, m_token, m_col, D)
    m_chosen = m_token[:, None] & (o_k < K)[None, :]
    tl.store(p_dweights + o_token[:, None] * K + o_k[None, :], dweights, mask=m_chosen)


PER_THREAD = 16  # elements of one row in a thread: two vectors of 16 bytes in half precision
THREADS = 128
UNROLL = 4  # choices whose rows are in flight at once


def _tile(size: int, top_k: int) -> tuple[int, int]:
    """Tokens and columns of a program. Not yet measured on any GPU."""
    block = min(next_power_of_2(max(size, 1)), PER_THREAD * THREADS)
    return max(1, PER_THREAD * THREADS // max(block, next_power_of_2(top_k))), block


def _check(slots, sources, rows):
    if not slots.numel() == sources.numel() == rows:
        got = f"{slots.numel()}, {sources.numel()} and {rows}"
        raise ValueError(f"slots, sources and sorted rows must be as many, got {got}")


def dispatch(x, sources, slots):
    """Schema of ceg::moe_dispatch. ValueError for slots and sources that differ in number."""
    x, (n, top_k) = unit_stride(x), slots.shape
    _check(slots, sources, n * top_k)
    out = x.new_empty((n * top_k, x.shape[1]))
    rows, block = _tile(x.shape[1], top_k)
    launch(
        moe_dispatch_kernel, (cdiv(n, rows), cdiv(x.shape[1], block)),
        x, slots.contiguous(), sources.contiguous(), out, n, n * top_k, x.stride(0),
        D=x.shape[1], K=top_k, ROWS=rows, BLOCK=block, UNROLL=min(UNROLL, top_k),
        warps=THREADS // gpu_of(x).warp,
    )  # fmt: skip
    return out


def combine(y, slots, sources, weights):
    """Schema of ceg::moe_combine. ValueError as `dispatch`."""
    y, (n, top_k) = unit_stride(y), slots.shape
    _check(slots, sources, y.shape[0])
    out = y.new_empty((n, y.shape[1]))
    rows, block = _tile(y.shape[1], top_k)
    launch(
        moe_combine_kernel, (cdiv(n, rows), cdiv(y.shape[1], block)),
        y, slots.contiguous(), None if weights is None else weights.contiguous(), out, n,
        y.shape[0], y.stride(0), D=y.shape[1], K=top_k, ROWS=rows, BLOCK=block,
        UNROLL=min(UNROLL, top_k), warps=THREADS // gpu_of(y).warp,
    )  # fmt: skip
    return out


def combine_backward(dout, y, slots, sources, weights):
    """Schema of ceg::moe_combine_backward. ValueError as `dispatch`."""
    dout, y, (n, top_k) = unit_stride(dout), unit_stride(y), slots.shape
    _check(slots, sources, y.shape[0])
    dy, dweights = empty_like(y), empty_like(weights)
    rows, block = _tile(y.shape[1], top_k)
    launch(
        moe_combine_bwd_kernel, (cdiv(n, rows),),
        dout, y, slots.contiguous(), sources.contiguous(), weights.contiguous(), dy, dweights, n,
        y.shape[0], dout.stride(0), y.stride(0), D=y.shape[1], K=top_k, ROWS=rows, BLOCK=block,
        CHOSEN=next_power_of_2(top_k), UNROLL=min(UNROLL, top_k),
        warps=THREADS // gpu_of(y).warp,
    )  # fmt: skip
    return dy, dweights


def compiled() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The calls whose kernels are compiled ahead of time, by name; see compile.py."""

    def case(n, top_k, size, dtype, weighted=True):
        def meta(*shape, dtype=dtype):
            return torch.empty(*shape, dtype=dtype, device="meta")

        def all_three():
            slots, sources = (meta(*s, dtype=torch.int32) for s in ((n, top_k), (n * top_k,)))
            weights = meta(n, top_k, dtype=torch.float32)
            x, y = meta(n, size), meta(n * top_k, size)
            dispatch(x, sources, slots)
            combine(y, slots, sources, weights if weighted else None)
            if weighted:
                combine_backward(x, y, slots, sources, weights)

        return all_three

    half, single = torch.bfloat16, torch.float32
    yield "D512 K2 bf16", case(2048, 2, 512, half)
    yield "D2048 K8 bf16", case(4096, 8, 2048, half)
    yield "D2048 K8 bf16 no weights", case(4096, 8, 2048, half, weighted=False)
    yield "D2880 K4 fp16", case(4096, 4, 2880, torch.float16)
    yield "D7168 K8 fp32", case(4096, 8, 7168, single)
    yield "D257 K4 bf16", case(4096, 4, 257, half)
    yield "D64 K64 bf16", case(4096, 64, 64, half)

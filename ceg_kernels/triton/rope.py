"""Rotary position embedding of q and k in one launch; the formulas are in ops/rope.py.

A program takes TOKENS positions and all their heads: the angles are loaded once. Strided views of q
and k are read where they lie. The backward is the same kernel with the sine negated (INVERSE).

    q: (B, T, H, D), k: (B, T, H_kv, D), their last dimension dense;  cos sin: (rows, HALF) with
    HALF = rotary_dim / 2;  positions: (B, T);  s_: strides
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from ceg_kernels.triton.launch import cdiv, empty_like, gpu_of, launch, next_power_of_2, unit_stride


@triton.jit
def _rotate(
    p_x, p_out, o_x, o_out, s_head, m_token, cos, sin,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """All heads of x at some tokens. o_x, o_out: [TOKENS, 1, 1], cos, sin: [TOKENS, 1, PAIRS]."""
    for first in tl.static_range(0, H, HEADS):
        o_head = (first + tl.arange(0, HEADS)).to(tl.int64)[None, :, None]
        m_head = m_token & (o_head < H)
        p_in = p_x + o_x + o_head * s_head
        p_to = p_out + o_out + o_head * D
        if INTERLEAVED:
            # Both of a pair are loaded in one vector and parted in registers.
            o = tl.arange(0, 2 * PAIRS)[None, None, :]
            m = m_head & (o < 2 * HALF)
            x = tl.load(p_in + o, mask=m, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(x, (TOKENS, HEADS, PAIRS, 2)))
            turned = tl.join(a * cos - b * sin, b * cos + a * sin)
            tl.store(p_to + o, tl.reshape(turned, (TOKENS, HEADS, 2 * PAIRS)), mask=m)
        else:
            o = tl.arange(0, PAIRS)[None, None, :]
            m = m_head & (o < HALF)
            a = tl.load(p_in + o, mask=m, other=0.0).to(tl.float32)
            b = tl.load(p_in + HALF + o, mask=m, other=0.0).to(tl.float32)
            tl.store(p_to + o, a * cos - b * sin, mask=m)
            tl.store(p_to + HALF + o, b * cos + a * sin, mask=m)
        if D > 2 * HALF:
            o = 2 * HALF + tl.arange(0, REST)[None, None, :]
            m = m_head & (o < D)
            tl.store(p_to + o, tl.load(p_in + o, mask=m), mask=m)


@triton.jit(do_not_specialize=["n_tokens", "length", "table_rows"])
def rope_kernel(
    p_q, p_k, p_cos, p_sin, p_positions, p_q_out, p_k_out, n_tokens, length, table_rows,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_cos, s_sin,
    H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
    HEADS: tl.constexpr, HEADS_KV: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    # 32 bits hold the number of a token (the launcher checks), and divide much faster than 64.
    o_token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    m_token = o_token < n_tokens
    o_b, o_t = (o_token // length).to(tl.int64), (o_token % length).to(tl.int64)

    # Angles. A position that the table has not gives NaN rather than what lies beside the table.
    if p_positions is None:
        o_angle = o_t
    else:
        o_angle = tl.load(p_positions + o_token, mask=m_token, other=0).to(tl.int64)
    o_pair = tl.arange(0, PAIRS)[None, None, :]
    m_angle = ((o_angle >= 0) & (o_angle < table_rows))[:, None, None] & (o_pair < HALF)
    nan = float("nan")
    cos = tl.load(p_cos + o_angle[:, None, None] * s_cos + o_pair, mask=m_angle, other=nan)
    sin = tl.load(p_sin + o_angle[:, None, None] * s_sin + o_pair, mask=m_angle, other=nan)
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    if INVERSE:
        sin = -sin

    # Rotate.
    m = m_token[:, None, None]
    o_out = o_token.to(tl.int64)[:, None, None] * D
    o_q = (o_b * s_qb + o_t * s_qt)[:, None, None]
    o_k = (o_b * s_kb + o_t * s_kt)[:, None, None]
    _rotate(p_q, p_q_out, o_q, o_out * H, s_qh, m, cos, sin,
            H, D, HALF, TOKENS, HEADS, PAIRS, REST, INTERLEAVED)  # fmt: skip
    _rotate(p_k, p_k_out, o_k, o_out * H_KV, s_kh, m, cos, sin,
            H_KV, D, HALF, TOKENS, HEADS_KV, PAIRS, REST, INTERLEAVED)  # fmt: skip


PER_THREAD = 16  # elements of q in a thread: two vectors of 16 bytes in half precision
THREADS = 128
MOST_TOKENS = 32  # each costs registers for its offsets


def rope(q, k, cos, sin, positions, interleaved, inverse):
    """Schema of ceg::rope. Positions outside the table give NaN."""
    batch, length, heads, size = q.shape
    if batch * length >= 2**31 - 1024:  # less what the last program reaches beyond
        raise ValueError(f"q must have fewer than 2^31 - 1024 tokens, got {batch * length}")
    q, k, cos, sin = (unit_stride(t) for t in (q, k, cos, sin))
    q_out, k_out = empty_like(q), empty_like(k)
    half = cos.shape[1]
    pairs = next_power_of_2(max(half, 1))
    per_program = PER_THREAD * THREADS
    most = max(1, 2 * per_program // (2 * pairs))  # heads at once: at most twice PER_THREAD
    tile, tile_kv = (min(next_power_of_2(max(n, 1)), most) for n in (heads, k.shape[2]))
    tokens = min(max(1, per_program // (max(tile, tile_kv) * 2 * pairs)), MOST_TOKENS)
    launch(
        rope_kernel, (cdiv(batch * length, tokens),),
        q, k, cos, sin, None if positions is None else positions.contiguous(), q_out, k_out,
        batch * length, length, cos.shape[0], *q.stride()[:3], *k.stride()[:3],
        cos.stride(0), sin.stride(0),
        H=heads, H_KV=k.shape[2], D=size, HALF=half, TOKENS=tokens, HEADS=tile, HEADS_KV=tile_kv,
        PAIRS=pairs, REST=next_power_of_2(max(size - 2 * half, 1)),
        INTERLEAVED=interleaved, INVERSE=inverse, warps=THREADS // gpu_of(q).warp,
    )  # fmt: skip
    return q_out, k_out


def compiled() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The calls whose kernels are compiled ahead of time, by name; see compile.py."""

    def case(heads, heads_kv, size, rotary, dtype=torch.bfloat16, flags=(False, False), at=None):
        q = torch.empty(2, 2048, heads, size, dtype=dtype, device="meta")
        k = torch.empty(2, 2048, heads_kv, size, dtype=dtype, device="meta")
        table = torch.empty(4096, rotary // 2, dtype=torch.float32, device="meta")
        positions = None if at is None else torch.empty(2, 2048, dtype=at, device="meta")
        return lambda: rope(q, k, table, table, positions, *flags)

    yield "H12/12 D64 bf16", case(12, 12, 64, 64)
    yield "H32/8 D128 bf16", case(32, 8, 128, 128)
    yield "H32/8 D128 bf16 inverse", case(32, 8, 128, 128, flags=(False, True))
    yield "H32/8 D128 fp32 at positions", case(32, 8, 128, 128, torch.float32, at=torch.int64)
    turned = (True, False)
    yield "H16/16 D256 R64 fp16 interleaved", case(16, 16, 256, 64, torch.float16, flags=turned)
    yield "H25/5 D80 bf16 interleaved", case(25, 5, 80, 80, flags=turned)

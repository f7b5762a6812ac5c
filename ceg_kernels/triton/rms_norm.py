"""RMSNorm with an optional residual, and its backward; the formulas are in ops/rms_norm.py.

A tile is ROWS x BLOCK: whole rows in registers, so that memory is read once. Longer rows are
walked in blocks, twice (the `_long_` kernels). The backward runs on as many programs as the GPU
holds, each with fp32 sums of dweight of its own, which a small kernel adds up in order: no atomics,
so the same GPU gives the same bits.

    x residual y h dy dh dx: (R, D) with dense rows;  rstd: (R,);  weight: (D,);  s_: row strides
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ceg_kernels.triton.launch import (
    Gpu,
    as_rows,
    cdiv,
    empty_like,
    gpu_of,
    launch,
    next_power_of_2,
)


@triton.jit
def _load(p_t, stride, o_row, o_col, m):
    """A tile in fp32: [ROWS, BLOCK]."""
    return tl.load(p_t + o_row[:, None] * stride + o_col[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def _h(p_x, p_residual, s_x, s_residual, o_row, o_col, m):
    h = _load(p_x, s_x, o_row, o_col, m)
    if p_residual is not None:
        h += _load(p_residual, s_residual, o_row, o_col, m)
    return h


@triton.jit
def _scaled(v, p_weight, weight_offset, o_col, D: tl.constexpr):
    """v times the weight of each column."""
    if p_weight is not None:
        weight = tl.load(p_weight + o_col, mask=o_col < D, other=0.0).to(tl.float32)
        v = v * (weight + weight_offset)[None, :]
    return v


@triton.jit
def _rstd(squares, eps, D: tl.constexpr):
    # Correctly rounded: one number a row costs nothing, and the approximate rsqrt errs by 2 ulp.
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, D * 1.0) + eps))


@triton.jit(do_not_specialize=["n_rows"])
def rms_norm_fwd_kernel(
    p_x, p_residual, p_weight, p_y, p_sum, p_rstd, n_rows, s_x, s_residual, eps, weight_offset,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_col = tl.arange(0, BLOCK)
    m_row = o_row < n_rows
    m = m_row[:, None] & (o_col < D)[None, :]

    # Reduce.
    h = _h(p_x, p_residual, s_x, s_residual, o_row, o_col, m)
    rstd = _rstd(tl.sum(h * h, axis=1), eps, D)
    tl.store(p_rstd + o_row, rstd, mask=m_row)

    # Scale and write.
    o_out = o_row[:, None] * D + o_col[None, :]
    tl.store(p_y + o_out, _scaled(h * rstd[:, None], p_weight, weight_offset, o_col, D), mask=m)
    if p_residual is not None:
        tl.store(p_sum + o_out, h, mask=m)


@triton.jit(do_not_specialize=["n_rows"])
def rms_norm_long_fwd_kernel(
    p_x, p_residual, p_weight, p_y, p_sum, p_rstd, n_rows, s_x, s_residual, eps, weight_offset,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n_rows

    # Reduce: column by column over blocks first, across threads once.
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(0, D, BLOCK):
        o_col = start + tl.arange(0, BLOCK)
        m = m_row[:, None] & (o_col < D)[None, :]
        h = _h(p_x, p_residual, s_x, s_residual, o_row, o_col, m)
        squares += h * h
    rstd = _rstd(tl.sum(squares, axis=1), eps, D)
    tl.store(p_rstd + o_row, rstd, mask=m_row)

    # Scale and write: the row comes from L2 now.
    for start in tl.range(0, D, BLOCK):
        o_col = start + tl.arange(0, BLOCK)
        m = m_row[:, None] & (o_col < D)[None, :]
        h = _h(p_x, p_residual, s_x, s_residual, o_row, o_col, m)
        o_out = o_row[:, None] * D + o_col[None, :]
        tl.store(p_y + o_out, _scaled(h * rstd[:, None], p_weight, weight_offset, o_col, D), mask=m)
        if p_residual is not None:
            tl.store(p_sum + o_out, h, mask=m)


@triton.jit
def _tiles(n_rows, ROWS: tl.constexpr):
    return (n_rows - 1) // ROWS + 1  # tl.cdiv overflows just below 2^31 rows


@triton.jit
def _dx(g, h, rstd, along, D: tl.constexpr):
    """The gradient of h where `along` is the sum of g * h over the row."""
    projection = tl.div_rn(along * rstd * rstd * rstd, D * 1.0)
    return g * rstd[:, None] - h * projection[:, None]


@triton.jit(do_not_specialize=["n_rows"])
def rms_norm_bwd_kernel(
    p_dy, p_dh, p_h, p_weight, p_rstd, p_dx, p_partials, n_rows, s_dy, s_dh, s_h, weight_offset,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_col = tl.arange(0, BLOCK)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(tl.program_id(0), _tiles(n_rows, ROWS), tl.num_programs(0)):
        o_row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        m_row = o_row < n_rows
        m = m_row[:, None] & (o_col < D)[None, :]
        dy = _load(p_dy, s_dy, o_row, o_col, m)
        h = _load(p_h, s_h, o_row, o_col, m)
        rstd = tl.load(p_rstd + o_row, mask=m_row, other=0.0)

        # Reduce: how much of dy points along h.
        g = _scaled(dy, p_weight, weight_offset, o_col, D)
        dx = _dx(g, h, rstd, tl.sum(g * h, axis=1), D)

        # Write; rows of dweight meet in registers until the last tile.
        if p_dh is not None:
            dx += _load(p_dh, s_dh, o_row, o_col, m)
        tl.store(p_dx + o_row[:, None] * D + o_col[None, :], dx, mask=m)
        dweight += dy * h * rstd[:, None]
    if p_partials is not None:
        p = p_partials + tl.program_id(0).to(tl.int64) * D + o_col
        tl.store(p, tl.sum(dweight, axis=0), mask=o_col < D)


@triton.jit(do_not_specialize=["n_rows"])
def rms_norm_long_bwd_kernel(
    p_dy, p_dh, p_h, p_weight, p_rstd, p_dx, n_rows, s_dy, s_dh, s_h, weight_offset,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n_rows
    rstd = tl.load(p_rstd + o_row, mask=m_row, other=0.0)

    # Reduce: how much of dy points along h.
    along = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(0, D, BLOCK):
        o_col = start + tl.arange(0, BLOCK)
        m = m_row[:, None] & (o_col < D)[None, :]
        g = _scaled(_load(p_dy, s_dy, o_row, o_col, m), p_weight, weight_offset, o_col, D)
        along += g * _load(p_h, s_h, o_row, o_col, m)
    along_row = tl.sum(along, axis=1)

    # Write: dy and h come from L2 now.
    for start in tl.range(0, D, BLOCK):
        o_col = start + tl.arange(0, BLOCK)
        m = m_row[:, None] & (o_col < D)[None, :]
        g = _scaled(_load(p_dy, s_dy, o_row, o_col, m), p_weight, weight_offset, o_col, D)
        dx = _dx(g, _load(p_h, s_h, o_row, o_col, m), rstd, along_row, D)
        if p_dh is not None:
            dx += _load(p_dh, s_dh, o_row, o_col, m)
        tl.store(p_dx + o_row[:, None] * D + o_col[None, :], dx, mask=m)


@triton.jit(do_not_specialize=["n_rows"])
def rms_norm_long_partials_kernel(
    p_dy, p_h, p_rstd, p_partials, n_rows, s_dy, s_h,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dweight of BLOCK columns over every tile of rows that is this program's."""
    o_col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(tl.program_id(1), _tiles(n_rows, ROWS), tl.num_programs(1)):
        o_row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        m_row = o_row < n_rows
        m = m_row[:, None] & (o_col < D)[None, :]
        rstd = tl.load(p_rstd + o_row, mask=m_row, other=0.0)
        dy, h = _load(p_dy, s_dy, o_row, o_col, m), _load(p_h, s_h, o_row, o_col, m)
        dweight += dy * h * rstd[:, None]
    p = p_partials + tl.program_id(1).to(tl.int64) * D + o_col
    tl.store(p, tl.sum(dweight, axis=0), mask=o_col < D)


@triton.jit(do_not_specialize=["n_partials"])
def rms_norm_dweight_kernel(
    p_partials, p_dweight, n_partials,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(0, n_partials, ROWS):
        o_row = start + tl.arange(0, ROWS).to(tl.int64)
        m = (o_row < n_partials)[:, None] & (o_col < D)[None, :]
        dweight += _load(p_partials, D, o_row, o_col, m)
    tl.store(p_dweight + o_col, tl.sum(dweight, axis=0), mask=o_col < D)


# Longest row that is kept in registers. In the backward dy, h, the weight and the sums of dweight
# are alive together.
LONGEST_FWD, LONGEST_BWD = 16384, 8192
PER_THREAD = 16  # elements of one tensor in a thread: two vectors of 16 bytes in half precision
LEAST_THREADS, MOST_THREADS = 128, 512
MOST_ROWS = 128  # each costs registers for its offsets
# Of the backward, in one processor. More bring more partial sums: of 264 programs on an H200 they
# are 2% of the bytes that 16384 rows of 4096 in bf16 take.
RESIDENT_THREADS = 512


@dataclass(frozen=True)
class Tile:
    rows: int
    block: int
    warps: int


def tile_of(size: int, longest: int, gpu: Gpu, least_threads: int = LEAST_THREADS) -> Tile:
    """Rows and columns of a tile. Chosen for bytes in flight, and not yet measured on any GPU."""
    block = next_power_of_2(size) if size <= longest else longest // 4
    threads = min(max(block // PER_THREAD, least_threads), MOST_THREADS)
    rows = min(max(1, threads * PER_THREAD // block), MOST_ROWS)
    return Tile(rows, block, threads // gpu.warp)


def forward(x, weight, residual, eps, weight_offset):
    """Schema of ceg::rms_norm."""
    rows, size = as_rows(x), x.shape[-1]
    more = None if residual is None else as_rows(residual)
    y, rstd = empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    summed = x.new_empty(0) if residual is None else empty_like(x)
    tile = tile_of(size, LONGEST_FWD, gpu_of(x))
    kernel = rms_norm_fwd_kernel if size <= LONGEST_FWD else rms_norm_long_fwd_kernel
    launch(
        kernel, (cdiv(rows.shape[0], tile.rows),),
        rows, more, _dense(weight), y, None if more is None else summed, rstd, rows.shape[0],
        rows.stride(0), 0 if more is None else more.stride(0), eps, weight_offset,
        D=size, ROWS=tile.rows, BLOCK=tile.block, warps=tile.warps,
    )  # fmt: skip
    return y, summed, rstd


def backward(dy, dh, h, weight, rstd, weight_offset):
    """Schema of ceg::rms_norm_backward."""
    dy, rows, rstd = as_rows(dy), as_rows(h), rstd.reshape(-1)
    more = None if dh is None else as_rows(dh)
    dx = empty_like(h)
    gpu, (n_rows, size) = gpu_of(h), rows.shape
    strides = dy.stride(0), 0 if more is None else more.stride(0), rows.stride(0)
    if size > LONGEST_BWD:
        tile = tile_of(size, LONGEST_BWD, gpu)
        launch(
            rms_norm_long_bwd_kernel, (cdiv(n_rows, tile.rows),),
            dy, more, rows, _dense(weight), rstd, dx, n_rows, *strides, weight_offset,
            D=size, ROWS=tile.rows, BLOCK=tile.block, warps=tile.warps,
        )  # fmt: skip
        return dx, h.new_empty(0) if weight is None else _long_dweight(dy, rows, rstd, weight, gpu)
    tile = tile_of(size, LONGEST_BWD, gpu, least_threads=RESIDENT_THREADS // 2)
    resident = gpu.processors * (RESIDENT_THREADS // (tile.warps * gpu.warp))
    programs = min(cdiv(n_rows, tile.rows), resident)
    partials = None if weight is None else rstd.new_empty(programs, size)
    launch(
        rms_norm_bwd_kernel, (programs,),
        dy, more, rows, _dense(weight), rstd, dx, partials, n_rows, *strides, weight_offset,
        D=size, ROWS=tile.rows, BLOCK=tile.block, warps=tile.warps,
    )  # fmt: skip
    return dx, h.new_empty(0) if weight is None else _dweight(partials, weight)


def _long_dweight(dy, h, rstd, weight, gpu):
    (n_rows, size), rows, block = h.shape, 4, 512
    columns = cdiv(size, block)
    programs = min(cdiv(n_rows, rows), cdiv(8 * gpu.processors, columns))
    partials = rstd.new_empty(programs, size)
    launch(
        rms_norm_long_partials_kernel, (columns, programs),
        dy, h, rstd, partials, n_rows, dy.stride(0), h.stride(0),
        D=size, ROWS=rows, BLOCK=block, warps=4,
    )  # fmt: skip
    return _dweight(partials, weight)


def _dweight(partials, weight):
    dweight = empty_like(weight)
    launch(
        rms_norm_dweight_kernel, (cdiv(partials.shape[1], 32),),
        partials, dweight, partials.shape[0], D=partials.shape[1], ROWS=64, BLOCK=32, warps=4,
    )  # fmt: skip
    return dweight


def _dense(weight):
    return None if weight is None else weight.contiguous()


def compiled() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The calls whose kernels are compiled ahead of time, by name; see compile.py."""

    def case(size, dtype, weight_dtype, residual):
        def meta(*shape, dtype=dtype):
            return torch.empty(*shape, dtype=dtype, device="meta")

        rows, weight = meta(4096, size), None
        if weight_dtype is not None:
            weight = meta(size, dtype=weight_dtype)
        more = rows if residual else None

        def both():
            forward(rows, weight, more, 1e-6, 0.0)
            backward(rows, more, rows, weight, meta(4096, dtype=torch.float32), 0.0)

        return both

    half, single = torch.bfloat16, torch.float32
    yield "D128 bf16", case(128, half, half, False)
    yield "D768 bf16 residual", case(768, half, half, True)
    yield "D4096 bf16", case(4096, half, half, False)
    yield "D4099 fp16 no weight", case(4099, torch.float16, None, False)
    yield "D8192 fp32 residual", case(8192, single, single, True)
    yield "D8192 bf16 fp32 weight", case(8192, half, single, False)
    yield "D16384 bf16 residual", case(16384, half, half, True)
    yield "D32768 fp32", case(32768, single, single, False)

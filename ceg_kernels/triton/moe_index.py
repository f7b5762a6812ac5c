"""A stable counting sort of choices by expert; ops/moe_index.py says what the outputs mean.

Choices are cut into chunks, one a program. Count them by expert in each chunk, scan the counts over
chunks, then place each choice at the first row of its expert, plus those of the same expert in
chunks before, plus those before it in its own chunk. The host learns no number on the way, and no
order depends on which program runs first.

    ids slots sources: (n,) choices;  table: (CHUNKS + 1, BINS) int32, the last row the totals
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from ceg_kernels.triton.launch import cdiv, empty_like, gpu_of, launch, next_power_of_2


@triton.jit
def _ids(p_ids, start, n, E: tl.constexpr, STEP: tl.constexpr):
    """Positions, ids and which of them count: an id that is no expert's is dropped."""
    o = start + tl.arange(0, STEP)
    ids = tl.load(p_ids + o, mask=o < n, other=-1).to(tl.int32)
    valid = (ids >= 0) & (ids < E)
    return o, tl.where(valid, ids, 0), valid


@triton.jit(do_not_specialize=["n", "chunk"])
def moe_index_count_kernel(
    p_ids, p_table, n, chunk, E: tl.constexpr, BINS: tl.constexpr, STEP: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * chunk
    counts = tl.zeros((BINS,), tl.int32)
    for start in tl.range(0, chunk, STEP):
        _, ids, valid = _ids(p_ids, first + start, n, E, STEP)
        counts += tl.histogram(ids, BINS, mask=valid)
    tl.store(p_table + tl.program_id(0) * BINS + tl.arange(0, BINS), counts)


@triton.jit(do_not_specialize=["n_chunks"])
def moe_index_scan_kernel(
    p_table, n_chunks, BINS: tl.constexpr, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Counts of COLUMNS experts become those of the chunks before, and a row of totals."""
    o_chunk = tl.arange(0, CHUNKS)[:, None]
    o_e = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = (o_chunk < n_chunks) & (o_e < BINS)[None, :]
    counts = tl.load(p_table + o_chunk * BINS + o_e[None, :], mask=m, other=0)
    before = tl.cumsum(counts, axis=0) - counts
    tl.store(p_table + o_chunk * BINS + o_e[None, :], before, mask=m)
    tl.store(p_table + n_chunks * BINS + o_e, tl.sum(counts, axis=0), mask=o_e < BINS)


@triton.jit(do_not_specialize=["n", "chunk", "n_chunks", "limit"])
def moe_index_place_kernel(
    p_ids, p_table, p_slots, p_sources, p_offsets, n, chunk, n_chunks, limit,
    E: tl.constexpr, BINS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    # Rows of each expert, by every program for itself: a launch costs more.
    o_e = tl.arange(0, BINS)
    kept = tl.minimum(tl.load(p_table + n_chunks * BINS + o_e), limit)
    ends = tl.cumsum(kept, axis=0)
    firsts, filled = ends - kept, tl.sum(kept, axis=0)
    if tl.program_id(0) == 0:
        tl.store(p_offsets + o_e, firsts, mask=o_e < E)
        tl.store(p_offsets + E, filled)

    # Place; `before` counts on from step to step.
    before = tl.load(p_table + tl.program_id(0) * BINS + o_e)
    first = tl.program_id(0).to(tl.int64) * chunk
    o_step = tl.arange(0, STEP)
    for start in tl.range(0, chunk, STEP):
        o, ids, valid = _ids(p_ids, first + start, n, E, STEP)
        # Every pair of a step is compared: cheaper than a sort, and whatever E is.
        earlier = valid[None, :] & (o_step[None, :] < o_step[:, None])
        same = earlier & (ids[:, None] == ids[None, :])
        rank = tl.gather(before, ids, 0) + tl.sum(same.to(tl.int32), axis=1)
        keep = valid & (rank < limit)
        slot = tl.where(keep, tl.gather(firsts, ids, 0) + rank, -1)
        tl.store(p_slots + o, slot, mask=o < n)
        tl.store(p_sources + slot, o, mask=keep)
        # Rows behind the last expert's are nobody's slot.
        tl.store(p_sources + o, tl.full((STEP,), -1, tl.int32), mask=(o < n) & (o >= filled))
        before += tl.histogram(ids, BINS, mask=valid)


STEP = 64  # choices whose pairs are compared at once; 128 x 128 spilled
MOST_CHUNKS = 256  # more than any GPU has processors; few enough for one scan in registers
COLUMNS = 32  # experts in a program of the scan: 128 bytes, a line of the cache
WIDE = 2048  # bins beyond which a program has four times the threads


def moe_index(expert_ids, num_experts, capacity):
    """Schema of ceg::moe_index."""
    n = expert_ids.numel()
    if n > 2**31 - 1:
        raise ValueError(f"expert_ids must have at most 2^31 - 1 elements, got {n}")
    ids = expert_ids.contiguous()
    slots, sources = empty_like(ids), ids.new_empty(n)
    offsets = ids.new_empty(num_experts + 1)
    chunk = max(1, cdiv(n, STEP * MOST_CHUNKS)) * STEP
    chunks = max(1, cdiv(n, chunk))
    bins = next_power_of_2(num_experts)
    table = ids.new_empty((chunks + 1, bins), dtype=torch.int32)
    warp = gpu_of(ids).warp
    warps = (512 if bins > WIDE else 128) // warp
    launch(
        moe_index_count_kernel, (chunks,),
        ids, table, n, chunk, E=num_experts, BINS=bins, STEP=STEP, warps=warps,
    )  # fmt: skip
    launch(
        moe_index_scan_kernel, (cdiv(bins, COLUMNS),),
        table, chunks, BINS=bins, CHUNKS=next_power_of_2(chunks), COLUMNS=COLUMNS,
        warps=256 // warp,
    )  # fmt: skip
    launch(
        moe_index_place_kernel, (chunks,),
        ids, table, slots, sources, offsets, n, chunk, chunks,
        2**31 - 1 if capacity < 0 else capacity, E=num_experts, BINS=bins, STEP=STEP, warps=warps,
    )  # fmt: skip
    return slots, sources, offsets


def compiled() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The calls whose kernels are compiled ahead of time, by name; see compile.py."""

    def case(n, experts, top_k, capacity=-1):
        ids = torch.empty(n, top_k, dtype=torch.int32, device="meta")
        return lambda: moe_index(ids, experts, capacity)

    yield "N2048 E8 K2", case(2048, 8, 2)
    yield "N4096 E128 K8", case(4096, 128, 8)
    yield "N32768 E512 K10 capacity", case(32768, 512, 10, 1024)
    yield "N4096 E8192 K8", case(4096, 8192, 8)

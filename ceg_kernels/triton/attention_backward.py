"""Flash attention backward; the formula is in ops/attention_reference.py.

No atomics, so that the same GPU gives the same bits. Delta of every row first, then one of two
schedules, which the table of tiles chooses (attention_config.py): one pass over the pairs
(attention_bwd_kernel and a sum over the splits of the keys), or two (dkdv, dq). A last kernel sums
dsink.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ceg_kernels.triton.attention_backward_keys import (
    attention_bwd_dkdv_kernel,
    attention_bwd_kernel,
)
from ceg_kernels.triton.attention_backward_queries import attention_bwd_dq_kernel
from ceg_kernels.triton.attention_backward_rows import (
    attention_bwd_delta_kernel,
    attention_bwd_dsink_kernel,
    attention_bwd_sum_kernel,
)
from ceg_kernels.triton.attention_config import UNUSED, Tile, forced
from ceg_kernels.triton.attention_problem import (
    CASES,
    FEW,
    HALVED,
    Problem,
    described,
    lse_strides,
    problem_of,
    strides,
)
from ceg_kernels.triton.launch import cdiv, empty_like, gpu_of, launch, unit_stride

# Of the partial sums of dQ. Where they would need more the pairs are visited twice.
MOST_BYTES = 2**29


def backward(
    dout, dlse, q, k, v, out, lse, cu_q, cu_k, max_q, max_k,
    slopes, sink, scale, causal, left, right, softcap,
):  # fmt: skip
    """Schema of ceg::attention_backward."""
    dout, q, k, v, out = (unit_stride(t) for t in (dout, q, k, v, out))
    p = problem_of(q, k, v, cu_q, cu_k, max_q, max_k, slopes, sink, causal, left, right, softcap)
    packed = cu_q is not None
    lse = lse.contiguous()
    at_lse = lse_strides(lse, packed)
    delta = _delta(dout, out, dlse, lse, packed, p)
    dsink = lse.new_zeros(0) if sink is None else _dsink(lse, delta, p.sink, at_lse, packed)
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    gpu = gpu_of(q)
    tile = p.tile("bwd", gpu)
    splits = splits_of(tile, p, q)
    given = dout, q, k, v, lse, delta, p, (p.left, p.right, scale, softcap), gpu
    if splits:
        _one_pass(*given, dq, dk, dv, tile, splits)
    else:
        _two_passes(*given, dq, dk, dv)
    return dq, dk, dv, dsink


def splits_of(tile: Tile, p: Problem, q: torch.Tensor) -> int:
    """Programs that share the keys of a (sequence, key head), 0 for two passes over the pairs.

    From the table and the shape alone: dQ is summed over the splits, so that they decide on bits.
    """
    if not tile.programs:
        return 0
    pairs = p.batch * q.shape[-2] // p.constants["GROUP"]
    wanted = max(1, min(cdiv(p.n_k, tile.n), cdiv(tile.programs, max(pairs, 1))))
    fitting = MOST_BYTES // max(4 * math.prod(_slice(tile, p, q)), 1)
    return min(wanted, fitting) if 2 * fitting >= wanted else 0


def _slice(tile: Tile, p: Problem, q: torch.Tensor) -> tuple[int, ...]:
    """The workspace of one split. Each packed sequence has tiles of its own."""
    tiles = cdiv(p.n_q, tile.m) if p.cu_q is None else q.shape[0] // tile.m + p.batch
    batch = p.batch if p.cu_q is None else 1
    return batch, q.shape[-2], tiles, tile.m, p.constants["BLOCK_D"]


def _workspace(q: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return q.new_empty(shape, dtype=torch.float32)


def _one_pass(dout, q, k, v, lse, delta, p, flags, gpu, dq, dk, dv, tile, splits):
    packed, heads, heads_kv = p.cu_q is not None, q.shape[-2], k.shape[-2]
    work = _workspace(q, (splits, *_slice(tile, p, q)))
    at_work = work.stride(0), 0 if packed else work.stride(1), work.stride(2)
    launch(
        attention_bwd_kernel, (splits * p.batch * heads_kv,),
        dout, q, k, v, *described((dout, q), tile.m, p, gpu), lse, delta, dk, dv, work,
        p.cu_q, p.cu_k, p.slopes, p.n_q, p.n_k, heads_kv, p.batch * heads_kv, splits,
        *(s for t in (dout, q, k, v, dk, dv) for s in strides(t, packed)),
        *lse_strides(lse, packed), *at_work, p.slopes_stride, *flags,
        **p.constants, SLICE=tile.slice, BLOCK_M=tile.m, BLOCK_N=tile.n,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    tiles = cdiv(p.n_q, tile.m)
    launch(
        attention_bwd_sum_kernel, (tiles * p.batch * heads,),
        work, dq, p.cu_q, p.n_q, tiles, heads, splits, *at_work, *strides(dq, packed), flags[2],
        D=p.constants["D"], BLOCK_M=tile.m, BLOCK_D=p.constants["BLOCK_D"], warps=4,
    )  # fmt: skip


def _two_passes(dout, q, k, v, lse, delta, p, flags, gpu, dq, dk, dv):
    packed, heads, heads_kv = p.cu_q is not None, q.shape[-2], k.shape[-2]
    read = [s for t in (dout, q, k, v) for s in strides(t, packed)]
    more = *lse_strides(lse, packed), p.slopes_stride, *flags
    keys, queries = p.tile("bwd_dkdv", gpu), p.tile("bwd_dq", gpu)
    launch(
        attention_bwd_dkdv_kernel, (cdiv(p.n_k, keys.n) * p.batch * heads_kv,),
        dout, q, k, v, *described((dout, q), keys.m, p, gpu), lse, delta, dk, dv,
        p.cu_q, p.cu_k, p.slopes, p.n_q, p.n_k, heads_kv, p.batch * heads_kv,
        *read, *strides(dk, packed), *strides(dv, packed), *more,
        **p.constants, SLICE=keys.slice, BLOCK_M=keys.m, BLOCK_N=keys.n,
        warps=keys.warps, stages=keys.stages,
    )  # fmt: skip
    launch(
        attention_bwd_dq_kernel, (cdiv(p.n_q, queries.m) * p.batch * heads,),
        dout, q, k, v, *described((k, v), queries.n, p, gpu), lse, delta, dq,
        p.cu_q, p.cu_k, p.slopes, p.n_q, p.n_k, heads, p.batch * heads,
        *read, *strides(dq, packed), *more,
        **p.constants, SLICE=queries.slice, BLOCK_M=queries.m, BLOCK_N=queries.n,
        warps=queries.warps, stages=queries.stages,
    )  # fmt: skip


def _delta(dout, out, dlse, lse, packed, p):
    delta = torch.empty_like(lse)
    rows, heads = lse.shape[-1], out.shape[-2]
    block = max(1, 65536 // (p.bits * p.constants["BLOCK_DV"]))
    tiles = cdiv(rows, block)
    more = (0, 0) if dlse is None else lse_strides(dlse := unit_stride(dlse), packed)
    launch(
        attention_bwd_delta_kernel, (tiles * lse.numel() // max(rows, 1),),
        dout, out, dlse, delta, rows, tiles, heads,
        *strides(dout, packed), *strides(out, packed), *more, *lse_strides(lse, packed),
        DV=p.constants["DV"], BLOCK_DV=p.constants["BLOCK_DV"], BLOCK_M=block, warps=4,
    )  # fmt: skip
    return delta


def _dsink(lse, delta, sink, at_lse, packed):
    dsink = empty_like(sink)
    batch = 1 if packed else lse.shape[0]
    launch(
        attention_bwd_dsink_kernel, (sink.numel(),),
        lse, delta, sink, dsink, lse.shape[-1], batch, *at_lse, BLOCK=1024, warps=4,
    )  # fmt: skip
    return dsink


def _both_schedules(*args):
    backward(*args)
    with forced({"bwd": UNUSED}):
        backward(*args)


def compiled() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The calls whose kernels are compiled ahead of time, by name; see compile.py."""
    for name, args in CASES.items():
        q, _, v, cu = args[:4]
        if name in FEW or name in HALVED:
            continue
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        shape = out.shape[-2::-1] if cu is not None else (out.shape[0], *out.shape[-2:0:-1])
        lse = q.new_empty(shape, dtype=torch.float32)
        dlse = lse if "everything" in name else None
        given = (out, dlse, *args[:3], out, lse, *args[3:])
        yield name, partial(_both_schedules, *given)

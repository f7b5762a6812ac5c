"""Which tile an attention kernel should have: compiled on any machine, timed on a GPU.

A key of the table (attention_config.py) stands for all calls of its kernel, GPU, head_dim, width
and mask; those of attention_problem.CASES that it covers speak for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton

from ceg_kernels.triton import attention, attention_backward
from ceg_kernels.triton.attention_config import UNUSED, Key, Tile, forced, key_of, plain
from ceg_kernels.triton.attention_problem import CASES, FEW, HALVED, problem_of
from ceg_kernels.triton.compile import TARGETS, Facts, Target, build, describe
from ceg_kernels.triton.launch import record

MODULES = {
    "fwd": attention,
    "decode": attention,
    "bwd": attention_backward,
    "bwd_dkdv": attention_backward,
    "bwd_dq": attention_backward,
}
# Blocks of fewer keys than this write so much of dQ's partial sums that a second pass is cheaper:
# a pair costs 10 D FLOPs and 8 D / keys bytes. The width of the elements decides on the FLOP/s.
LEAST_KEYS = {16: 64, 32: 32}
# Columns that the backward's products take at once, where all (0) do not fit into registers, by
# head_dim and width: attention_slices.py says why. In half precision only one pass needs them.
SLICES = {(128, 16): (0, 64), (256, 16): (0, 128, 64), (256, 32): (128, 64)}
FEW_ROWS = {16: (64, 16), 32: (16,)}  # of decode: what attention_problem.FEW compiles


def keys(target: Target) -> Iterator[Key]:
    """The keys of this target that the cases cover."""
    for kernel, module in MODULES.items():
        names = (name for name, _ in module.compiled() if _speaks_for(kernel, name))
        yield from dict.fromkeys(plain(_key(kernel, target, CASES[name])) for name in names)


def _speaks_for(kernel: str, case: str) -> bool:
    if case in HALVED:
        return kernel == "fwd"  # the backward halves no tile
    return (case in FEW) == (kernel == "decode")


def _key(kernel: str, target: Target, args: tuple) -> Key:
    p = problem_of(*args[:9], *args[10:])
    mask = "other" if kernel == "decode" else p.mask
    return key_of(kernel, target.gpu, p.size, p.bits, mask)


def _cases(key: Key, target: Target) -> list[str]:
    """The names of the calls that the key stands for."""
    found = {name: _key(key.kernel, target, args) for name, args in CASES.items()}
    return [
        name
        for name, own in found.items()
        if key in (own, plain(own)) and _speaks_for(key.kernel, name)
    ]


def facts(key: Key, tile: Tile, target: Target) -> Iterator[Facts]:
    """What the key's calls become with this tile, the cheapest first to fail."""
    compiled = dict(MODULES[key.kernel].compiled())
    for case in _cases(key, target):
        with record(target.gpu) as launches, forced(alone(key, tile)):
            compiled[case]()
        for one in launches:
            if one.kernel.__name__ == f"attention_{key.kernel}_kernel":
                yield describe(build(one, target), target, "attention", case)


def alone(key: Key, tile: Tile) -> dict[str, Tile]:
    """What to force so that the key's kernel runs with this tile."""
    second = {"bwd": UNUSED} if key.kernel in ("bwd_dkdv", "bwd_dq") else {}
    return {**second, key.kernel: tile}


def fits(key: Key, tile: Tile) -> bool:
    """Whether no call of the key spills or wants more shared memory than its GPU has."""
    return _misfit(key, tile) is None


def _misfit(key: Key, tile: Tile) -> Facts | None:
    return next((fact for fact in facts(key, tile, TARGETS[key.gpu]) if fact.wrong), None)


def largest(key: Key) -> tuple[Tile, Any]:
    """The first candidate that fits and its `by` in the table.

    Of UNUSED that is what was tried: how many tiles, and which of them came nearest.
    """
    tried: dict[Tile, Facts] = {}
    for tile in candidates(key):
        if (misfit := _misfit(key, tile)) is not None:
            tried[tile] = misfit
        elif tile != UNUSED:
            return tile, "compiler"
        else:
            # Too much shared memory is never a near miss.
            distance = {
                t: (f.shared_bytes > f.shared_limit, f.spill_bytes) for t, f in tried.items()
            }
            nearest = min(distance, key=distance.__getitem__)
            return tile, {
                "compiler": f"triton {triton.__version__}", "tried": len(tried),
                "nearest": [nearest.m, nearest.n, nearest.warps, nearest.stages, nearest.slice],
                "wrong": tried[nearest].wrong,
            }  # fmt: skip
    raise RuntimeError(f"{key} must have a tile that fits, got none of {len(tried)}")


def candidates(key: Key) -> list[Tile]:
    """Tiles worth compiling, the largest first: each block is read once for a tile's rows."""
    rows = (128, 64, 32, 16) if key.bits == 16 else (64, 32, 16)
    stages = (2, 3, 1) if key.bits == 16 else (1,)
    # A product in fp32 keeps rows of both operands in registers too; of the others few spill.
    most = 100 if key.kernel == "bwd" and key.bits == 32 else 200
    # A thread of a matrix unit's product has four numbers or more.
    least = 128 if key.bits == 16 else 32
    gpu = TARGETS[key.gpu].gpu
    programs = {"bwd": 1, "decode": 2}.get(key.kernel, 0) * gpu.processors
    tiles = [
        Tile(m, n, warps, stage, programs, part)
        for m, n, warps, stage, part in itertools.product(rows, rows, (8, 4), stages, _slices(key))
        if _registers(key, m, n) / (gpu.warp * warps) <= most and m * n >= least * warps
        if key.kernel != "bwd" or n >= LEAST_KEYS[key.bits]
        if key.kernel != "decode" or (m in FEW_ROWS[key.bits] and n >= 32 and warps == 4)
    ]
    tiles.sort(key=partial(_preference, key.kernel))
    return [*tiles, UNUSED] if key.kernel in ("bwd", "decode") else tiles


def _slices(key: Key) -> tuple[int, ...]:
    sliced = key.kernel == "bwd" or (key.kernel in ("bwd_dkdv", "bwd_dq") and key.bits == 32)
    return SLICES.get((key.head_dim, key.bits), (0,)) if sliced else (0,)


def schedules(key: Key, tile: Tile) -> list[Tile]:
    """The same tile as others would run it."""
    processors = TARGETS[key.gpu].gpu.processors
    if key.kernel == "fwd":
        tiles = [replace(tile, programs=n) for n in (0, 1, 2, 3)]
    elif key.kernel in ("bwd", "decode"):
        numbers = (processors, 2 * processors, 4 * processors) if tile != UNUSED else ()
        tiles = [UNUSED, *(replace(tile, programs=n) for n in numbers)]
    else:
        tiles = []
    return [other for other in tiles if other != tile]


def _registers(key: Key, m: int, n: int) -> float:
    """What the accumulators and scores of a tile need, in registers of the whole program."""
    sums = {"fwd": m, "decode": m, "bwd": 2 * n + m, "bwd_dkdv": 2 * n, "bwd_dq": m}[
        key.kernel
    ] * key.head_dim
    return (
        sums
        + {"fwd": 1.5, "decode": 1.5, "bwd": 2.5, "bwd_dkdv": 2.0, "bwd_dq": 2.5}[key.kernel]
        * m
        * n
    )


def _preference(kernel: str, tile: Tile) -> tuple:
    # Rows that stay in the program decide how often the others are read again.
    kept = tile.n if kernel in ("bwd", "bwd_dkdv") else tile.m
    stages = (2, 3, 1).index(tile.stages)
    # Slices are loaded again and again.
    return tile.slice > 0, -tile.m * tile.n, -kept, -tile.warps, stages, -tile.slice


def masks(target: Target) -> list[Key]:
    """The keys that are worth timing: `plain` as causal and full, each with a case of its own."""
    apart = [(("causal", "full") if k.mask == "plain" else (k.mask,), k) for k in keys(target)]
    told = [replace(key, mask=mask) for masks_, key in apart for mask in masks_]
    return [key for key in told if _cases(key, target)]


def arguments(key: Key, target: Target, device: str) -> tuple:
    """Random arguments of the op for the key's first case, as its kernels' callers give them."""
    args = CASES[_cases(key, target)[0]]
    generator = torch.Generator(device).manual_seed(0)

    def real(t: Any) -> Any:
        if not isinstance(t, torch.Tensor):
            return t
        return torch.randn(t.shape, generator=generator, device=device).to(t.dtype)

    def cu(packed: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor | None:
        if starts is None:
            return None
        rows = packed.shape[0] // (starts.numel() - 1)  # sequences of equal length
        return torch.arange(starts.numel(), dtype=starts.dtype, device=device) * rows

    q, k, v, cu_q, cu_k, *rest = args
    made = *map(real, (q, k, v)), cu(q, cu_q), cu(k, cu_k), *map(real, rest)
    if key.kernel in ("fwd", "decode"):
        return made
    out, lse = attention.forward(*made)
    return real(out), None, *made[:3], out, lse, *made[3:]

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

from ceg_kernels.triton import attention, attention_backward
from ceg_kernels.triton.attention_config import Key, Tile, forced, key_of, plain
from ceg_kernels.triton.attention_problem import CASES, problem_of
from ceg_kernels.triton.compile import TARGETS, Facts, Target, build, describe
from ceg_kernels.triton.launch import record

MODULES = {"fwd": attention, "bwd_dkdv": attention_backward, "bwd_dq": attention_backward}


def keys(target: Target) -> Iterator[Key]:
    """The keys of this target that the cases cover."""
    for kernel, module in MODULES.items():
        names = (name for name, _ in module.compiled())
        yield from dict.fromkeys(plain(_key(kernel, target, CASES[name])) for name in names)


def _key(kernel: str, target: Target, args: tuple) -> Key:
    p = problem_of(*args[:9], *args[10:])
    return key_of(kernel, target.gpu, p.constants, p.bits, p.mask)


def _cases(key: Key, target: Target) -> list[str]:
    """The names of the calls that the key stands for."""
    found = {name: _key(key.kernel, target, args) for name, args in CASES.items()}
    return [name for name, own in found.items() if key in (own, plain(own))]


def facts(key: Key, tile: Tile, target: Target) -> Iterator[Facts]:
    """What the key's calls become with this tile, the cheapest first to fail."""
    compiled = dict(MODULES[key.kernel].compiled())
    for case in _cases(key, target):
        with record(target.gpu) as launches, forced({key.kernel: tile}):
            compiled[case]()
        for one in launches:
            if one.kernel.__name__ == f"attention_{key.kernel}_kernel":
                yield describe(build(one, target), target, "attention", case)


def fits(key: Key, tile: Tile) -> bool:
    """Whether no call of the key spills or wants more shared memory than its GPU has."""
    return not any(fact.wrong for fact in facts(key, tile, TARGETS[key.gpu]))


def candidates(key: Key) -> list[Tile]:
    """Tiles worth compiling, the largest first: each block is read once for a tile's rows."""
    rows = (128, 64, 32, 16) if key.bits == 16 else (64, 32, 16)
    stages = (2, 3, 1) if key.bits == 16 else (1,)
    tiles = [
        Tile(m, n, warps, stage)
        for m, n, warps, stage in itertools.product(rows, rows, (8, 4), stages)
        if _registers(key, m, n) / (32 * warps) <= 200 and m * n >= 64 * 2 * warps
    ]
    return sorted(tiles, key=partial(_preference, key.kernel))


def _registers(key: Key, m: int, n: int) -> float:
    """What the accumulators and scores of a tile need, in registers of the whole program."""
    sums = {"fwd": m, "bwd_dkdv": 2 * n, "bwd_dq": m}[key.kernel] * key.head_dim
    return sums + {"fwd": 1.5, "bwd_dkdv": 2.0, "bwd_dq": 2.5}[key.kernel] * m * n


def _preference(kernel: str, tile: Tile) -> tuple:
    # Rows that stay in the program decide how often the others are read again.
    kept = tile.n if kernel == "bwd_dkdv" else tile.m
    return -tile.m * tile.n, -kept, -tile.warps, (2, 3, 1).index(tile.stages)


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
        if not t.is_floating_point():  # cu_seqlens: sequences of equal length
            rows = args[0].shape[0] // (t.numel() - 1)
            return torch.arange(t.numel(), dtype=t.dtype, device=device) * rows
        return torch.randn(t.shape, generator=generator, device=device).to(t.dtype)

    made = tuple(map(real, args))
    if key.kernel == "fwd":
        return made
    out, lse = attention.forward(*made)
    return real(out), None, *made[:3], out, lse, *made[3:]

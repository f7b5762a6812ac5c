"""Tiles of the attention kernels, from attention_tiles.json: a row per kernel, GPU, head_dim, width
of the elements and kind of mask.

Rows by "compiler" are the largest tiles that compile without spills and within shared memory: a
guess at what is fast. Where there is none the row says how many were tried and what is wrong with
the nearest. `ceg tune` replaces rows by measured ones. Nothing is tuned on a user's call.

The `programs` of bwd and decode decide on how keys are shared out, and so on bits. bwd: for how
many programs, each of which adds to dQ beside dK and dV; with 0, or where the sums would need too
much memory, bwd_dkdv and bwd_dq run instead. decode: for how many programs too; `m` are the most
rows, queries times heads of a group, that it is for (0: none), and its mask is always "other".

Those of fwd change no bit: how many programs a processor has that take one tile after another, or 0
for a program a tile. By "compiler", measured on no GPU, they are as many as a processor holds of
the row's smallest head_dim, by registers and shared memory; 0 where the loop over tiles spills or
lets a processor hold fewer in any case of the row. Rows of "other" have 0: packed sequences have
tiles of any length, which turns share out worse than a GPU does that starts a program where another
ends.

A `slice` of the backward that is not 0 is how many columns of head_dim a product takes at once
(attention_slices.py). It decides on the order of sums, and so on bits.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ceg_kernels.triton.launch import Gpu

PATH = Path(__file__).parent / "attention_tiles.json"
KERNELS = ("fwd", "decode", "bwd", "bwd_dkdv", "bwd_dq")

# GPUs that use the rows of another: the same generation, or one with as little shared memory.
ALIKE = {"sm_103": "sm_100", "sm_89": "sm_86", "sm_121": "sm_120"}


@dataclass(frozen=True)
class Tile:
    m: int  # queries
    n: int  # keys
    warps: int
    stages: int
    programs: int = 0  # see the module's docstring
    slice: int = 0  # see the module's docstring


UNUSED = Tile(0, 0, 0, 0)  # of bwd or decode: the other kernels do their work

# Small, so that the tests have several tiles, splits and chunks.
INTERPRETED = {
    "fwd": Tile(64, 64, 4, 1, 1), "decode": Tile(16, 32, 4, 1, 16), "bwd": Tile(64, 64, 4, 1, 4),
}  # fmt: skip


@dataclass(frozen=True)
class Key:
    kernel: str  # of KERNELS
    gpu: str  # sm_90, gfx942, ...
    head_dim: int  # 64, 128 or 256: the next one that is not smaller
    bits: int  # of an element: 16 or 32
    mask: str  # causal, full, other (window, softcap, ALiBi or packed); plain: causal or full


_FORCED: ContextVar[Mapping[str, Tile] | None] = ContextVar("ceg_attention_tiles", default=None)


@contextlib.contextmanager
def forced(tiles: Mapping[str, Tile]) -> Iterator[None]:
    """Kernels launched inside take these tiles, by kernel; for `ceg tune`."""
    token = _FORCED.set({**(_FORCED.get() or {}), **tiles})
    try:
        yield
    finally:
        _FORCED.reset(token)


def rows(path: Path = PATH) -> dict[Key, tuple[Tile, Any]]:
    """The table: each key's tile and where it comes from."""
    listed = json.loads(path.read_text())
    return {Key(*row["key"]): (Tile(*row["tile"]), row["by"]) for row in listed}


def write(table: Mapping[Key, tuple[Tile, Any]], path: Path = PATH) -> None:
    """Replace the table, a line for each row; a reader sees the old one or the new one."""
    lines = [
        json.dumps({"key": [*vars(key).values()], "tile": [*vars(tile).values()], "by": by})
        for key, (tile, by) in sorted(table.items(), key=lambda row: [*vars(row[0]).values()])
    ]
    temporary = path.with_suffix(".new")
    temporary.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    temporary.replace(path)


@functools.cache
def _tiles() -> dict[Key, Tile]:
    return {key: tile for key, (tile, _) in rows().items()}


def key_of(kernel: str, gpu: Gpu, size: int, bits: int, mask: str) -> Key:
    """The key of a call: its GPU as it is called in the table, or the one with least memory.

    size: the larger of BLOCK_D and BLOCK_DV.
    """
    head_dim = 64 if size <= 64 else 128 if size <= 128 else 256
    arch = ALIKE.get(gpu.arch, gpu.arch)
    if Key("fwd", arch, 64, 16, "plain") not in _tiles():
        arch = "gfx942" if gpu.warp == 64 else "sm_120"
    return Key(kernel, arch, head_dim, bits, mask)


def plain(key: Key) -> Key:
    """The key that a call falls back to whose own mask was not measured."""
    return replace(key, mask="plain") if key.mask in ("causal", "full") else key


def tile_of(kernel: str, gpu: Gpu, size: int, bits: int, mask: str) -> Tile:
    """The tile of a call; where it was not measured, that for any plain mask. size: see key_of."""
    if (given := _FORCED.get()) is not None and kernel in given:
        return given[kernel]
    if gpu.arch == "interpreter":
        return INTERPRETED.get(kernel, Tile(64, 64, 4, 1))
    return _tabled(kernel, gpu, size, bits, mask)


@functools.cache  # a call asks for two tiles, and building keys takes longer than finding them
def _tabled(kernel: str, gpu: Gpu, size: int, bits: int, mask: str) -> Tile:
    key = key_of(kernel, gpu, size, bits, mask)
    found = _tiles().get(key) or _tiles().get(plain(key))
    if found is None and kernel in ("decode", "bwd"):
        return UNUSED
    return _tiles()[plain(key)] if found is None else found


def for_queries(tile: Tile, n_q: int, bits: int) -> Tile:
    """Few queries, as in decoding, take no more rows than they need, and a program for each.

    The warps stay: with half of them the keys and values that a thread loads are twice as many,
    which under all masks spilled up to 144 bytes. In half precision 32 rows are the least: 16 lie
    in all eight warps alike, which spilled 16 bytes, and cost memory, the limit here, no less.
    """
    m, least = tile.m, 32 if bits == 16 else 16
    while m >= 2 * n_q and m > least:
        m //= 2
    return tile if m == tile.m else replace(tile, m=m, programs=0)

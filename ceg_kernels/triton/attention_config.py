"""Tiles of the attention kernels: chosen with the compiler's report, and not measured on any GPU.

Every entry compiles without spills and within the shared memory of the GPUs of its row, which
`ceg info --kernels` checks. Nothing is tuned on a user's call. Whether the mask is causal may
change what is fastest, not what fits, so it is no key before something has been measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ceg_kernels.triton.launch import Gpu


@dataclass(frozen=True)
class Tile:
    m: int  # queries
    n: int  # keys
    warps: int
    stages: int


# For each GPU the tiles for a head_dim, padded to a power of two, of up to 64, 128 and 256; fp32,
# whose products need no matrix unit (tf32 is never used), has the same everywhere.
Table = dict[str, tuple[Tile, Tile, Tile]]
FORWARD: Table = {
    "sm_80": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
    "sm_90": (Tile(128, 128, 8, 2), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
    "sm_100": (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
    "sm_120": (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 1)),
    "gfx942": (Tile(128, 64, 4, 1), Tile(128, 32, 8, 1), Tile(64, 32, 8, 1)),
    "fp32": (Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
}
KEYS: Table = {  # dK and dV
    "sm_80": (Tile(32, 64, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 1)),
    "sm_90": (Tile(64, 128, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 1)),
    "sm_100": (Tile(64, 64, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 1)),
    "sm_120": (Tile(32, 64, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 1)),
    "gfx942": (Tile(16, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    "fp32": (Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1)),
}
QUERIES: Table = {  # dQ
    "sm_80": (Tile(64, 64, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 1)),
    "sm_90": (Tile(64, 64, 4, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 1)),
    "sm_100": (Tile(64, 64, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    "sm_120": (Tile(64, 64, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 1)),
    "gfx942": (Tile(64, 64, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
    "fp32": (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 16, 1)),
}

# GPUs that use the row of another: the same generation, or one with as little shared memory.
ROWS = {"sm_103": "sm_100", "sm_86": "sm_120", "sm_89": "sm_120", "sm_121": "sm_120"}


def row(gpu: Gpu, width: int) -> str:
    """The row of the tables for this GPU; for one that has none, that with the smallest tiles."""
    if width == 4:
        return "fp32"
    arch = ROWS.get(gpu.arch, gpu.arch)
    if arch in FORWARD:
        return arch
    return "gfx942" if gpu.warp == 64 else "sm_120"


def _lookup(table: Table, gpu: Gpu, constants: dict[str, Any], width: int) -> Tile:
    if gpu.arch == "interpreter":
        return Tile(64, 64, 4, 1)  # small, so that the tests have several
    size = max(constants["BLOCK_D"], constants["BLOCK_DV"])
    return table[row(gpu, width)][0 if size <= 64 else 1 if size <= 128 else 2]


def forward_tile(gpu: Gpu, constants: dict[str, Any], width: int, n_q: int) -> Tile:
    """The tile of a forward. Few queries, as in decoding, take no more rows than they need."""
    tile = _lookup(FORWARD, gpu, constants, width)
    rows = tile.m
    while rows >= 2 * n_q and rows > 16:
        rows //= 2
    return tile if rows == tile.m else Tile(rows, tile.n, min(tile.warps, 4), tile.stages)


def backward_tiles(gpu: Gpu, constants: dict[str, Any], width: int) -> tuple[Tile, Tile]:
    """The tiles of dK and dV, and of dQ."""
    return _lookup(KEYS, gpu, constants, width), _lookup(QUERIES, gpu, constants, width)

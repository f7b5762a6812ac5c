"""Sorting the choices of a router by expert: where each goes, and where each row comes from.

A *choice* is a (token, k) pair, numbered token * K + k. The sort is stable, so rows of one expert
keep token order: `slots[n, k]` is the row of a choice in the sorted buffer, `sources[r]` the choice
in row r, `offsets[e]` the first row of expert e. A choice beyond its expert's capacity is dropped:
slot -1; rows behind offsets[E] hold nothing: source -1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ceg_kernels import native, triton
from ceg_kernels.op import Backend, Cost, Op, Sample, Shape
from ceg_kernels.ops.moe_route import check_expert_ids, count_tokens, too_many_experts

# expert_ids: (N, K), slots: (N, K), sources: (N * K,), offsets: (E + 1,), all int32


def reference(expert_ids, num_experts, capacity):
    flat = expert_ids.reshape(-1).long()
    check_expert_ids(expert_ids, num_experts)
    counts = count_tokens(flat, num_experts)
    kept = counts if capacity < 0 else counts.clamp(max=capacity)
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=flat.device)
    offsets[1:] = kept.cumsum(0)
    order = flat.argsort(stable=True)
    expert = flat[order]
    first = counts.cumsum(0) - counts  # of each expert, before anything is dropped
    rank = torch.arange(flat.numel(), device=flat.device) - first[expert]
    row = torch.where(rank < kept[expert], offsets[expert] + rank, -1)
    slots = torch.empty_like(flat).scatter_(0, order, row).view(expert_ids.shape)
    # Dropped choices go to one spare element behind the end, which is cut off.
    sources = torch.full((flat.numel() + 1,), -1, device=flat.device)
    sources.scatter_(0, torch.where(row < 0, flat.numel(), row), order)
    return slots.int(), torch.where(_filled(sources[:-1], offsets), sources[:-1], -1).int(), offsets


def _filled(sources, offsets):
    return torch.arange(sources.numel(), device=sources.device) < offsets[-1]


def cost(expert_ids, num_experts, capacity):
    """No floating-point work; the ids in, slots and sources out."""
    return Cost(0, 3 * expert_ids.nbytes + 4 * (num_experts + 1))


# Left out: more than 2^31 choices, which int32 slots cannot number (moe_dispatch cannot hold them).
_SIZES = [(1, 1, 1, 1), (63, 8, 2, 40), (257, 16, 4, 257), (5, 60, 4, 64), (0, 4, 2, 8)]


def random_ids(n, e, k, device):
    generator = torch.Generator().manual_seed(n * 1000 + e)
    scores = torch.rand(n, e, generator=generator)
    return scores.argsort(-1)[:, :k].int().to(device)


def cases(device):
    for n, e, k, d in _SIZES:
        ids = random_ids(n, e, k, device)
        yield f"N{n} E{e} K{k} D{d}", ids, e, -1, d
    yield "capacity 5", random_ids(64, 4, 2, device), 4, 5, 32
    yield "capacity 0", random_ids(9, 4, 2, device), 4, 0, 8
    yield "one expert takes all", torch.zeros(33, 1, dtype=torch.int32, device=device), 7, -1, 24


def samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for name, ids, e, capacity, _ in cases(device):
        yield Sample(name, (ids, e, capacity))


def _shape(group: str, n: int, e: int, k: int) -> Shape:
    return Shape(group, lambda dtype, device: (random_ids(n, e, k, device), e, -1))


def run_native(expert_ids, num_experts, capacity, *, launch):
    slots = native.empty_like(expert_ids)
    sources = expert_ids.new_empty(expert_ids.numel())
    offsets = expert_ids.new_empty(num_experts + 1)
    ids = native.dense(expert_ids)
    counts = launch.workspace("moe_index", num_experts, torch.int32, ids)
    launch("moe_index", ids, slots, sources, offsets, *counts, capacity)
    return slots, sources, offsets


def cuda_why_not(expert_ids, num_experts, capacity):
    return native.cuda_why_not(expert_ids) or too_many_experts(num_experts)


launch_triton = triton.launcher("moe_index", "moe_index")


def run_triton(expert_ids, num_experts, capacity):
    check_expert_ids(expert_ids, num_experts)
    return launch_triton(expert_ids, num_experts, capacity)


def why_not_triton(expert_ids, num_experts, capacity):
    return triton.why_not_experts(num_experts, expert_ids)


def fake(expert_ids, num_experts, capacity):
    slots = expert_ids.new_empty(expert_ids.shape)
    return slots, slots.new_empty(slots.numel()), slots.new_empty(num_experts + 1)


MOE_INDEX = Op(
    name="moe_index",
    schema="(Tensor expert_ids, int num_experts, int capacity)"
    " -> (Tensor slots, Tensor sources, Tensor offsets)",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    shapes={
        "quick-n2048-e16-k2": _shape("quick", 2048, 16, 2),
        "moe-n4096-e128-k8": _shape("moe", 4096, 128, 8),
    },
    # The reference is what stock torch offers: a stable sort and index arithmetic.
    backends=(
        *native.native_backends("moe_index", run_native, cuda_refuses=cuda_why_not),
        Backend("triton", run_triton, why_not_triton, automatic=False),
        Backend("torch", reference),
        Backend("reference", reference),
    ),
)

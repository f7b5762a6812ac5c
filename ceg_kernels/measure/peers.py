"""What others run: each op's formula in plain torch, eager or compiled, and kernels of libraries.

Peers of the benchmarks, not backends: nothing dispatches to them. The reference is written to be
exact (fp32 inside, every flag, its own backward); these are written as model code has them, in the
dtype of the inputs and for the common flags, and torch differentiates them. The libraries are in
libraries.py.

A formula takes the arguments of the op's schema and returns the first of its outputs, as many as
its users want. Letters as in ceg_kernels/ops/.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ceg_kernels.measure import libraries
from ceg_kernels.op import Backend

PLAIN = ("eager", "compile")
NAMES = (*PLAIN, *libraries.MODULES, "loop")


@dataclass(frozen=True)
class Peer(Backend):
    """`prepare` makes its arguments of the op's, once for each inputs and outside the clock."""

    prepare: Callable[..., tuple] | None = None


def attention(q, k, v, cu_q, cu_k, max_q, max_k, slopes, sink, scale, causal, left, right, softcap):
    """Scores of all pairs, as in nanoGPT. Returns out, (B, Tq, H, Dv) contiguous."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if group > 1:
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = q @ k.transpose(-2, -1) * scale
    if causal:
        tq, tk = scores.shape[-2:]
        future = torch.ones(tq, tk, dtype=torch.bool, device=q.device).triu(1 + tk - tq)
        scores = scores.masked_fill(future, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous()


def attention_why_not(
    q, k, v, cu_q, cu_k, max_q, max_k, slopes, sink, scale, causal, left, right, softcap
):
    if cu_q is not None or slopes is not None or sink is not None or softcap != 0:
        return "the plain formula has no cu_seqlens, ALiBi, sink or softcap"
    if left >= 0 or right >= 0 or q.shape[1] > k.shape[1] or k.shape[1] == 0:
        return "the plain formula has no window, and no query that sees no key"
    return None


def rms_norm(x, weight, residual, eps, weight_offset):
    """Returns y, or (y, x + residual)."""
    h = x if residual is None else x + residual
    y = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight + weight_offset if weight_offset else weight)
    return y if residual is None else (y, h)


def rope(q, k, cos, sin, positions, interleaved, inverse):
    """x cos + rotate_half(x) sin, as in Hugging Face's models. Returns (q, k)."""
    t = q.shape[1]
    cos, sin = (torch.cat((table[:t], table[:t]), -1)[:, None].to(q.dtype) for table in (cos, sin))

    def rotated(x):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    return rotated(q), rotated(k)


def rope_why_not(q, k, cos, sin, positions, interleaved, inverse):
    if positions is not None or interleaved or inverse or 2 * cos.shape[1] != q.shape[-1]:
        return "the plain formula rotates whole heads by halves, at positions 0..T-1"
    return None


def _count(ids, num_experts):
    ones = torch.ones_like(ids)
    return torch.zeros(num_experts, dtype=ids.dtype, device=ids.device).scatter_add_(0, ids, ones)


def moe_route(logits, bias, top_k, score, renormalize):
    """In fp32, as in Mixtral; topk breaks ties. Returns weights, ids, counts."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = wide.softmax(-1) if score == "softmax" else wide.sigmoid()
    if bias is None:
        weights, ids = scores.topk(top_k)
    else:
        ids = (scores + bias).topk(top_k).indices
        weights = scores.gather(-1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids, _count(ids.flatten(), logits.shape[1])


def moe_index(expert_ids, num_experts, capacity):
    """A stable sort and its inverse. Returns (slots, sources, offsets)."""
    flat = expert_ids.flatten().long()
    sources = flat.argsort(stable=True)
    rows = torch.arange(flat.numel(), device=flat.device)
    slots = torch.empty_like(sources).scatter_(0, sources, rows)
    ends = _count(flat, num_experts).cumsum(0)
    return slots.view(expert_ids.shape), sources, torch.nn.functional.pad(ends, (1, 0))


def moe_index_why_not(expert_ids, num_experts, capacity):
    return None if capacity < 0 else "the plain formula drops no token"


def moe_dispatch(x, sources, slots):
    """Returns the rows of x, sorted by expert."""
    return x.index_select(0, sources // slots.shape[1])


def moe_combine(y, slots, sources, weights):
    """Returns (N, D), every weighted row added to its token's."""
    if weights is not None:
        y = y * weights.flatten().index_select(0, sources).unsqueeze(-1).to(y.dtype)
    return y.new_zeros(slots.shape[0], y.shape[1]).index_add_(0, sources // slots.shape[1], y)


def moe_dispatch_why_not(x, sources, slots):
    return "the plain formula drops no token" if (sources < 0).any() else None


def moe_combine_why_not(y, slots, sources, weights):
    return moe_dispatch_why_not(y, sources, slots)


def _no_reason(*args: Any) -> None:
    return None


# op: (formula, why it refuses arguments)
FORMULAS: dict[str, tuple[Callable[..., Any], Callable[..., str | None]]] = {
    "attention": (attention, attention_why_not),
    "rms_norm": (rms_norm, _no_reason),
    "rope": (rope, rope_why_not),
    "moe_route": (moe_route, _no_reason),
    "moe_index": (moe_index, moe_index_why_not),
    "moe_dispatch": (moe_dispatch, moe_dispatch_why_not),
    "moe_combine": (moe_combine, moe_combine_why_not),
}


def moe_loop(x, logits, top_k):
    """The chain from routing to combining one expert at a time, as Hugging Face's eager mixtures.

    The experts are left out: what each would be given goes straight back, weighted.
    """
    weights, ids, counts = moe_route(logits, None, top_k, "softmax", True)
    out = torch.zeros_like(x)
    for expert in counts.nonzero().flatten().tolist():
        tokens, choices = torch.where(ids == expert)
        rows = x[tokens] * weights[tokens, choices].unsqueeze(-1).to(x.dtype)
        out.index_add_(0, tokens, rows)
    return out


def of(op: str) -> tuple[str, ...]:
    """The names of an op's peers. "loop" is the peer of a chain of ops, so of none."""
    plain = PLAIN if op in FORMULAS else ()
    return *plain, *(name for one, name in libraries.FORMULAS if one == op)


def absent(name: str, device: str) -> str | None:
    """Why that peer can run nothing on this device of this machine, or None."""
    return libraries.absent(name, device) if name in libraries.MODULES else None


def find(op: str, name: str) -> Backend | None:
    """The peer `name` (of NAMES) of an op, as a backend that is none; None where there is none.

    The first call of "compile" compiles; it raises RuntimeError where that fails.
    """
    if name in PLAIN and op in FORMULAS:
        formula, why_not = FORMULAS[op]
        return Peer(name, formula if name == "eager" else _compiled(op), why_not)
    if (op, name) not in libraries.FORMULAS:
        return None
    formula, refuses, prepare = libraries.FORMULAS[op, name]

    def library_why_not(*args: Any) -> str | None:
        return absent(name, args[0].device.type) or refuses(*args)

    return Peer(name, formula, library_why_not, prepare=prepare)


def prepared(peer: Backend, args: tuple) -> tuple:
    """The arguments that `peer` is to be called with; copies where it would write over them."""
    return peer.prepare(*args) if isinstance(peer, Peer) and peer.prepare is not None else args


@functools.cache
def _compiled(op: str) -> Callable[..., Any]:
    return torch.compile(FORMULAS[op][0], fullgraph=True)

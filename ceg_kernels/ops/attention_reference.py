"""Attention as the plain formula, T x T scores and all: gold in fp64, the paper's baseline in use.

Scores of query i and key j, with visible keys aligned bottom-right when Tq != Tk:

    s = scale * q.k;  softcap c > 0: s = c tanh(s / c);  ALiBi: s -= slope * |i + Tk - Tq - j|
    j is visible to i iff  i + Tk - Tq - window_left <= j <= i + Tk - Tq + window_right

A negative window side is unlimited, causal means window_right = 0. A sink adds one logit per head
to the softmax's denominator, without a value. A row that sees nothing has out = 0 and lse = -inf
(the sink, if there is one).

Backward from the saved log-sum-exp (Dao et al. 2022, arXiv 2205.14135): p = exp(s - lse),
delta = rowsum(dout * out) - dlse, ds = p * (dout.v - delta), and dsink = sum of -p_sink * delta.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ceg_kernels import native

# q: (B, Tq, H, D), k: (B, Tk, H_kv, D), v: (B, Tk, H_kv, Dv); varlen: (total, H, D) and cu_seqlens


def visible(tq: int, tk: int, causal: bool, left: int, right: int, device) -> Tensor | None:
    """(Tq, Tk) mask of the visible keys; None where every query sees every key."""
    right = 0 if causal else right
    if left < 0 and right < 0:
        return None
    distance = torch.arange(tk, device=device) - torch.arange(tk - tq, tk, device=device)[:, None]
    mask = torch.ones(tq, tk, dtype=torch.bool, device=device)
    if left >= 0:
        mask &= distance >= -left
    if right >= 0:
        mask &= distance <= right
    return mask


def alibi_bias(alibi_slopes: Tensor, b: int, tq: int, tk: int) -> Tensor:
    """(B or 1, H, Tq, Tk)."""
    device = alibi_slopes.device
    distance = torch.arange(tk, device=device) - torch.arange(tk - tq, tk, device=device)[:, None]
    slopes = alibi_slopes.expand(b, -1) if alibi_slopes.dim() == 1 else alibi_slopes
    return -slopes[:, :, None, None] * distance.abs()


def per_head(k: Tensor, heads: int) -> Tensor:
    """(B, Tk, H_kv, D) as (B, H, Tk, D), each key head repeated for its group of query heads."""
    group = heads // k.shape[2]
    return k.transpose(1, 2) if group == 1 else k.transpose(1, 2).repeat_interleave(group, 1)


def _scores(q, k, scale, softcap):
    """(B, H, Tq, Tk), and the softcap's derivative (None without one)."""
    s = (q * scale).transpose(1, 2) @ per_head(k, q.shape[2]).transpose(-1, -2)
    if softcap == 0:
        return s, None
    t = torch.tanh(s / softcap)
    return softcap * t, 1 - t.square()


def _masked(s, alibi_slopes, causal, left, right):
    b, _, tq, tk = s.shape
    if alibi_slopes is not None:
        s = (s + alibi_bias(alibi_slopes.to(native.math_dtype(s.dtype)), b, tq, tk)).to(s.dtype)
    mask = visible(tq, tk, causal, left, right, s.device)
    return s if mask is None else s.masked_fill_(~mask, -torch.inf), mask


def _dense(q, k, v, alibi_slopes, sink, scale, causal, left, right, softcap):
    (b, tq, h, _), tk = q.shape, k.shape[1]
    wide = native.math_dtype(q.dtype)
    if tk == 0:
        empty = -torch.inf if sink is None else sink.to(wide)[None, :, None]
        lse = torch.zeros(b, h, tq, dtype=wide, device=q.device) + empty
        return q.new_zeros(b, tq, h, v.shape[-1]), lse
    s, _ = _scores(q, k, scale, softcap)
    s, mask = _masked(s, alibi_slopes, causal, left, right)
    if sink is not None:
        s = torch.cat((s, sink.to(s.dtype)[None, :, None, None].expand(b, h, tq, 1)), -1)
    p = s.softmax(-1, dtype=wide)
    # The largest score is log p + lse, which spares a second pass of exponentials over T x T.
    lse = s.amax(-1).to(wide) - p.amax(-1).log()
    if sink is not None:
        p = p[..., :tk]
    elif mask is not None and (tq > tk or left >= 0 or right >= 0):
        blind = ~mask.any(-1)
        p = p.masked_fill(blind[:, None], 0)
        lse = lse.masked_fill(blind, -torch.inf)
    out = p.to(v.dtype) @ per_head(v, h)
    return out.transpose(1, 2).contiguous(), lse


def _dense_backward(
    dout, dlse, q, k, v, out, lse, alibi_slopes, sink, scale, causal, left, right, softcap
):
    h, kv = q.shape[2], k.shape[2]
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(1, 2)  # (B, H, Tq)
    delta = delta if dlse is None else delta - dlse
    dsink = lse.new_zeros(0)
    if sink is not None:
        p_sink = torch.exp(sink.to(lse.dtype)[None, :, None] - lse)
        dsink = -(p_sink * delta).sum((0, 2))
    if q.shape[1] == 0 or k.shape[1] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), dsink
    s, slope = _scores(q, k, scale, softcap)
    s, _ = _masked(s, alibi_slopes, causal, left, right)
    # A row that sees nothing has lse = -inf; +inf in its place makes its probabilities 0, not NaN.
    safe = lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1)
    p = s.to(lse.dtype).sub_(safe).exp_()
    grad = dout.transpose(1, 2)
    ds = (grad @ per_head(v, h).transpose(-1, -2)).to(lse.dtype)
    ds = ds.sub_(delta.unsqueeze(-1)).mul_(p)
    if slope is not None:
        ds = ds.mul_(slope)
    ds = ds.to(q.dtype)
    dq = ds @ per_head(k, h) * scale
    dk = ds.transpose(-1, -2) @ (q * scale).transpose(1, 2)
    dv = p.to(v.dtype).transpose(-1, -2) @ grad

    def of_group(d):  # (B, H, Tk, D) -> (B, Tk, H_kv, D), summed over the group's heads
        return d.unflatten(1, (kv, h // kv)).sum(2).transpose(1, 2)

    return dq.transpose(1, 2), of_group(dk), of_group(dv), dsink


def boundaries(cu_seqlens: Tensor, name: str, total: int) -> list[int]:
    """cu_seqlens as a list; ValueError unless it rises from 0 to the number of rows."""
    at = cu_seqlens.tolist()
    if not at or at[0] != 0 or at[-1] != total or any(a > b for a, b in pairwise(at)):
        raise ValueError(f"{name} must rise from 0 to {total} without falling, got {at[:9]}")
    return at


def per_sequence(
    dense: Callable, q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, take: Callable
) -> list[tuple]:
    """`dense` over each sequence of a packed batch; `take(i, queries, keys)` its arguments."""
    at_q = boundaries(cu_q, "cu_seqlens_q", q.shape[0])
    at_k = boundaries(cu_k, "cu_seqlens_k", k.shape[0])
    pairs = zip(at_q, at_q[1:], at_k, at_k[1:], strict=False)
    return [dense(*take(i, slice(a, b), slice(c, d))) for i, (a, b, c, d) in enumerate(pairs)]


def _slopes_of(alibi_slopes, i):
    per_batch = alibi_slopes is not None and alibi_slopes.dim() == 2
    return alibi_slopes[i : i + 1] if per_batch else alibi_slopes


def varlen(dense: Callable) -> Callable:
    """A dense forward as one that also takes packed sequences, one after the other."""

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, alibi_slopes, sink, *rest):
        if cu_q is None:
            return dense(q, k, v, alibi_slopes, sink, *rest)

        def take(i, queries, keys):
            slopes = _slopes_of(alibi_slopes, i)
            return q[queries][None], k[keys][None], v[keys][None], slopes, sink, *rest

        outs, lses = zip(*per_sequence(dense, q, k, cu_q, cu_k, take), strict=True)
        return torch.cat(outs, 1)[0], torch.cat(lses, 2)[0]

    return forward


def varlen_backward(dense: Callable) -> Callable:
    """The same for a backward."""

    def backward(
        dout, dlse, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, alibi_slopes, sink, *rest
    ):
        if cu_q is None:
            return dense(dout, dlse, q, k, v, out, lse, alibi_slopes, sink, *rest)

        def take(i, queries, keys):
            of_queries = dout[queries][None], None if dlse is None else dlse[:, queries][None]
            of_keys = q[queries][None], k[keys][None], v[keys][None]
            saved = out[queries][None], lse[:, queries][None]
            return *of_queries, *of_keys, *saved, _slopes_of(alibi_slopes, i), sink, *rest

        parts = per_sequence(dense, q, k, cu_q, cu_k, take)
        dq, dk, dv, dsink = zip(*parts, strict=True)
        packed = (torch.cat(d, 1)[0] for d in (dq, dk, dv))
        return *packed, torch.stack(dsink).sum(0)

    return backward


reference = varlen(_dense)
reference_backward = varlen_backward(_dense_backward)

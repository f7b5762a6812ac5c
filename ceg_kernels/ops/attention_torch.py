"""Attention as stock torch offers it: the operators behind scaled_dot_product_attention.

They are called directly because the public function returns no log-sum-exp, which the backward and
`return_lse` need. On CPU that is the flash kernel of ATen, with a bias for what it has no flag
for; on CUDA the FlashAttention-2 that torch ships, whose layout and mask alignment are ours.
"""

from __future__ import annotations

import torch

from ceg_kernels import native
from ceg_kernels.ops.attention_reference import (
    alibi_bias,
    per_head,
    reference,
    reference_backward,
    varlen,
    varlen_backward,
    visible,
)

aten = torch.ops.aten


def _bias(q, k, alibi_slopes, causal, left, right):
    """(is_causal, attn_mask, blind rows): the flag where it means the same, else a float bias."""
    b, tq, tk = q.shape[0], q.shape[1], k.shape[1]
    if alibi_slopes is None and left < 0 and (causal or right < 0) and (tq == tk or not causal):
        return causal, None, None
    wide = native.math_dtype(q.dtype)  # ATen adds an fp32 bias to half-precision scores in fp32
    bias = torch.zeros(tq, tk, dtype=wide, device=q.device)
    if alibi_slopes is not None:
        bias = alibi_bias(alibi_slopes.to(wide), b, tq, tk)
    mask = visible(tq, tk, causal, left, right, q.device)
    if mask is None:
        return False, bias, None
    return False, bias.masked_fill(~mask, -torch.inf), ~mask.any(-1)


def _dense(q, k, v, alibi_slopes, sink, scale, causal, left, right, softcap):
    if q.numel() == 0 or k.numel() == 0:
        args = alibi_slopes, sink, scale, causal, left, right, softcap
        return reference(q, k, v, None, None, 0, 0, *args)
    is_causal, bias, blind = _bias(q, k, alibi_slopes, causal, left, right)
    q, k, v = map(native.unit_stride, (q, k, v))  # ATen's kernel reads wrong numbers otherwise
    h = q.shape[2]
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), per_head(k, h), per_head(v, h), 0.0, is_causal, attn_mask=bias,
        scale=scale,
    )  # fmt: skip
    if blind is not None:
        lse = lse.masked_fill(blind, -torch.inf)
    return _with_sink(out.transpose(1, 2), lse, sink)


def _with_sink(out, lse, sink):
    """One more logit in the denominator scales the row by exp(lse - lse')."""
    if sink is None:
        return out, lse
    both = torch.logaddexp(lse, sink.to(lse.dtype)[:, None])
    factor = torch.exp(lse - both).transpose(-1, -2).unsqueeze(-1)
    return (out.to(lse.dtype) * factor).to(out.dtype), both


def _sink_gradient(dout, out, lse, sink):
    if sink is None:
        return lse.new_zeros(0)
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(-1, -2)
    weighted = torch.exp(sink.to(lse.dtype)[:, None] - lse) * delta  # (..., H, T)
    return -weighted.sum(-1).reshape(-1, sink.shape[0]).sum(0)


def _dense_backward(
    dout, dlse, q, k, v, out, lse, alibi_slopes, sink, scale, causal, left, right, softcap
):
    rest = alibi_slopes, sink, scale, causal, left, right, softcap
    if dlse is not None or q.numel() == 0 or k.numel() == 0:
        # ATen's backward has no input for the gradient of the log-sum-exp.
        return reference_backward(dout, dlse, q, k, v, out, lse, None, None, 0, 0, *rest)
    kv, h = k.shape[2], q.shape[2]
    dout, q, k, v, out = map(native.unit_stride, (dout, q, k, v, out))
    is_causal, bias, _ = _bias(q, k, alibi_slopes, causal, left, right)
    finite = lse.masked_fill(lse == -torch.inf, 0)  # ATen's own value for rows that see nothing
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout.transpose(1, 2), q.transpose(1, 2), per_head(k, h), per_head(v, h),
        out.transpose(1, 2), finite, 0.0, is_causal, attn_mask=bias, scale=scale,
    )  # fmt: skip

    def of_group(d):
        return d.unflatten(1, (kv, h // kv)).sum(2).transpose(1, 2)

    grads = dq.transpose(1, 2), of_group(dk), of_group(dv)
    return *grads, _sink_gradient(dout, out, lse, sink)


_cpu, _cpu_backward = varlen(_dense), varlen_backward(_dense_backward)


def run(q, k, v, cu_q, cu_k, max_q, max_k, alibi_slopes, sink, scale, causal, left, right, softcap):
    tail = alibi_slopes, sink, scale, causal, left, right, softcap
    if q.device.type == "cpu":
        return _cpu(q, k, v, cu_q, cu_k, max_q, max_k, *tail)
    if q.numel() == 0 or k.numel() == 0:
        return reference(q, k, v, cu_q, cu_k, max_q, max_k, *tail)
    q, k, v = map(native.unit_stride, (q, k, v))
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale,
        window_size_left=_side(left), window_size_right=0 if causal else _side(right),
    )  # fmt: skip
    if _may_be_blind(q, k, cu_q):
        lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    return _with_sink(out, lse, sink)


def run_backward(
    dout, dlse, q, k, v, out, lse, cu_q, cu_k, max_q, max_k,
    alibi_slopes, sink, scale, causal, left, right, softcap,
):  # fmt: skip
    tail = alibi_slopes, sink, scale, causal, left, right, softcap
    if q.device.type == "cpu":
        return _cpu_backward(dout, dlse, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, *tail)
    if dlse is not None or q.numel() == 0 or k.numel() == 0:
        return reference_backward(dout, dlse, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, *tail)
    dout, q, k, v, out = map(native.unit_stride, (dout, q, k, v, out))
    theirs = lse.masked_fill(lse == -torch.inf, torch.inf) if _may_be_blind(q, k, cu_q) else lse
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = aten._flash_attention_backward(
        dout, q, k, v, out, theirs, cu_q, cu_k, max_q, max_k, 0.0, causal, no_dropout,
        torch.zeros((), dtype=torch.uint64, device=q.device), scale=scale,
        window_size_left=_side(left), window_size_right=0 if causal else _side(right),
    )  # fmt: skip
    return dq, dk, dv, _sink_gradient(dout, out, lse, sink)


def _may_be_blind(q, k, cu_q) -> bool:
    """Whether a row may see nothing, whose lse is +inf in FlashAttention-2: exp(x - lse) is 0 then.

    With as many keys as queries each sees at least its own; stock torch is not to pay for it there.
    """
    return cu_q is not None or q.shape[1] > k.shape[1]


def _side(size: int) -> int | None:
    return None if size < 0 else size


def why_not(q, k, v, cu_q, cu_k, max_q, max_k, alibi_slopes, sink, scale, causal, left, right, cap):
    """Why stock torch refuses these arguments."""
    if cap != 0:
        return "scaled_dot_product_attention has no softcap"
    if q.shape[-1] != v.shape[-1]:
        return f"needs equal head_dim of q and v, got {q.shape[-1]} and {v.shape[-1]}"
    if q.device.type == "cpu":
        return None
    if q.device.type != "cuda":
        return f"needs tensors on cpu or cuda, got {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention on cuda needs fp16 or bf16, got {q.dtype}"
    if alibi_slopes is not None:
        return "torch's FlashAttention backward takes no alibi_slopes"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"FlashAttention needs head_dim <= 256 and a multiple of 8, got {q.shape[-1]}"
    return None

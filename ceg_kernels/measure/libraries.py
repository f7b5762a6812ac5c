"""Peers that are other people's kernels: Liger, flash-attn, and SDPA with one kernel forced.

Imported when asked for, never required. All need a GPU: Triton's interpreter can run Liger without
one, but its time would say nothing. Called as their documentation has it, with nothing on the
clock that their users would do once a model and not once a layer.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# peer: (package, module that must import, what it must have); None where torch itself has it
MODULES: dict[str, tuple[str, str, tuple[str, ...]] | None] = {
    "liger": (
        "liger-kernel", "liger_kernel.transformers.functional",
        ("liger_rms_norm", "liger_fused_add_rms_norm", "liger_rope"),
    ),
    "flash-attn": ("flash-attn", "flash_attn", ("flash_attn_func",)),
    "cudnn": None,
    "flash": None,
}  # fmt: skip
HALF = (torch.float16, torch.bfloat16)


def absent(peer: str, device: str) -> str | None:
    """Why a peer of `MODULES` can run nothing on this device, or None."""
    wanted, kind = MODULES[peer], torch.device(device).type
    reasons = [] if wanted is None else [_missing(*wanted)]
    reasons.append(None if kind == "cuda" else f"needs a GPU, got {kind}")
    return ", ".join(filter(None, reasons)) or None


def _missing(package: str, module: str, names: tuple[str, ...]) -> str | None:
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"{package} is not installed"
    try:
        found = importlib.import_module(module)
    except ImportError as error:  # built for another torch, say
        return f"{package} does not import: {str(error).partition(chr(10))[0]}"
    lacking = [name for name in names if not hasattr(found, name)]
    return f"{package} has no {', '.join(lacking)}" if lacking else None


def _function(peer: str, name: str) -> Callable[..., Any]:
    wanted = MODULES[peer]
    assert wanted is not None
    return getattr(importlib.import_module(wanted[1]), name)


def _dtype(tensor: torch.Tensor, allowed: tuple[torch.dtype, ...]) -> str | None:
    if tensor.dtype in allowed:
        return None
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    return f"needs {names}, got {str(tensor.dtype).removeprefix('torch.')}"


def liger_rms_norm(x, weight, residual, eps, weight_offset):
    """Rounds x * rstd before the weight, as Llama does. Returns y, or (y, x + residual)."""
    # Not in place: that would write dx over the upstream gradient, which every round needs again.
    tail = weight, eps, weight_offset, "llama", False
    if residual is None:
        return _function("liger", "liger_rms_norm")(x, *tail)
    return _function("liger", "liger_fused_add_rms_norm")(x, residual, *tail)


def liger_rms_norm_why_not(x, weight, residual, eps, weight_offset):
    if weight is None and residual is not None:
        return "Liger's RMSNorm with a residual needs a weight"
    return _dtype(x, (torch.float32, *HALF))


def liger_rope(q, k, cos, sin, positions, interleaved, inverse):
    """In place, on what `liger_rope_prepare` made. Returns (q, k)."""
    q, k = _function("liger", "liger_rope")(q, k, cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def liger_rope_prepare(q, k, cos, sin, positions, interleaved, inverse):
    """Copies for Liger to write over, (B, H, T, D) in memory as (B, T, H, D): it copies all others.

    Models make the tables of width D once, in the dtype of q.
    """
    heads_first = (t.clone(memory_format=torch.contiguous_format).transpose(1, 2) for t in (q, k))
    rows = (t[: q.shape[1]] for t in (cos, sin))
    tables = (torch.cat((t, t), -1).to(q.dtype).unsqueeze(0) for t in rows)
    return *heads_first, *tables, positions, interleaved, inverse


def liger_rope_why_not(q, k, cos, sin, positions, interleaved, inverse):
    if positions is not None or interleaved or inverse or 2 * cos.shape[1] != q.shape[-1]:
        return "Liger's RoPE rotates whole heads by halves, at positions 0..T-1"
    return _dtype(q, (torch.float32, *HALF))


def flash_attn(
    q, k, v, cu_q, cu_k, max_q, max_k, slopes, sink, scale, causal, left, right, softcap
):
    """Its layout, heads and alignment of the causal mask are ours."""
    return _function("flash-attn", "flash_attn_func")(q, k, v, softmax_scale=scale, causal=causal)


def flash_attn_why_not(
    q, k, v, cu_q, cu_k, max_q, max_k, slopes, sink, scale, causal, left, right, softcap
):
    if (reason := _plain((q, k, v), cu_q, slopes, sink, left, right, softcap)) is not None:
        return reason
    return _dtype(q, HALF)


def sdpa(
    kernel, q, k, v, cu_q, cu_k, max_q, max_k, slopes, sink, scale, causal, left, right, softcap
):
    """Raises RuntimeError where the kernel refuses. Returns out, (B, Tq, H, Dv) contiguous."""
    gqa = q.shape[2] != k.shape[2]
    causal = causal and q.shape[1] > 1
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(kernel):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=gqa
        )
    return out.transpose(1, 2).contiguous()


def sdpa_why_not(
    q, k, v, cu_q, cu_k, max_q, max_k, slopes, sink, scale, causal, left, right, softcap
):
    if (reason := _plain((q, k, v), cu_q, slopes, sink, left, right, softcap)) is not None:
        return reason
    if causal and q.shape[1] not in (1, k.shape[1]):
        return "SDPA aligns a causal mask to the first key: needs Tq = Tk, or one query"
    return _dtype(q, HALF)


def _plain(qkv, cu_q, slopes, sink, left, right, softcap):
    if cu_q is not None or slopes is not None or sink is not None or softcap != 0:
        return "called without cu_seqlens, ALiBi, sink or softcap"
    if left >= 0 or right >= 0:
        return "called without a window"
    if qkv[0].shape[-1] != qkv[2].shape[-1] or qkv[0].shape[-1] > 256:
        return f"needs one head_dim <= 256, got {qkv[0].shape[-1]} and {qkv[2].shape[-1]}"
    if any(t.stride(-1) != 1 or t.numel() == 0 for t in qkv):
        return "needs q, k and v that are not empty, with stride 1 in head_dim"
    return None


# (op, peer): (formula, why it refuses arguments, what it makes of them before the clock starts)
FORMULAS: dict[tuple[str, str], tuple[Callable, Callable, Callable | None]] = {
    ("rms_norm", "liger"): (liger_rms_norm, liger_rms_norm_why_not, None),
    ("rope", "liger"): (liger_rope, liger_rope_why_not, liger_rope_prepare),
    ("attention", "flash-attn"): (flash_attn, flash_attn_why_not, None),
    ("attention", "cudnn"): (
        functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION), sdpa_why_not, None,
    ),
    ("attention", "flash"): (
        functools.partial(sdpa, SDPBackend.FLASH_ATTENTION), sdpa_why_not, None,
    ),
}  # fmt: skip

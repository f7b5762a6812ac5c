"""Drop-in modules over the public ops, with the state-dict keys of the modules that they replace.

RMSNorm: `weight`, as torch's and Hugging Face's. RotaryEmbedding, FlashAttention: no keys.
MoE: Mixtral's `gate.weight, experts.gate_up_proj, experts.down_proj`, DeepSeek-V3's
`gate.e_score_correction_bias` and `shared_experts.{gate,up,down}_proj.weight` where there are any.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from ceg_kernels import (
    flash_attention,
    moe_combine,
    moe_dispatch,
    moe_route,
    rms_norm,
    rope,
    rope_table,
)


class RMSNorm(nn.Module):
    """y = x / rms(x) * (weight_offset + weight) over the last dimension; x: (..., dim).

    weight_offset=1.0 is Gemma's form. With `residual`, returns (norm of x + residual, x +
    residual).
    """

    def __init__(self, dim: int, eps: float = 1e-6, *, weight_offset: float = 0.0) -> None:
        super().__init__()
        self.eps = eps
        self.weight_offset = weight_offset
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - weight_offset))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return rms_norm(
            x, self.weight, self.eps, residual=residual, weight_offset=self.weight_offset
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, weight_offset={self.weight_offset}"


class RotaryEmbedding(nn.Module):
    """Turns the first `dim` of each head of q and k by their positions; q: (B, T, H, D)."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self, dim: int, max_seq_len: int, *, base: float = 10000.0, interleaved: bool = False
    ) -> None:
        super().__init__()
        self.dim = dim
        self.max_seq_len = max_seq_len
        self.base = base
        self.interleaved = interleaved
        cos, sin = rope_table(max_seq_len, dim, base=base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor | None = None):
        """Positions default to 0 .. T - 1. Returns (q, k)."""
        if positions is None and max(q.shape[1], k.shape[1]) > self.max_seq_len:
            raise ValueError(
                f"q and k must have at most max_seq_len = {self.max_seq_len} positions,"
                f" got {q.shape[1]} and {k.shape[1]}"
            )
        if positions is not None:
            return rope(q, k, self.cos, self.sin, positions=positions, interleaved=self.interleaved)
        seq_len = q.shape[1]
        return rope(q, k, self.cos[:seq_len], self.sin[:seq_len], interleaved=self.interleaved)

    def _apply(self, fn, recurse: bool = True):
        # Made anew: model.bfloat16() would round the angles, to_empty() would leave them unwritten.
        super()._apply(fn, recurse)
        device = self.cos.device
        self.cos, self.sin = rope_table(self.max_seq_len, self.dim, base=self.base, device=device)
        return self

    def extra_repr(self) -> str:
        return f"{self.dim}, max_seq_len={self.max_seq_len}, base={self.base}"


class FlashAttention(nn.Module):
    """softmax(q k^T) v as a module: q (B, Tq, H, D), k and v (B, Tk, H_kv, D) -> (B, Tq, H, D)."""

    def __init__(
        self,
        *,
        causal: bool = False,
        softmax_scale: float | None = None,
        window: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.window = window
        self.softcap = softcap

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attention(
            q,
            k,
            v,
            causal=self.causal,
            softmax_scale=self.softmax_scale,
            window=self.window,
            softcap=self.softcap,
        )
        return cast(Tensor, out)

    def extra_repr(self) -> str:
        return f"causal={self.causal}, window={self.window}, softcap={self.softcap}"


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), Llama's MLP and DeepSeek's shared expert; x: (..., dim)."""

    def __init__(self, dim: int, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, width, bias=bias)
        self.up_proj = nn.Linear(dim, width, bias=bias)
        self.down_proj = nn.Linear(width, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MLP(nn.Module):
    """down(gelu(up(x))) with GPT-2's tanh form of gelu; x: (..., dim)."""

    def __init__(self, dim: int, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.up_proj = nn.Linear(dim, width, bias=bias)
        self.down_proj = nn.Linear(width, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class MoE(nn.Module):
    """Mixture of experts: each token goes to `top_k` of `num_experts` MLPs; x: (..., dim) -> same.

    gated=True: SwiGLU experts (Mixtral), else GELU ones. score and renormalize: as `moe_route`.
    balance_bias=True adds DeepSeek-V3's bias, which moves the choice of experts but not their
    weights; `update_bias` moves it. shared_width > 0 adds an expert that sees every token.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        num_experts: int,
        top_k: int,
        *,
        gated: bool = True,
        score: str = "softmax",
        renormalize: bool = True,
        balance_bias: bool = False,
        shared_width: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be in [1, num_experts = {num_experts}], got {top_k}")
        self.top_k = top_k
        self.score = score
        self.renormalize = renormalize
        self.gate = Router(dim, num_experts, balance_bias=balance_bias)
        self.experts = Experts(dim, width, num_experts, gated=gated)
        shared = GatedMLP if gated else MLP
        self.shared_experts = shared(dim, shared_width) if shared_width else None

    def forward(self, x: Tensor, *, return_aux: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """`return_aux=True` also returns Switch's load-balancing loss (1 when balanced)."""
        tokens = x.reshape(-1, x.shape[-1])
        logits = self.gate(tokens)
        routing = moe_route(
            logits,
            self.top_k,
            score=self.score,
            bias=self.gate.bias(),
            renormalize=self.renormalize,
        )
        if self.training:
            self.gate.count(routing.tokens_per_expert)
        rows, plan = moe_dispatch(tokens, routing)
        y = moe_combine(self.experts(rows, plan.offsets), plan, routing.weights).reshape(x.shape)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        if not return_aux:
            return y
        share = routing.tokens_per_expert.float() / max(1, tokens.shape[0] * self.top_k)
        return y, logits.shape[-1] * (share * logits.softmax(-1).mean(0)).sum()

    @torch.no_grad()
    def update_bias(self, rate: float) -> None:
        """After an optimizer step: overloaded experts lose `rate` of bias, the others gain it."""
        self.gate.update_bias(rate)


class Router(nn.Module):
    """tokens (N, D) -> logits (N, E), in fp32: a rounded logit is another choice of experts."""

    e_score_correction_bias: Tensor | None
    tokens_seen: Tensor

    def __init__(self, dim: int, num_experts: int, *, balance_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, dim) * dim**-0.5)
        bias = torch.zeros(num_experts) if balance_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        if balance_bias:
            seen = torch.zeros(num_experts, dtype=torch.int64)
            self.register_buffer("tokens_seen", seen, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens.float(), self.weight.float())

    def bias(self) -> Tensor | None:
        bias = self.e_score_correction_bias
        return None if bias is None else bias.float()

    def count(self, tokens_per_expert: Tensor) -> None:
        if self.e_score_correction_bias is not None:
            self.tokens_seen += tokens_per_expert

    def update_bias(self, rate: float) -> None:
        if self.e_score_correction_bias is None:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.tokens_seen)  # or the ranks' biases drift apart
        seen = self.tokens_seen.float()
        self.e_score_correction_bias += rate * torch.sign(seen.mean() - seen)
        self.tokens_seen.zero_()


class Experts(nn.Module):
    """rows (M, D) sorted by expert, offsets (E + 1,) -> (M, D). Stacked weights: (E, out, in)."""

    def __init__(self, dim: int, width: int, num_experts: int, *, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        first = torch.randn(num_experts, 2 * width if gated else width, dim) * dim**-0.5
        if gated:
            self.gate_up_proj = nn.Parameter(first)
        else:
            self.up_proj = nn.Parameter(first)
        self.down_proj = nn.Parameter(torch.randn(num_experts, dim, width) * width**-0.5)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        if not self.gated:
            hidden = F.gelu(grouped_linear(rows, self.up_proj, offsets), approximate="tanh")
        else:
            gate, up = grouped_linear(rows, self.gate_up_proj, offsets).chunk(2, dim=-1)
            hidden = F.silu(gate) * up
        return grouped_linear(hidden, self.down_proj, offsets)


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """rows[offsets[e]:offsets[e + 1]] @ weight[e].T for each expert e.

    rows: (M, in) sorted by expert; weight: (E, out, in); offsets: (E + 1,) int32, from 0 to M
    -> (M, out). Differentiable in rows and weight. On a GPU nothing waits for the device.
    """
    device = rows.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rows, weight = rows.to(dtype), weight.to(dtype)
    return _grouped_linear(rows, weight, offsets)


# Ops, so that they compile (sizes known at run time only would break the graph) and count: torch
# 2.13 has no FLOP formula for grouped_mm and no fake for it but in bf16. On a CPU a loop: there its
# fp32 grouped_mm takes more than twice the time of one.
@torch.library.custom_op("ceg_nn::grouped_linear", mutates_args=())
def _grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    if rows.is_cuda:
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets[1:])
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    for w, (start, end) in zip(weight, pairwise(offsets.tolist()), strict=True):
        torch.mm(rows[start:end], w.t(), out=out[start:end])
    return out


@torch.library.custom_op("ceg_nn::grouped_outer", mutates_args=())
def _grouped_outer(dout: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """dout[group].T @ rows[group] for each expert's group of rows: (E, out, in)."""
    if rows.is_cuda:
        return F.grouped_mm(dout.t(), rows, offs=offsets[1:])
    dweight = rows.new_empty(offsets.shape[0] - 1, dout.shape[1], rows.shape[1])
    for dw, (start, end) in zip(dweight, pairwise(offsets.tolist()), strict=True):
        torch.mm(dout[start:end].t(), rows[start:end], out=dw)
    return dweight


@_grouped_linear.register_fake
def _(rows, weight, offsets):
    return rows.new_empty(rows.shape[0], weight.shape[1])


@_grouped_outer.register_fake
def _(dout, rows, offsets):
    return rows.new_empty(offsets.shape[0] - 1, dout.shape[1], rows.shape[1])


def _grouped_save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_backward(ctx, dout):
    rows, weight, offsets = ctx.saved_tensors
    dout = dout.contiguous()  # grouped_mm fails on an expanded gradient
    drows = dweight = None
    if ctx.needs_input_grad[0]:
        drows = _grouped_linear(dout, weight.transpose(1, 2), offsets)
    if ctx.needs_input_grad[1]:
        dweight = _grouped_outer(dout, rows, offsets)
    return drows, dweight, None


_grouped_linear.register_autograd(_grouped_backward, setup_context=_grouped_save)


@register_flop_formula([torch.ops.ceg_nn.grouped_linear, torch.ops.ceg_nn.grouped_outer])
def _grouped_flops(a, b, offsets, *, out_shape=None) -> int:
    """Each of the M rows meets one expert: 2 M in out, forward and for either gradient."""
    return 2 * a[0] * a[1] * b[1]

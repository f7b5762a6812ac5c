"""Model FLOPs, parameter counts and MFU.

A *model FLOP* is arithmetic that the model's maths requires. `model_flops` adds up the costs that
the ops of ceg_kernels declare and 2 m n k for every matmul of an (m, k) by a (k, n) matrix;
backward, each matmul costs twice its forward (a gradient for either factor). It equals what
torch's FlopCounterMode counts over a training step, to the last digit. Not
counted, as there: embeddings, residual sums, biases, LayerNorm, activations, an LSTM's gates,
softmax and loss of the head, the balancing loss, sparse attention's gating and importances, the
optimizer. Recomputation and padding are executed FLOPs, never model FLOPs; so are the masked pairs
of native sparse attention, which the counter does see: it shows `masked_flops` more.

How it differs from the usual formulas, a token:

    6 N               every parameter once a token: no attention, but norms as if multiplied
    6 N + 12 L H Q T  PaLM (Chowdhery et al. 2022, appendix B): attention over all T x T pairs,
                      though half are masked; N without learned positions, with the norms
    here              the pairs that the mask leaves, T (T + 1) / 2, fewer with a window; what
                      RoPE, RMSNorm, routing and dispatch declare; the experts that a token visits

`causal=False` counts every pair, for comparison with PaLM's formula and with published MFUs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ceg_kernels import OPS
from ceg_model.config import GPTConfig
from ceg_model.sparse_attention import (
    compressed_blocks,
    compressed_pairs,
    computed_pairs,
    selected_pairs,
)


@dataclass(frozen=True)
class ModelFlops:
    forward: int
    backward: int
    tokens: int

    @property
    def total(self) -> int:
        return self.forward + self.backward

    @property
    def per_token(self) -> float:
        return self.total / self.tokens


@functools.lru_cache(maxsize=1024)  # a study asks for each of its runs, of which few differ
def model_flops(
    config: GPTConfig, seq_len: int | None = None, batch: int = 1, *, causal: bool = True
) -> ModelFlops:
    """Model FLOPs of one forward and backward pass over `batch` sequences of `seq_len` tokens.

    ValueError for causal=False with native sparse attention, which has no form without a mask.
    """
    seq_len = config.seq_len if seq_len is None else seq_len
    if not 1 <= seq_len <= config.seq_len or batch < 1:
        raise ValueError(
            f"seq_len must be in [1, {config.seq_len}] and batch at least 1,"
            f" got {seq_len} and {batch}"
        )
    if not causal and config.attention == "native_sparse":
        raise ValueError("causal must be True with attention 'native_sparse', got False")
    count = _Count()
    if config.arch == "lstm":
        _count_lstm(count, config, batch, seq_len)
    else:
        for _ in range(config.n_layer):
            _count_attention(count, config, batch, seq_len, causal)
            _count_mlp(count, config, batch * seq_len)
    _count_norm(count, config, config.norm_at_end, batch * seq_len)
    count.matmul(batch * seq_len, config.vocab_size, config.d_model)
    return ModelFlops(count.forward, count.backward, batch * seq_len)


def masked_flops(config: GPTConfig, seq_len: int, batch: int = 1) -> int:
    """Executed FLOPs of a pass that native sparse attention's masks throw away; 0 without it."""
    if config.attention != "native_sparse":
        return 0
    needed = compressed_pairs(config, seq_len) + selected_pairs(config, seq_len)
    wasted = computed_pairs(config, seq_len) - needed
    return 3 * 4 * config.head_dim * config.n_head * config.n_layer * batch * wasted


class _Count:
    def __init__(self) -> None:
        self.forward = 0
        self.backward = 0

    def matmul(self, m: int, n: int, k: int) -> None:
        self.forward += 2 * m * n * k
        self.backward += 4 * m * n * k

    def op(self, name: str, args: Sequence[Any], backward: str, backward_args: Sequence[Any]):
        self.forward += OPS[name].cost(*args).flops
        self.backward += OPS[backward].cost(*backward_args).flops


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype)


def _count_attention(
    count: _Count, config: GPTConfig, batch: int, seq_len: int, causal: bool
) -> None:
    tokens, sparse = batch * seq_len, config.attention == "native_sparse"
    branches = 3 if sparse else 1  # each has keys and values of its own
    kv_width = branches * config.kv_heads * config.head_dim
    _count_norm(count, config, config.norm, tokens)
    for width in (config.d_model, kv_width, kv_width, config.d_model):  # q, k, v, o
        count.matmul(tokens, width, config.d_model)
    q = _meta(batch, seq_len, config.n_head, config.head_dim)
    k = _meta(batch, seq_len, config.kv_heads, config.head_dim)
    if config.qk_norm:
        for x in (q, *(k for _ in range(branches))):
            _count_rms_norm(count, x)
    if config.position == "rope":
        turned = _meta(batch, seq_len, (2 if sparse else 1) * config.kv_heads, config.head_dim)
        table = _meta(seq_len, config.head_dim // 2)
        turn = (q, turned, table, table, None, False)
        count.op("rope", (*turn, False), "rope", (*turn, True))
    if sparse:
        _count_far_branches(count, config, batch, seq_len)
    window = config.sparse_window if sparse else config.window
    left, right = (-1, -1) if window is None or not causal else (window - 1, 0)
    lse = _meta(batch, config.n_head, seq_len)
    scale = config.head_dim**-0.5
    rest = (None, None, seq_len, seq_len, None, None, scale, causal, left, right, 0.0)
    count.op("attention", (q, k, k, *rest), "attention_backward", (q, None, q, k, k, q, lse, *rest))


def _count_far_branches(count: _Count, config: GPTConfig, batch: int, seq_len: int) -> None:
    """The gates, the compressing MLPs, and the pairs of the compressed and selected branches."""
    size = config.head_dim
    count.matmul(batch * seq_len, 3 * config.n_head, config.d_model)
    blocks = batch * config.kv_heads * compressed_blocks(config, seq_len)
    for _ in ("k", "v"):
        count.matmul(blocks, size, config.compress_block * size)
        count.matmul(blocks, size, size)
    pairs = compressed_pairs(config, seq_len) + selected_pairs(config, seq_len)
    for _ in ("scores", "output"):
        count.matmul(batch * config.n_head * pairs, 1, size)


def _count_mlp(count: _Count, config: GPTConfig, tokens: int) -> None:
    _count_norm(count, config, config.norm, tokens)
    if config.mlp != "moe":
        _count_dense(count, config, config.mlp, tokens)
        return
    experts, top_k = config.num_experts, config.top_k
    count.matmul(tokens, experts, config.d_model)
    logits, weights = _meta(tokens, experts), _meta(tokens, top_k)
    slots = _meta(tokens, top_k, dtype=torch.int32)
    sources = _meta(tokens * top_k, dtype=torch.int32)
    x, rows = _meta(tokens, config.d_model), _meta(tokens * top_k, config.d_model)
    how = (config.router_score, config.renormalize)
    bias = _meta(experts) if config.balance == "bias" else None
    count.op(
        "moe_route",
        (logits, bias, top_k, *how),
        "moe_route_backward",
        (weights, logits, slots, *how),
    )
    count.op("moe_dispatch", (x, sources, top_k), "moe_combine", (rows, slots, sources, None))
    _count_dense(count, config, config.expert, tokens * top_k)
    count.op(
        "moe_combine", (rows, slots, sources, weights),
        "moe_combine_backward", (x, rows, slots, sources, weights),
    )  # fmt: skip
    if config.shared_expert:
        _count_dense(count, config, config.expert, tokens)


def _count_dense(count: _Count, config: GPTConfig, kind: str, rows: int) -> None:
    for _ in range(3 if kind == "swiglu" else 2):
        count.matmul(rows, config.ff_width, config.d_model)


def _count_lstm(count: _Count, config: GPTConfig, batch: int, seq_len: int) -> None:
    for _ in range(config.n_layer):
        _count_norm(count, config, config.norm, batch * seq_len)
        count.matmul(batch * seq_len, 4 * config.d_model, config.d_model)
        # The first step's state is zero: nothing to multiply.
        count.matmul(batch * (seq_len - 1), 4 * config.d_model, config.d_model)


def _count_norm(count: _Count, config: GPTConfig, kind: str, tokens: int) -> None:
    if kind == "rms_norm":
        _count_rms_norm(count, _meta(tokens, config.d_model))


def _count_rms_norm(count: _Count, x: Tensor) -> None:
    weight, rstd = _meta(x.shape[-1]), _meta(*x.shape[:-1])
    count.op(
        "rms_norm", (x, weight, None, 1e-6, 0.0),
        "rms_norm_backward", (x, None, x, weight, rstd, 0.0),
    )  # fmt: skip


def params_count(config: GPTConfig, *, positions: bool = True, active: bool = False) -> int:
    """Parameters of the model; without learned positions, as in 6 N; or those that a token uses."""
    d, width = config.d_model, config.ff_width
    total = config.vocab_size * d * (1 if config.tied_head else 2)
    total += _norm_params(config, config.norm_at_end)
    if config.arch == "lstm":
        return total + config.n_layer * (8 * d * d + 4 * d + _norm_params(config, config.norm))
    if positions and config.position == "learned":
        total += config.seq_len * d
    kv_width = config.kv_heads * config.head_dim
    attention = 2 * d * d + 2 * d * kv_width + (2 * config.head_dim if config.qk_norm else 0)
    if config.attention == "native_sparse":
        size = config.head_dim
        attention += 4 * d * kv_width + 3 * config.n_head * (d + 1)
        attention += 2 * ((config.compress_block + 1) * size**2 + 2 * size)
    kind = config.expert if config.mlp == "moe" else config.mlp
    mlp = (3 if kind == "swiglu" else 2) * d * width
    branches = 3 if config.attention == "native_sparse" else 1
    biases = 2 * d + 2 * branches * kv_width + d + width * (2 if kind == "swiglu" else 1)
    if config.mlp == "moe":
        experts = config.top_k if active else config.num_experts
        mlp = mlp * (experts + config.shared_expert) + config.num_experts * d
    block = attention + mlp + 2 * _norm_params(config, config.norm)
    return total + config.n_layer * (block + (biases if config.bias else 0))


def _norm_params(config: GPTConfig, kind: str) -> int:
    if kind == "none":
        return 0
    return config.d_model * (2 if kind == "layer_norm" and config.bias else 1)

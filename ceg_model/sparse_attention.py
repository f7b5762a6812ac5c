"""Native sparse attention (NSA; Yuan et al. 2025, arXiv 2502.11089), causal, in plain torch.

Each query attends three times, and learned gates in (0, 1), one a head and branch, add it up:

    compressed  keys and values that an MLP makes of `compress_block` tokens, one every
                `compress_stride`; a query sees the blocks that have ended, itself included
    selected    the tokens up to the query in the `select_count` most important blocks of
                `select_block`; the first block and the last two are always among them
    window      the last `sparse_window` tokens

A block's importance is the probability that the compressed branch gives to it: every compressed
block passes its own on to each stride of tokens that it covers, and a block of the selection adds
up its strides and the query heads of one KV group, which select together. (Equation 9 of the paper
does this for l' = a d and l = b d, and its index, read from 0, points one block too far back.)

As in the paper: keys and values of their own for each branch, one query for all; sigmoid gates;
no gradient through the choice, so that the compressing MLPs learn from their branch alone. Chosen
where the paper is silent: an MLP has one hidden layer, of the head's width, and is shared by the
heads of a layer; its position embedding inside a block would pass through the first matmul as a
constant, which is that matmul's bias; the gates are one linear layer; RoPE turns the selected and
the window branch only, because a compressed key has no one position. Left out: the paper's kernels.
The first two branches compute whole matrices and mask them; ceg_model.flops counts what the masks
leave, and `masked_flops` there the rest.

B, T: batch, positions; H, H_kv: heads of queries, of keys and values; G = H / H_kv; D: head size;
N, S: compressed blocks, blocks to select.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ceg_kernels import flash_attention
from ceg_kernels.nn import RMSNorm
from ceg_model.config import GPTConfig

LOCAL_BLOCKS = 2  # the current one and the one before it; beside them, the first


def compressed_blocks(config: GPTConfig, seq_len: int) -> int:
    """How many compressed blocks end within `seq_len` tokens."""
    return max(0, (seq_len - config.compress_block) // config.compress_stride + 1)


def compressed_pairs(config: GPTConfig, seq_len: int) -> int:
    """(query, compressed key) pairs that a sequence sees, a head."""
    return sum(compressed_blocks(config, t + 1) for t in range(seq_len))


def selected_pairs(config: GPTConfig, seq_len: int) -> int:
    """(query, key) pairs of the selected branch, a head: data decides which, but not how many."""
    size, pairs = config.select_block, 0
    for t in range(seq_len):
        blocks = min(config.select_count, t // size + 1)
        pairs += (blocks - 1) * size + t % size + 1  # all but the current block are whole
    return pairs


def computed_pairs(config: GPTConfig, seq_len: int) -> int:
    """Pairs of these two branches that this file computes, masked or not, a head."""
    queries = max(0, seq_len - config.compress_block + 1)
    return queries * compressed_blocks(config, seq_len) + seq_len**2


class NativeSparseAttention(nn.Module):
    """x: (B, T, d) -> (B, T, d); the place of full attention in a block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        width = 3 * config.kv_heads * config.head_dim  # compressed, selected, window
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.k_proj = nn.Linear(config.d_model, width, bias=config.bias)
        self.v_proj = nn.Linear(config.d_model, width, bias=config.bias)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        # Without a bias a gate could only ever open for some inputs by closing for others.
        self.gate_proj = nn.Linear(config.d_model, 3 * config.n_head)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.compress_k = Compressor(config)
        self.compress_v = Compressor(config)

    def forward(self, x: Tensor, rotary: nn.Module | None) -> Tensor:
        heads, kv_heads = (-1, self.config.head_dim), self.config.kv_heads
        q = self.q_norm(self.q_proj(x).unflatten(-1, heads))  # (B, T, H, D)
        k = self.k_norm(self.k_proj(x).unflatten(-1, heads))  # (B, T, 3 H_kv, D)
        v_far, v_chosen, v_near = self.v_proj(x).unflatten(-1, heads).chunk(3, dim=2)
        k_far, k = k.split((kv_heads, 2 * kv_heads), dim=2)
        far, importance = self._compressed(q, self.compress_k(k_far), self.compress_v(v_far))
        if rotary is not None:
            q, k = rotary(q, k)
        k_chosen, k_near = k.chunk(2, dim=2)
        chosen, _ = _attend(q, k_chosen, v_chosen, self._selection(importance))
        window = (self.config.sparse_window - 1, 0)
        near = cast(Tensor, flash_attention(q, k_near, v_near, causal=True, window=window))
        gates = self.gate_proj(x).sigmoid().unflatten(-1, (3, -1, 1)).unbind(-3)  # (B, T, H, 1)
        out = gates[0] * far + gates[1] * chosen + gates[2] * near
        return self.o_proj(out.flatten(-2))

    def _compressed(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: (B, N, H_kv, D) -> the branch's output (B, T, H, D), importance (B, H_kv, T, S)."""
        c, seq_len = self.config, q.shape[1]
        blocks = -(-seq_len // c.select_block)
        if k.shape[1] == 0:
            return torch.zeros_like(q), q.new_zeros(q.shape[0], c.kv_heads, seq_len, blocks)
        blind = c.compress_block - 1  # queries before the end of the first block
        ends = blind + c.compress_stride * torch.arange(k.shape[1], device=q.device)
        at = torch.arange(blind, seq_len, device=q.device)
        out, probs = _attend(q[:, blind:], k, v, ends <= at[:, None])
        out = F.pad(out, (0, 0, 0, 0, blind, 0))
        with torch.no_grad():
            group = F.pad(probs.sum(2), (0, 0, blind, 0))  # (B, H_kv, T, N)
            strides = blocks * (c.select_block // c.compress_stride)
            spread = torch.zeros_like(group[..., :1]).expand(*group.shape[:-1], strides)
            for shift in range(c.compress_block // c.compress_stride):
                spread = spread + F.pad(group, (shift, strides - group.shape[-1] - shift))
            return out, spread.unflatten(-1, (blocks, -1)).sum(-1)

    def _selection(self, importance: Tensor) -> Tensor:
        """Which keys each query attends to: (B, H_kv, 1, T, T), from importance (B, H_kv, T, S)."""
        c, (seq_len, blocks) = self.config, importance.shape[-2:]
        at = torch.arange(seq_len, device=importance.device)
        block = torch.arange(blocks, device=importance.device)
        behind = (at // c.select_block)[:, None] - block  # (T, S)
        always = (block == 0) | (behind < LOCAL_BLOCKS)
        rank = importance.masked_fill(always, float("inf")).masked_fill(behind < 0, -1.0)
        # A stable sort, not topk: equal blocks are taken in order, on every device.
        best = rank.sort(dim=-1, descending=True, stable=True).indices[..., : c.select_count]
        chosen = torch.zeros_like(rank, dtype=torch.bool).scatter(-1, best, True)
        keys = chosen.repeat_interleave(c.select_block, dim=-1)[..., :seq_len]
        return (keys & (at <= at[:, None])).unsqueeze(2)


class Compressor(nn.Module):
    """One key (or value) of every `compress_block` tokens: (B, T, H_kv, D) -> (B, N, H_kv, D)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.size, self.stride = config.compress_block, config.compress_stride
        self.merge = nn.Linear(self.size * config.head_dim, config.head_dim)
        self.mix = nn.Linear(config.head_dim, config.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < self.size:
            return x[:, :0]
        blocks = x.unfold(1, self.size, self.stride)  # (B, N, H_kv, D, compress_block)
        return self.mix(F.gelu(self.merge(blocks.flatten(-2))))


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of q (B, Tq, H, D) over k, v (B, N, H_kv, D): (B, Tq, H, D), and p.

    visible: bool, broadcast to p (B, H_kv, G, Tq, N); every query must see a key.
    """
    rows = q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)  # (B, H_kv, G, Tq, D)
    group = rows.shape[2:4]
    scores = rows.flatten(2, 3) @ k.permute(0, 2, 3, 1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * q.shape[-1] ** -0.5
    scores = scores.unflatten(2, group).masked_fill(~visible, float("-inf"))
    probs = scores.softmax(-1)
    out = probs.flatten(2, 3).to(v.dtype) @ v.transpose(1, 2)  # (B, H_kv, G Tq, D)
    return out.unflatten(2, group).permute(0, 3, 1, 2, 4).flatten(2, 3), probs

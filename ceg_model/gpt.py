"""The whole model: a GPT-2 style decoder, and an LSTM language model with the same interface.

Attention, RoPE, RMSNorm and the MoE's routing and dispatch are calls of ceg_kernels' public ops
(which backend runs is chosen outside, by `use_backend`); everything else is plain torch.

    model = build_model(GPTConfig(norm="layer_norm"), seed=0)
    logits, loss = model(idx, targets)      # idx, targets: (B, T) int64; logits: (B, T, V)

Weights are a pure function of (config, seed), each parameter from its own stream named after it:
two arms of a study start with the same values wherever they have a parameter of one name and
shape. B, T: batch, positions; V: vocabulary; d: d_model; H, H_kv: heads of queries, of keys and
values.
"""

from __future__ import annotations

import hashlib
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ceg_kernels import flash_attention
from ceg_kernels.nn import MLP, GatedMLP, MoE, RMSNorm, RotaryEmbedding
from ceg_model.config import GPTConfig
from ceg_model.sparse_attention import NativeSparseAttention


def build_model(config: GPTConfig, seed: int = 0) -> LanguageModel:
    """The model of `config.arch` with the weights of `seed`; the global random state is kept."""
    return (LSTM if config.arch == "lstm" else GPT)(config, seed)


class LanguageModel(nn.Module):
    """What GPT and LSTM share: embedding, head, loss and initialisation."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.final_norm = _norm(config.norm_at_end, config)
        self.head = (
            None if config.tied_head else nn.Linear(config.d_model, config.vocab_size, bias=False)
        )

    def hidden(self, idx: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, T) -> what the head reads, (B, T, d) after the final norm; and auxiliary losses."""
        raise NotImplementedError

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(logits, loss): loss in mean nats a token, fp32, or None without targets.

        In training the balancing loss of MoE layers (mean over layers, times aux_coef) is part of
        it; in eval mode the loss is the cross-entropy alone.
        """
        self._check(idx, targets)
        x, aux = self.hidden(idx)
        weight = self.embed.weight if self.head is None else self.head.weight
        logits = F.linear(x, weight)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        if self.training and aux:
            loss = loss + self.config.aux_coef * torch.stack(aux).mean()
        return logits, loss

    def after_step(self) -> None:
        """Call once after each optimizer step: moves the experts' biases (balance="bias")."""
        for module in self.modules():
            if isinstance(module, MoE):
                module.update_bias(self.config.bias_rate)

    def _check(self, idx: Tensor, targets: Tensor | None) -> None:
        if idx.dim() != 2 or idx.dtype != torch.int64:
            raise ValueError(f"idx must be (B, T) int64, got {tuple(idx.shape)} {idx.dtype}")
        if idx.shape[1] > self.config.seq_len:
            raise ValueError(
                f"idx must have at most seq_len = {self.config.seq_len} positions,"
                f" got {idx.shape[1]}"
            )
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(
                f"targets must have idx's shape {tuple(idx.shape)}, got {tuple(targets.shape)}"
            )

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                stream = torch.Generator().manual_seed(_stream_seed(seed, name))
                normal = torch.randn(parameter.shape, generator=stream)
                parameter.copy_(normal * self._std(name, parameter.shape[-1]))
            elif name.endswith("bias"):
                parameter.zero_()
        for module in self.modules():
            if isinstance(module, LSTMLayer):
                module.open_forget_gate()

    def _std(self, name: str, fan_in: int) -> float:
        return 0.02


class GPT(LanguageModel):
    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):  # torch's own initialisation draws, for nothing
            super().__init__(config)
            self.positions = (
                nn.Embedding(config.seq_len, config.d_model)
                if config.position == "learned"
                else None
            )
            self.rotary = (
                RotaryEmbedding(config.head_dim, config.seq_len, base=config.rope_base)
                if config.position == "rope"
                else None
            )
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self._initialise(seed)

    def hidden(self, idx: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.embed(idx)
        if self.positions is not None:
            x = x + self.positions.weight[: idx.shape[1]]
        x, update = self.dropout(x), None
        losses = []
        for block in self.blocks:
            x, update, aux = block(x, update, self.rotary)
            if aux is not None:
                losses.append(aux)
        return _add_and_norm(self.final_norm, x, update)[0], losses

    def _std(self, name: str, fan_in: int) -> float:
        # GPT-2: what is added to the residual stream is smaller, so that 2 L sums leave it near 1.
        if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            return 0.02 / (2 * self.config.n_layer) ** 0.5
        # With 0.02 twice over, compressed keys would all start near zero and no block stand out.
        if ".compress_" in name:
            return fan_in**-0.5
        return 0.02


class Block(nn.Module):
    """x += attention(norm(x)), then x += mlp(norm(x)).

    The last sum is left to whoever normalises next: RMSNorm adds while it reads.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn_norm = _norm(config.norm, config)
        sparse = config.attention == "native_sparse"
        self.attn = NativeSparseAttention(config) if sparse else Attention(config)
        self.mlp_norm = _norm(config.norm, config)
        self.mlp = _mlp(config)
        self.dropout = nn.Dropout(config.dropout)
        self.balanced = config.balance == "aux"

    def forward(
        self, x: Tensor, update: Tensor | None, rotary: nn.Module | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The residual stream and what is still to be added to it, before and after the block."""
        normed, x = _add_and_norm(self.attn_norm, x, update)
        normed, x = _add_and_norm(self.mlp_norm, x, self.dropout(self.attn(normed, rotary)))
        if not self.balanced:
            return x, self.dropout(self.mlp(normed)), None
        update, aux = self.mlp(normed, return_aux=True)
        return x, self.dropout(update), aux


class Attention(nn.Module):
    """Causal self-attention over all earlier positions, or over the last `window`; x: (B, T, d)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.window = (-1, -1) if config.window is None else (config.window - 1, 0)
        kv_width = config.kv_heads * config.head_dim
        # Three projections, not one: then arms that differ in H_kv share q's weights.
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=config.bias)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=config.bias)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotary: nn.Module | None) -> Tensor:
        heads = (-1, self.head_dim)
        q = self.q_norm(self.q_proj(x).unflatten(-1, heads))  # (B, T, H, D)
        k = self.k_norm(self.k_proj(x).unflatten(-1, heads))  # (B, T, H_kv, D)
        v = self.v_proj(x).unflatten(-1, heads)
        if rotary is not None:
            q, k = rotary(q, k)
        out = cast(Tensor, flash_attention(q, k, v, causal=True, window=self.window))
        return self.o_proj(out.flatten(-2))  # (B, T, H D) -> (B, T, d)


class LSTM(LanguageModel):
    """Stacked LSTM layers in place of the blocks; each reads the (normed) output below it."""

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            super().__init__(config)
            self.norms = nn.ModuleList(_norm(config.norm, config) for _ in range(config.n_layer))
            self.layers = nn.ModuleList(LSTMLayer(config.d_model) for _ in range(config.n_layer))
        self._initialise(seed)

    def hidden(self, idx: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.dropout(self.embed(idx))
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = self.dropout(layer(norm(x)))
        return self.final_norm(x), []

    def _std(self, name: str, fan_in: int) -> float:
        # The variance of the usual U(-1/sqrt(d), 1/sqrt(d)); 0.02 would leave the gates undecided.
        return (3 * fan_in) ** -0.5 if name.startswith("layers.") else 0.02


class LSTMLayer(nn.Module):
    """One LSTM layer from a zero state; x: (B, T, d) -> h: (B, T, d).

    The inputs' share of the gates is one matmul over all steps, the recurrence one a step (none at
    the first, whose state is zero). The cell is kept in fp32 under autocast. Not nn.LSTM, whose
    fused kernels are faster but hide their matmuls from FlopCounterMode.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.input_proj = nn.Linear(dim, 4 * dim)
        self.state_proj = nn.Linear(dim, 4 * dim, bias=False)

    def open_forget_gate(self) -> None:
        """Forget bias 1, so that gradients reach back from the start (Jozefowicz et al. 2015)."""
        dim = self.state_proj.in_features
        with torch.no_grad():
            self.input_proj.bias[:dim] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        dim = x.shape[-1]
        inputs = self.input_proj(x.transpose(0, 1)).unbind(0)  # T of (B, 4 d)
        cell, hidden, states = None, None, []
        for step in inputs:
            gates = step if hidden is None else step + self.state_proj(hidden)
            # split, not slices: the backward of a slice writes all four gates.
            openings, candidate = gates.float().split((3 * dim, dim), dim=-1)
            forget, enter, leave = openings.sigmoid().chunk(3, dim=-1)
            entered = enter * candidate.tanh()
            cell = entered if cell is None else torch.addcmul(entered, forget, cell)
            hidden = leave * cell.tanh()
            states.append(hidden)
        return torch.stack(states, dim=1).to(x.dtype)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """For an optimizer: matrices (and stacks of them) decay; norms and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def _norm(kind: str, config: GPTConfig) -> nn.Module:
    if kind == "layer_norm":
        return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
    if kind == "rms_norm":
        return RMSNorm(config.d_model, config.norm_eps)
    return nn.Identity()


def _add_and_norm(norm: nn.Module, x: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
    """norm(x + update) and x + update; x alone where there is no update yet."""
    if update is None:
        return norm(x), x
    if isinstance(norm, RMSNorm):  # under autocast the update has 16 bits and x has not
        return norm(update.to(x.dtype), residual=x)
    x = x + update
    return norm(x), x


def _mlp(config: GPTConfig) -> nn.Module:
    dim, width = config.d_model, config.ff_width
    if config.mlp == "moe":
        return MoE(
            dim,
            width,
            config.num_experts,
            config.top_k,
            gated=config.expert == "swiglu",
            score=config.router_score,
            renormalize=config.renormalize,
            balance_bias=config.balance == "bias",
            shared_width=width if config.shared_expert else 0,
        )
    return (GatedMLP if config.mlp == "swiglu" else MLP)(dim, width, bias=config.bias)


def _stream_seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:7], "little")

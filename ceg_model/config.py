"""The model's configuration: every algorithmic switch of the study is one field of GPTConfig.

Two runs differ by an algorithm exactly when their GPTConfigs differ. How something is computed
(which kernel, which dtype) is no field of it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

NORMS = ("none", "layer_norm", "rms_norm")
POSITIONS = ("none", "learned", "rope")
MLPS = ("gelu", "swiglu", "moe")
EXPERTS = ("gelu", "swiglu")
BALANCES = ("none", "aux", "bias")
ARCHS = ("gpt", "lstm")
ATTENTIONS = ("full", "native_sparse")


@dataclass(frozen=True)
class GPTConfig:
    """A decoder language model. The defaults are the paper's baseline at a size for one CPU.

    norm is the pre-norm of each sub-layer; final_norm the one before the head (None: as `norm`,
    and where that is none LayerNorm, as in the paper's baseline; "none": none). n_kv_head <
    n_head is GQA, 1 is MQA. window counts the keys that a query sees, itself among them. gelu is
    GPT-2's tanh form; `expert` is the MLP inside each expert. d_ff is the width of the MLP
    (None: 4 d for gelu, 8 d / 3 for swiglu, rounded up to 8) or of one expert (None: the dense
    width over the experts that a token visits, so that mixture and dense model spend the same
    FLOPs a token, but for the router's). attention="native_sparse" is NSA, and the five fields
    after it its sizes in tokens (select_count: in blocks): the paper's 32, 16, 64, 16 and 512 are
    for 8,192 tokens and more, these for 128 to 1,024; see sparse_attention.py. Routing is softmax
    top-k; balance="bias" is DeepSeek-V3's loss-free scheme: sigmoid scores, and a bias per expert
    that moves selection only, by bias_rate a step. rope turns whole heads, pairs a half apart.
    arch="lstm" reads vocab_size, seq_len, n_layer, d_model, norm, final_norm, norm_eps, tied_head,
    dropout and bias (of the norms; its gates always have one), and refuses every switch that it
    has no place for.
    """

    vocab_size: int = 256
    seq_len: int = 256
    n_layer: int = 2
    n_head: int = 4
    n_kv_head: int | None = None
    d_model: int = 64
    d_ff: int | None = None
    arch: str = "gpt"
    norm: str = "none"
    final_norm: str | None = None
    norm_eps: float = 1e-5
    position: str = "learned"
    rope_base: float = 10000.0
    window: int | None = None
    attention: str = "full"
    compress_block: int = 8
    compress_stride: int = 4
    select_block: int = 8
    select_count: int = 6
    sparse_window: int = 32
    qk_norm: bool = False
    mlp: str = "gelu"
    num_experts: int = 8
    top_k: int = 2
    expert: str = "gelu"
    shared_expert: bool = False
    balance: str = "none"
    aux_coef: float = 0.01
    bias_rate: float = 0.001
    tied_head: bool = True
    bias: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.arch == "lstm":
            _check_lstm(self)
        else:
            _check_gpt(self)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def norm_at_end(self) -> str:
        if self.final_norm is not None:
            return self.final_norm
        return "layer_norm" if self.norm == "none" else self.norm

    @property
    def ff_width(self) -> int:
        """Width of the MLP, or of one expert."""
        if self.d_ff is not None:
            return self.d_ff
        visited = self.top_k + self.shared_expert if self.mlp == "moe" else 1
        kind = self.expert if self.mlp == "moe" else self.mlp
        if kind == "gelu" and visited == 1:
            return 4 * self.d_model
        numerator, parts = (4, visited) if kind == "gelu" else (8, 3 * visited)
        return -(-numerator * self.d_model // (parts * 8)) * 8

    @property
    def router_score(self) -> str:
        return "sigmoid" if self.balance == "bias" else "softmax"

    @property
    def renormalize(self) -> bool:
        """Whether a token's expert weights add up to 1: a single one would, and teach nothing."""
        return self.top_k > 1

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))  # asdict copies each value: a study asks 10,000 times

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GPTConfig:
        """The inverse of to_dict. Missing fields take their defaults, unknown ones raise."""
        known = [f.name for f in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(
                f"GPTConfig has no field {', '.join(map(repr, unknown))};"
                f" its fields: {', '.join(known)}"
            )
        return cls(**values)


SPARSE_SIZES: dict[str, Any] = {
    f.name: f.default
    for f in fields(GPTConfig)
    if f.name.startswith(("compress_", "select_", "sparse_"))
}
# What turns a GPT's fields into an LSTM's.
LSTM_FIELDS: dict[str, Any] = {
    "arch": "lstm",
    "position": "none",
    "n_kv_head": None,
    "window": None,
    "qk_norm": False,
    "d_ff": None,
    "mlp": "gelu",
    "shared_expert": False,
    "balance": "none",
    "expert": "gelu",
    "attention": "full",
    **SPARSE_SIZES,
}


def _check_fields(config: GPTConfig) -> None:
    for name in ("vocab_size", "seq_len", "n_layer", "n_head", "d_model", "num_experts", "top_k"):
        _check_count(name, getattr(config, name))
    for name in SPARSE_SIZES:
        _check_count(name, getattr(config, name))
    for name in ("n_kv_head", "d_ff", "window"):
        if getattr(config, name) is not None:
            _check_count(name, getattr(config, name))
    for name in ("shared_expert", "qk_norm", "tied_head", "bias"):
        if not isinstance(getattr(config, name), bool):
            raise TypeError(f"{name} must be True or False, got {getattr(config, name)!r}")
    choices = {"arch": ARCHS, "norm": NORMS, "position": POSITIONS, "mlp": MLPS}
    choices |= {"expert": EXPERTS, "balance": BALANCES, "attention": ATTENTIONS}
    for name, allowed in choices.items():
        _check_choice(name, getattr(config, name), allowed)
    if config.final_norm is not None:
        _check_choice("final_norm", config.final_norm, NORMS)
    for name, low in (("norm_eps", 0.0), ("rope_base", 1.0)):
        _check_number(name, getattr(config, name), f"above {low:g}", lambda x, low=low: x > low)
    for name in ("aux_coef", "bias_rate"):
        _check_number(name, getattr(config, name), "0 or above", lambda x: x >= 0)
    _check_number("dropout", config.dropout, "in [0, 1)", lambda x: 0 <= x < 1)


def _check_gpt(config: GPTConfig) -> None:
    if config.d_model % config.n_head:
        raise ValueError(
            f"n_head must divide d_model, got n_head {config.n_head} and d_model {config.d_model}"
        )
    if config.n_head % config.kv_heads:
        raise ValueError(
            f"n_kv_head must divide n_head, got n_kv_head {config.n_kv_head}"
            f" and n_head {config.n_head}"
        )
    if config.position == "rope" and config.head_dim % 2:
        raise ValueError(
            f"position 'rope' needs an even d_model / n_head,"
            f" got {config.d_model} / {config.n_head} = {config.head_dim}"
        )
    _check_attention(config)
    if config.mlp == "moe":
        if config.top_k > config.num_experts:
            raise ValueError(
                f"top_k must be at most num_experts, got {config.top_k} of {config.num_experts}"
            )
        if config.bias:
            raise ValueError("bias must be False with mlp 'moe' (experts have none), got True")
        for name, width in (("d_model", config.d_model), ("d_ff", config.ff_width)):
            if width % 8:  # grouped matmul wants rows of a multiple of 16 bytes
                raise ValueError(f"{name} must be a multiple of 8 with mlp 'moe', got {width}")
        return
    # A switch that would silently do nothing makes two equal runs look like two arms.
    for name, idle in (("shared_expert", False), ("balance", "none"), ("expert", "gelu")):
        if getattr(config, name) != idle:
            raise ValueError(
                f"{name} needs mlp 'moe', got {name} {getattr(config, name)!r}"
                f" with mlp {config.mlp!r}"
            )


def _check_attention(config: GPTConfig) -> None:
    if config.attention == "full":
        for name, idle in SPARSE_SIZES.items():
            if getattr(config, name) != idle:
                raise ValueError(
                    f"{name} must be {idle} with attention 'full' (it has no use for it),"
                    f" got {getattr(config, name)}"
                )
        return
    if config.window is not None:
        raise ValueError(
            f"window must be None with attention 'native_sparse' (its own is sparse_window),"
            f" got {config.window}"
        )
    for name in ("compress_block", "select_block"):
        if getattr(config, name) % config.compress_stride:
            raise ValueError(
                f"compress_stride must divide {name}, got {config.compress_stride}"
                f" and {getattr(config, name)}"
            )
    if config.compress_block > config.seq_len:
        raise ValueError(
            f"compress_block must be at most seq_len (no block would ever end),"
            f" got {config.compress_block} and {config.seq_len}"
        )
    if config.select_count < 3:
        raise ValueError(
            f"select_count must be at least 3 (the first block and the last two are always"
            f" selected), got {config.select_count}"
        )


def _check_lstm(config: GPTConfig) -> None:
    for name, value in LSTM_FIELDS.items():
        if name != "arch" and getattr(config, name) != value:
            raise ValueError(
                f"{name} must be {value!r} with arch 'lstm' (it has no use for it),"
                f" got {getattr(config, name)!r}"
            )


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _check_number(name: str, value: Any, expected: str, holds: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not holds(value):
        raise ValueError(f"{name} must be {expected}, got {value}")

"""What the study can switch on, as data. One entry per innovation; adding one is adding an entry.

The baseline is the one of Sanderson et al. 2025 (arXiv 2505.04075): a GPT with learned positions,
no norm in its blocks, and attention that materialises the T x T matrix (backend `reference`
for every op).

- kind "algorithm" changes GPTConfig and runs on the same reference backends as the baseline, so
  that nothing but the algorithm moves. Values are absolute, or relative to another field
  (`relative`), because a study runs the same innovation at several model sizes.
- kind "kernel" computes the same maths: it only names the ops that move to our kernels. Its C
  ratio is 1 by construction: to the baseline, or, where the op is part of an algorithm that the
  baseline lacks, to the arm of that algorithm, which it names as its part. `twin` tells which.
- kind "precision" changes TrainConfig's dtype: the same formula, rounded more; whether the loss
  notices is measured, not assumed.
- a bundle names its parts and is the union of their changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ceg_model.config import LSTM_FIELDS

PAPER = "Sanderson et al. 2025, arXiv 2505.04075"
INDEPENDENT = "compute-independent"
DEPENDENT = "compute-dependent"


@dataclass(frozen=True)
class Published:
    """A CEG that somebody published, and the ratio of what it is: the paper mixes units."""

    value: str
    what: str
    source: str


@dataclass(frozen=True)
class Innovation:
    name: str
    title: str
    kind: str  # "baseline" | "algorithm" | "kernel" | "precision" | "bundle"
    config: dict[str, Any] = field(default_factory=dict)
    relative: dict[str, tuple[str, float]] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    kernels: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    paper_class: str | None = None
    published: tuple[Published, ...] = ()
    note: str = ""


# As in the paper: no norm in the blocks, one LayerNorm before the head, in every arm.
BASELINE: dict[str, Any] = {
    "arch": "gpt",
    "norm": "none",
    "final_norm": "layer_norm",
    "position": "learned",
    "mlp": "gelu",
    "window": None,
    "qk_norm": False,
}


_V1 = f"{PAPER} v1, Table III"


def _v1(value: float) -> Published:
    return Published(f"{value}", "iterations x MFU, at 50k", _V1)


def _v2(compact: float, full: float) -> Published:
    return Published(f"{compact} / {full}", "steps, compact / full model", f"{PAPER} v2")


def _literature(value: str, what: str) -> Published:
    return Published(value, what, f"literature column of {PAPER}")


_ENTRIES = (
    Innovation("baseline", "Baseline", "baseline"),
    Innovation(
        "layer_norm",
        "LayerNorm",
        "algorithm",
        config={"norm": "layer_norm"},
        paper_class=INDEPENDENT,
        published=(_v1(2.24), _v2(1.836, 1.421), _literature("1.67x", "as cited there")),
    ),
    Innovation("rms_norm", "RMSNorm", "algorithm", config={"norm": "rms_norm"}),
    Innovation(
        "rms_norm_fused",
        "RMSNorm, fused kernel",
        "kernel",
        parts=("rms_norm",),
        kernels=("rms_norm",),
        note="same maths as RMSNorm: its gain in C over the baseline is that arm's",
    ),
    Innovation(
        "rope",
        "RoPE",
        "algorithm",
        config={"position": "rope"},
        paper_class=INDEPENDENT,
        published=(_v1(1.54), _v2(1.870, 1.350), _literature("1.7x", "as cited there")),
    ),
    Innovation(
        "rope_fused",
        "RoPE, fused kernel",
        "kernel",
        parts=("rope",),
        kernels=("rope",),
        note="same maths as RoPE: its gain in C over the baseline is that arm's",
    ),
    Innovation(
        "flash_attention",
        "FlashAttention",
        "kernel",
        kernels=("attention",),  # an op's entry covers its backward
        paper_class=INDEPENDENT,
        published=(_v1(0.81), _v2(1.063, 1.000), _literature("2-4x", "speed of the kernel")),
        note="same maths: G_alg is 1 by construction; the paper's 0.81 divides by its speed",
    ),
    Innovation(
        "ln_rope_fa",
        "LN + RoPE + FA",
        "bundle",
        parts=("layer_norm", "rope", "flash_attention"),
        paper_class=INDEPENDENT,
        published=(_v1(3.03), _v2(3.483, 1.800)),
    ),
    Innovation(
        "mqa",
        "Multi-query attention",
        "algorithm",
        config={"n_kv_head": 1},
        paper_class=DEPENDENT,
        published=(
            Published("0.91", "iterations x MFU, at 25k; not reached at 50k", _V1),
            _v2(0.673, 0.931),
            _literature("1x", "training; its gain is in decoding"),
        ),
    ),
    Innovation(
        "gqa",
        "Grouped-query attention",
        "algorithm",
        relative={"n_kv_head": ("n_head", 0.5)},
    ),
    Innovation(
        "moe",
        "Mixture of experts",
        "algorithm",
        # d_ff None: expert widths that cost a token about what the dense MLP costs.
        config={"mlp": "moe", "d_ff": None, "num_experts": 8, "top_k": 2, "balance": "aux"},
        paper_class=DEPENDENT,
        published=(_literature("7-11x", "as cited there, at far larger scale"),),
        note="classified from the literature by the paper, not run there; its experts are the "
        "baseline's MLP, narrower",
    ),
    Innovation("swiglu", "SwiGLU", "algorithm", config={"mlp": "swiglu", "d_ff": None}),
    Innovation(
        "window",
        "Sliding-window attention",
        "algorithm",
        relative={"window": ("seq_len", 0.25)},
        note="the simplest sparse pattern; the paper's v2 runs native sparse attention",
    ),
    Innovation(
        "native_sparse",
        "Native sparse attention",
        "algorithm",
        config={"attention": "native_sparse"},
        paper_class=DEPENDENT,
        published=(_v2(0.515, 0.964), _literature("4.84x", "as cited there")),
        note="keys and values of its own for each of three branches, and short contexts that leave "
        "little to skip: it can cost more FLOPs a token than full attention",
    ),
    Innovation("qk_norm", "QK-norm", "algorithm", config={"qk_norm": True}),
    Innovation(
        "lstm",
        "LSTM in the Transformer's place",
        "algorithm",
        config=LSTM_FIELDS,
        published=(
            _literature("10-50x", "the Transformer over the LSTM: the inverse of this arm's gain"),
        ),
        note="an innovation taken away: its gain over the baseline, a Transformer, is below 1 "
        "where the Transformer is better, and falls with scale if its advantage grows (the paper "
        "calls the Transformer compute-dependent, from the literature)",
    ),
    Innovation("bf16", "bf16 autocast", "precision", train={"dtype": "bfloat16"}),
)

INNOVATIONS: dict[str, Innovation] = {entry.name: entry for entry in _ENTRIES}


def innovation(name: str) -> Innovation:
    if name not in INNOVATIONS:
        raise ValueError(f"arm must be one of {', '.join(INNOVATIONS)}, got {name!r}")
    return INNOVATIONS[name]


def config_changes(name: str, base: dict[str, Any]) -> dict[str, Any]:
    """The GPTConfig fields that arm `name` changes, given the scale's own fields in `base`."""
    entry = innovation(name)
    changes: dict[str, Any] = {}
    for part in entry.parts:
        changes.update(config_changes(part, base))
    changes.update(entry.config)
    for key, (of, ratio) in entry.relative.items():
        changes[key] = max(1, round(base[of] * ratio))
    return changes


def train_changes(name: str) -> dict[str, Any]:
    """The TrainConfig fields that arm `name` changes."""
    entry = innovation(name)
    changes: dict[str, Any] = {}
    for part in entry.parts:
        changes.update(train_changes(part))
    return changes | entry.train


@cache
def kernel_ops(name: str) -> tuple[str, ...]:
    """The ops that arm `name` moves from the reference to our kernels."""
    entry = innovation(name)
    ops = [op for part in entry.parts for op in kernel_ops(part)]
    return tuple(dict.fromkeys([*ops, *entry.kernels]))


@cache
def twin(name: str) -> str | None:
    """The arm that computes the maths of `name` without its kernels: their C must be equal.

    None where `name` has no kernels, or no arm is its algorithm alone.
    """
    if not kernel_ops(name):
        return None
    wanted = _all_changes(name)
    same = (e.name for e in _ENTRIES if not kernel_ops(e.name) and _all_changes(e.name) == wanted)
    return next(same, None)


def _all_changes(name: str) -> dict[str, Any]:
    entry = innovation(name)
    changes: dict[str, Any] = {}
    for part in entry.parts:
        changes.update(_all_changes(part))
    return changes | entry.config | entry.relative | entry.train


def is_same_maths(name: str) -> bool:
    """True where C cannot differ from the baseline's: every part is a kernel."""
    entry = innovation(name)
    if entry.parts:
        return all(is_same_maths(part) for part in entry.parts)
    return entry.kind in ("kernel", "baseline")

"""The plans that are there, by name."""

from __future__ import annotations

from typing import Any

from ceg_model.study.plan import Plan, Scale
from ceg_model.study.sweep import Sweep


def _scale(name: str, *, layers: int, width: int, heads: int, length: int, **train: Any) -> Scale:
    model = {"n_layer": layers, "d_model": width, "n_head": heads, "seq_len": length}
    return Scale(name, model, train)


_PAPER_ARMS = ("baseline", "layer_norm", "rope", "flash_attention", "ln_rope_fa", "mqa", "moe")
# A constant rate after a short warm-up, so that a crossing inside a run is not confounded by decay;
# fp32, so that a kernel and its eager twin differ by rounding only.
_TRAIN = {
    "schedule": "constant",
    "lr": 2e-3,
    "warmup_steps": 30,
    "dtype": "float32",
    "checkpoint_every": 100,
    "log_every": 1,  # in lockstep a turn is a row
}

# 11x compute from S to L. Every evaluation reads 6 to 8 thousand tokens: the luck of a small
# evaluation set shifts a gain in all seeds alike, so no interval over seeds shows it. The rate
# of L comes from a few trials: without norms, twice this rate parts two seeds by 0.06 nats, four
# times leaves one of them stuck. S is at the usual rate and M between; no rate was swept.
_NANO = (
    _scale("S", layers=2, width=32, heads=2, length=128, batch_size=4, lr=2e-3,
           steps=280, eval_every=12, eval_batches=12),
    _scale("M", layers=2, width=48, heads=3, length=128, batch_size=6, lr=1.4e-3,
           steps=350, eval_every=14, eval_batches=10),
    _scale("L", layers=2, width=64, heads=4, length=128, batch_size=8, lr=1e-3,
           steps=480, eval_every=16, eval_batches=8),
)  # fmt: skip

# Every budget is a run with a complete schedule of its own: warm-up, a constant rate, and a linear
# decay over the last fifth. 8x compute within a scale.
_BUDGETS = (0.125, 0.25, 0.5, 1.0)
_COMPLETE = {"schedule": "wsd", "decay_fraction": 0.2, "min_lr_ratio": 0.0}
_LADDER_ARMS = (
    "baseline", "layer_norm", "rope", "flash_attention", "ln_rope_fa", "mqa", "moe",
    "native_sparse",
)  # fmt: skip
# 13 to 18 tokens a parameter of the blocks at the largest budget, 31x compute from S to L. All
# three read the same 32 thousand tokens at each evaluation.
_CPU_LADDER = (
    _scale("S", layers=2, width=32, heads=2, length=128, batch_size=4, lr=4e-3,
           steps=576, eval_every=72, eval_batches=64),
    _scale("M", layers=2, width=48, heads=3, length=128, batch_size=8, lr=3e-3,
           steps=960, eval_every=120, eval_batches=32),
    _scale("L", layers=3, width=64, heads=4, length=128, batch_size=16, lr=2e-3,
           steps=960, eval_every=120, eval_batches=16),
)  # fmt: skip

OPENWEBTEXT = {"hf": "Skylion007/openwebtext", "tokenizer": "gpt2", "val_fraction": 0.0005}


def _gpu_scale(
    name: str, *, layers: int, width: int, length: int, batch_size: int, grad_accum: int,
    steps: int, lr: float, heads: int | None = None,
) -> Scale:  # fmt: skip
    """A scale for a GPU: half a million evaluation tokens, eight evaluations a run."""
    return _scale(
        name, layers=layers, width=width, heads=heads or width // 64, length=length,
        batch_size=batch_size, grad_accum=grad_accum, steps=steps, lr=lr,
        eval_every=steps // 8, eval_batches=max((1 << 19) // (batch_size * length), 1),
    )  # fmt: skip


# 262,144 tokens a step and 50,000 steps, as in the paper; the rates are only where a sweep begins.
_PAPER_COMPACT = _gpu_scale(
    "compact", layers=6, width=384, length=512, batch_size=64, grad_accum=8, steps=50_000, lr=1e-3
)
_PAPER_V1 = _gpu_scale(
    "v1", layers=8, width=512, length=512, batch_size=64, grad_accum=8, steps=50_000, lr=8e-4
)
_PAPER_FULL = _gpu_scale(
    "full", layers=10, width=768, length=1024, batch_size=32, grad_accum=8, steps=50_000, lr=6e-4
)
_GPU_TRAIN = {
    **_COMPLETE, "warmup_steps": 250, "dtype": "bfloat16", "checkpoint_every": 500, "log_every": 25,
}  # fmt: skip
_GPU: dict[str, Any] = {
    "budgets": _BUDGETS, "sweep": Sweep(budget=0.125), "seeds": (0, 1, 2), "train": _GPU_TRAIN,
    "data": OPENWEBTEXT, "timing_seconds": 30.0, "fast_curves": True,
}  # fmt: skip

PLANS = {
    plan.name: plan
    for plan in (
        Plan(
            "cpu-ladder",
            _LADDER_ARMS,
            _CPU_LADDER,
            seeds=(0, 1, 2),
            train={**_COMPLETE, "warmup_steps": 20, "dtype": "float32", "checkpoint_every": 240},
            budgets=_BUDGETS,
            sweep=Sweep(budget=0.25),
            fast_curves=True,
            timing_seconds=60.0,
            note="three scales over 30x compute, four budgets each, tuned; hours on two cores",
        ),
        Plan(
            "paper-compact",
            _LADDER_ARMS,
            (_PAPER_COMPACT,),
            **_GPU,
            note="the paper's smaller model (second version) on its data; for a GPU; never run",
        ),
        Plan(
            "paper-full",
            _LADDER_ARMS,
            (_PAPER_COMPACT, _PAPER_V1, _PAPER_FULL),
            **_GPU,
            note="the three models of both versions of the paper, on its data; GPUs; never run",
        ),
        Plan(
            "h200-ladder",
            _LADDER_ARMS,
            (
                _gpu_scale(
                    "S",
                    layers=4,
                    width=256,
                    length=512,
                    batch_size=64,
                    grad_accum=1,
                    steps=2_400,
                    lr=3e-3,
                ),
                _gpu_scale(
                    "M",
                    layers=6,
                    width=384,
                    length=512,
                    batch_size=64,
                    grad_accum=2,
                    steps=4_000,
                    lr=2e-3,
                ),
                _gpu_scale(
                    "L",
                    layers=8,
                    width=512,
                    length=1024,
                    batch_size=32,
                    grad_accum=8,
                    steps=3_200,
                    lr=1e-3,
                ),
            ),
            **_GPU,
            note="three scales over 35x compute, sized to a few hours of one large GPU; never run",
        ),
        Plan(
            "nano",
            _PAPER_ARMS,
            _NANO,
            seeds=(0, 1),
            train=_TRAIN,
            lockstep=True,
            note="the demo: minutes on two cores",
        ),
        Plan(
            "kernels",
            ("baseline", "flash_attention", "rope", "rope_fused", "rms_norm", "rms_norm_fused"),
            _NANO,
            seeds=(0, 1, 2),
            train=_TRAIN,
            lockstep=True,
            note="each kernel beside its twin without it: equal losses, and what it gains in time",
        ),
        Plan(
            "precision",
            ("baseline", "bf16"),
            _NANO,
            seeds=(0, 1, 2, 3, 4),
            train=_TRAIN,
            lockstep=True,
            note="whether bf16 autocast costs compute: why it may be a default",
        ),
        Plan(
            "smoke",
            ("baseline", "layer_norm", "flash_attention"),
            (
                _scale("S", layers=1, width=32, heads=2, length=64, steps=40, batch_size=8),
                _scale("M", layers=2, width=32, heads=2, length=64, steps=60, batch_size=8),
            ),
            seeds=(0, 1),
            train={**_TRAIN, "warmup_steps": 5, "eval_every": 3, "eval_batches": 2},
            lockstep=True,
            timing_rounds=5,
            timing_seconds=1.0,
            note="proves that everything runs; its numbers mean nothing",
        ),
    )
}


def plan_named(name: str) -> Plan:
    if name not in PLANS:
        raise ValueError(f"PLAN must be one of {', '.join(PLANS)}, got {name!r}")
    return PLANS[name]

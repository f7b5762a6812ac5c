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

PLANS = {
    plan.name: plan
    for plan in (
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

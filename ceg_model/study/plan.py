"""A plan: arms x scales x seeds, and how each run is trained. Frozen; written to study.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ceg_kernels import OPS
from ceg_model.config import GPTConfig
from ceg_model.study.innovations import (
    BASELINE,
    config_changes,
    innovation,
    kernel_ops,
    train_changes,
)
from ceg_model.train_config import TrainConfig

STOCK = ("torch", "reference")  # backends that are not ours


@dataclass(frozen=True)
class Scale:
    """A model size and its budget: fields of GPTConfig and of TrainConfig."""

    name: str
    model: Mapping[str, Any]
    train: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    name: str
    arms: tuple[str, ...]  # the first is the baseline
    scales: tuple[Scale, ...]
    seeds: tuple[int, ...]
    train: Mapping[str, Any] = field(default_factory=dict)
    tuned: bool = False  # learning rate swept per arm and scale
    timing_rounds: int = 9  # of the throughput benchmark at least, a few steps of all in each
    timing_seconds: float = 10.0  # more rounds until this long
    workers: int = 2
    threads: int = 1  # of each worker
    # The arms of a scale and seed take their rows in turn, in one worker: see lockstep.py. All of
    # them are in memory together, so it is for models that fit.
    lockstep: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        for arm in self.arms:
            innovation(arm)
        if not self.arms or innovation(self.arms[0]).kind != "baseline":
            raise ValueError(f"arms must start with the baseline, got {', '.join(self.arms)}")
        for what, values in (
            ("arms", self.arms),
            ("scales", tuple(s.name for s in self.scales)),
            ("seeds", self.seeds),
        ):
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{what} must be there and differ, got {values}")

    @property
    def baseline(self) -> str:
        return self.arms[0]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        known = [f.name for f in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(f"Plan has no field {', '.join(unknown)}; its fields: {known}")
        scales = tuple(Scale(**scale) for scale in values["scales"])
        tuples = {"arms": tuple(values["arms"]), "seeds": tuple(values["seeds"])}
        return cls(**{**values, **tuples, "scales": scales})


@dataclass(frozen=True)
class RunSpec:
    """One run of a plan."""

    arm: str
    scale: str
    seed: int
    model: GPTConfig
    train: TrainConfig


def our_backend(op: str, dtype: Any, device: str) -> str | None:
    """The first of our backends that would run the op here unasked, or None."""
    sample = next(iter(OPS[op].samples(dtype, device)))
    for backend in OPS[op].backends:
        if backend.name not in STOCK and backend.takes(*sample.args):
            return backend.name
    return None


def backends_of(arm: str, ours: Mapping[str, str | None]) -> dict[str, str]:
    """The backend of each op: the reference everywhere, our kernel where the arm asks for it.

    Where ours is not built the arm runs stock torch, which is as fused; the report says so.
    """
    forward = [name for name in OPS if not name.endswith("_backward")]
    chosen = dict.fromkeys(forward, "reference")
    for op in kernel_ops(arm):
        chosen[op] = ours.get(op) or "torch"
    return chosen


def model_config(arm: str, scale: Scale, vocab_size: int) -> GPTConfig:
    base = {**BASELINE, "vocab_size": vocab_size, **scale.model}
    return GPTConfig.from_dict({**base, **config_changes(arm, base)})


def train_config(
    plan: Plan, arm: str, scale: Scale, seed: int, backend: Mapping[str, str] | None = None
) -> TrainConfig:
    fields = {**plan.train, **scale.train, **train_changes(arm), "seed": seed, "backend": backend}
    return TrainConfig.from_dict(fields)


def runs(plan: Plan, ours: Mapping[str, str | None], vocab_size: int) -> Iterator[RunSpec]:
    """All runs, longest first; the arms of one scale and seed are neighbours.

    So the last runs to finish are short, and whatever drifts on the machine hits all arms alike.
    """
    for scale in reversed(plan.scales):
        for seed in plan.seeds:
            for arm in plan.arms:
                train = train_config(plan, arm, scale, seed, backends_of(arm, ours))
                yield RunSpec(arm, scale.name, seed, model_config(arm, scale, vocab_size), train)


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

"""A plan: arms x scales x budgets x seeds, and how each run is trained. Frozen; in study.json.

The plans themselves are in plans.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ceg_model.config import GPTConfig
from ceg_model.study.innovations import (
    BASELINE,
    config_changes,
    innovation,
    kernel_ops,
    train_changes,
    twin,
)
from ceg_model.study.sweep import Sweep
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
    # Parts of a scale's steps, rising to 1: each is a run with a complete schedule. Those of an
    # arm and seed grow on one trunk (trunk.py).
    budgets: tuple[float, ...] = (1.0,)
    sweep: Sweep | None = None  # None: every arm at its scale's rate
    # Arms other than the baseline train on our kernels throughout. What a run costs in FLOPs does
    # not depend on it, and G_hw comes from the timed segments, where each arm has its own.
    fast_curves: bool = False
    timing_rounds: int = 9  # of the throughput benchmark at least, a few steps of all in each
    timing_seconds: float = 10.0  # more rounds until this long
    workers: int = 2
    threads: int = 1  # of each worker
    # The arms of a scale and seed take their rows in turn, in one worker: see lockstep.py. All of
    # them are in memory together, so it is for models that fit.
    lockstep: bool = False
    data: Mapping[str, Any] = field(default_factory=dict)  # a data.Request; none: the built-in
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
        if list(self.budgets) != sorted(set(self.budgets)) or not 0 < self.budgets[0] <= 1:
            raise ValueError(f"budgets must rise from above 0 to 1, got {self.budgets}")
        if self.budgets[-1] != 1:
            raise ValueError(f"budgets must end with 1, got {self.budgets}")
        if self.sweep is not None and self.sweep.budget not in self.budgets:
            raise ValueError(
                f"the sweep's budget must be one of {self.budgets}, got {self.sweep.budget}"
            )
        if self.sweep is not None and self.sweep.seeds > len(self.seeds):
            raise ValueError(
                f"the sweep's seeds must be at most the plan's {len(self.seeds)}, "
                f"got {self.sweep.seeds}"
            )
        if self.lockstep and (self.sweep is not None or len(self.budgets) > 1):
            raise ValueError("lockstep must be False with a sweep or several budgets, got True")

    @property
    def baseline(self) -> str:
        return self.arms[0]

    def rates(self, scale: Scale) -> tuple[float, ...]:
        """The learning rates that an arm tries first at `scale`."""
        own = train_config(self, self.baseline, scale, self.seeds[0]).lr
        return tuple(factor * own for factor in self.sweep.factors) if self.sweep else (own,)

    def tunes(self, arm: str) -> bool:
        """Whether the arm has a sweep of its own; a kernel takes over the rate of its twin."""
        return self.sweep is not None and twin(arm) not in self.arms

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        known = [f.name for f in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(f"Plan has no field {', '.join(unknown)}; its fields: {known}")
        scales = tuple(Scale(**scale) for scale in values["scales"])
        tuples = {key: tuple(values[key]) for key in ("arms", "seeds", "budgets") if key in values}
        if (sweep := values.get("sweep")) is not None:
            sweep = Sweep(**{**sweep, "factors": tuple(sweep["factors"])})
        return cls(**{**values, **tuples, "scales": scales, "sweep": sweep})


@dataclass(frozen=True)
class RunSpec:
    """One run of a plan; `sweep` where it only helps to choose a rate.

    `donor` is the id of the run of the next smaller budget, on whose trunk it grows ("": none).
    """

    arm: str
    scale: str
    seed: int
    model: GPTConfig
    train: TrainConfig
    budget: float = 1.0
    sweep: bool = False
    donor: str = ""


def backends_of(arm: str, ours: Mapping[str, str | None]) -> dict[str, str]:
    """The backend of each op: the reference everywhere, our kernel where the arm asks for it.

    `ours` names our backend of every op that the study has been begun with, or None.
    Where ours is not built the arm runs stock torch, which is as fused; the report says so.
    """
    chosen = dict.fromkeys(ours, "reference")
    for op in kernel_ops(arm):
        chosen[op] = ours.get(op) or "torch"
    return chosen


def trained_backends(plan: Plan, arm: str, ours: Mapping[str, str | None]) -> dict[str, str]:
    """The backends with which the arm's curves are trained: its own, or all of ours."""
    own = backends_of(arm, ours)
    if not plan.fast_curves or arm == plan.baseline or twin(arm) in plan.arms:
        return own
    return {op: ours.get(op) or name for op, name in own.items()}


def model_config(arm: str, scale: Scale, vocab_size: int) -> GPTConfig:
    base = {**BASELINE, "vocab_size": vocab_size, **scale.model}
    return GPTConfig.from_dict({**base, **config_changes(arm, base)})


def train_config(
    plan: Plan,
    arm: str,
    scale: Scale,
    seed: int,
    backend: Mapping[str, str] | None = None,
    *,
    budget: float = 1.0,
    lr: float | None = None,
) -> TrainConfig:
    fields = {**plan.train, **scale.train, **train_changes(arm), "seed": seed, "backend": backend}
    if lr is not None:
        fields["lr"] = lr
    config = TrainConfig.from_dict(fields)
    return replace(config, steps=max(round(budget * config.steps), 1))


def run_spec(
    plan: Plan,
    arm: str,
    scale: Scale,
    seed: int,
    *,
    ours: Mapping[str, str | None],
    vocab_size: int,
    budget: float = 1.0,
    lr: float | None = None,
    sweep: bool = False,
) -> RunSpec:
    backend = trained_backends(plan, arm, ours)
    train = train_config(plan, arm, scale, seed, backend, budget=budget, lr=lr)
    model = model_config(arm, scale, vocab_size)
    return RunSpec(arm, scale.name, seed, model, train, budget, sweep)

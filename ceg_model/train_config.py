"""How a model is trained: TrainConfig, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ceg_model.loggers import PACKAGES

SCHEDULES = ("constant", "wsd", "cosine")
DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. Sizes are global: more processes share the same micro-batches.

    A step is grad_accum micro-batches of batch_size sequences. wsd keeps the peak rate and falls
    linearly over the last decay_fraction of the steps; wsd and cosine end at min_lr_ratio * lr.
    dtype "auto" is bf16 autocast where the device multiplies bf16 faster than fp32, else fp32.
    backend is what ceg_kernels.use_backend takes. log_every counts the steps of one row, which are
    timed together: on a GPU more than 1 spares host syncs. log_to names a logger (loggers.py) that
    gets a copy of each row; it is no part of a run's id, because no number depends on it.
    """

    steps: int = 400
    batch_size: int = 16
    grad_accum: int = 1
    lr: float = 2e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    decay_fraction: float = 0.2
    min_lr_ratio: float = 0.0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    grad_clip: float | None = 1.0
    eval_every: int = 50
    eval_batches: int = 16
    log_every: int = 1
    checkpoint_every: int | None = 200
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    backend: str | Mapping[str, str] | None = None
    compile: bool = False
    timing_warmup: int = 2
    log_to: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # a list, when it comes from JSON
        least = {"steps": 1, "batch_size": 1, "grad_accum": 1, "eval_every": 1, "eval_batches": 1}
        least |= {"log_every": 1, "warmup_steps": 0, "seed": 0, "timing_warmup": 0}
        for name, low in least.items():
            _check_int(name, getattr(self, name), low)
        if self.checkpoint_every is not None:
            _check_int("checkpoint_every", self.checkpoint_every, 1)
        _check_range("lr", self.lr, 0, math.inf, open_low=True)
        _check_range("eps", self.eps, 0, math.inf, open_low=True)
        _check_range("weight_decay", self.weight_decay, 0, math.inf)
        _check_range("decay_fraction", self.decay_fraction, 0, 1)
        _check_range("min_lr_ratio", self.min_lr_ratio, 0, 1)
        if self.grad_clip is not None:
            _check_range("grad_clip", self.grad_clip, 0, math.inf, open_low=True)
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        for name, allowed in (("schedule", SCHEDULES), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if self.log_to is not None and self.log_to not in PACKAGES:
            raise ValueError(f"log_to must be one of {', '.join(PACKAGES)}, got {self.log_to!r}")

    def to_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "betas": list(self.betas),
            "backend": dict(self.backend) if isinstance(self.backend, Mapping) else self.backend,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of to_dict. Fields left out take defaults; an unknown one is an error."""
        known = [f.name for f in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(
                f"TrainConfig has no field {', '.join(map(repr, unknown))}; "
                f"its fields: {', '.join(known)}"
            )
        return cls(**values)


def decay_start(config: TrainConfig) -> int | None:
    """The last step of a wsd run at its full rate; None where the schedule has no such step."""
    if config.schedule != "wsd":
        return None
    return max(config.steps - max(round(config.steps * config.decay_fraction), 1), 0)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step 1..steps."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        decay_steps = config.steps - (decay_start(config) or 0)
        left = min((config.steps - step) / decay_steps, 1.0)
    else:
        done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
        left = 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)


def _check_int(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_range(name: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not low <= value <= high or (open_low and value == low):
        raise ValueError(f"{name} must be in {'(' if open_low else '['}{low}, {high}], got {value}")

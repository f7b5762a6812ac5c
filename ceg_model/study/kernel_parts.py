"""What an arm's own kernels change in a step, op by op: the terms of Amdahl's sum.

The arm with its own kernels stands beside the same arm on the references: same maths, same dtype,
so the ops are all that differs. Own are the backends that the study gives the arm, or, where those
are the references too, all of our kernels. Every call of an op in a step is timed on either, on
the tensors that the step gives it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ceg_kernels import OPS, use_backend
from ceg_kernels.measure.steps import call_times
from ceg_model.op_calls import OpArguments, OpCalls
from ceg_model.study.plan import Plan
from ceg_model.study.rounds import Array, gain
from ceg_model.train import Trainer

PLAIN = "reference"
MIN_TIME_S = 0.05  # for a call on a backend; a study times some thirty


@dataclass
class Variant:
    """A model on its backends; `calls` are the ops of one micro-batch."""

    trainer: Trainer
    backends: dict[str, str] | None
    calls: OpCalls

    def step(self, number: int) -> None:
        """A training step, waited for. The schedule begins anew where it ends."""
        with use_backend(self.backends):
            loss, _ = self.trainer.step(1 + number % self.trainer.config.steps)
            loss.item()  # waits for the device


def kernel_parts(
    plan: Plan,
    keys: Mapping[tuple[str, str], Any],
    made: Mapping[Any, Variant],
    samples: Mapping[Any, Array],
) -> dict[str, dict[str, Any] | None]:
    """Arm -> step seconds on the references and on its own kernels, and the parts between them.

    keys: (arm, kind) -> key; made and samples: key -> variant and the seconds of its steps. A part
    has the op, its calls a step and mean seconds of one on either. None for the baseline, from
    which the others are told, and where nothing differs.
    """
    compared: dict[str, tuple[Any, Any, dict[tuple, str]]] = {}
    arguments: dict[tuple, tuple] = {}
    names: dict[tuple, set[str]] = {}
    for arm in plan.arms[1:]:
        plain, own = (keys[arm, kind] for kind in (PLAIN, _own(keys, arm)))
        calls = made[plain].calls
        assert isinstance(calls, OpArguments)
        if not (chosen := _chosen(calls, made[own].backends)):
            continue
        compared[arm] = (plain, own, chosen)
        for call, name in chosen.items():
            arguments.setdefault(call, calls.arguments[call])
            names.setdefault(call, {PLAIN}).add(name)
    times = _times(arguments, names, made, samples, keys[plan.baseline, "study"])
    found: dict[str, dict[str, Any] | None] = dict.fromkeys(plan.arms)
    for arm, (plain, own, chosen) in compared.items():
        baseline_s = float(np.median(samples[plain]))
        found[arm] = {
            "own": _own(keys, arm),
            "baseline_s": baseline_s,
            "measured_s": baseline_s / gain(samples[plain], samples[own])["gain"],
            "parts": _parts(made[plain], chosen, times),
        }
    return found


def _own(keys: Mapping[tuple[str, str], Any], arm: str) -> str:
    return "study" if keys[arm, "study"] != keys[arm, PLAIN] else "ours"


def _chosen(calls: OpArguments, backends: dict[str, str] | None) -> dict[tuple, str]:
    """The calls that do not run on the reference under `backends`, and what they run on."""
    with use_backend(backends):
        ran = {call: OPS[call[0]].choose(*args).name for call, args in calls.arguments.items()}
    return {call: name for call, name in ran.items() if name != PLAIN}


def _times(
    arguments: Mapping[tuple, tuple],
    names: Mapping[tuple, set[str]],
    made: Mapping[Any, Variant],
    samples: Mapping[Any, Array],
    base: Any,
) -> dict[tuple[tuple, str], float]:
    """Seconds of each call on each backend, at the speed that the machine had in the rounds.

    On a CPU a step of the baseline is timed beside the calls: its seconds in the rounds over those
    here tell how the speed has changed. Device seconds of a GPU hardly drift.
    """
    if not arguments:
        return {}
    variant = made[base]
    cpu = variant.trainer.device.type == "cpu"
    beside = {"step": functools.partial(variant.step, 0)} if cpu else None
    times, steps = call_times(
        arguments, names, device=variant.trainer.device.type, beside=beside, min_time_s=MIN_TIME_S
    )
    drift = float(np.median(samples[base])) / steps["step"] if cpu else 1.0
    return {pair: drift * seconds for pair, seconds in times.items()}


def _parts(
    plain: Variant, chosen: Mapping[tuple, str], times: Mapping[tuple[tuple, str], float]
) -> list[dict[str, Any]]:
    assert isinstance(plain.calls, OpArguments)
    rows: dict[str, dict[str, Any]] = {}
    for call, name in chosen.items():
        count = plain.calls.counts[call] * plain.trainer.config.grad_accum
        row = rows.setdefault(call[0], {"op": call[0], "calls": 0, "baseline_s": 0.0, "own_s": 0.0})
        row["calls"] += count
        row["baseline_s"] += count * times[call, PLAIN]
        row["own_s"] += count * times[call, name]
    return [
        row | {kind: row[kind] / row["calls"] for kind in ("baseline_s", "own_s")}
        for row in rows.values()
    ]

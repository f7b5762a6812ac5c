"""F_v / F_b without drift: steps of all arms of a scale, one of each in turn, in one process.

For variants that are not trained (stock torch, all of our kernels), and for studies whose runs are
not in lockstep or not on the arm's own kernels (lockstep.py tells why turns are single steps).

Variants of an arm: "study" (its own backends: ours where it is a kernel, else the reference),
"reference" and "torch" (all ops there), "ours" (the automatic choice: our kernel wherever one is
built). Variants whose ops run on the same backends are the same, and timed once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ceg_kernels import OPS, use_backend
from ceg_kernels.measure import ceilings
from ceg_kernels.measure.host import Stolen
from ceg_model import energy
from ceg_model.data import TokenData
from ceg_model.device import resolve_device
from ceg_model.op_calls import OpArguments, OpCalls
from ceg_model.process_group import ProcessGroup
from ceg_model.progress import ProgressFn
from ceg_model.study.kernel_parts import Variant, kernel_parts
from ceg_model.study.plan import Plan, Scale, backends_of, model_config, train_config
from ceg_model.study.rounds import Array, Step, gain, rounds
from ceg_model.train import Trainer

KINDS = ("study", "reference", "torch", "ours")

Backends = dict[str, str] | None


def variants(plan: Plan, ours: Mapping[str, str | None]) -> dict[tuple[str, str], Backends]:
    """(arm, kind) -> backends; None is the automatic choice."""
    forward = [name for name in OPS if not name.endswith("_backward")]
    out: dict[tuple[str, str], Backends] = {}
    for arm in plan.arms:
        out[arm, "study"] = backends_of(arm, ours)
        out[arm, "reference"] = dict.fromkeys(forward, "reference")
        out[arm, "torch"] = dict.fromkeys(forward, "torch")
        out[arm, "ours"] = None
    for op in forward:  # an op without a stock twin keeps its plain formula under "torch"
        if "torch" not in {b.name for b in OPS[op].backends}:
            for arm in plan.arms:
                (out[arm, "torch"] or {})[op] = "reference"
    return out


def measure(
    plan: Plan,
    scale: Scale,
    ours: Mapping[str, str | None],
    data_dir: str | Path,
    progress: ProgressFn = lambda done, total, text: None,
) -> dict[str, Any]:
    """Times every variant of every arm at one scale, and the calls of ops in their steps.

    Seconds, FLOPs a step and FLOP/s. joules_per_step is None where no GPU reports it, stolen_share
    where no kernel says what the host of a virtual machine took.
    """
    data = TokenData(data_dir)
    device = resolve_device(dict(plan.train).get("device", "auto"))
    with ProcessGroup.joined(device) as group:
        keys, made = _make(plan, scale, ours, data, group)
        steps = {key: variant.step for key, variant in made.items()}
        stolen = Stolen()
        samples = rounds(steps, least=plan.timing_rounds, seconds=plan.timing_seconds,
                         progress=progress)  # fmt: skip
        stolen_share = stolen.share()
        base, stock = keys[plan.baseline, "study"], keys[plan.baseline, "torch"]
        own = {arm: keys[arm, "study"] for arm in plan.arms}
        kernels = kernel_parts(plan, keys, made, samples)
        joules = _joules({key: steps[key] for key in own.values()}, device, plan.timing_seconds)
    arms: dict[str, Any] = {}
    for arm, key in own.items():
        variant = made[key]
        work = variant.trainer.model_flops
        arms[arm] = {kind: _timing(samples[keys[arm, kind]]) for kind in KINDS} | {
            "backends": backends_of(arm, ours),
            "dtype": _name(variant.trainer.dtype),
            "model_flops": work,
            "executed_flops": variant.trainer.executed_flops,
            "against_reference": gain(
                samples[base], samples[key], work / made[base].trainer.model_flops
            ),
            "against_torch": gain(
                samples[stock], samples[key], work / made[stock].trainer.model_flops
            ),
            "kernels": kernels[arm],
            "joules_per_step": joules.get(key),
        }
    return {
        "scale": scale.name,
        "rounds": len(samples[base]),
        "stolen_share": stolen_share,
        "device": device.type,
        "devices": group.world,
        "threads": torch.get_num_threads(),
        "peaks": _peaks({row["dtype"] for row in arms.values()}, device, plan.timing_seconds),
        "arms": arms,
    }


def _make(
    plan: Plan,
    scale: Scale,
    ours: Mapping[str, str | None],
    data: TokenData,
    group: ProcessGroup,
) -> tuple[dict[tuple[str, str], Any], dict[Any, Variant]]:
    """(arm, kind) -> key, and key -> variant: fewer, since keys say what really runs."""
    keys: dict[tuple[str, str], Any] = {}
    made: dict[Any, Variant] = {}
    for (arm, kind), backends in variants(plan, ours).items():
        config = model_config(arm, scale, data.vocab_size)
        train = train_config(plan, arm, scale, plan.seeds[0])
        trainer = Trainer(config, train, data, group)
        calls = OpArguments() if kind == "reference" else OpCalls()
        with use_backend(backends):
            trainer.show(calls)
        key = keys[arm, kind] = (config, train, tuple(sorted(calls.backends.items())))
        if key not in made:
            made[key] = Variant(trainer, backends, calls)
        elif kind == "reference":
            made[key].calls = calls  # with the arguments
    return keys, made


def _joules(steps: Mapping[Any, Step], device: torch.device, seconds: float) -> dict[Any, float]:
    """Of a step of each, alone for a second or more; nothing where no GPU reports it."""
    if (meter := energy.meter(device)) is None:
        return {}
    long = max(1.0, seconds / 5)
    return {
        key: energy.joules_per_call(functools.partial(step, 0), meter, seconds=long)
        for key, step in steps.items()
    }


def _peaks(dtypes: set[str], device: torch.device, seconds: float) -> dict[str, float]:
    """Measured by this process, with its threads and its neighbours: what its steps could reach."""
    taken = min(0.2, seconds / 10)
    return {name: ceilings.peak_flops(name, device.type, taken) for name in sorted(dtypes)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _timing(samples: Array) -> dict[str, float]:
    p20, median, p80 = np.quantile(samples, [0.2, 0.5, 0.8])
    return {"median_s": float(median), "p20_s": float(p20), "p80_s": float(p80)}

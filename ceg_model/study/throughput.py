"""F_v / F_b without drift: steps of all arms of a scale, one of each in turn, in one process.

For variants that are not trained (stock torch, all of our kernels), and for studies whose runs are
not in lockstep (lockstep.py tells why turns are single steps). Rounds start at another variant
each, and a gain is the median over rounds of the ratio within a round.

Variants of an arm: "study" (the backends its runs used), "reference" and "torch" (all ops there),
"ours" (the automatic choice: our kernel wherever one is built). Equal variants are timed once.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ceg_kernels import OPS, use_backend
from ceg_model.data import TokenData
from ceg_model.device import resolve_device
from ceg_model.process_group import ProcessGroup
from ceg_model.progress import ProgressFn
from ceg_model.study.plan import Plan, Scale, backends_of, model_config, train_config
from ceg_model.train import Trainer

KINDS = ("study", "reference", "torch", "ours")
WARM_UP, MAX_ROUNDS = 2, 400

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
    """Times every variant of every arm at one scale."""
    data = TokenData(data_dir)
    wanted = variants(plan, ours)
    configs = {arm: model_config(arm, scale, data.vocab_size) for arm in plan.arms}
    trains = {arm: train_config(plan, arm, scale, plan.seeds[0]) for arm in plan.arms}
    keys = {(a, k): (configs[a], trains[a], repr(b)) for (a, k), b in wanted.items()}
    backends = {keys[pair]: b for pair, b in wanted.items()}
    steppers = {}
    with ProcessGroup.joined(resolve_device(trains[plan.baseline].device)) as group:
        for key in backends:
            steppers[key] = Trainer(key[0], key[1], data, group)
        samples = _rounds(steppers, backends, plan, progress)
    flops = {key: stepper.model_flops for key, stepper in steppers.items()}
    base = keys[plan.baseline, "study"]
    stock = keys[plan.baseline, "torch"]
    arms: dict[str, Any] = {}
    for arm in plan.arms:
        own = keys[arm, "study"]
        arms[arm] = {kind: _timing(samples[keys[arm, kind]]) for kind in KINDS} | {
            "backends": wanted[arm, "study"],
            "model_flops": flops[own],
            "against_reference": _gain(samples, flops, own, base),
            "against_torch": _gain(samples, flops, own, stock),
        }
    return {
        "scale": scale.name,
        "rounds": len(samples[base]),
        "threads": torch.get_num_threads(),
        "arms": arms,
    }


def _rounds(
    steppers: Mapping[Any, Any],
    backends: Mapping[Any, Backends],
    plan: Plan,
    progress: ProgressFn,
) -> dict[Any, np.ndarray]:
    order = list(steppers)
    seconds: dict[Any, list[float]] = {key: [] for key in order}
    begun = time.monotonic()
    for r in range(-WARM_UP, MAX_ROUNDS):
        if r >= plan.timing_rounds and time.monotonic() - begun > plan.timing_seconds:
            break
        # A collection takes as long as a step here and would land in some sample.
        gc.collect()
        gc.disable()
        try:
            turn = order[r % len(order) :] + order[: r % len(order)]
            for key in turn:
                with use_backend(backends[key]):
                    start = time.perf_counter()
                    loss, _ = steppers[key].step(1 + max(r, 0))
                    loss.item()  # waits for the device
                    seconds[key].append(time.perf_counter() - start)
        finally:
            gc.enable()
        share = min((time.monotonic() - begun) / plan.timing_seconds, (r + 1) / plan.timing_rounds)
        progress(round(100 * min(max(share, 0.0), 1.0)), 100, "timing")
    return {key: np.array(times[WARM_UP:]) for key, times in seconds.items()}


def _timing(samples: np.ndarray) -> dict[str, float]:
    p20, median, p80 = np.quantile(samples, [0.2, 0.5, 0.8])
    return {"median_s": float(median), "p20_s": float(p20), "p80_s": float(p80)}


def _gain(
    samples: Mapping[Any, np.ndarray], flops: Mapping[Any, int], new: Any, base: Any
) -> dict[str, float]:
    """Ratio of FLOP/s, with the middle 60% of the rounds."""
    logs = np.log(samples[base] / samples[new]) + np.log(flops[new] / flops[base])
    p20, median, p80 = np.exp(np.quantile(logs, [0.2, 0.5, 0.8]))
    return {"gain": float(median), "p20": float(p20), "p80": float(p80)}

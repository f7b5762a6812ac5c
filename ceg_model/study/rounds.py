"""Steps of several variants in turn, and the ratio of two without the machine's drift.

Rounds take the variants in an order drawn anew, so that none always follows the same other. A gain
is the mean over stretches of rounds of the median ratio within a round: what slows a whole round
divides out, what hits one step alone is outvoted. The stretches are long against the machine's
bursts, so they are a sample (the method of batch means), and Student's t over them gives the
interval.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ceg_model.progress import ProgressFn
from ceg_model.study import stats
from ceg_model.study.lockstep import BATCHES, ROUNDS_PER_COLLECTION

WARM_UP, MAX_ROUNDS = 3, 400

Array = NDArray[np.float64]
Step = Callable[[int], Any]


def rounds(
    steps: Mapping[Any, Step],
    *,
    least: int,
    seconds: float,
    progress: ProgressFn = lambda done, total, text: None,
) -> dict[Any, Array]:
    """Seconds of a step of each, round by round, after WARM_UP rounds.

    At least `least` rounds, and more until `seconds` are over or MAX_ROUNDS are done.
    """
    taken: dict[Any, list[float]] = {key: [] for key in steps}
    draw = random.Random(0)
    gc.disable()  # a collection takes as long as a step here and would land in some sample
    try:
        for r in range(-WARM_UP, MAX_ROUNDS):
            if r <= 0:
                began = time.perf_counter()
            if r >= least and time.perf_counter() - began > seconds:
                break
            if r % ROUNDS_PER_COLLECTION == 0:
                gc.collect()
            for key in draw.sample(list(steps), len(steps)):
                start = time.perf_counter()
                steps[key](max(r, 0))
                taken[key].append(time.perf_counter() - start)
            share = min((time.perf_counter() - began) / max(seconds, 1e-9), (r + 1) / max(least, 1))
            progress(round(100 * min(max(share, 0.0), 1.0)), 100, "timing")
    finally:
        gc.enable()
    return {key: np.array(times[WARM_UP:]) for key, times in taken.items()}


def gain(base: Array, new: Array, work: float = 1.0) -> dict[str, Any]:
    """F_new / F_base from seconds (rounds,) of either in the same rounds, with a 95% interval.

    work: FLOPs of a step of `new` over those of one of `base`. ci is None for a single round.
    """
    logs = np.log(base / new) + np.log(work)
    parts = np.array([np.median(part) for part in np.array_split(logs, min(BATCHES, logs.size))])
    interval = stats.t_interval(parts)
    ci = None if interval is None else list(interval.ratio)
    return {"gain": float(np.exp(parts.mean())), "ci": ci}

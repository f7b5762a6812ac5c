"""Runs that differ in their number of steps alone share a trunk: the steps before the decay.

With warmup-stable-decay a run of S steps is, up to its decay, bit for bit a longer run of the same
seed. So a run leaves a checkpoint where its decay begins, and a longer one may begin there: it
ends as if it had been trained from its first step (tests/test_trunk.py), for a fraction of the
time. Several budgets, each with a complete schedule, cost little more than the longest.

    run/trunk/step-00000120/   as in checkpoint.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ceg_model import checkpoint
from ceg_model.rundir import RUN, read_json
from ceg_model.train_config import TrainConfig, decay_start

TRUNK = "trunk"


def grow(
    donor: Path,
    run: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    note: Callable[[str], None],
) -> dict[str, Any] | None:
    """Load the trunk of the run in `donor`; returns its state, as checkpoint.load does.

    None where the donor left no trunk yet, or one that goes on past this run's own decay.
    `run` is the description of the run that grows. Raises ValueError where the two differ in more
    than their steps.
    """
    found, folder = read_json(donor / RUN), donor / TRUNK
    if found is None or not folder.is_dir():
        return None
    for part in ("model", "train", "data"):
        for key, value in run[part].items():
            other = found[part].get(key)
            if other != value and (part, key) != ("train", "steps"):
                raise ValueError(
                    f"the trunk of run {found['id']} must be of the same {part}.{key} as run "
                    f"{run['id']}, {value!r}, got {other!r}"
                )
    ends, own = (decay_start(TrainConfig.from_dict(r["train"])) for r in (found, run))
    if ends is None or own is None or ends > own:
        return None
    return checkpoint.load(folder, model, optimizer, run_id=found["id"], note=note)

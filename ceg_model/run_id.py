"""The name of a run: equal for equal configs, seed and data, whatever the machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

from ceg_model.config import GPTConfig
from ceg_model.train_config import TrainConfig

RUN_VERSION = 1  # part of a run's id: raise it when the same config would give another curve


def run_id(model_config: GPTConfig, train_config: TrainConfig, data_hash: str) -> str:
    return run_ids(model_config, train_config, data_hash)(train_config.seed)


def run_ids(
    model_config: GPTConfig, train_config: TrainConfig, data_hash: str
) -> Callable[[int], str]:
    """seed -> run_id, for runs that differ in nothing else: a study names thousands of them."""
    train = {k: v for k, v in train_config.to_dict().items() if k != "log_to"}
    content = {
        "version": RUN_VERSION,
        "model": model_config.to_dict(),
        "train": train | {"seed": "\0"},  # what no other value can hold
        "data": data_hash,
    }
    before, after = json.dumps(content, sort_keys=True).split(json.dumps("\0"))
    return lambda seed: hashlib.sha256(f"{before}{seed}{after}".encode()).hexdigest()[:16]

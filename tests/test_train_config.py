"""TrainConfig: what it refuses, the learning rates it means, and the id of a run."""

import dataclasses
import json
import math

import pytest
import torch

from ceg_model import train as training
from ceg_model.config import GPTConfig
from ceg_model.train import run_id
from ceg_model.train_config import TrainConfig, learning_rate

MODEL = GPTConfig(n_layer=1, n_head=2, d_model=32, seq_len=32, norm="layer_norm", dropout=0.1)
TRAIN = TrainConfig(steps=8, batch_size=2, eval_every=4, eval_batches=2, dtype="float32")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {1: 1.0, 50: 1.0, 100: 1.0}),
        ({"warmup_steps": 10}, {1: 0.1, 5: 0.5, 10: 1.0, 11: 1.0, 100: 1.0}),
        (
            {"schedule": "cosine", "min_lr_ratio": 0.1, "warmup_steps": 20},
            {10: 0.5, 20: 1.0, 60: 0.55, 100: 0.1},
        ),
        (
            {"schedule": "wsd", "decay_fraction": 0.2, "warmup_steps": 4},
            {2: 0.5, 80: 1.0, 90: 0.5, 95: 0.25, 100: 0.0},
        ),
    ],
)
def test_learning_rates(config, expected):
    config = TrainConfig(steps=100, lr=2.0, **config)
    for step, share in expected.items():
        assert learning_rate(config, step) == pytest.approx(2.0 * share)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 1.5}, TypeError, "steps must be an int, got 1.5"),
        ({"batch_size": True}, TypeError, "batch_size must be an int, got True"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be at least 1, got 0"),
        ({"lr": 0.0}, ValueError, r"lr must be in \(0, inf\], got 0.0"),
        ({"lr": "fast"}, TypeError, "lr must be a number, got 'fast'"),
        ({"lr": math.nan}, ValueError, r"lr must be in \(0, inf\], got nan"),
        ({"grad_clip": 0.0}, ValueError, r"grad_clip must be in \(0, inf\], got 0.0"),
        ({"min_lr_ratio": 2.0}, ValueError, r"min_lr_ratio must be in \[0, 1\], got 2.0"),
        ({"decay_fraction": -1.0}, ValueError, r"decay_fraction must be in \[0, 1\], got -1.0"),
        ({"weight_decay": -0.1}, ValueError, r"weight_decay must be in \[0, inf\], got -0.1"),
        ({"eps": 0.0}, ValueError, r"eps must be in \(0, inf\], got 0.0"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas must be two numbers in \[0, 1\), got"),
        ({"betas": (0.9,)}, ValueError, r"betas must be two numbers in \[0, 1\), got"),
        ({"schedule": "linear"}, ValueError, "schedule must be one of constant, wsd, cosine, got"),
        ({"dtype": "fp8"}, ValueError, "dtype must be one of auto, float32, bfloat16, got 'fp8'"),
        ({"rate": 1}, ValueError, "TrainConfig has no field 'rate'; its fields: steps, "),
    ],
)
def test_bad_train_configs_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        TrainConfig.from_dict(fields)


def test_devices_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda, got 'meta'"):
        training.resolve_device("meta")
    if not torch.cuda.is_available():
        with pytest.raises(
            ValueError, match="device must be one that torch can use here, got 'cuda'"
        ):
            training.resolve_device("cuda")


def test_run_ids_tell_runs_apart():
    assert TrainConfig.from_dict(json.loads(json.dumps(TRAIN.to_dict()))) == TRAIN
    ids = {
        run_id(MODEL, TRAIN, "d"),
        run_id(dataclasses.replace(MODEL, norm="rms_norm"), TRAIN, "d"),
        run_id(MODEL, dataclasses.replace(TRAIN, seed=1), "d"),
        run_id(MODEL, dataclasses.replace(TRAIN, backend={"attention": "torch"}), "d"),
        run_id(MODEL, TRAIN, "e"),
    }
    assert len(ids) == 5
    assert run_id(MODEL, TRAIN, "d") in ids

"""Runs of several budgets that share a trunk end as if each had been trained from its start."""

import dataclasses
import json

import pytest

from ceg_model.rundir import METRICS, RUN, read_metrics
from ceg_model.train import train, training
from ceg_model.train_config import TrainConfig, decay_start, learning_rate
from ceg_model.trunk import TRUNK
from tests import test_train
from tests.test_train import MODEL

tokens = test_train.data_dir  # the fixture

SHORT = TrainConfig(
    steps=10, batch_size=2, lr=3e-3, schedule="wsd", warmup_steps=2, decay_fraction=0.4,
    eval_every=4, eval_batches=1, checkpoint_every=None, dtype="float32", device="cpu",
)  # fmt: skip
LONG = dataclasses.replace(SHORT, steps=20)


def _grow(config, tokens, run_dir, donor):
    rows = training(MODEL, config, tokens, run_dir, donor=donor)
    while True:
        try:
            next(rows)
        except StopIteration as end:
            return end.value


def _curve(run_dir):
    keys = ("step", "loss", "eval_loss", "model_flops", "lr", "grad_norm")
    return [tuple(row[key] for key in keys) for row in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def short(tokens, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("trunk") / "short"
    assert train(MODEL, SHORT, tokens, run_dir)["status"] == "done"
    return run_dir


def test_the_rate_is_whole_up_to_the_trunk_and_falls_after_it():
    assert decay_start(SHORT) == 6
    rates = [learning_rate(SHORT, step) for step in range(1, 11)]
    assert rates[1:6] == [SHORT.lr] * 5
    assert rates[6:] == pytest.approx([SHORT.lr * left for left in (0.75, 0.5, 0.25, 0)])
    assert decay_start(dataclasses.replace(SHORT, schedule="constant")) is None


def test_a_run_on_another_s_trunk_equals_one_from_its_first_step(short, tokens, tmp_path):
    train(MODEL, LONG, tokens, tmp_path / "whole")
    _grow(LONG, tokens, tmp_path / "grown", short)
    assert _curve(tmp_path / "grown")[-1] == _curve(tmp_path / "whole")[-1]
    steps = [row[0] for row in _curve(tmp_path / "grown")]
    assert steps == list(range(1, 21))
    assert json.loads((tmp_path / "grown" / RUN).read_text())["sessions"][0]["from_step"] == 6
    whole, grown = ({row[0]: row for row in _curve(tmp_path / name)} for name in ("whole", "grown"))
    assert whole == grown
    # and the grown run leaves a trunk of its own, for the next budget
    assert [p.name for p in (tmp_path / "grown" / TRUNK).iterdir()] == ["step-00000012"]


def test_a_kill_between_growing_and_the_first_checkpoint_loses_nothing(short, tokens, tmp_path):
    rows = training(MODEL, LONG, tokens, tmp_path / "run", donor=short)
    assert next(rows) == 7
    rows.close()
    assert len((tmp_path / "run" / METRICS).read_text().splitlines()) == 7
    _grow(LONG, tokens, tmp_path / "run", short)
    train(MODEL, LONG, tokens, tmp_path / "whole")
    assert _curve(tmp_path / "run") == _curve(tmp_path / "whole")


def test_a_trunk_that_is_too_long_is_not_used(short, tokens, tmp_path):
    shorter = dataclasses.replace(SHORT, steps=8)
    assert _grow(shorter, tokens, tmp_path / "run", short)["status"] == "done"
    assert json.loads((tmp_path / "run" / RUN).read_text())["sessions"][0]["from_step"] == 0


def test_a_trunk_of_another_run_is_refused(short, tokens, tmp_path):
    other = dataclasses.replace(LONG, lr=1e-3)
    with pytest.raises(ValueError, match=r"must be of the same train.lr .* 0.001, got 0.003"):
        _grow(other, tokens, tmp_path / "run", short)

"""Runs taken in turn: the order, what one run's end does to the others, and the common clock."""

import dataclasses

import numpy as np
import pytest
import torch

from ceg_kernels import OPS, use_backend
from ceg_model.study.lockstep import BATCHES, common_clock, in_turn, log_stretches


def steps(log, name, begin, end, error=None):
    for step in range(begin, end):
        log.append((step, name))
        yield step
    if error is not None:
        raise error
    return {"name": name}


def test_a_round_is_a_row_of_each_and_starts_at_another_one():
    log = []
    ended = dict(in_turn({name: steps(log, name, 0, 3) for name in "abc"}))
    assert ended == {name: {"name": name} for name in "abc"}
    assert ["".join(n for s, n in log if s == step) for step in range(3)] == ["abc", "bca", "cab"]


def test_a_run_that_resumed_behind_catches_up_first():
    log = []
    list(in_turn({"late": steps(log, "late", 1, 6), "early": steps(log, "early", 4, 6)}))
    assert log[2:5] == [(2, "late"), (3, "late"), (4, "late")]
    assert {name for _, name in log[5:7]} == {"late", "early"}


def test_an_error_ends_one_run_and_a_bug_ends_all():
    log = []
    broken = steps(log, "broken", 0, 1, ValueError("diverged"))
    ended = dict(in_turn({"broken": broken, "whole": steps(log, "whole", 0, 5)}))
    assert str(ended["broken"]) == "diverged"
    assert ended["whole"] == {"name": "whole"}
    with pytest.raises(KeyError):
        list(in_turn({"bug": steps(log, "bug", 0, 1, KeyError("x"))}))


def test_each_run_keeps_its_own_backend():
    args = next(iter(OPS["rope"].samples(torch.float32, "cpu"))).args
    seen = {}

    def run(backend):
        with use_backend(backend):
            for step in range(3):
                seen.setdefault(backend, set()).add(OPS["rope"].choose(*args).name)
                yield step
        return {}

    list(in_turn({backend: run(backend) for backend in ("reference", "cpu")}))
    assert seen == {"reference": {"reference"}, "cpu": {"cpu"}}
    assert OPS["rope"].choose(*args).name == "cpu"


@dataclasses.dataclass
class Machine:
    """Arms of known cost on a machine whose speed drifts and stutters."""

    cost: np.ndarray
    rounds: int = 480

    def seconds(self, *, drift=0.3, noise=0.1):
        generator = np.random.default_rng(0)
        speed = 1 + drift * np.linspace(-1, 1, self.rounds)
        own = np.exp(noise * generator.standard_normal((self.cost.size, self.rounds)))
        return np.cumsum(self.cost[:, None] * speed * own, axis=1)


def test_common_clock_takes_the_drift_out_and_leaves_the_costs():
    machine = Machine(np.array([1.0, 1.3, 0.6, 0.8, 1.9]))
    raw = machine.seconds()
    clock = common_clock(raw)
    # time to a target: the first arm needs 80% of the rounds, the others 30%
    late, early = int(0.8 * machine.rounds), int(0.3 * machine.rounds)
    truth = np.log(late / early * machine.cost[0] / machine.cost)
    assert np.abs(np.log(raw[0, late - 1] / raw[:, early - 1]) - truth).max() > 0.1
    assert np.abs(np.log(clock[0, late - 1] / clock[:, early - 1]) - truth)[1:].max() < 0.03
    # a hiccup of one arm stays that arm's
    hurt = machine.seconds(noise=0.0)
    hurt[2, 100:] += 50.0
    assert common_clock(hurt)[2, -1] - common_clock(machine.seconds(noise=0.0))[2, -1] > 40.0


def test_without_drift_the_common_clock_is_the_raw_one():
    raw = Machine(np.array([1.0, 2.0, 3.0])).seconds(drift=0.0, noise=0.0)
    np.testing.assert_allclose(common_clock(raw), raw, rtol=1e-12)


def test_log_stretches_are_batch_means_of_the_ratio():
    clock = common_clock(Machine(np.array([1.0, 0.5, 2.0])).seconds())
    logs = log_stretches(clock[0]) - log_stretches(clock[1])
    assert logs.size == BATCHES
    assert logs.mean() == pytest.approx(np.log(2), abs=0.02)
    assert logs.std(ddof=1) / np.sqrt(BATCHES) < 0.01

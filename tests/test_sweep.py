"""The learning-rate sweep, and the runs that a plan asks for as results come in."""

import dataclasses
import math

import pytest

from ceg_model.rundir import RUN, read_json
from ceg_model.study.collect import collect
from ceg_model.study.plan import Plan, model_config, trained_backends
from ceg_model.study.plans import PLANS, _scale
from ceg_model.study.runner import our_kernels, run_study
from ceg_model.study.schedule import schedule
from ceg_model.study.store import Store
from ceg_model.study.sweep import Sweep, choose
from tests import test_study

tokens = test_study.tokens  # the fixture

PLAN = Plan(
    "test",
    ("baseline", "rope", "flash_attention"),
    (_scale("S", layers=1, width=16, heads=2, length=16, steps=16, batch_size=2, lr=4e-3),),
    seeds=(0, 1),
    train={
        "schedule": "wsd", "warmup_steps": 1, "dtype": "float32", "device": "cpu",
        "eval_every": 8, "eval_batches": 2, "checkpoint_every": 4,
    },
    budgets=(0.25, 0.5, 1.0),
    sweep=Sweep(budget=0.5, extensions=2, seeds=1),
    fast_curves=True,
    timing_rounds=3,
    timing_seconds=0.1,
)  # fmt: skip
GRID = (0.5, 1.0, 2.0)


def plan_runs(plan, index=None):
    return schedule(plan, {}, data_hash="x", vocab_size=256, index=index or {})


def finish(found, loss_of):
    """An index in which every run found so far has ended."""
    return {run: {"status": "done", "eval_loss": loss_of(spec)} for run, spec in found.runs.items()}


def test_the_best_rate_inside_the_grid_is_taken():
    choice = choose(GRID, {0.5: 3.0, 1.0: 2.0, 2.0: 2.5}, extensions=3)
    assert (choice.best, choice.inside, choice.missing) == (1.0, True, ())


def test_rates_that_are_missing_are_asked_for_first():
    assert choose(GRID, {1.0: 2.0}, extensions=3).missing == (0.5, 2.0)


@pytest.mark.parametrize(("best", "further"), [(0.5, 0.25), (2.0, 4.0)])
def test_an_edge_extends_the_grid_until_the_best_is_inside(best, further):
    tried = {rate: abs(math.log(rate / best)) for rate in GRID}
    choice = choose(GRID, tried, extensions=1)
    assert (choice.best, choice.missing) == (None, (further,))
    assert choose(GRID, {**tried, further: 9.0}, extensions=1).inside
    still = choose(GRID, {**tried, further: -1.0}, extensions=1)
    assert (still.best, still.inside) == (further, False)
    assert "of the sweep" in still.reason


def test_a_rate_that_failed_bounds_the_sweep_like_a_bad_one():
    assert choose(GRID, {0.5: 3.0, 1.0: 2.0, 2.0: math.inf}, extensions=0).inside
    all_failed = dict.fromkeys(GRID, math.inf)
    assert choose(GRID, all_failed, extensions=1).missing == (0.25,)


def test_a_sweep_refuses_a_grid_without_an_inside():
    with pytest.raises(ValueError, match="factors must be three or more, rising"):
        Sweep(factors=(1.0, 2.0))


def test_runs_follow_from_the_rates_that_the_sweeps_chose():
    begin = plan_runs(PLAN)
    assert {(s.arm, s.train.lr) for s in begin.runs.values()} == {
        (arm, 4e-3 * factor) for arm in ("baseline", "rope") for factor in GRID
    }
    assert all(s.sweep and s.train.steps == 8 and s.seed == 0 for s in begin.runs.values())
    assert len(begin.pending) == 3 * 2 * 3
    index = finish(begin, lambda s: abs(s.train.lr - 4e-3) + 1)
    found = plan_runs(PLAN, index)
    assert not found.pending
    finals = found.finals()
    assert len(finals) == 3 * 2 * 3
    assert {s.train.lr for s in finals.values()} == {4e-3}
    assert {s.train.steps for s in finals.values()} == {4, 8, 16}
    # the sweep's run at the chosen rate is a run of the study, not one more
    assert len(found.runs) == 18 + 2 * 2
    # each budget grows on the trunk of the one before
    chain = [(run, s) for run, s in finals.items() if (s.arm, s.seed) == ("rope", 1)]
    assert [s.donor for _, s in chain] == ["", *(run for run, _ in chain[:-1])]


def test_a_rate_that_parts_the_seeds_is_not_the_best():
    """At 8e-3 one seed does very well and the other stays where it was."""
    plan = dataclasses.replace(PLAN, sweep=Sweep(budget=0.5, seeds=2))

    def loss(spec):
        if spec.train.lr == 8e-3:
            return 1.0 if spec.seed == 0 else 3.5
        return 2.0 if spec.train.lr == 4e-3 else 2.2

    begin = plan_runs(plan)
    assert len(begin.runs) == 2 * 3 * 2
    half = {run: r for run, r in finish(begin, loss).items() if begin.runs[run].seed == 0}
    assert not plan_runs(plan, half).finals()
    finals = plan_runs(plan, finish(begin, loss)).finals()
    assert {s.train.lr for s in finals.values()} == {4e-3}


def test_a_kernel_takes_over_the_baseline_s_rate_and_an_edge_is_extended():
    index = finish(plan_runs(PLAN), lambda s: s.train.lr if s.arm == "baseline" else 1.0)
    found = plan_runs(PLAN, index)
    more = [s for run, s in found.runs.items() if run not in index]
    assert {(s.arm, s.train.lr) for s in more if s.sweep} == {("baseline", 1e-3), ("rope", 1e-3)}
    index |= finish(found, lambda s: s.train.lr)
    found = plan_runs(PLAN, index)
    index |= finish(found, lambda s: s.train.lr)
    found = plan_runs(PLAN, index)
    rates = {s.arm: s.train.lr for s in found.finals().values()}
    assert rates["flash_attention"] == rates["baseline"] == 4e-3 / 8
    tuning = next(t for t in found.tunings if t.arm == "baseline")
    assert not tuning.choice.inside
    assert "lowest of the sweep" in tuning.choice.reason


def test_algorithm_arms_may_train_on_our_kernels_and_the_baseline_does_not():
    ours = {"attention": "cpu", "rope": "cpu", "rms_norm": None}
    assert set(trained_backends(PLAN, "baseline", ours).values()) == {"reference"}
    fast = trained_backends(PLAN, "rope", ours)
    assert (fast["attention"], fast["rope"], fast["rms_norm"]) == ("cpu", "cpu", "reference")
    kernel = trained_backends(PLAN, "flash_attention", ours)
    assert (kernel["attention"], kernel["rope"]) == ("cpu", "reference")
    own = dataclasses.replace(PLAN, fast_curves=False)
    assert set(trained_backends(own, "rope", ours).values()) == {"reference"}


@pytest.mark.parametrize("changes", [
    {"budgets": (0.5, 0.25, 1.0)}, {"budgets": (0.25, 0.5)}, {"budgets": (0.25, 1.0)},
    {"lockstep": True},
])  # fmt: skip
def test_plans_that_contradict_themselves_are_refused(changes):
    with pytest.raises(ValueError, match=r"must (rise|end|be)"):
        dataclasses.replace(PLAN, **changes)


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_builds_its_models_and_survives_json(name):
    plan = PLANS[name]
    assert Plan.from_dict(plan.to_dict()) == plan
    for scale in plan.scales:
        for arm in plan.arms:
            assert model_config(arm, scale, 50257).d_model
    found = plan_runs(plan)
    assert len({**found.runs, **found.pending}) >= len(plan.arms) * len(plan.scales)


def test_a_swept_study_runs_resumes_and_reports(tokens, tmp_path):
    stopped = run_study(PLAN, tmp_path / "s", tokens, budget_minutes=0.03)
    assert stopped.stopped
    summary = run_study(PLAN, tmp_path / "s", tokens)
    assert summary.done == summary.planned
    assert not summary.failed
    whole = run_study(PLAN, tmp_path / "whole", tokens)
    assert whole.done == summary.done
    results, undisturbed = collect(tmp_path / "s"), collect(tmp_path / "whole")
    assert results["sweeps"] == undisturbed["sweeps"]
    assert len(results["curves"]) == 18
    for ours, theirs in zip(results["curves"], undisturbed["curves"], strict=True):
        assert (ours["arm"], ours["budget"], ours["loss"]) == (
            theirs["arm"], theirs["budget"], theirs["loss"],
        )  # fmt: skip
    assert {len(s["points"]) for s in results["sweeps"]} <= {3, 4, 5}
    sessions = [
        session
        for path in (tmp_path / "whole" / "runs").iterdir()
        for session in read_json(path / RUN)["sessions"]
    ]
    assert sum(session["from_step"] > 0 for session in sessions) >= 10  # grown on a trunk


def test_a_seed_that_is_not_whole_is_left_out(tokens, tmp_path):
    """Killed in seed 1, the study compares the arms on seed 0 and says so."""
    ours = our_kernels("cpu")
    one = dataclasses.replace(PLAN, sweep=None, arms=("baseline", "rope"))
    run_study(one, tmp_path / "s", tokens)
    store = Store(tmp_path / "s")
    data_hash = store.study()["data_hash"]
    found = schedule(one, ours, data_hash=data_hash, vocab_size=256, index=store.index())
    run = next(r for r, s in found.runs.items() if (s.arm, s.seed, s.budget) == ("rope", 1, 1.0))
    (store.path(run) / "result.json").unlink()
    results = collect(tmp_path / "s")
    assert results["left_out"] == [{"scale": "S", "seed": 1}]
    assert {c["seed"] for c in results["curves"]} == {"0"}

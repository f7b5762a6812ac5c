"""Plans, runner, store and the commands, on a study of seconds.

Left out: the numbers of a study that small mean nothing, so only equality is tested, not size.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from ceg_kernels import OPS
from ceg_model import cli, data
from ceg_model.columns import COLUMNS
from ceg_model.rundir import read_metrics
from ceg_model.study.collect import collect
from ceg_model.study.innovations import (
    INNOVATIONS,
    config_changes,
    is_same_maths,
    kernel_ops,
    train_changes,
)
from ceg_model.study.plan import Plan, Scale, backends_of, model_config
from ceg_model.study.plans import PLANS, plan_named
from ceg_model.study.report import write_report
from ceg_model.study.runner import our_kernels, run_study
from ceg_model.study.schedule import schedule
from ceg_model.study.store import FIRST_FAILURE, Store
from ceg_model.study.throughput import variants

PLAN = Plan(
    "test",
    ("baseline", "layer_norm", "flash_attention"),
    (
        Scale(
            "S",
            {"n_layer": 1, "d_model": 32, "n_head": 2, "seq_len": 32},
            {"steps": 60, "batch_size": 4},
        ),
    ),
    (0, 1),
    train={
        "lr": 3e-3, "dtype": "float32", "device": "cpu", "eval_every": 4, "log_every": 1,
        "eval_batches": 2, "checkpoint_every": 10,
    },
    timing_rounds=3,
    timing_seconds=0.1,
    workers=2,
    lockstep=True,
)  # fmt: skip
OTHER = (
    "import sys; from tests.test_study import PLAN; from ceg_model.study.runner import run_study; "
    "run_study(PLAN, sys.argv[1], sys.argv[2])"
)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    text = folder / "text"
    text.mkdir()
    for i in range(40):
        body = " ".join(f"word{(j * j + i) % 97} and {j % 13}" for j in range(120))
        (text / f"{i}.txt").write_text(body)
    data.prepare(data.Request(sources=(str(text),), val_fraction=0.2), folder / "tokens")
    return folder / "tokens"


@pytest.fixture(scope="module")
def study(tmp_path_factory, tokens):
    """An undisturbed study."""
    out = tmp_path_factory.mktemp("study") / "one"
    summary = run_study(PLAN, out, tokens)
    assert (summary.planned, summary.done, summary.failed) == (6, 6, [])
    assert len(list(out.glob(f"runs/*/{COLUMNS}"))) == 6  # or a report would parse every line
    return out


def losses(folder):
    return {
        (c["arm"], c["scale"], c["seed"]): (c["flops"], c["loss"])
        for c in collect(folder)["curves"]
    }


def test_every_innovation_gives_a_model_that_differs_or_names_a_kernel():
    scale = PLANS["nano"].scales[0]
    base = model_config("baseline", scale, 256)
    for name, entry in INNOVATIONS.items():
        config = model_config(name, scale, 256)
        same = config == base and not train_changes(name)
        assert same == is_same_maths(name), name
        assert bool(kernel_ops(name)) == (entry.kind in ("kernel", "bundle"))
        assert bool(train_changes(name)) == (entry.kind == "precision")
        assert all(op in OPS for op in kernel_ops(name))
        assert all(part in INNOVATIONS for part in entry.parts)
        assert all(p.source and p.what for p in entry.published)
    with pytest.raises(ValueError, match="arm must be one of baseline"):
        config_changes("nonsense", {})


def test_bundle_is_the_union_of_its_parts():
    config = model_config("ln_rope_fa", PLANS["nano"].scales[0], 256)
    assert (config.norm, config.position) == ("layer_norm", "rope")
    assert kernel_ops("ln_rope_fa") == ("attention",)


def test_algorithm_arms_run_on_the_references_and_kernel_arms_say_what_ran():
    ours = {"attention": "cpu", "rope": "cpu"}
    assert set(backends_of("rope", ours).values()) == {"reference"}
    fused = backends_of("flash_attention", ours)
    assert fused.pop("attention") == "cpu"
    assert set(fused.values()) == {"reference"}
    assert backends_of("flash_attention", {"attention": None})["attention"] == "torch"


def test_nano_holds_its_arms_in_lockstep_at_a_constant_rate():
    nano = PLANS["nano"]
    found = schedule(nano, {}, data_hash="", vocab_size=256, index={})
    specs = list(found.runs.values())
    assert len(specs) == 42
    assert [s.arm for s in specs[:7]] == list(nano.arms)  # neighbours in time
    assert len({(s.scale, s.seed) for s in specs[:7]}) == 1
    for spec in specs:
        assert spec.train.schedule == "constant"
        assert spec.train.steps // spec.train.eval_every >= 12


def test_plan_round_trip_and_errors():
    assert Plan.from_dict(json.loads(json.dumps(PLAN.to_dict()))) == PLAN
    with pytest.raises(ValueError, match="arms must start with the baseline"):
        Plan("x", ("rope",), PLAN.scales, (0,))
    with pytest.raises(ValueError, match="seeds must be there and differ"):
        Plan("x", ("baseline",), PLAN.scales, (0, 0))
    with pytest.raises(ValueError, match=r"PLAN must be one of cpu-ladder, .*smoke.* got 'x'"):
        plan_named("x")


def test_throughput_variants_are_forceable():
    for backends in variants(PLANS["nano"], our_kernels("cpu")).values():
        for op, name in (backends or {}).items():
            OPS[op].backend(name)


def test_kernel_arm_is_equal_and_gains_are_there(study):
    results = collect(study)
    kernel = results["estimate"]["arms"]["flash_attention"]
    assert kernel["equivalence"]["passed"] is True
    # The arms share initialisation, data and maths; only rounding parts their losses.
    for seed in ("0", "1"):
        base, fused = (losses(study)[arm, "S", seed] for arm in ("baseline", "flash_attention"))
        assert fused[0] == base[0]
        assert fused[1] == pytest.approx(base[1], abs=1e-4)
    timing = results["throughput"]["S"]["arms"]
    assert timing["baseline"]["against_reference"]["gain"] == 1.0
    assert results["hardware"]["S"]["flash_attention"]["against_torch"] > 0
    assert results["complete"] == {"planned": 6, "done": 6, "failed": []}


def test_lockstep_changes_no_loss_and_gives_a_common_clock(tmp_path, study, tokens):
    alone = dataclasses.replace(PLAN, lockstep=False)
    assert run_study(alone, tmp_path / "alone", tokens).done == 6
    assert losses(tmp_path / "alone") == losses(study)
    in_turn, one_by_one = collect(study), collect(tmp_path / "alone")
    gains = in_turn["hardware"]["S"]["flash_attention"]
    assert gains["source"] == "runs in lockstep"
    assert gains["ci"][0] < gains["against_reference"] < gains["ci"][1]
    gains = one_by_one["hardware"]["S"]["flash_attention"]
    assert (gains["source"], gains["ci"]) == ("throughput benchmark", None)
    raw = read_metrics(next(iter((study / "runs").iterdir())))
    assert [row["step"] for row in raw] == list(range(1, 61))


def test_report_of_a_real_study(study):
    page = write_report(collect(study), Store(study).report).read_text()
    assert "6 of 6 runs" in page
    assert "FlashAttention" in page


def test_finished_study_does_nothing_again(study, tokens):
    before = sorted((p, p.stat().st_mtime_ns) for p in study.rglob("*.json*"))
    assert run_study(PLAN, study, tokens).done == 6
    assert sorted((p, p.stat().st_mtime_ns) for p in study.rglob("*.json*")) == before


def test_another_plan_is_refused(study, tokens):
    with pytest.raises(ValueError, match="must hold the same plan: seeds is"):
        run_study(dataclasses.replace(PLAN, seeds=(0,)), study, tokens)


def test_steps_can_be_timed_for_longer_without_another_study(study):
    store, plan = Store(study), dataclasses.replace(PLAN, timing_seconds=9.0)
    before = store.study()
    again = {**before, "plan": json.loads(json.dumps(plan.to_dict()))}
    try:
        assert store.begin(again)["plan"]["timing_seconds"] == 9.0
        assert Store(study).study() == again  # what the timings are of
    finally:
        store.begin(before)
    assert store.study() == before


def test_foreign_folder_is_refused(tmp_path, tokens):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"got one with thesis\.tex"):
        run_study(PLAN, tmp_path, tokens)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_killed_study_goes_on_to_the_same_losses(tmp_path, study, tokens):
    out = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for wanted in (1, 3):  # evaluations or results to wait for before the kill
        process = subprocess.Popen([sys.executable, "-c", OTHER, out, tokens], env=environment)
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            if len(list(out.glob("runs/*/metrics.jsonl"))) >= wanted:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(1.2)  # the workers see that their parent is gone
    left = [p for p in out.glob("runs/*") if not (p / "result.json").exists()]
    assert run_study(PLAN, out, tokens).done == 6
    assert losses(out) == losses(study)
    assert left or (out / "throughput" / "S.json").exists()


def test_budget_stops_and_the_same_call_goes_on(tmp_path, tokens):
    one = dataclasses.replace(PLAN, arms=("baseline",), seeds=(0,), workers=1)
    summary = run_study(one, tmp_path / "s", tokens, budget_minutes=0)
    assert (summary.done, summary.stopped) == (0, True)
    with pytest.raises(ValueError, match="finished run of the baseline"):
        collect(tmp_path / "s")
    assert run_study(one, tmp_path / "s", tokens).done == 1


def test_failed_run_is_tried_twice_and_reported(tmp_path, tokens):
    wild = Scale("S", PLAN.scales[0].model, {**PLAN.scales[0].train, "lr": 1e30, "grad_clip": None})
    plan = dataclasses.replace(PLAN, arms=("baseline",), scales=(wild,), seeds=(0,), workers=1)
    notes = []
    summary = run_study(plan, tmp_path / "s", tokens, note=notes.append)
    assert [(spec.arm, "finite" in reason) for spec, reason in summary.failed] == [
        ("baseline", True)
    ]
    assert any("trying once more" in n for n in notes)
    assert any("failed twice" in n for n in notes)
    store = Store(tmp_path / "s")
    run = next(store.runs.iterdir()).name
    assert (store.path(run) / FIRST_FAILURE).exists()
    again = run_study(plan, tmp_path / "s", tokens)
    assert len(again.failed) == 1


def test_estimate_command(tmp_path, capsys):
    rows = ["arm,flops,loss,lr,seed"]
    for arm, k in (("baseline", 1), ("rope", 2)):
        for seed in range(2):
            rows += [
                f"{arm},{c}e12,{1.5 + (k * c * (1 + seed / 50)) ** -0.3},1e-3,{seed}"
                for c in range(1, 31)
            ]
    path = tmp_path / "c.csv"
    path.write_text("\n".join(rows))
    assert cli.main(["estimate", str(path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["arms"]["rope"]["g_alg"] == pytest.approx(2, rel=0.01)
    assert {"baseline", "target_loss", "mode", "arms", "class", "aa"} <= set(answer)
    assert cli.main(["estimate", str(path)]) == 0
    assert "G_alg 2.00" in capsys.readouterr().out
    assert cli.main(["estimate", str(path), "--target", "0.1"]) == 0  # a refusal is an answer
    assert "reached by neither arm" in capsys.readouterr().out
    assert cli.main(["estimate", str(path), "--mode", "endpoint"]) == 0
    assert "got 1" in capsys.readouterr().out  # budget, three needed
    path.write_text("arm,flops,loss\nbaseline,1,x\n")
    assert cli.main(["estimate", str(path)]) == 2
    assert "c.csv line 2, column 'loss': expected a number, got 'x'" in capsys.readouterr().err
    assert cli.main(["estimate", str(tmp_path / "none.csv")]) == 2


def test_report_command_on_no_study(tmp_path, capsys):
    assert cli.main(["study", "report", str(tmp_path)]) == 2
    assert "has no study.json" in capsys.readouterr().err


def test_index_is_fast(tmp_path):
    store = Store(tmp_path)
    for i in range(2000):
        folder = store.path(f"{i:016x}")
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"status": "done", "reason": ""}))
    start = time.monotonic()
    assert len(store.index()) == 2000
    assert time.monotonic() - start < 2.0  # 10,000 in less than 10 s


def test_our_kernels_are_ours():
    for op, name in our_kernels("cpu").items():
        assert name not in ("torch", "reference")
        if name is not None:
            sample = next(iter(OPS[op].samples(torch.float32, "cpu")))
            assert OPS[op].backend(name).why_not(*sample.args) is None

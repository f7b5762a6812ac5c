"""Curves of other tools as our table, and a study's curves as the same table.

Left out: the event files of TensorBoard where the package is not installed, and W&B's own servers.
"""

import dataclasses
import json
import math
import sys

import pytest

from ceg_model import cli, data, environment
from ceg_model.device import resolve_device
from ceg_model.study.collect import collect
from ceg_model.study.curve_export import study_curves, write_curves
from ceg_model.study.curve_import import Wanted, import_curves, table, write_table
from ceg_model.study.curves import CurveError, read_csv
from ceg_model.study.lockstep import in_turn
from ceg_model.study.plan import Scale
from ceg_model.study.plans import plan_named
from ceg_model.study.runner import our_kernels
from ceg_model.study.schedule import schedule
from ceg_model.study.store import Store
from ceg_model.train import training

STEPS = range(10, 310, 10)
GAINS = {"base": 1, "mod - b": 2}  # a run's name may hold W&B's own separator


def loss(step, k):
    return 1.5 + (k * step / 10) ** -0.3


def chart(*, low=0.0):
    """W&B's export of a chart with two runs that were not evaluated at the same steps."""
    lines = ['"Step"' + "".join(
        f',"{run} - _step","{run} - _step__MIN","{run} - _step__MAX"'
        f',"{run} - val/loss","{run} - val/loss__MIN","{run} - val/loss__MAX"'
        for run in GAINS
    )]  # fmt: skip
    for step in STEPS:
        cells = [str(step)]
        for run, k in GAINS.items():
            if step % 20 and run == "base":
                cells += [""] * 6
                continue
            value = loss(step, k)
            cells += [str(step)] * 3 + [repr(value), repr(value - low), repr(value + low)]
        lines.append(",".join(cells))
    return "\n".join(lines) + "\n"


def estimated(path, capsys, *options):
    capsys.readouterr()
    assert cli.main(["estimate", str(path), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_chart_of_wandb_gives_the_gain(tmp_path, capsys):
    (tmp_path / "wandb_export.csv").write_text(chart())
    command = ["curves", "import", str(tmp_path / "wandb_export.csv"), "--out",
               str(tmp_path / "c.csv"), "--arm", "base=baseline", "--arm", "mod - b=rope",
               "--seed", "7", "--scale", "S", "--flops-per-step", "1e12"]  # fmt: skip
    assert cli.main(command) == 0
    first, *rows = (tmp_path / "c.csv").read_text().splitlines()
    assert first == "arm,scale,seed,step,loss,flops"
    assert len(rows) == len(STEPS) + len(STEPS) // 2
    assert rows[0] == f"baseline,S,7,20,{loss(20, 1)!r},20000000000000"
    rope = estimated(tmp_path / "c.csv", capsys)["arms"]["rope"]
    # linear in (ln C, L) between evaluations 20 steps apart
    assert rope["g_alg"] == pytest.approx(2, rel=0.02)
    assert (rope["scale"], rope["seeds"]) == ("S", ["7"])


def test_averages_are_marked_and_refused(tmp_path, capsys):
    (tmp_path / "w.csv").write_text(chart(low=0.01))
    curves = import_curves([tmp_path / "w.csv"], Wanted(flops_per_step={"": 1.0}))
    assert all("averages" in curve.notes[0] for curve in curves)
    write_table(curves, tmp_path / "c.csv")
    answer = estimated(tmp_path / "c.csv", capsys, "--baseline", "base")["arms"]["mod - b"]
    assert answer["status"] == "refused"
    assert any("smoothed or adjusted" in reason for reason in answer["reasons"])
    (tmp_path / "w.csv").write_text(chart())
    assert not any(c.smoothed for c in import_curves([tmp_path / "w.csv"]))
    assert all(c.smoothed for c in import_curves([tmp_path / "w.csv"], Wanted(smoothed=True)))


def test_a_history_brings_its_other_columns(tmp_path):
    """lr and tokens are logged at other steps than the evaluation, as trainers do."""
    lines = [",_step,_runtime,val/loss,train/loss,lr,tokens,note"]
    for i, step in enumerate(range(5)):
        val = f"{3 - i / 10}" if step % 2 else ""
        rest = "" if step % 2 else f"{1e-3 * (i + 1)},{step * 512}"
        lines.append(f"{i},{step},{2.5 * step},{val},{4 - i / 10},{rest or ','},words")
    (tmp_path / "run.csv").write_text("\n".join(lines))
    wanted = Wanted(columns={"seconds": "_runtime"}, labels={"arm": {"run": "rope"}})
    (curve,) = import_curves([tmp_path / "run.csv"], wanted)
    assert curve.rows["step"] == [1, 3]
    assert curve.rows["loss"] == [2.9, 2.7]
    assert curve.rows["seconds"] == [2.5, 7.5]
    assert curve.rows["lr"] == [1e-3, 3e-3]  # the last before: a rate holds until it is changed
    assert curve.rows["tokens"] == [512, 1536]  # a counter: on the line between
    assert "flops" not in curve.rows
    assert table([curve]).splitlines()[0] == "arm,step,loss,seconds,tokens,lr"
    late = tmp_path / "late.csv"
    late.write_text("step,val/loss,lr\n1,3,\n2,2.9,1e-3\n")
    (curve,) = import_curves([late])
    assert "lr" not in curve.rows  # unknown at step 1, and never a guess
    assert curve.notes == ["no lr: 'lr' is not known at step 1"]


def test_a_log_of_a_run_that_was_killed_holds_some_steps_twice(tmp_path):
    """The steps since its checkpoint were trained again: equal losses, on a clock that went on."""
    rows = [(2, 2.9, 20), (4, 2.7, 40), (6, 2.6, 60), (4, 2.7, 41), (6, 2.6, 62), (8, 2.5, 80)]
    lines = [f"{step},{loss},{seconds}" for step, loss, seconds in rows]
    (tmp_path / "run.csv").write_text("\n".join(["step,val/loss,train_s", *lines]))
    (curve,) = import_curves([tmp_path / "run.csv"])
    assert curve.rows["step"] == [2, 4, 6, 8]
    assert curve.rows["loss"] == [2.9, 2.7, 2.6, 2.5]
    assert curve.rows["seconds"] == [20, 41, 62, 80]
    assert curve.notes == ["2 evaluations came twice, as after a restart, with equal losses"]


def test_tensorboards_csv_files_of_one_run_are_put_together(tmp_path):
    for tag, value in (("val_loss", 2.0), ("lr", 1e-3)):
        rows = [f"{1.7e9 + step},{step},{value + 1 / step}" for step in (1, 2, 3)]
        text = "\n".join(["Wall time,Step,Value", *rows])
        (tmp_path / f"run-rope-tag-{tag}.csv").write_text(text)
    sources = sorted(tmp_path.glob("*.csv"))
    (curve,) = import_curves(sources, Wanted(columns={"seconds": "wall"}))
    assert (curve.run, curve.labels) == ("rope", {"arm": "rope"})
    assert curve.rows["loss"] == [3.0, 2.5, pytest.approx(2 + 1 / 3)]
    assert curve.rows["seconds"] == [0, 1, 2]
    assert curve.rows["lr"] == [1.001, 0.501, pytest.approx(1 / 3 + 1e-3)]


def test_runs_without_the_loss_are_left_out_and_named(tmp_path):
    (tmp_path / "good.csv").write_text("step,val/loss\n1,2\n")
    (tmp_path / "tuning.csv").write_text("step,train/loss\n1,2\n")
    for wanted in (Wanted(), Wanted(loss="val/loss")):
        (curve,) = import_curves(sorted(tmp_path.glob("*.csv")), wanted)
        assert curve.run == "good"
        assert curve.notes == ["left out, for they have no such loss: tuning"]


def test_json_lines_with_a_loss_that_is_no_number_are_kept_for_the_estimator(tmp_path, capsys):
    rows = [{"_step": s, "eval/loss": math.nan if s == 9 else 9 - s / 10} for s in range(1, 20)]
    (tmp_path / "wandb-history.jsonl").write_text("\n".join(map(json.dumps, rows)))
    wanted = Wanted(labels={"arm": {"": "baseline"}}, flops_per_step={"": 10.0})
    write_table(import_curves([tmp_path / "wandb-history.jsonl"], wanted), tmp_path / "c.csv")
    (curve,) = read_csv(tmp_path / "c.csv")
    assert curve.problems[0] == "loss is nan at line 10"


@pytest.mark.parametrize(
    ("name", "text", "wanted", "message"),
    [
        ("a.csv", "step,val/loss\n1,2\n2,x\n", {},
         "a.csv line 3, column 'val/loss': expected a number, got 'x'"),
        ("a.csv", "step,val/loss\n1,2\n1,3\n", {},
         "a.csv line 3, column 'val/loss': expected 2 again at step 1 of run 'a', got 3"),
        ("a.csv", "step,val/loss\n1,2,3\n", {}, "a.csv line 2: expected 2 columns, got 3"),
        ("a.csv", "epoch,val/loss\n1,2\n", {}, "a.csv line 1, column 'step': expected one of"),
        ("a.csv", "Tokens,r - val/loss\n1,2\n", {},
         "a.csv line 1, column 'Tokens': expected 'Step' as the chart's x axis"),
        ("a.csv", "", {}, "a.csv line 1: expected rows below a header, got none"),
        ("a.csv", "step,train/loss,acc\n1,2,3\n", {},
         "that is the evaluation loss, got none; there are: train/loss, acc"),
        ("a.csv", "step,val/loss,eval_loss\n1,2,3\n", {}, "there are: eval_loss, val/loss"),
        ("a.csv", "step,train/loss\n1,2\n", {}, "got none; there are: train/loss"),
        ("a.csv", "step,val/loss\n1,2\n", {"loss": "x"}, "got x; there are: val/loss"),
        ("a.csv", "step,val/loss\n1,2\n", {"columns": {"lr": "rate"}},
         "--column lr must name a metric of run 'a' (a.csv), got 'rate'"),
        ("a.csv", "step,val/loss\n1,2\n", {"columns": {"rate": "lr"}},
         "--column must name one of flops, seconds, tokens, lr, executed_flops, got 'rate'"),
        ("a.csv", "step,val/loss\n1,2\n", {"labels": {"seed": {"b": "1"}}},
         "--seed must name one of a, got 'b'"),
        ("a.csv", "Step,r - val/loss,s - val/loss\n1,2,3\n", {"labels": {"arm": {"": "x"}}},
         "runs must differ in arm, scale, seed or budget, got {'arm': 'x'} for both 'r' and 's'"),
        ("a.csv", "Step,r - val/loss,s - val/loss\n1,2,3\n", {"flops_per_step": {"r": 2.0}},
         "flops must be known for all runs or for none, got them for 'r' and not for 's'"),
        ("a.csv", "step,val/loss\n0,2\n", {}, "column 'val/loss': expected steps above 0"),
        ("a.jsonl", '{"step": 1}\n{"loss": 1}\n', {},
         "a.jsonl line 2, column 'step': expected an object with one of"),
        ("a.jsonl", '{"step": 1}\n{"st', {}, "a.jsonl line 2: expected JSON, got '{\"st'"),
        ("a.txt", "", {}, "SOURCE must be an event file (its name has 'tfevents'), a .csv"),
    ],
)  # fmt: skip
def test_bad_sources_name_file_line_and_column(name, text, wanted, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(CurveError) as error:
        import_curves([tmp_path / name], Wanted(**wanted))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--flops-per-step", "fast"], "--flops-per-step must be a number above 0, got 'fast'"),
        (["--column", "=x"], "--column must be COLUMN=METRIC, got '=x'"),
        (["--arm", "x="], "--arm must be [RUN=]VALUE, got 'x='"),
        (["--arm", "x", "--arm", "y"], "--arm must be given once for each run, got 'y' again"),
    ],
)
def test_bad_options_are_one_line_and_status_2(options, message, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("step,val/loss\n1,2\n")
    out = tmp_path / "c.csv"
    assert cli.main(["curves", "import", str(tmp_path / "a.csv"), "--out", str(out), *options]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_without_tensorboard_an_event_file_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="event files need the package tensorboard"):
        import_curves([tmp_path])


def test_event_files_after_a_restart(tmp_path):
    """A run that logged steps 1-8, was killed, and went on after step 5; both ways of writing."""
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from torch.utils.tensorboard import SummaryWriter

    for steps, purge, extra in ((range(1, 9), None, 0.0), (range(6, 11), 6, 0.5)):
        writer = SummaryWriter(tmp_path / "logs/rope", purge_step=purge)
        for step in steps:
            writer.add_scalar("val/loss", 1 / step + extra, step)
            writer.add_scalar("new/loss", 1 / step + extra, step, new_style=True)
            writer.add_scalar("lr", 0.25, step)
        writer.add_text("note", "no scalar", 5)
        writer.close()
    expected = [1 / s if s < 6 else 1 / s + 0.5 for s in range(1, 11)]
    for tag in ("val/loss", "new/loss"):
        (curve,) = import_curves([tmp_path / "logs"], Wanted(loss=tag))
        assert curve.labels == {"arm": "rope"}
        assert curve.rows["step"] == list(range(1, 11))
        assert curve.rows["loss"] == pytest.approx(expected)  # float32 in the file
        assert curve.rows["lr"] == [0.25] * 10


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The smoke plan's runs, trained here: workers would spend most of their time on importing."""
    folder = tmp_path_factory.mktemp("study")
    words = " ".join(f"word{(j * j) % 97} and {j % 13}" for j in range(4000))
    (folder / "text.txt").write_text(words)
    request = data.Request(sources=(str(folder / "text.txt"),), val_fraction=0.3, document_bytes=99)
    data.prepare(request, folder / "tokens")
    tokens, ours = data.TokenData(folder / "tokens"), our_kernels("cpu")
    short = [Scale(s.name, s.model, {**s.train, "steps": 30}) for s in plan_named("smoke").scales]
    plan = dataclasses.replace(plan_named("smoke"), scales=tuple(short))
    store = Store(folder / "study")
    store.begin(
        {
            "plan": json.loads(json.dumps(plan.to_dict())),
            "data_hash": tokens.hash,
            "ours": ours,
            "data_dir": str(folder / "tokens"),
            "environment": environment.describe(resolve_device("cpu")),
        }
    )
    groups = {}
    found = schedule(plan, ours, data_hash=tokens.hash, vocab_size=tokens.vocab_size, index={})
    for run, spec in found.runs.items():
        groups.setdefault((spec.scale, spec.seed), {})[run] = spec
    for group in groups.values():
        rows = {
            run: training(
                spec.model,
                spec.train,
                folder / "tokens",
                store.path(run),
                lockstep=str(list(group)),
            )
            for run, spec in group.items()
        }
        assert all(result["status"] == "done" for _, result in in_turn(rows))
    return store.folder


def test_an_exported_study_gives_its_own_numbers_again(study, tmp_path, capsys):
    results = collect(study)["estimate"]
    assert cli.main(["study", "export", str(study), "--out", str(tmp_path / "c.csv")]) == 0
    answer = estimated(tmp_path / "c.csv", capsys, "--kernel", "flash_attention")
    # What a CSV cannot say: seconds of whole rounds (G_hw and what follows from it), which
    # arms are bundles, that no rate was swept.
    assert answer["target_losses"] == results["target_losses"]
    assert answer["class"] == results["class"]
    assert answer["aa"] == results["aa"]
    said = ("status", "g_alg", "ci", "g_time", "c_baseline", "c_variant", "bound", "bound_side",
            "executed_over_model", "seeds", "reasons", "range", "target_loss")  # fmt: skip
    for arm, result in results["arms"].items():
        for scale, cell in result["scales"].items():
            again = answer["arms"][arm]["scales"][scale]
            assert {k: again[k] for k in said} == {k: cell[k] for k in said}
        assert answer["arms"][arm]["mean_over_scales"] == result["mean_over_scales"]
        assert answer["arms"][arm].get("equivalence") == result.get("equivalence")
    assert any(r["status"] == "ok" for r in results["arms"].values())


def test_parquet_holds_what_the_csv_holds(study, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    curves = study_curves(study)
    write_curves(curves, tmp_path / "c.parquet")
    write_curves(curves, tmp_path / "c.csv")
    table = parquet.read_table(tmp_path / "c.parquet")
    again = read_csv(tmp_path / "c.csv")
    assert [c.key for c in again] == [c.key for c in curves]
    for name in ("flops", "loss", "seconds", "lr", "executed_flops"):
        in_csv = [None if (v := getattr(c, name)) is None else v.tolist() for c in again]
        flat = [x for c, v in zip(again, in_csv, strict=True) for x in v or [None] * c.flops.size]
        assert table[name].to_pylist() == flat
    assert again[0].identity == curves[0].identity


def test_export_refuses_what_it_cannot_write(study, tmp_path, capsys):
    assert cli.main(["study", "export", str(study), "--out", str(tmp_path / "c.xlsx")]) == 2
    assert "--out must end in .csv or .parquet, got 'c.xlsx'" in capsys.readouterr().err
    assert cli.main(["study", "export", str(tmp_path), "--out", str(tmp_path / "c.csv")]) == 2
    assert "has no study.json" in capsys.readouterr().err

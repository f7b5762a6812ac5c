"""The training loop: repeatable, resumable, timed and counted as its docstring says."""

import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ceg_kernels import OPS, use_backend
from ceg_model import checkpoint, environment
from ceg_model import train as training
from ceg_model.columns import COLUMNS, read_all
from ceg_model.config import GPTConfig
from ceg_model.data import Request, TokenData, prepare
from ceg_model.flops import model_flops
from ceg_model.gpt import build_model
from ceg_model.rundir import METRICS, RESULT, RUN, RunDir, read_metrics
from ceg_model.train import run_id, train
from ceg_model.train_config import TrainConfig

ROOT = Path(__file__).parents[1]
MODEL = GPTConfig(n_layer=1, n_head=2, d_model=32, seq_len=32, norm="layer_norm", dropout=0.1)
TRAIN = TrainConfig(
    steps=8,
    batch_size=2,
    grad_accum=2,
    eval_every=4,
    eval_batches=2,
    checkpoint_every=3,
    dtype="float32",
    device="cpu",
    backend="torch",
)
COMPARED = (
    "step",
    "tokens",
    "loss",
    "eval_loss",
    "model_flops",
    "executed_flops",
    "lr",
    "grad_norm",
)


def _train_config(**changes):
    return dataclasses.replace(TRAIN, **changes)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(
            f"document {i} counts: " + " ".join(map(str, range(i, 90)))
        )
    prepare(Request(sources=(str(folder),), val_fraction=0.2), folder / "shards")
    return folder / "shards"


@pytest.fixture(scope="module")
def undisturbed(data_dir, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(MODEL, TRAIN, data_dir, run_dir)
    return run_dir


def _losses(run_dir):
    return [{key: row[key] for key in COMPARED} for row in read_metrics(run_dir)]


def _weights(run_dir):
    return load_file(sorted((run_dir / "ckpt").glob("step-*"))[-1] / checkpoint.MODEL)


def _assert_same_run(a, b):
    assert _losses(a) == _losses(b)
    first, second = _weights(a), _weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_writes_what_the_design_says(undisturbed, data_dir):
    run = json.loads((undisturbed / RUN).read_text())
    result = json.loads((undisturbed / RESULT).read_text())
    rows = read_metrics(undisturbed)
    data = TokenData(data_dir)
    assert run["id"] == result["id"] == run_id(MODEL, TRAIN, data.hash)
    assert GPTConfig.from_dict(run["model"]) == MODEL
    assert TrainConfig.from_dict(run["train"]) == TRAIN
    assert run["data"]["hash"] == data.hash
    assert run["backends"] == {"attention": "torch", "attention_backward": "torch"}
    assert run["sessions"][0]["versions"]["torch"] == torch.__version__
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["eval_loss"] is not None for row in rows] == [s % 4 == 0 for s in range(1, 9)]
    seconds = [row["train_s"] for row in rows]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    per_step = model_flops(MODEL, batch=4).total
    assert [row["model_flops"] for row in rows] == [per_step * s for s in range(1, 9)]
    assert [row["tokens"] for row in rows] == [4 * 32 * s for s in range(1, 9)]
    assert result["status"] == "done"
    for key in ("eval_loss", "loss", "model_flops", "executed_flops", "train_s", "tokens"):
        assert result[key] == rows[-1][key]
    assert result["tokens_per_s"] == pytest.approx(4 * 32 / result["step_s_median"])
    assert result["bits_per_byte"] == pytest.approx(result["eval_loss"] / math.log(2))
    assert result["n_params"] == sum(p.numel() for p in build_model(MODEL).parameters())


def test_the_recorded_loss_is_the_models(undisturbed, data_dir):
    """One evaluation and the first step's loss, computed here in plain torch."""
    data = TokenData(data_dir)
    model = build_model(MODEL, seed=0)
    model.load_state_dict(_weights(undisturbed), strict=False)
    model.eval()
    with torch.no_grad(), use_backend("torch"):
        losses = [model(x, y)[1].item() for x, y in data.val_batches(2, 32, 2)]
    assert read_metrics(undisturbed)[-1]["eval_loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_training_learns(data_dir, tmp_path):
    model = dataclasses.replace(MODEL, dropout=0.0)
    config = _train_config(steps=60, eval_every=20, lr=1e-2, checkpoint_every=None)
    train(model, config, data_dir, tmp_path / "run")
    evals = [r["eval_loss"] for r in read_metrics(tmp_path / "run") if r["eval_loss"] is not None]
    assert evals == sorted(evals, reverse=True)
    assert evals[-1] < 2.5 < math.log(256)


@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        dataclasses.replace(MODEL, norm="rms_norm", position="rope", mlp="moe", balance="bias"),
        GPTConfig(arch="lstm", position="none", d_model=32, seq_len=32, dropout=0.1),
    ],
    ids=["gpt", "moe", "lstm"],
)
def test_stopping_and_going_on_changes_nothing(model, data_dir, tmp_path):
    train(model, TRAIN, data_dir, tmp_path / "whole")
    for stop_at in (1, 5, 6):
        stopped = train(model, TRAIN, data_dir, tmp_path / "parts", stop_at=stop_at)
        assert (stopped["status"], stopped["step"]) == ("stopped", stop_at)
        assert not (tmp_path / "parts" / RESULT).exists()
    assert train(model, TRAIN, data_dir, tmp_path / "parts")["status"] == "done"
    _assert_same_run(tmp_path / "whole", tmp_path / "parts")
    run = json.loads((tmp_path / "parts" / RUN).read_text())
    assert [s["from_step"] for s in run["sessions"]] == [0, 1, 5, 6]


def test_stop_at_may_be_a_function(data_dir, tmp_path):
    asked = iter([False, False, True])
    stopped = train(MODEL, TRAIN, data_dir, tmp_path / "run", stop_at=lambda: next(asked))
    assert (stopped["status"], stopped["step"]) == ("stopped", 3)


SLOW = """
import dataclasses, sys, time
from ceg_model import train as training
from tests.test_train import MODEL, TRAIN
step = training.Trainer.step
def slow(self, number):
    time.sleep(0.2)
    return step(self, number)
training.Trainer.step = slow
training.train(MODEL, TRAIN, sys.argv[1], sys.argv[2])
"""


def test_kill_9_loses_only_the_steps_after_the_checkpoint(undisturbed, data_dir, tmp_path):
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(data_dir), str(run_dir)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    deadline = time.monotonic() + 120
    while len(read_metrics(run_dir)) < 5:  # past the checkpoint at 3, before the one at 6
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run_dir / RESULT).exists()
    assert train(MODEL, TRAIN, data_dir, run_dir)["status"] == "done"
    _assert_same_run(undisturbed, run_dir)
    assert json.loads((run_dir / RUN).read_text())["sessions"][1]["from_step"] in (3, 6)


def test_a_torn_line_and_later_rows_are_cut_on_resume(undisturbed, data_dir, tmp_path):
    run_dir = tmp_path / "run"
    train(MODEL, TRAIN, data_dir, run_dir, stop_at=3)
    with (run_dir / METRICS).open("a") as metrics:
        metrics.write('{"step": 4, "loss": 9.0, "eval_loss": null}\n{"step": 5, "lo')
    train(MODEL, TRAIN, data_dir, run_dir)
    _assert_same_run(undisturbed, run_dir)


def test_a_damaged_line_in_the_middle_is_refused(undisturbed, tmp_path):
    lines = (undisturbed / METRICS).read_text().splitlines()
    (tmp_path / METRICS).write_text("\n".join([lines[0], "{", lines[1]]))
    with pytest.raises(ValueError, match=r"metrics.jsonl line 2 must be JSON, got '{'"):
        read_metrics(tmp_path)


def test_only_the_last_two_checkpoints_are_kept(undisturbed):
    kept = sorted(path.name for path in (undisturbed / "ckpt").iterdir())
    assert kept == ["step-00000006", "step-00000008"]


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE])
def test_a_damaged_checkpoint_is_left_out_with_a_note(name, undisturbed, data_dir, tmp_path):
    run_dir = tmp_path / "run"
    for stop_at in (3, 6):
        train(MODEL, TRAIN, data_dir, run_dir, stop_at=stop_at)
    file = run_dir / "ckpt/step-00000006" / name
    file.write_bytes(file.read_bytes()[:-7])
    notes = []
    train(MODEL, TRAIN, data_dir, run_dir, note=notes.append)
    assert len(notes) == 1
    assert str(file) in notes[0]
    _assert_same_run(undisturbed, run_dir)


def test_only_damaged_checkpoints_are_an_error(data_dir, tmp_path):
    train(MODEL, TRAIN, data_dir, tmp_path / "run", stop_at=2)
    (tmp_path / "run/ckpt/step-00000002" / checkpoint.OPTIMIZER).unlink()
    with pytest.raises(ValueError, match=r"only damaged ones: .*optimizer.pt must .*no such file"):
        train(MODEL, TRAIN, data_dir, tmp_path / "run")


def test_a_checkpoint_of_another_run_is_refused(data_dir, tmp_path):
    for seed in (0, 1):
        config = _train_config(seed=seed)
        train(MODEL, config, data_dir, tmp_path / str(seed), stop_at=2)
    (tmp_path / "0/ckpt").rename(tmp_path / "moved")
    (tmp_path / "1/ckpt").rename(tmp_path / "0/ckpt")
    with pytest.raises(ValueError, match=r"checkpoint .* must be of run \w+, got \w+"):
        train(MODEL, TRAIN, data_dir, tmp_path / "0")


def test_weights_of_another_model_are_refused(undisturbed, tmp_path):
    path = sorted((undisturbed / "ckpt").iterdir())[-1]
    wide = build_model(dataclasses.replace(MODEL, d_model=64))
    with pytest.raises(
        ValueError, match=r"weight in .* must have shape \(256, 64\), got \(256, 32\)"
    ):
        checkpoint.load_model(path, wide)
    deep = build_model(dataclasses.replace(MODEL, n_layer=2))
    with pytest.raises(ValueError, match=r"must have the tensors of this model, .*blocks.1"):
        checkpoint.load_model(path, deep)
    with pytest.raises(FileNotFoundError, match="no such file"):
        checkpoint.load_model(tmp_path, deep)
    (tmp_path / "bad.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match=r"bad.safetensors must be a safetensors file"):
        checkpoint.load_model(tmp_path / "bad.safetensors", deep)


def test_weights_load_into_the_same_model(undisturbed):
    path = sorted((undisturbed / "ckpt").iterdir())[-1]
    model = build_model(MODEL, seed=5)
    checkpoint.load_model(path, model)
    assert torch.equal(model.embed.weight, _weights(undisturbed)["embed.weight"])


@pytest.mark.parametrize(
    ("model", "config", "difference"),
    [
        ({"d_model": 64}, {}, r"model.d_model 32 here, 64 asked for"),
        ({}, {"lr": 1.0, "seed": 3}, r"train.lr 0.002 here, 1.0 asked for; train.seed 0 here, 3"),
    ],
)
def test_the_folder_of_another_run_is_refused(model, config, difference, undisturbed, data_dir):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")}
    with pytest.raises(ValueError, match=difference):
        train(dataclasses.replace(MODEL, **model), _train_config(**config), data_dir, undisturbed)
    assert {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")}.keys() == before.keys()


def test_other_data_is_refused(undisturbed, data_dir, tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(9):
        (tmp_path / f"text/{i}.txt").write_text(f"other {i} " * 50)
    prepare(Request(sources=(str(tmp_path / "text"),)), tmp_path / "shards")
    with pytest.raises(ValueError, match=r"data.hash '\w+' here, '\w+' asked for"):
        train(MODEL, TRAIN, tmp_path / "shards", undisturbed)


def test_foreign_folders_and_running_runs_are_refused(data_dir, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"must be new, empty or a run's, got one with thesis.tex"):
        train(MODEL, TRAIN, data_dir, tmp_path / "a")
    (tmp_path / "b").write_text("")
    with pytest.raises(NotADirectoryError, match="must be a folder, got a file"):
        train(MODEL, TRAIN, data_dir, tmp_path / "b")
    with RunDir(tmp_path / "c"), pytest.raises(ValueError, match="another process trains in"):
        train(MODEL, TRAIN, data_dir, tmp_path / "c")


def test_a_damaged_description_is_refused(data_dir, tmp_path):
    (tmp_path / RUN).write_text('{"id": ')
    with pytest.raises(ValueError, match=r"run.json must be JSON, got Expecting value"):
        train(MODEL, TRAIN, data_dir, tmp_path)


def test_a_vocabulary_smaller_than_the_datas_is_refused(data_dir, tmp_path):
    small = dataclasses.replace(MODEL, vocab_size=100)
    with pytest.raises(ValueError, match=r"vocab_size must be at least the 256 of the data .*100"):
        train(small, TRAIN, data_dir, tmp_path / "run")


def test_a_finished_run_is_returned_as_it_is(undisturbed, data_dir, monkeypatch):
    monkeypatch.setattr(training, "Trainer", None)
    result = train(MODEL, TRAIN, data_dir, undisturbed)
    assert result == json.loads((undisturbed / RESULT).read_text())


def test_a_kill_before_the_result_is_written_costs_nothing(data_dir, tmp_path, undisturbed):
    train(MODEL, TRAIN, data_dir, tmp_path / "run")
    result = json.loads((tmp_path / "run" / RESULT).read_text())
    (tmp_path / "run" / RESULT).unlink()
    assert train(MODEL, TRAIN, data_dir, tmp_path / "run") == result


def test_a_result_never_comes_before_the_columns(data_dir, tmp_path, undisturbed, monkeypatch):
    run = tmp_path / "run"

    def killed(self, result):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunDir, "write_result", killed)
        train(MODEL, TRAIN, data_dir, run)
    assert (run / COLUMNS).exists()
    assert not (run / RESULT).exists()
    before = (run / COLUMNS).read_bytes()
    train(MODEL, TRAIN, data_dir, run)
    assert (run / COLUMNS).read_bytes() != before  # metrics.jsonl was written anew
    monkeypatch.setattr("ceg_model.columns.read_columns", None)  # the lines are not asked
    found = read_all(tmp_path, ["run"])["run"]
    assert found.step.tolist() == list(range(1, 9))
    assert found.evaluated.tolist() == [3, 7]
    assert found.eval_loss.tolist() == [_losses(undisturbed)[i]["eval_loss"] for i in (3, 7)]


def test_stopping_behind_the_checkpoint_does_nothing(data_dir, tmp_path):
    for stop_at in (4, 2):
        stopped = train(MODEL, TRAIN, data_dir, tmp_path / "run", stop_at=stop_at)
        assert stopped["step"] == 4
    assert len(read_metrics(tmp_path / "run")) == 4


def test_warming_up_leaves_no_trace(undisturbed, data_dir, tmp_path):
    moe = dataclasses.replace(MODEL, norm="rms_norm", mlp="moe", balance="bias")
    for steps in (0, 3):
        config = _train_config(timing_warmup=steps)
        train(moe, config, data_dir, tmp_path / str(steps))
    _assert_same_run(tmp_path / "0", tmp_path / "3")


def test_seconds_are_those_of_the_steps_alone(data_dir, tmp_path, monkeypatch):
    """Evaluation, checkpoints and warm-up take half a second each and are not counted."""

    def slowed(function):
        def run(*arguments, **named):
            time.sleep(0.5)
            return function(*arguments, **named)

        return run

    for owner, name in (
        (training.Trainer, "_evaluate"),
        (training.Trainer, "_warm_up"),
        (checkpoint, "save"),
    ):
        monkeypatch.setattr(owner, name, slowed(getattr(owner, name)))
    start = time.perf_counter()
    result = train(MODEL, TRAIN, data_dir, tmp_path / "run")
    wall = time.perf_counter() - start
    assert wall - result["train_s"] > 6 * 0.5  # 2 evaluations, 3 checkpoints, 1 warm-up
    assert result["train_s"] > 8 * 0.5 * result["step_s_median"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(value, data_dir, tmp_path, monkeypatch):
    loss = training.Trainer._loss

    def broken(self, model, x, y):
        self.calls = getattr(self, "calls", 0) + 1
        return loss(self, model, x, y) * (value if self.calls >= 12 else 1)

    monkeypatch.setattr(training.Trainer, "_loss", broken)
    config = _train_config(log_every=2, timing_warmup=0)
    result = train(MODEL, config, data_dir, tmp_path / "run")
    assert result["status"] == "failed"
    # 1 call to see the backends, 2 a step, 2 of the evaluation after step 4
    assert result["reason"] == f"loss at step 5 must be finite, got {value}"
    assert json.loads((tmp_path / "run" / RESULT).read_text()) == result
    assert "NaN" not in (tmp_path / "run" / METRICS).read_text()
    assert "Infinity" not in (tmp_path / "run" / METRICS).read_text()
    assert train(MODEL, config, data_dir, tmp_path / "run") == result


def test_log_every_sums_rows_without_changing_the_run(undisturbed, data_dir, tmp_path):
    train(MODEL, _train_config(log_every=5, checkpoint_every=None), data_dir, tmp_path / "run")
    fine, coarse = _losses(undisturbed), _losses(tmp_path / "run")
    assert [row["step"] for row in coarse] == [4, 5, 8]
    assert coarse[0]["loss"] == pytest.approx(sum(r["loss"] for r in fine[:4]) / 4)
    assert coarse[-1]["eval_loss"] == fine[-1]["eval_loss"]


def test_grad_accum_must_be_shared_evenly(data_dir, tmp_path):
    group = training.ProcessGroup(rank=0, world=3)
    with pytest.raises(ValueError, match="grad_accum must be a multiple of the 3 processes, got 2"):
        training.Trainer(MODEL, TRAIN, TokenData(data_dir), group)


def test_the_chosen_backend_runs_and_is_recorded(undisturbed, data_dir, tmp_path):
    train(MODEL, _train_config(backend="reference"), data_dir, tmp_path / "run")
    run = json.loads((tmp_path / "run" / RUN).read_text())
    assert set(run["backends"].values()) == {"reference"}
    for a, b in zip(_losses(undisturbed), _losses(tmp_path / "run"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_a_backend_that_is_not_there_is_refused(data_dir, tmp_path):
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'cray'"):
        train(MODEL, _train_config(backend="cray"), data_dir, tmp_path / "run")


def test_executed_flops_add_what_the_backends_recompute(data_dir, tmp_path, monkeypatch):
    for name, tenths in (("attention", 10), ("attention_backward", 15)):
        op = OPS[name]

        def executed(*args, op=op, tenths=tenths):
            return op.cost(*args).flops * tenths // 10

        chosen = dataclasses.replace(op.backend("torch"), executed_flops=executed)
        monkeypatch.setattr(op, "choose", lambda *args, chosen=chosen: chosen)
    result = train(MODEL, TRAIN, data_dir, tmp_path / "run")
    pairs = 32 * 33 // 2
    backward = 8 * pairs * MODEL.head_dim * MODEL.n_head * MODEL.n_layer * 4  # 4 sequences a step
    assert result["executed_flops"] - result["model_flops"] == 8 * (backward // 2)


def test_executed_flops_are_unknown_where_a_backend_does_not_say(data_dir, tmp_path):
    result = train(MODEL, TRAIN, data_dir, tmp_path / "run")
    assert result["executed_flops"] is None


def test_bf16_autocast_trains(undisturbed, data_dir, tmp_path):
    result = train(MODEL, _train_config(dtype="bfloat16"), data_dir, tmp_path / "run")
    assert result["dtype"] == "bfloat16"
    fp32 = read_metrics(undisturbed)[-1]["eval_loss"]
    assert result["eval_loss"] == pytest.approx(fp32, rel=2e-2)
    assert result["eval_loss"] != fp32
    assert all(t.dtype == torch.float32 for t in _weights(tmp_path / "run").values())


def test_dtype_auto_follows_the_device_and_is_kept(data_dir, tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    config = _train_config(dtype="auto")
    monkeypatch.setattr(environment, "cpu_flags", lambda: {"avx2"})
    assert training.resolve_dtype("auto", cpu) == torch.float32
    train(MODEL, config, data_dir, tmp_path / "run", stop_at=2)
    monkeypatch.setattr(environment, "cpu_flags", lambda: {"avx512_bf16"})
    assert training.resolve_dtype("auto", cpu) == torch.bfloat16
    assert training.resolve_dtype("float32", cpu) == torch.float32
    with pytest.raises(
        ValueError, match=r"it began with, cpu torch.float32, got cpu torch.bfloat16"
    ):
        train(MODEL, config, data_dir, tmp_path / "run")


def test_compiled_training_matches(data_dir, tmp_path, monkeypatch):
    # without inductor, whose code generation is torch's to test and takes a minute
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model = dataclasses.replace(MODEL, dropout=0.0)
    for compiled in (False, True):
        config = _train_config(compile=compiled, steps=2)
        train(model, config, data_dir, tmp_path / str(compiled))
    for a, b in zip(_losses(tmp_path / "False"), _losses(tmp_path / "True"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)

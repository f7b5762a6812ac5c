"""The `ceg` command: exit statuses, one-line errors, JSON, and going on after an interruption."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ceg_kernels import OPS
from ceg_kernels.measure import ceilings
from ceg_model.cli import main
from ceg_model.presets import PRESETS, load_config
from ceg_model.rundir import read_metrics

ROOT = Path(__file__).parents[1]
SMOKE = ["smoke", "--set", "backend=torch", "--set", "device=cpu", "--set", "dtype=float32"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a small corpus in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / f"text/{i}.txt").write_text(f"text {i}: " + " ".join(map(str, range(i, 99))))
    assert main(["data", "prepare", "text", "--out", "shards", "--val-fraction", "0.2"]) == 0
    return tmp_path


def _ceg(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "ceg_model.cli", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_help_loads_nothing_heavy():
    script = (
        "import sys; from ceg_model.cli import build_parser; print(build_parser().format_help());"
        "print('heavy:', sorted({'torch', 'numpy', 'scipy', 'rich', 'pytest'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "heavy: []" in done.stdout
    for command in ("info", "bench", "train", "data", "study", "estimate", "demo"):
        assert f"\n    {command} " in done.stdout


def test_prepare_prints_the_manifest(folder, capsys):
    capsys.readouterr()
    assert (
        main(["data", "prepare", "text", "--out", "shards", "--val-fraction", "0.2", "--json"]) == 0
    )
    manifest = json.loads(capsys.readouterr().out)
    assert manifest == json.loads((folder / "shards/manifest.json").read_text())
    assert manifest["documents"]["val"] > 0


def test_train_prints_the_result_and_is_done_the_second_time(folder, capsys):
    command = ["train", *SMOKE, "--data", "shards", "--json"]
    capsys.readouterr()
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["status"] == "done"
    assert result["steps"] == 20
    run_dir = folder / "runs" / result["id"]
    assert json.loads((run_dir / "result.json").read_text()) == result
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*.json*")}
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*.json*")} == before
    assert main([*command[:-1]]) == 0
    assert f"{result['eval_loss']:.4f} nats/token" in capsys.readouterr().out


def test_train_without_data_uses_the_built_in_one(folder, capsys):
    assert main(["train", *SMOKE, "--set", "steps=1", "--json"]) == 0
    assert (folder / "data/stdlib/manifest.json").is_file()


@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_configs_are_files_too(suffix, folder, capsys):
    if suffix == "toml" and sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    content = {
        "json": '{"model": {"n_layer": 1, "d_model": 16, "n_head": 2, "seq_len": 16},'
        ' "train": {"steps": 2, "batch_size": 2, "eval_batches": 1, "backend": "torch"}}',
        "toml": "[model]\nn_layer = 1\nd_model = 16\nn_head = 2\nseq_len = 16\n"
        '[train]\nsteps = 2\nbatch_size = 2\neval_batches = 1\nbackend = "torch"\n',
    }[suffix]
    (folder / f"run.{suffix}").write_text(content)
    capsys.readouterr()
    command = ["train", f"run.{suffix}", "--data", "shards", "--json", "--set", "dtype=float32"]
    assert main([*command, "--set", "norm=rms_norm", "--set", "train.betas=[0.9, 0.99]"]) == 0
    run_dir = folder / "runs" / json.loads(capsys.readouterr().out)["id"]
    run = json.loads((run_dir / "run.json").read_text())
    assert run["model"]["norm"] == "rms_norm"
    assert run["model"]["vocab_size"] == 256
    assert run["train"]["betas"] == [0.9, 0.99]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "smok"], "config must be a .json or .toml file or one of smoke, nano"),
        (["train", "no.json"], "config no.json must be a file, got nothing there"),
        (["train", "broken.json"], "config broken.json must be valid json, got"),
        (["train", "list.json"], "config list.json must be an object, got list"),
        (["train", "odd.json"], "must have the sections model and train only, got 'modle'"),
        (["train", "smoke", "--set", "lr"], "--set must be KEY=VALUE, got 'lr'"),
        (["train", "smoke", "--set", "rate=1"], "key of --set must be one of vocab_size"),
        (["train", "smoke", "--set", "data.lr=1"], "section of data.lr must be model or train"),
        (["train", "smoke", "--set", "model.lr=1"], "key of --set must be one of vocab_size"),
        (["train", "smoke", "--set", "lr=-1"], "lr must be in (0, inf], got -1"),
        (["train", "smoke", "--set", "lr=fast"], "lr must be a number, got 'fast'"),
        (["train", *SMOKE, "--data", "gone"], "data folder gone must hold manifest.json, got none"),
        (["train", *SMOKE, "--data", "shards", "--set", "n_head=5"], "n_head must divide d_model"),
        (["train", *SMOKE, "--data", "shards", "--set", "backend=cray"], "backend must be one of"),
        (["data", "prepare", "text"], "--out must name the new folder when there is a source"),
        (["data", "prepare", "gone", "--out", "x"], "source gone must be a file or a folder"),
        (["data", "prepare", "text/1.txt", "--out", "shards"], "must be new or hold the same data"),
        (["data", "prepare", "--out", "x", "--val-fraction", "2"], "val_fraction must be between"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, folder, capsys):
    (folder / "broken.json").write_text("{")
    (folder / "list.json").write_text("[]")
    (folder / "odd.json").write_text('{"modle": {}}')
    if arguments[:3] == ["data", "prepare", "text/1.txt"]:
        (folder / "text/1.txt").write_text("a paragraph\n\n" * 500)
        arguments = [*arguments, "--document-bytes", "100", "--val-fraction", "0.2"]
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith("ceg: ")
    assert message in last
    assert "Traceback" not in err
    assert out == ""
    assert not (folder / "runs").exists()


def test_traceback_on_request():
    with pytest.raises(ValueError, match="config must be"):
        main(["--traceback", "train", "smok"])


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["train"], ["train", "smoke", "--lr", "1"]]
)
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: ceg" in capsys.readouterr().err


def test_a_failed_run_is_status_1(folder, capsys):
    command = ["train", *SMOKE, "--data", "shards", "--set", "lr=1e30", "--set", "grad_clip=null"]
    assert main(command) == 1
    assert "failed: " in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_training_goes_on_with_the_same_command(number, folder, capsys):
    command = ["train", *SMOKE, "--set", "steps=300", "--set", "eval_every=100"]
    command += ["--data", "shards", "--json", "--out"]
    process = _ceg(*command, "broken", cwd=folder)
    deadline = time.monotonic() + 120
    while not any(len(read_metrics(p)) > 3 for p in (folder / "broken").glob("*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted: run the same command again to go on"
    (run_dir,) = (folder / "broken").iterdir()
    done = read_metrics(run_dir)[-1]["step"]
    assert (run_dir / f"ckpt/step-{done:08d}").is_dir()
    assert not (run_dir / "result.json").exists()
    capsys.readouterr()
    assert main([*command, "broken"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["status"], result["steps"]) == ("done", 300)
    steps = [row["step"] for row in read_metrics(run_dir)]
    assert steps == list(range(1, 301))


def test_info_tells_what_is_there(capsys):
    assert main(["info", "--no-roofs", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["versions"]["torch"]
    attention = info["ops"]["cpu"]["attention"]
    assert attention["can"][-1] == "reference"
    assert attention["runs"] in attention["can"]
    assert info["roofs"] == {}
    assert main(["info", "--no-roofs"]) == 0
    text = capsys.readouterr().out
    assert f"  attention             {attention['runs']}, " in text
    assert f"torch {info['versions']['torch']}" in text


def test_info_says_why_a_backend_cannot_run(capsys, monkeypatch):
    op = OPS["rms_norm"]
    refusing = dataclasses.replace(op.backends[0], why_not=lambda *args: "needs more luck")
    monkeypatch.setattr(op, "backends", (refusing, *op.backends[1:]))
    assert main(["info", "--no-roofs"]) == 0
    assert f"  not {refusing.name}: needs more luck" in capsys.readouterr().out


def test_info_shows_the_roofs(capsys, monkeypatch):
    roofs = {field.name: None for field in dataclasses.fields(ceilings.Roofs)}
    roofs |= {"flops": {"float32": 1.5e11, "float16": 2e12, "bfloat16": None}, "threads": 2}
    asked = []

    def measure(device, refresh):
        asked.append((device, refresh))
        return ceilings.Roofs(**roofs)

    monkeypatch.setattr(ceilings, "measure", measure)
    assert main(["info", "--json", "--refresh"]) == 0
    assert json.loads(capsys.readouterr().out)["roofs"]["cpu"]["flops"]["float32"] == 1.5e11
    assert asked[0] == ("cpu", True)
    assert main(["info"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in ("float32 150 GFLOP/s", "float16 2 TFLOP/s", "bfloat16 unknown", "copy unknown"):
        assert line in lines


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    from ceg_model.config import GPTConfig
    from ceg_model.train_config import TrainConfig

    model, train = load_config(name, [])
    GPTConfig.from_dict({"vocab_size": 256, **model})
    TrainConfig.from_dict(train)

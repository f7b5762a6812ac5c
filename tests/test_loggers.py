"""Rows forwarded to loggers: once each, also after a kill; and loggers that fail.

Fakes stand for the packages, with the calls that those document. TensorBoard itself is tried where
it is installed; W&B and trackio keep what they get on their own servers and in their own formats.
"""

import dataclasses
import json
import sys
import types

import pytest

from ceg_model import cli, data
from ceg_model.config import GPTConfig
from ceg_model.loggers import PACKAGES
from ceg_model.rundir import read_metrics
from ceg_model.study.plans import plan_named
from ceg_model.study.store import Store
from ceg_model.train import run_id, train, training
from ceg_model.train_config import TrainConfig

MODEL = GPTConfig(n_layer=1, n_head=2, d_model=16, seq_len=16)
TRAIN = TrainConfig(
    steps=8, batch_size=2, eval_every=4, eval_batches=1, checkpoint_every=4, dtype="float32",
    device="cpu", backend="torch", timing_warmup=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(" ".join(f"{i * i} and {i % 7}" for i in range(3000)))
    request = data.Request(sources=(str(folder / "text.txt"),), val_fraction=0.3, document_bytes=99)
    data.prepare(request, folder / "tokens")
    return folder / "tokens"


class Service:
    """What a logger has got: (name of the run, step, metrics) in order; "forget" cuts."""

    def __init__(self):
        self.rows, self.begun, self.closed, self.fail_at = [], [], 0, None

    def log(self, name, step, metrics):
        if step == self.fail_at:
            raise RuntimeError("disk full")
        self.rows.append((name, step, metrics))

    def close(self):
        self.closed += 1


def fake_wandb(service):
    class Run:
        def __init__(self, name):
            self.name = name

        def log(self, metrics, step, commit):
            assert commit
            if service.rows and step < service.rows[-1][1]:
                raise AssertionError("W&B drops rows whose step is below the last one")
            service.log(self.name, step, metrics)

        def finish(self):
            service.close()

    def init(*, project, id, name, dir, config, resume, reinit, settings):
        assert (resume, reinit, settings.console) == ("allow", "create_new", "off")
        service.begun.append({"id": id, "config": config})
        return Run(name)

    return {"wandb": types.SimpleNamespace(init=init, Settings=types.SimpleNamespace)}


def fake_trackio(service):
    def init(project, name, *, config, resume, embed):
        print("* Trackio project initialized")  # on stdout, as the real one
        assert (resume, embed) == ("allow", False)
        service.begun.append({"id": name.split()[-1], "config": config})
        return types.SimpleNamespace(
            log=lambda metrics, step: service.log(name, step, metrics), finish=service.close
        )

    return {"trackio": types.SimpleNamespace(init=init)}


def fake_tensorboard(service):
    class SummaryWriter:
        def __init__(self, folder, purge_step):
            service.begun.append({"folder": folder})
            service.rows = [row for row in service.rows if row[1] < purge_step]

        def add_scalar(self, tag, value, step):
            if not service.rows or service.rows[-1][1] != step:
                service.log("", step, {})
            service.rows[-1][2][tag] = value

        def flush(self):
            pass

        def close(self):
            service.close()

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    return {"tensorboard": types.SimpleNamespace(), "torch.utils.tensorboard": module}


FAKES = {"wandb": fake_wandb, "trackio": fake_trackio, "tensorboard": fake_tensorboard}


@pytest.fixture(params=sorted(PACKAGES))
def logger(request, monkeypatch):
    """(name, what it has got)"""
    service = Service()
    for name, module in FAKES[request.param](service).items():
        monkeypatch.setitem(sys.modules, name, module)
    return request.param, service


def logging(name):
    return dataclasses.replace(TRAIN, log_to=name)


def killed(config, tokens, folder, *, after):
    """Trains until the row `after` is written, and nothing is saved after that."""
    rows = training(MODEL, config, tokens, folder, label="rope S 0")
    while next(rows) != after:
        pass
    rows.close()


def forwarded(rows):
    return {row["step"]: {k: v for k, v in row.items() if k != "step" and v is not None}
            for row in rows}  # fmt: skip


def test_each_step_is_forwarded_once_also_after_a_kill(logger, tokens, tmp_path):
    name, service = logger
    killed(logging(name), tokens, tmp_path / "run", after=6)  # its checkpoint is at 4
    assert [step for _, step, _ in service.rows] == [1, 2, 3, 4, 5, 6]
    assert train(MODEL, logging(name), tokens, tmp_path / "run")["status"] == "done"
    assert [step for _, step, _ in service.rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    written = forwarded(read_metrics(tmp_path / "run"))
    for _, step, metrics in service.rows:
        if name != "tensorboard" and step in (5, 6):  # their first copy: other seconds
            metrics = {**metrics, "train_s": written[step]["train_s"]}
        assert metrics == written[step]
    assert "eval_loss" not in service.rows[0][2]  # null in metrics.jsonl
    assert service.closed == 2
    if name != "tensorboard":
        assert service.begun[0]["id"] == service.begun[1]["id"]
        assert service.begun[0]["config"]["model"]["d_model"] == 16
        assert service.rows[0][0].startswith("rope S 0 ")
    assert train(MODEL, logging(name), tokens, tmp_path / "run")["status"] == "done"
    assert len(service.begun) == 2  # a finished run opens no logger


def test_a_second_kill_before_the_next_checkpoint(logger, tokens, tmp_path):
    name, service = logger
    for after in (7, 5):
        killed(logging(name), tokens, tmp_path / "run", after=after)
    train(MODEL, logging(name), tokens, tmp_path / "run")
    assert [step for _, step, _ in service.rows] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_rows_from_before_the_logger_are_made_up_for(logger, tokens, tmp_path):
    name, service = logger
    assert train(MODEL, TRAIN, tokens, tmp_path / "run", stop_at=4)["status"] == "stopped"
    train(MODEL, logging(name), tokens, tmp_path / "run")
    assert {step: m for _, step, m in service.rows} == forwarded(read_metrics(tmp_path / "run"))


def test_a_logger_that_fails_is_said_once_and_ends_nothing(logger, tokens, tmp_path):
    name, service = logger
    service.fail_at = 3
    notes = []
    result = train(MODEL, logging(name), tokens, tmp_path / "run", note=notes.append)
    assert (result["status"], len(read_metrics(tmp_path / "run"))) == ("done", 8)
    (note,) = notes
    assert note.startswith(f"{name} failed (step 3: RuntimeError: disk full); the run goes on")
    assert [step for _, step, _ in service.rows] == [1, 2]


def test_a_logger_that_cannot_start_is_said_once(tokens, tmp_path, monkeypatch):
    def init(**_):
        raise PermissionError("no API key")

    fake = types.SimpleNamespace(init=init, Settings=types.SimpleNamespace)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    notes = []
    result = train(MODEL, logging("wandb"), tokens, tmp_path / "run", note=notes.append)
    assert result["status"] == "done"
    assert len(notes) == 1
    assert "wandb failed (starting: PermissionError: no API key)" in notes[0]


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_a_missing_package_is_an_error_before_anything_is_made(
    name, tokens, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(ModuleNotFoundError, match=f"log_to '{name}' needs the package {name}"):
        train(MODEL, logging(name), tokens, tmp_path / "run")
    for command in (["train", "smoke"], ["study", "run", "smoke", "--out", "s"]):
        assert cli.main([*command, "--data", str(tokens), "--log-to", name]) == 2
        assert capsys.readouterr().err.startswith(f"ceg: log_to '{name}' needs the package")
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_and_the_config_say_the_same(tokens, tmp_path, monkeypatch, capsys):
    service = Service()
    monkeypatch.setitem(sys.modules, "trackio", fake_trackio(service)["trackio"])
    monkeypatch.chdir(tmp_path)
    small = [f"train.{k}={json.dumps(v)}" for k, v in {**TRAIN.to_dict(), "log_to": None}.items()]
    sets = [x for text in (*small, "d_model=16", "seq_len=16") for x in ("--set", text)]
    ids = []
    for extra in (["--log-to", "trackio"], ["--set", "log_to=trackio"], []):
        out = str(tmp_path / f"out{len(ids)}")
        command = ["train", "smoke", *sets, "--data", str(tokens), "--out", out, "--json", *extra]
        assert cli.main(command) == 0
        ids.append(json.loads(capsys.readouterr().out)["id"])  # nothing else on stdout
    assert len(set(ids)) == 1
    assert [begun["id"] for begun in service.begun] == ids[:2]
    assert len(service.rows) == 16
    assert cli.main(["train", "smoke", "--log-to", "paper"]) == 2
    assert "log_to must be one of tensorboard, wandb, trackio" in capsys.readouterr().err


def test_a_logger_changes_neither_runs_nor_studies(tmp_path):
    assert run_id(MODEL, logging("wandb"), "d") == run_id(MODEL, TRAIN, "d")
    plan = plan_named("smoke")
    study = {"plan": plan.to_dict(), "data_hash": "d", "ours": {}}
    store = Store(tmp_path / "s")
    store.begin(json.loads(json.dumps(study)))
    followed = dataclasses.replace(plan, train={**plan.train, "log_to": "wandb"})
    store.begin(json.loads(json.dumps({**study, "plan": followed.to_dict()})))
    other = dataclasses.replace(plan, train={**plan.train, "lr": 1.0})
    with pytest.raises(ValueError, match="must hold the same plan: train is"):
        store.begin(json.loads(json.dumps({**study, "plan": other.to_dict()})))


def test_tensorboard_itself(tokens, tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from ceg_model.study.curve_sources import read_source

    killed(logging("tensorboard"), tokens, tmp_path / "run", after=6)
    train(MODEL, logging("tensorboard"), tokens, tmp_path / "run")
    (log,) = read_source(tmp_path / "run/tensorboard")
    written = forwarded(read_metrics(tmp_path / "run"))
    for metric in ("loss", "train_s", "model_flops", "eval_loss"):
        expected = {step: row[metric] for step, row in written.items() if metric in row}
        got = {step: value for step, value, _ in log.points[metric]}
        assert len(log.points[metric]) == len(expected)
        assert got == pytest.approx(expected, rel=1e-6)  # the file holds float32

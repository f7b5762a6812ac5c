"""Training on the CPU and on a GPU gives the losses of the formula, stopped on the way or not, and
two processes those of one.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import forced, on_each_device

from ceg_model.config import GPTConfig
from ceg_model.data import Request, prepare
from ceg_model.rundir import RUN, read_metrics
from ceg_model.train import train
from ceg_model.train_config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
MODEL = GPTConfig(
    n_layer=1, n_head=2, d_model=32, seq_len=32,
    norm="rms_norm", position="rope", qk_norm=True, mlp="swiglu",
)  # fmt: skip
TRAIN = TrainConfig(
    steps=8, batch_size=2, grad_accum=2, eval_every=4, eval_batches=2, checkpoint_every=3,
    dtype="float32", device="cpu", backend="reference",
)  # fmt: skip


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(f"document {i}: " + " ".join(map(str, range(i, 90))))
    prepare(Request(sources=(str(folder),), val_fraction=0.2), folder / "shards")
    return folder / "shards"


@pytest.fixture(scope="module")
def by_formula(data_dir, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "formula"
    train(MODEL, TRAIN, data_dir, run_dir)
    return read_metrics(run_dir)


@on_each_device
@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_each_device_trains_to_the_losses_of_the_formula(
    by_formula, data_dir, tmp_path, dtype, near, device, backend
):
    names = forced(backend, getattr(torch, dtype))
    config = dataclasses.replace(TRAIN, device=device, dtype=dtype, backend=names)
    train(MODEL, config, data_dir, tmp_path / "run", stop_at=5)
    result = train(MODEL, config, data_dir, tmp_path / "run")
    assert (result["status"], result["dtype"]) == ("done", dtype)
    ran = json.loads((tmp_path / "run" / RUN).read_text())["backends"]
    assert {"attention", "rms_norm_backward", "rope"} <= ran.keys()
    assert ran == {op: names[op] for op in ran}
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [row["step"] for row in by_formula]
    for row, formula in zip(rows, by_formula, strict=True):
        assert row["loss"] == pytest.approx(formula["loss"], rel=near)
        assert row["grad_norm"] == pytest.approx(formula["grad_norm"], rel=10 * near)
        if formula["eval_loss"] is not None:
            assert row["eval_loss"] == pytest.approx(formula["eval_loss"], rel=near)


def test_two_processes_equal_two_micro_batches(data_dir, tmp_path):
    # with dropout, and with experts' biases that depend on the tokens of both
    model = dataclasses.replace(MODEL, mlp="moe", balance="bias", dropout=0.1)
    train(model, TRAIN, data_dir, tmp_path / "one")
    script = (
        "import json, sys\n"
        "from ceg_model.config import GPTConfig\n"
        "from ceg_model.train import TrainConfig, train\n"
        "train(GPTConfig.from_dict(json.loads(sys.argv[1])), "
        "TrainConfig.from_dict(json.loads(sys.argv[2])), sys.argv[3], sys.argv[4])\n"
    )
    (tmp_path / "script.py").write_text(script)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(tmp_path / "script.py"), json.dumps(model.to_dict()), json.dumps(TRAIN.to_dict()),
         str(data_dir), str(tmp_path / "two")],
        check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for a, b in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        if a["eval_loss"] is not None:
            assert a["eval_loss"] == pytest.approx(b["eval_loss"], rel=1e-5)
    assert json.loads((tmp_path / "two" / RUN).read_text())["sessions"][0]["processes"] == 2

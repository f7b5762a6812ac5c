"""Training on the CPU and on a GPU gives the losses of the formula, stopped on the way or not."""

import dataclasses
import json

import pytest
import torch
from devices import forced, on_each_device

from ceg_model.config import GPTConfig
from ceg_model.data import Request, prepare
from ceg_model.rundir import RUN, read_metrics
from ceg_model.train import train
from ceg_model.train_config import TrainConfig

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

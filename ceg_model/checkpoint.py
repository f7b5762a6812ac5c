"""Checkpoints that survive kill -9: a folder appears whole, under its final name, or not at all.

    ckpt/step-00000200/model.safetensors   weights and buffers, by their names in the state dict
                       optimizer.pt        torch's optimizer state (read with weights_only=True)
                       state.json          step, seconds, run id, and the SHA-256 of the other two

Files are written to a folder with a temporary name, synced to disk, and the folder is renamed.
The last two are kept: should a disk damage the newest, the one before it goes on, and says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

KEPT = 2
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "state.json"


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write a checkpoint of `state["step"]` below `folder` and remove all but the last two."""
    final = folder / f"step-{state['step']:08d}"
    if final.exists():
        return final  # the same run at the same step: the same content
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".partial-*"):
        shutil.rmtree(stale)
    partial = folder / f".partial-{final.name}"
    partial.mkdir()
    save_file(_unshared(model.state_dict()), partial / MODEL)
    torch.save(optimizer.state_dict(), partial / OPTIMIZER)
    hashes = {name: _sha256(partial / name) for name in (MODEL, OPTIMIZER)}
    (partial / STATE).write_text(json.dumps({**state, "sha256": hashes}, indent=2) + "\n")
    for name in (MODEL, OPTIMIZER, STATE):
        sync(partial / name)
    sync(partial)
    os.rename(partial, final)
    sync(folder)
    for old in _checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)
    return final


def load(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    run_id: str,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:
    """Load the newest whole checkpoint below `folder` and return its state; None if there is none.

    A damaged checkpoint is left out with a `note`; if all are damaged, or one belongs to another
    run, a ValueError says so.
    """
    damage = ""
    for path in reversed(_checkpoints(folder)):
        damage = _damage(path)
        if damage:
            note(f"left out: {damage}")
            continue
        state = json.loads((path / STATE).read_text())
        if state["run_id"] != run_id:
            raise ValueError(f"checkpoint {path} must be of run {run_id}, got {state['run_id']}")
        _load_weights(path / MODEL, model)
        optimizer.load_state_dict(torch.load(path / OPTIMIZER, weights_only=True))
        return state
    if damage:
        raise ValueError(
            f"a checkpoint below {folder} must be whole, got only damaged ones: {damage}"
        )
    return None


def load_model(path: Path, model: nn.Module) -> None:
    """Load the weights of one checkpoint folder, or of one .safetensors file, into `model`."""
    file = path / MODEL if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint {path} must hold {MODEL}, got no such file")
    _load_weights(file, model)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's names, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint folder, or "" when its files are as they were written."""
    try:
        hashes = json.loads((path / STATE).read_text())["sha256"]
    except (OSError, ValueError, KeyError) as error:
        return f"{path / STATE} must be readable, got {error!r}"
    for name, expected in hashes.items():
        file = path / name
        found = _sha256(file) if file.is_file() else "no such file"
        if found != expected:
            return f"{file} must have SHA-256 {expected}, got {found}"
    return ""


def _load_weights(file: Path, model: nn.Module) -> None:
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} must be a safetensors file, got {error}") from error
    own = _unshared(model.state_dict())
    if weights.keys() != own.keys():
        differing = sorted(weights.keys() ^ own.keys())
        raise ValueError(
            f"{file} must have the tensors of this model, got a difference in "
            f"{len(differing)}: {', '.join(differing[:4])}"
        )
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise ValueError(
                f"{name} in {file} must have shape {tuple(tensor.shape)}, "
                f"got {tuple(weights[name].shape)}"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def _unshared(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict with a tied weight under its first name only (safetensors holds no views)."""
    first: dict[tuple[int, torch.Size], str] = {}
    return {
        name: tensor.detach().contiguous() if not tensor.is_contiguous() else tensor.detach()
        for name, tensor in state.items()
        if tensor.numel() == 0 or first.setdefault((tensor.data_ptr(), tensor.shape), name) == name
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

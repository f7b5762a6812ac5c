"""What `ceg train CONFIG` reads: a preset by name, or a JSON or TOML file, with overrides.

A config has two sections, `model` (fields of GPTConfig) and `train` (fields of TrainConfig). Fields
left out take their defaults, and `vocab_size` that of the data.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from ceg_model.config import GPTConfig
from ceg_model.train_config import TrainConfig

_MODERN = {"norm": "rms_norm", "position": "rope", "mlp": "swiglu"}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # seconds on two cores: to see that everything works
    "smoke": {
        "model": {"n_layer": 1, "d_model": 32, "n_head": 2, "seq_len": 64},
        "train": {"steps": 20, "batch_size": 4, "eval_every": 10, "eval_batches": 2},
    },
    # the largest model of `ceg demo`: half a minute on two cores
    "nano": {
        "model": {"n_layer": 2, "d_model": 64, "n_head": 4, "seq_len": 256},
        "train": {"steps": 400, "batch_size": 16, "lr": 2e-3, "warmup_steps": 10},
    },
    "nano-modern": {
        "model": {"n_layer": 2, "d_model": 64, "n_head": 4, "seq_len": 256, **_MODERN},
        "train": {"steps": 400, "batch_size": 16, "lr": 2e-3, "warmup_steps": 10},
    },
    # the paper's v2 "compact" model: for a GPU
    "compact": {
        "model": {"n_layer": 6, "d_model": 384, "n_head": 6, "seq_len": 512},
        "train": {
            "steps": 5000,
            "batch_size": 64,
            "lr": 1e-3,
            "schedule": "wsd",
            "warmup_steps": 200,
            "eval_every": 250,
            "log_every": 10,
            "checkpoint_every": 500,
        },
    },
    # GPT-2 124M, half a million tokens a step
    "gpt2": {
        "model": {
            "n_layer": 12,
            "d_model": 768,
            "n_head": 12,
            "seq_len": 1024,
            "norm": "layer_norm",
        },
        "train": {
            "steps": 19073,
            "batch_size": 32,
            "grad_accum": 16,
            "lr": 6e-4,
            "schedule": "cosine",
            "min_lr_ratio": 0.1,
            "warmup_steps": 700,
            "eval_every": 250,
            "log_every": 10,
            "checkpoint_every": 500,
        },
    },
}

SECTIONS = {"model": GPTConfig, "train": TrainConfig}


def load_config(name: str, overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sections (model, train) of a preset or a file, after `KEY=VALUE` overrides."""
    if name in PRESETS:
        content = {section: dict(values) for section, values in PRESETS[name].items()}
    else:
        content = _read(name)
    unknown = [key for key in content if key not in SECTIONS]
    if unknown or not all(isinstance(section, dict) for section in content.values()):
        raise ValueError(
            f"config {name} must have the sections model and train only, "
            f"got {', '.join(map(repr, unknown or content))}"
        )
    sections = {section: content.get(section, {}) for section in SECTIONS}
    for override in overrides:
        section, key, value = _parse(override)
        sections[section][key] = value
    return sections["model"], sections["train"]


def _read(name: str) -> dict[str, Any]:
    path = Path(name)
    if path.suffix not in (".json", ".toml"):
        raise ValueError(
            f"config must be a .json or .toml file or one of {', '.join(PRESETS)}, got {name!r}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"config {name} must be a file, got nothing there")
    try:
        content = json.loads(path.read_text()) if path.suffix == ".json" else _read_toml(path)
    except ValueError as error:  # what both decoders raise
        raise ValueError(f"config {name} must be valid {path.suffix[1:]}, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config {name} must be an object, got {type(content).__name__}")
    return content


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"config {path} needs Python >= 3.11 (tomllib); write it as JSON"
        ) from error
    return tomllib.loads(path.read_text())


def _parse(override: str) -> tuple[str, str, Any]:
    """`train.lr=1e-3`, or `lr=1e-3` where only one section has the field."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"--set must be KEY=VALUE, got {override!r}")
    section, dot, field = key.rpartition(".")
    if dot and section not in SECTIONS:
        raise ValueError(f"section of {key} must be model or train, got {section!r}")
    owners = [
        name
        for name, kind in SECTIONS.items()
        if section in ("", name) and field in (f.name for f in fields(kind))
    ]
    if len(owners) != 1:
        known = [
            f.name for name in ([section] if dot else SECTIONS) for f in fields(SECTIONS[name])
        ]
        raise ValueError(f"key of --set must be one of {', '.join(known)}, got {key!r}")
    try:
        return owners[0], field, json.loads(text)
    except json.JSONDecodeError:  # a bare word is a string
        return owners[0], field, text

"""What `ceg info` says: versions, build, which backend runs each op, the roofs of this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

import ceg_kernels
from ceg_kernels import OPS
from ceg_kernels.measure import ceilings
from ceg_model import environment


def info(*, roofs: bool, refresh: bool = False) -> dict[str, Any]:
    """Everything as one JSON object. `roofs` takes seconds when they are not cached."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {
        "versions": environment.versions(),
        "git": environment.git_state(),
        "build": ceg_kernels.build_info(),
        "ops": {device: {name: _choice(name, device) for name in OPS} for device in devices},
        "roofs": {
            device: dataclasses.asdict(ceilings.measure(device, refresh=refresh))
            for device in (devices if roofs else ())
        },
    }


def _choice(name: str, device: str) -> dict[str, Any]:
    """Which backend runs an op in fp32 unless another is forced, and why others cannot."""
    op = OPS[name]
    sample = next(iter(op.samples(torch.float32, device)))
    reasons = {backend.name: backend.why_not(*sample.args) for backend in op.backends}
    return {
        "runs": op.choose(*sample.args).name,
        "can": [backend for backend, reason in reasons.items() if reason is None],
        "cannot": {backend: reason for backend, reason in reasons.items() if reason is not None},
    }


def describe(found: dict[str, Any]) -> str:
    """`info` for people."""
    return "\n".join(_lines(found))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield "versions  " + ", ".join(
        f"{k} {v or 'not installed'}" for k, v in found["versions"].items()
    )
    commit = found["git"]["commit"]
    yield f"commit    {commit or 'unknown'}{' (changed)' if found['git']['dirty'] else ''}"
    yield "build"
    for key, value in _flat(found["build"]):
        yield f"  {key:<16}{value}"
    for device, ops in found["ops"].items():
        yield f"ops on {device} (the first one runs unless another is forced)"
        for name, choice in ops.items():
            others = [backend for backend in choice["can"] if backend != choice["runs"]]
            yield f"  {name:<22}{', '.join([choice['runs'], *others])}"
        cannot = {pair for choice in ops.values() for pair in choice["cannot"].items()}
        for backend, reason in sorted(cannot):
            yield f"  not {backend}: {reason}"
    for device, roofs in found["roofs"].items():
        yield f"roofs of {device}: {roofs['device_name']}, {roofs['threads']} threads"
        for dtype, flops in roofs["flops"].items():
            yield f"  {dtype:<16}{_rate(flops, 'FLOP/s')}"
        yield f"  {'copy':<16}{_rate(roofs['copy_bytes_per_s'], 'B/s')}"


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{key}.")
        elif isinstance(item, list):
            yield prefix + key, ", ".join(map(str, item)) or "none"
        else:
            yield prefix + key, "none" if item in (None, "") else str(item)


def _rate(value: float | None, unit: str) -> str:
    if value is None:
        return "unknown"
    scale, prefix = (1e12, "T") if value >= 1e12 else (1e9, "G")
    return f"{value / scale:.3g} {prefix}{unit}"

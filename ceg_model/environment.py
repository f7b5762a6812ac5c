"""What a run depended on beside its config: versions, the device, the commit."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "numpy", "ceg-kernels")


def versions() -> dict[str, str | None]:
    """Python's version and those of the packages that a result depends on; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__  # with the build tag (+cpu), which the metadata may lack
    return found


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """The instruction sets of this CPU, by Linux's names; empty where it does not say."""
    return set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())


def git_state() -> dict[str, Any]:
    """Commit of the checkout that this package runs from, and whether files of it were changed."""
    folder = Path(__file__).parent

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *command], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:  # no git on this machine
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", str(folder.parent))
    return {"commit": commit, "dirty": bool(changed) if commit else None}


def describe(device: torch.device) -> dict[str, Any]:
    return {
        "versions": versions(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "git": git_state(),
    }


def _cpuinfo(key: str) -> str | None:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.is_file() else ():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None

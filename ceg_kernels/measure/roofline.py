"""What a timing is worth: rows that stand beside the measured roofs of the machine.

The roofline model: work of `cost.flops` and `cost.bytes` takes at least
`max(flops / peak FLOP/s, bytes / copy bandwidth)` seconds. `bound` says which of the two is larger,
`roof_fraction` is that least time over the measured one. Where a roof is unknown both are None.
"""

from __future__ import annotations

import functools
import platform
import subprocess
from pathlib import Path
from typing import Any

from ceg_kernels.measure import memory
from ceg_kernels.measure.ceilings import Roofs
from ceg_kernels.measure.clock import Timing
from ceg_kernels.op import Cost

# `status` is "ok", or "ok: ..." with what the reader must know, or why there is no time.
ROW_KEYS = (
    "op", "direction", "backend", "peer", "shape", "dtype", "device", "status",
    "median_s", "p20_s", "p80_s", "hot_s", "rounds", "call_s", "flops", "bytes", "gflops",
    "gbytes_per_s", "intensity", "bound", "roof_fraction", "speedup_vs_reference",
    "max_error_over_slack", "versions", "commit",
)  # fmt: skip


def least_seconds(cost: Cost, dtype: str, roofs: Roofs) -> tuple[float, str] | None:
    """(seconds that the roofs allow, "compute" | "memory"), or None where a roof is unknown."""
    peak, bandwidth = roofs.flops.get(dtype), roofs.copy_bytes_per_s
    if bandwidth is None or (peak is None and cost.flops > 0):
        return None
    memory_s = cost.bytes / bandwidth
    compute_s = cost.flops / peak if peak is not None else 0.0
    return (compute_s, "compute") if compute_s > memory_s else (memory_s, "memory")


def attainable(cost: Cost, dtype: str, roofs: Roofs) -> float | None:
    """FLOP/s that the roofs allow at this cost's intensity, or None where a roof is unknown."""
    least = least_seconds(cost, dtype, roofs)
    if least is None or least[0] == 0.0:
        return None
    return cost.flops / least[0]


def bench_row(
    *,
    op: str,
    direction: str,
    backend: str,
    peer: str | None,
    shape: str,
    dtype: str,
    device: str,
    cost: Cost,
    roofs: Roofs,
    timing: Timing | None,
    reference: Timing | None = None,
    error_over_slack: float | None = None,
    status: str = "ok",
) -> dict[str, Any]:
    """One measurement as a dict of `ROW_KEYS`; `timing` is None where `status` says why."""
    row: dict[str, Any] = dict.fromkeys(ROW_KEYS)
    row.update(
        op=op, direction=direction, backend=backend, peer=peer, shape=shape, dtype=dtype,
        device=device, status=status, flops=int(cost.flops), bytes=int(cost.bytes),
        intensity=cost.flops / cost.bytes if cost.bytes else None,
        max_error_over_slack=error_over_slack, versions=versions(roofs), commit=commit(),
    )  # fmt: skip
    least = least_seconds(cost, dtype, roofs)
    if least is not None:
        row["bound"] = least[1]
    if timing is None:
        return row
    seconds = timing.median_s
    row.update(
        median_s=seconds, p20_s=timing.p20_s, p80_s=timing.p80_s, hot_s=timing.hot_s,
        rounds=timing.rounds, call_s=timing.call_s,
        gflops=cost.flops / seconds / 1e9, gbytes_per_s=cost.bytes / seconds / 1e9,
        roof_fraction=least[0] / seconds if least is not None else None,
        speedup_vs_reference=reference.median_s / seconds if reference is not None else None,
    )  # fmt: skip
    return row


def versions(roofs: Roofs) -> dict[str, str]:
    """What a number depends on beside the code: device, threads, build, versions, kind of roof."""
    found = dict(roofs.versions)
    found.update(
        python=platform.python_version(),
        machine=roofs.device_name,
        threads=str(roofs.threads),
        freed_memory="kept" if memory.prepared() else "returned",
    )
    if pages := memory.page_size():
        found["pages"] = pages
    sources = roofs.flops_source | {"copy": roofs.copy_source}
    if known := [f"{name} {how}" for name, how in sources.items() if how is not None]:
        found["roofs"] = ", ".join(known)
    return found


@functools.cache
def commit() -> str | None:
    """The checkout's commit, with "-dirty" where it differs from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed, or inside somebody else's repository
        return None
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if dirty else head


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

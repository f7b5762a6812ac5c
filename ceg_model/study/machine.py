"""What a study has to know of its machine: its roofs, and a quick bench of every op.

Each is measured once, before anything else runs, and kept in the study's folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ceg_model.progress import Progress
from ceg_model.rundir import read_json, write_json

BENCH, ROOFS = "bench.json", "roofs.json"
BUDGET_S = 40.0


def describe(
    folder: Path,
    device: str,
    *,
    say: Callable[[str], None],
    budget_s: float = BUDGET_S,
    smoke: bool = False,
    titles: tuple[str, str] = ("roofs of this machine", "bench of every op"),
) -> None:
    """Leaves roofs.json and bench.json in `folder`, each unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    roofs = _stage(folder / ROOFS, titles[0], lambda: _roofs(device, smoke), say)
    _stage(folder / BENCH, titles[1], lambda: _bench(device, budget_s, roofs, smoke), say)


def _stage(
    path: Path, title: str, make: Callable[[], dict[str, Any]], say: Callable[[str], None]
) -> dict[str, Any]:
    if (known := read_json(path)) is not None:
        say(f"{title}: done before")
        return known
    say(title)
    content = make()
    write_json(path, content)
    return content


def _roofs(device: str, smoke: bool) -> dict[str, Any]:
    from ceg_kernels.measure.ceilings import measure

    return dataclasses.asdict(measure(device, seconds=0.05 if smoke else 0.2))


def _bench(device: str, budget_s: float, roofs: dict[str, Any], smoke: bool) -> dict[str, Any]:
    from ceg_kernels.measure.ceilings import Roofs
    from ceg_kernels.measure.run import quick_bench

    with Progress("bench") as progress:
        rows = quick_bench(
            device,
            budget_s=budget_s,
            smoke=smoke,
            roofs=Roofs(**roofs),
            progress=lambda case, done, total: progress(done, total, str(case)),
        )
    return {"rows": [dict(row) for row in rows]}

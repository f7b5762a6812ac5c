"""Kills a study with SIGKILL, lets it go on, and compares what came out with an undisturbed one.

By hand:  python tests/kill_study.py nano --data data/stdlib --out DIR --seed 1   (half an hour)
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ceg_model.study.collect import collect
from ceg_model.study.machine import BENCH, ROOFS

KILLS = 10


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    """The content of results.json that must be the same whenever and however often it ran.

    Left out: all that is a time, a rate or a ratio of rates. Kept of those: which of them are
    there, and what they were taken from.
    """
    out = copy.deepcopy(results)
    for curve in out["curves"]:
        del curve["seconds"]
    for answer in out["estimate"]["arms"].values():
        for cell in (answer, *answer["scales"].values()):
            for name in ("g_hw", "g_time", "residual"):
                cell[name] = cell[name] is not None
            cell["flags"] = [flag for flag in cell["flags"] if flag != "identity_failed"]
    out["hardware"] = {
        scale: {arm: gains["source"] for arm, gains in arms.items()}
        for scale, arms in out["hardware"].items()
    }
    out["estimate"]["class_hw"] = list(out["estimate"]["class_hw"])
    out["throughput"] = {scale: list(timed["arms"]) for scale, timed in out["throughput"].items()}
    return out


def differences(left: Any, right: Any, where: str = "results") -> list[str]:
    """Each place in which two JSON values differ, as text."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return [d for key in left for d in differences(left[key], right[key], f"{where}.{key}")]
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}[{i}]")]
    return [] if left == right else [f"{where}: {str(left)[:80]} and {str(right)[:80]}"]


def processes_of(group: int) -> list[int]:
    """The processes that are alive in a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, its_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:  # it has just ended
                continue
            if int(its_group) == group and state not in "ZX":
                found.append(int(entry.name))
    return found


def wait_until_gone(group: int, patience_s: float) -> list[int]:
    """Those of the group that are still alive after at most `patience_s`."""
    end = time.monotonic() + patience_s
    while (left := processes_of(group)) and time.monotonic() < end:
        time.sleep(0.02)
    return left


def written(folder: Path) -> int:
    """Bytes of all rows by now."""
    return sum(file.stat().st_size for file in folder.glob("runs/*/metrics.jsonl"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("plan")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True, help="of the moments of the kills")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "ceg_model.cli", "study", "run", arguments.plan]
    command += ["--data", arguments.data, "--out"]
    whole, killed = arguments.out / "undisturbed", arguments.out / "killed"
    subprocess.run([*command, str(whole)], check=True)
    draw = random.Random(arguments.seed)
    # Parts of what there is to write, not seconds: how long anything takes depends on the machine.
    moments = [0.0, *sorted(draw.random() for _ in range(KILLS - 1))]
    for i, moment in enumerate(moments):
        process = subprocess.Popen([*command, str(killed)], start_new_session=True)
        while written(killed) < moment * written(whole):
            assert process.poll() is None, f"it ended before kill {i}"
            time.sleep(0.05)
        time.sleep(draw.uniform(0.5, 3.0))
        # Every third time the parent alone: its workers must see to themselves.
        (os.killpg if i % 3 else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        part, left = written(killed) / written(whole), wait_until_gone(process.pid, 10.0)
        print(f"\nkill {i} at {part:.1%} of the rows, processes left: {left}", flush=True)
        if i == 0:  # it met the measuring of the machine, which begins anew; the others meet runs
            killed.mkdir(exist_ok=True)
            for name in (ROOFS, BENCH):
                shutil.copy(whole / name, killed / name)
    subprocess.run([*command, str(killed)], check=True)
    found = differences(without_times(collect(whole)), without_times(collect(killed)))
    print("\n".join(found) or "the same results", flush=True)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()

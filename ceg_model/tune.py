"""`ceg tune`: tiles of the Triton attention kernels, timed on this GPU or found by compiling."""

from __future__ import annotations

import argparse
import json
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ceg_model.progress import Progress

if TYPE_CHECKING:
    from ceg_kernels.triton.attention_config import Key, Tile

TIMED = 12  # candidates a key, the largest that fit: some 2 s each
GAIN = 0.02  # a tile that is not faster by more than this stays where it is


def add_subcommands(subparsers: argparse._SubParsersAction) -> None:
    tune = subparsers.add_parser(
        "tune",
        help="time tiles of the Triton attention kernels on this GPU and keep the fastest",
        description="Checks and times tiles of the Triton attention kernels on this GPU, and "
        "writes the times and each tile that is more than 2 %% faster into the table. What is "
        "found is kept at any time; run it again and measured keys are timed again.",
    )
    tune.add_argument(
        "--compile", metavar="TARGETS",
        help="instead, and without a GPU: for keys of these GPUs (sm_90,gfx942) that have no tile, "
        "or one that spills or does not fit, the largest that does; measured rows stay",
    )  # fmt: skip
    tune.add_argument("--kernels", default="", metavar="NAMES", help="fwd,bwd,bwd_dkdv,bwd_dq")
    tune.add_argument("--table", type=Path, metavar="FILE", help="default: the package's own")
    tune.add_argument("--json", action="store_true", help="print the new rows")
    tune.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """0, also where nothing was better."""
    from ceg_kernels.triton import attention_config as config

    wanted = tuple(filter(None, parsed.kernels.split(","))) or config.KERNELS
    for name in wanted:
        if name not in config.KERNELS:
            raise ValueError(f"kernels must be of {', '.join(config.KERNELS)}, got {name!r}")
    path = parsed.table or config.PATH
    with Progress("tune") as progress:
        if parsed.compile:
            found = by_compiler(parsed.compile.split(","), wanted, path, progress)
        else:
            found = by_clock(wanted, path, progress)
    if parsed.json:
        print(json.dumps([{"key": vars(k), "tile": vars(t)} for k, t in found.items()], indent=2))
    else:
        for key, tile in found.items():
            print(*vars(key).values(), "->", *vars(tile).values())
        print(f"{len(found)} rows written to {path}")
    return 0


def by_compiler(
    targets: list[str], kernels: tuple[str, ...], path: Path, progress: Progress
) -> dict[Key, Tile]:
    """Rows of `targets` that do not fit any more or have no tile, searched; needs no GPU."""
    from ceg_kernels.triton import attention_config as config
    from ceg_kernels.triton import tune
    from ceg_kernels.triton.compile import TARGETS

    found: dict[Key, Tile] = {}
    known = [name for name in TARGETS if name not in config.ALIKE]  # those have no rows
    for name in targets:
        if name not in known:
            raise ValueError(f"target must be one of {', '.join(known)}, got {name!r}")
        keys = [key for key in tune.keys(TARGETS[name]) if key.kernel in kernels]
        for done, key in enumerate(keys):
            progress(done, len(keys), " ".join(map(str, vars(key).values())))
            table = config.rows(path)
            now, by = table.get(key, (config.UNUSED, "compiler"))
            measured = isinstance(by, dict) and "device" in by
            if measured or (now != config.UNUSED and tune.fits(key, now)):
                continue
            found[key], by = tune.largest(key)
            config.write({**table, key: (found[key], by)}, path)
    return found


def by_clock(kernels: tuple[str, ...], path: Path, progress: Progress) -> dict[Key, Tile]:
    """Rows of this GPU, timed: RuntimeError where there is none that Triton compiles for."""
    import torch

    from ceg_kernels import triton
    from ceg_kernels.measure.roofline import commit
    from ceg_kernels.triton import attention_config as config
    from ceg_kernels.triton import tune
    from ceg_kernels.triton.compile import TARGETS
    from ceg_kernels.triton.launch import gpu_of

    if not torch.cuda.is_available() or triton.INTERPRETED:
        raise RuntimeError("ceg tune must run on a GPU, got none (--compile needs none)")
    arch = gpu_of(torch.empty(0, device="cuda")).arch
    target = TARGETS.get(config.ALIKE.get(arch, arch))
    if target is None:
        raise RuntimeError(f"the GPU must be one of {', '.join(TARGETS)}, got {arch}")
    by = {"device": torch.cuda.get_device_name(), "triton": version("triton"), "commit": commit()}
    found: dict[Key, Tile] = {}
    keys = [key for key in tune.masks(target) if key.kernel in kernels]
    for done, key in enumerate(keys):
        progress(done, len(keys), " ".join(map(str, vars(key).values())))
        table = config.rows(path)
        now = table[key if key in table else config.plain(key)][0]
        fitting = (t for t in tune.candidates(key) if t != now and tune.fits(key, t))
        others = [tile for tile, _ in zip(fitting, range(TIMED), strict=False)]
        ways = [tile for tile in tune.schedules(key, now) if tune.fits(key, tile)]
        seconds = tune_one(key, [now, *ways, *others], target, "cuda")
        if now not in seconds:
            raise RuntimeError(f"{key}: the table's tile must give right results, got {now}")
        best = min(seconds, key=seconds.__getitem__)
        gained = 1 - seconds[best] / seconds[now]
        if gained < GAIN:
            best = now
        found[key] = best
        us = {"us": round(seconds[best] * 1e6, 2), "gain": round(max(gained, 0.0), 3)}
        config.write({**table, key: (best, {**by, **us})}, path)
    return found


def tune_one(key: Key, tiles: list[Tile], target: Any, device: str) -> dict[Tile, float]:
    """Median seconds of the key's first call with each tile whose results are right.

    The other kernels of a backward run beside it, the same for all.
    """
    from ceg_kernels.measure import accuracy
    from ceg_kernels.measure.clock import time_interleaved
    from ceg_kernels.ops.attention import ATTENTION, ATTENTION_BACKWARD
    from ceg_kernels.triton import attention_config as config
    from ceg_kernels.triton import tune

    declared = ATTENTION if key.kernel in ("fwd", "decode") else ATTENTION_BACKWARD
    op = accuracy.with_remembered_reference(declared)
    args = tune.arguments(key, target, device)

    def call(tile: Tile) -> Any:
        with config.forced(tune.alone(key, tile)):
            return op.backend("triton").run(*args)

    right = [t for t in tiles if accuracy.compare(op, accuracy.as_tuple(call(t)), args) <= 1]
    timings = time_interleaved({str(t): partial(call, t) for t in right}, device=device)
    return {t: timings[str(t)].median_s for t in right}

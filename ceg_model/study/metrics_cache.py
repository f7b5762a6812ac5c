"""The metrics of a study's runs in one file beside them, so that a report reads it in a second.

The truth stays in the runs: an entry holds while its metrics.jsonl has the inode, size and time
that it had, and everything is read anew where the file is damaged, which its checksums tell, or of
another version. It is written to a temporary name and renamed, so a kill leaves the old one.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np

from ceg_model.rundir import METRICS, Array, Columns, read_columns

VERSION = 1  # raise it when Columns changes
NAMES = tuple(field.name for field in fields(Columns))
OF_ROWS = ("step", "train_s")  # the other columns are of evaluations

Stamps = dict[str, tuple[int, int, int]]


def read(cache: Path, folder: Path, runs: Sequence[str]) -> dict[str, Columns]:
    """The metrics of those `runs` below `folder` that have any; brings the cache up to date."""
    paths = {run: f"{folder}/{run}/{METRICS}" for run in runs}
    stamps = {run: stamp for run in runs if (stamp := _stamp(paths[run])) is not None}
    known = _load(cache)
    found = {run: known[run][1] for run, stamp in stamps.items() if _holds(known, run, stamp)}
    missing = [run for run in stamps if run not in found]
    if missing:
        # Arrow's parser runs without Python's lock.
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            read = threads.map(read_columns, (folder / run for run in missing))
            found |= dict(zip(missing, read, strict=True))
        _save(cache, stamps, found)
    return found


def _stamp(path: str) -> tuple[int, int, int] | None:
    """What changes when a file does; None where there is none."""
    try:
        about = os.stat(path)
    except FileNotFoundError:
        return None
    return about.st_ino, about.st_size, about.st_mtime_ns


def _holds(
    known: Mapping[str, tuple[tuple[int, ...], Columns]], run: str, stamp: tuple[int, ...]
) -> bool:
    return run in known and known[run][0] == stamp


def _load(cache: Path) -> dict[str, tuple[tuple[int, ...], Columns]]:
    """run -> (stamp, metrics); empty where there is no cache that can be used."""
    try:
        with np.load(cache, allow_pickle=False) as file:  # checks the CRC of every array
            if int(file["version"]) != VERSION:
                return {}
            runs, stamps = file["runs"].tolist(), map(tuple, file["stamps"].tolist())
            ends = {name: np.cumsum(file[f"{name}_counts"]) for name in ("rows", "evaluations")}
            columns = {
                name: np.split(file[name], ends["rows" if name in OF_ROWS else "evaluations"][:-1])
                for name in NAMES
            }
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return {}
    each = (Columns(*parts) for parts in zip(*columns.values(), strict=True))
    return dict(zip(runs, zip(stamps, each, strict=True), strict=True))


def _save(cache: Path, stamps: Stamps, found: Mapping[str, Columns]) -> None:
    arrays: dict[str, Array] = {
        name: np.concatenate([getattr(columns, name) for columns in found.values()])
        for name in NAMES
    }
    arrays["version"] = np.array(VERSION)
    arrays["runs"] = np.array(list(found))
    arrays["stamps"] = np.array([stamps[run] for run in found], dtype=np.int64)
    arrays["rows_counts"] = np.array([c.step.size for c in found.values()])
    arrays["evaluations_counts"] = np.array([c.evaluated.size for c in found.values()])
    partial = cache.with_name(f".{cache.name}.{os.getpid()}.partial")  # two reports at a time
    with partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes allow_pickle for one
    os.replace(partial, cache)

"""What a report needs of a study's runs in one file beside them, so that it is read in a second.

The truth stays in the runs: an entry holds while its metrics.jsonl and run.json have the inode,
size and time that they had, and everything is read anew where the file is damaged, which its
checksums tell, or of another version. It is written to a temporary name and renamed, so a kill
leaves the old one.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ceg_model.rundir import METRICS, RUN, Array, Columns, read_columns, read_json

VERSION = 2  # raise it when Columns or About changes
NAMES = tuple(field.name for field in fields(Columns))
OF_ROWS = ("step", "train_s")  # the other columns are of evaluations

Stamp = tuple[int, ...]


class About(NamedTuple):
    """From run.json: what makes curves comparable, and each session's lockstep."""

    identity: dict[str, str]
    lockstep: list[str | None]


class Run(NamedTuple):
    columns: Columns
    about: About


def read(cache: Path | None, folder: Path, runs: Sequence[str]) -> dict[str, Run]:
    """Those `runs` below `folder` that have metrics; brings the cache up to date, if there is one.

    Raises ValueError for one that has metrics and no run.json.
    """
    stamps = {run: stamp for run in runs if (stamp := _stamp(f"{folder}/{run}")) is not None}
    known = _load(cache) if cache else {}
    found = {run: known[run][1] for run, stamp in stamps.items() if _holds(known, run, stamp)}
    missing = [run for run in stamps if run not in found]
    if missing:
        # Arrow's parser runs without Python's lock.
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            columns = threads.map(read_columns, (folder / run for run in missing))
            abouts = (_about(folder / run) for run in missing)
            found |= dict(zip(missing, map(Run, columns, abouts), strict=True))
        if cache:
            _save(cache, stamps, found)
    return found


def _about(folder: Path) -> About:
    run = read_json(folder / RUN)
    if run is None:
        raise ValueError(f"run folder {folder} must have {RUN}, got none")
    train, data = run["train"], run["data"]
    identity = {
        "data": data["hash"],
        "tokenizer": data["tokenizer"],
        "flop_convention": run["flop_convention"],
        "eval_set": f"{train['eval_batches']} x {train['batch_size']} x {run['model']['seq_len']}",
    }
    return About(identity, [session.get("lockstep") for session in run.get("sessions", [])])


def _stamp(folder: str) -> Stamp | None:
    """What changes when a run's files do; None where it has no metrics."""
    try:
        metrics = os.stat(f"{folder}/{METRICS}")
        run = os.stat(f"{folder}/{RUN}")
    except FileNotFoundError as error:
        return None if error.filename.endswith(METRICS) else ()  # read anew, which then says so
    return tuple(x for f in (metrics, run) for x in (f.st_ino, f.st_size, f.st_mtime_ns))


def _holds(known: Mapping[str, tuple[Stamp, Run]], run: str, stamp: Stamp) -> bool:
    return run in known and known[run][0] == stamp


def _load(cache: Path) -> dict[str, tuple[Stamp, Run]]:
    """run -> (stamp, content); empty where there is no cache that can be used."""
    try:
        with np.load(cache, allow_pickle=False) as file:  # checks the CRC of every array
            if int(file["version"]) != VERSION:
                return {}
            runs, stamps = file["runs"].tolist(), map(tuple, file["stamps"].tolist())
            ends = {
                kind: [0, *np.cumsum(file[f"{kind}_counts"]).tolist()]
                for kind in ("rows", "evaluations")
            }
            columns = {
                name: _cut(file[name], ends["rows" if name in OF_ROWS else "evaluations"])
                for name in NAMES
            }
            several = [About(*json.loads(text)) for text in file["abouts"].tolist()]
            abouts = [several[i] for i in file["about"].tolist()]
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return {}
    each = (Columns(*parts) for parts in zip(*columns.values(), strict=True))
    return dict(zip(runs, zip(stamps, map(Run, each, abouts), strict=True), strict=True))


def _cut(column: Array, ends: list[int]) -> list[Array]:
    """`numpy.split`, which takes six times as long."""
    return [column[first:last] for first, last in pairwise(ends)]


def _save(cache: Path, stamps: Mapping[str, Stamp], found: Mapping[str, Run]) -> None:
    every = [run.columns for run in found.values()]
    arrays: dict[str, Array] = {
        name: np.concatenate([getattr(columns, name) for columns in every]) for name in NAMES
    }
    # Runs of one group say the same of themselves.
    texts = [json.dumps(run.about) for run in found.values()]
    places: dict[str, int] = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    arrays["abouts"] = np.array(list(places))
    arrays["about"] = np.array([places[text] for text in texts])
    arrays["version"] = np.array(VERSION)
    arrays["runs"] = np.array(list(found))
    arrays["stamps"] = np.array([stamps[run] for run in found], dtype=np.int64)
    arrays["rows_counts"] = np.array([c.step.size for c in every])
    arrays["evaluations_counts"] = np.array([c.evaluated.size for c in every])
    partial = cache.with_name(f".{cache.name}.{os.getpid()}.partial")  # two reports at a time
    with partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes allow_pickle for one
    os.replace(partial, cache)

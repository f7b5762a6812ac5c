"""What a report needs of a run's metrics, as columns; kept in columns.bin when the run ends.

So a report of 10,000 runs parses no gigabyte of JSON. The truth stays in metrics.jsonl: what is
kept counts only where that has the size that it had at the end, and its time or, where the folder
was copied, its content. Else, and where a run ended before there was such a file, the lines are
read.

columns.bin is a header and Columns' numbers of eight bytes each, the integers first; a checksum
covers all of it but the first eight bytes, which hold it.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ceg_model.rundir import METRICS, read_metrics, write_atomically

Array = NDArray[Any]

COLUMNS = "columns.bin"
VERSION = 1  # raise it when Columns changes
# Checksum, version; size, time in ns and checksum of metrics.jsonl; how many rows and evaluations.
HEADER = struct.Struct("<7q")
NUMBERS = ("step", "train_s", "eval_loss", "model_flops", "executed_flops", "lr")


@dataclass(frozen=True)
class Columns:
    """Two columns of all rows, the others of evaluations; NaN stands for null.

    Lengths: (rows,) and (evaluations,).
    """

    step: Array
    train_s: Array
    evaluated: Array  # the evaluations' places among the rows
    eval_loss: Array
    model_flops: Array
    executed_flops: Array
    lr: Array


def keep(folder: Path) -> None:
    """Writes columns.bin, atomically. Nothing may be appended to metrics.jsonl afterwards."""
    file = folder / METRICS
    before = file.stat()
    found = _of_rows(read_metrics(folder))  # not Arrow's: a training process is spared its import
    integers = (found.step, found.evaluated)
    evaluations = (found.eval_loss, found.model_flops, found.executed_flops, found.lr)
    body = b"".join(
        [column.astype("<i8").tobytes() for column in integers]
        + [column.astype("<f8").tobytes() for column in (found.train_s, *evaluations)]
    )
    of_lines = (before.st_size, before.st_mtime_ns, zlib.crc32(file.read_bytes()))
    lengths = (found.step.size, found.evaluated.size)
    rest = HEADER.pack(0, VERSION, *of_lines, *lengths)[8:] + body
    write_atomically(folder / COLUMNS, struct.pack("<q", zlib.crc32(rest)) + rest)


def read_all(folder: Path, runs: Sequence[str]) -> dict[str, Columns]:
    """Of those `runs` below `folder` that have metrics."""
    found: dict[str, Columns] = {}
    missing = []
    for run in runs:
        try:
            lines = os.stat(f"{folder}/{run}/{METRICS}")
        except FileNotFoundError:
            continue
        if (kept := _kept(f"{folder}/{run}", lines)) is not None:
            found[run] = kept
        else:
            missing.append(run)
    if missing:
        # Arrow's parser runs without Python's lock.
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            read = threads.map(read_columns, (folder / run for run in missing))
            found |= zip(missing, read, strict=True)
    return found


def _kept(folder: str, lines: os.stat_result) -> Columns | None:
    """None where there is nothing, or nothing to be believed."""
    try:
        with open(f"{folder}/{COLUMNS}", "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return None
    if len(content) < HEADER.size:
        return None
    checksum, version, size, time, crc, rows, evaluations = HEADER.unpack_from(content)
    if version != VERSION or size != lines.st_size or checksum != zlib.crc32(content[8:]):
        return None
    if time != lines.st_mtime_ns and crc != zlib.crc32(Path(folder, METRICS).read_bytes()):
        return None
    integers, start = rows + evaluations, HEADER.size
    whole = np.frombuffer(content, "<i8", integers, start)
    others = np.frombuffer(content, "<f8", offset=start + 8 * integers)
    ends = [rows + i * evaluations for i in range(5)]
    rest = (others[first:last] for first, last in pairwise(ends))
    return Columns(whole[:rows], others[:rows], whole[rows:], *rest)


def read_columns(folder: Path) -> Columns:
    """`read_metrics` as columns. Arrow's parser takes a fifth of the time and lets threads run."""
    import pyarrow as pa
    from pyarrow import json as arrow

    schema = pa.schema([(name, pa.float64()) for name in NUMBERS])
    options = arrow.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    single = arrow.ReadOptions(use_threads=False)
    try:
        content = pa.BufferReader((folder / METRICS).read_bytes())
        table = arrow.read_json(content, single, options)
        return _columns({name: table[name].to_numpy() for name in NUMBERS})
    except pa.ArrowInvalid:  # a torn last line, or damage that `read_metrics` says better
        return _of_rows(read_metrics(folder))


def _of_rows(rows: Sequence[Mapping[str, Any]]) -> Columns:
    return _columns({n: np.array([row[n] for row in rows], dtype=np.float64) for n in NUMBERS})


def _columns(found: Mapping[str, Array]) -> Columns:
    evaluated = np.flatnonzero(~np.isnan(found["eval_loss"]))
    step, seconds, *rest = (found[name] for name in NUMBERS)
    return Columns(step.astype(np.int64), seconds, evaluated, *(c[evaluated] for c in rest))

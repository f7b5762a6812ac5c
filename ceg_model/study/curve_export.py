"""A study's curves as one table, in the columns that `ceg estimate` reads: CSV or Parquet."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ceg_model.rundir import write_atomically
from ceg_model.study.curves import IDENTITY, Curve
from ceg_model.study.gather import gather

LABELS = ("arm", "scale", "seed", "budget")
MEASURED = ("flops", "loss", "seconds", "lr", "executed_flops")


def study_curves(folder: str | Path) -> list[Curve]:
    """The curve of every finished run, in the order of the plan: scales, arms, seeds, budgets.

    Seconds are on the common clock where runs were trained in lockstep. ValueError where `folder`
    holds no study, or no run of it is finished.
    """
    curves = gather(folder).curves
    if not curves:
        raise ValueError(f"{folder} must hold a finished run, got none yet")
    return curves


def columns(curves: Sequence[Curve]) -> dict[str, list[Any]]:
    """Column -> values, one for each evaluation; None where a run has none. Empty ones are left."""
    out: dict[str, list[Any]] = {name: [] for name in (*LABELS, *MEASURED, *IDENTITY)}
    for curve in curves:
        rows = curve.flops.size
        for name in LABELS:
            out[name] += [getattr(curve.key, name) or None] * rows
        for name in MEASURED:
            values = getattr(curve, name)
            out[name] += [None] * rows if values is None else values.tolist()
        for name in IDENTITY:
            out[name] += [curve.identity.get(name)] * rows
    return {name: values for name, values in out.items() if any(v is not None for v in values)}


def write_curves(curves: Sequence[Curve], path: str | Path) -> None:
    """Writes FILE.csv (every digit, so that it reads back the same) or FILE.parquet (pyarrow)."""
    path, table = Path(path), columns(curves)
    if path.suffix == ".csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))
        write_atomically(path, text.getvalue())
    elif path.suffix == ".parquet":
        try:
            import pyarrow as pa
            from pyarrow import parquet
        except ImportError as error:
            raise ModuleNotFoundError(
                f"a .parquet file needs pyarrow (pip install -e .[study]), got {error}"
            ) from error
        parquet.write_table(pa.table(table), path)
    else:
        raise ValueError(f"--out must end in .csv or .parquet, got {path.name!r}")

"""A study's curves as one table, in the columns that `ceg estimate` reads: CSV or Parquet."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ceg_model.data import TokenData
from ceg_model.rundir import write_atomically
from ceg_model.study.curves import IDENTITY, Curve, Key
from ceg_model.study.plan import Plan
from ceg_model.study.runner import planned
from ceg_model.study.store import Store

LABELS = ("arm", "scale", "seed", "budget")
MEASURED = ("flops", "loss", "seconds", "lr", "executed_flops")


def study_curves(folder: str | Path) -> list[Curve]:
    """The curve of every finished run, in the order of the plan: scales, arms, seeds.

    Seconds are on the common clock where runs were trained in lockstep. ValueError where `folder`
    holds no study, or no run of it is finished.
    """
    store = Store(folder)
    study = store.study()
    if study is None:
        raise ValueError(f"DIR must be a study's folder, got {folder}, which has no study.json")
    plan = Plan.from_dict(study["plan"])
    specs = planned(plan, study["ours"], TokenData(study["data_dir"], verify=False))
    index = store.index()
    done = [(run, spec) for run, spec in specs if index.get(run, {}).get("status") == "done"]
    clocks = store.clocks(run for run, _ in done)
    found = [
        store.curve(run, Key(spec.arm, spec.scale, str(spec.seed)), clocks.get(run))
        for run, spec in done
    ]
    curves = [curve for curve in found if curve is not None]
    if not curves:
        raise ValueError(f"{folder} must hold a finished run, got none yet")
    scales = [scale.name for scale in plan.scales]
    curves.sort(key=lambda c: (scales.index(c.key.scale), plan.arms.index(c.key.arm), c.key.seed))
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

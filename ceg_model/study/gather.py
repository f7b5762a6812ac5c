"""What a study's folder holds by now: its plan, the runs that are over, and their curves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ceg_model.data import TokenData
from ceg_model.study.curves import Curve, Key
from ceg_model.study.plan import Plan, RunSpec
from ceg_model.study.schedule import Index, Schedule, schedule
from ceg_model.study.store import Store


@dataclass(frozen=True)
class Gathered:
    store: Store
    study: Mapping[str, Any]
    plan: Plan
    data: TokenData
    index: Index
    found: Schedule
    curves: list[Curve]  # by scale, arm, seed and budget
    clocks: Mapping[str, Any]  # run id -> seconds at each row, where trained in lockstep
    failed: list[dict[str, Any]]
    left_out: set[tuple[str, int]]  # (scale, seed) whose curves are not used: see _unbalanced


def gather(folder: str | Path) -> Gathered:
    """Reads the folder. Raises ValueError where it holds no study."""
    store = Store(folder)
    study = store.study()
    if study is None:
        raise ValueError(f"DIR must be a study's folder, got {folder}, which has no study.json")
    plan = Plan.from_dict(study["plan"])
    data = TokenData(study["data_dir"], verify=False)
    index = store.index()
    found = schedule(
        plan,
        study["ours"],
        data_hash=data.hash,
        vocab_size=data.vocab_size,
        index=index,
        failed_for_good=store.failed_twice,
    )
    left_out = _unbalanced(plan, found, index)
    over = {run: (spec, index[run]) for run, spec in found.finals().items() if run in index}
    done = {run: spec for run, (spec, result) in over.items() if result["status"] == "done"}
    clocks = store.clocks(done)
    curves = []
    for run, spec in done.items():
        curve = store.curve(run, _key(plan, spec), clocks.get(run))
        if curve is not None and (spec.scale, spec.seed) not in left_out:
            # With other kernels than the arm's own, a run's clock says nothing about the arm.
            curves.append(replace(curve, seconds=None) if plan.fast_curves else curve)
    order = {scale.name: i for i, scale in enumerate(plan.scales)}
    curves.sort(
        key=lambda c: (
            order[c.key.scale], plan.arms.index(c.key.arm), c.key.seed, float(c.key.budget or 1)
        )
    )  # fmt: skip
    failed = [
        {"arm": spec.arm, "scale": spec.scale, "seed": spec.seed, "budget": spec.budget}
        | {"reason": result["reason"] + (" (twice)" if store.failed_twice(run) else "")}
        for run, (spec, result) in over.items()
        if result["status"] == "failed"
    ]
    return Gathered(
        store, study, plan, data, index, found, curves=curves, clocks=clocks, failed=failed,
        left_out=left_out,
    )  # fmt: skip


def _key(plan: Plan, spec: RunSpec) -> Key:
    budget = f"{spec.budget:g}" if len(plan.budgets) > 1 else ""
    return Key(spec.arm, spec.scale, str(spec.seed), budget)


def _unbalanced(plan: Plan, found: Schedule, index: Index) -> set[tuple[str, int]]:
    """(scale, seed) in which an arm has runs to come: all arms are compared on the same seeds.

    Nothing is left out while no scale has a seed that is whole: then the report is a preview.
    """
    if len(plan.budgets) == 1:
        return set()
    blocks: dict[tuple[str, int], bool] = {}
    for run, spec in [*found.finals().items(), *found.pending.items()]:
        over = index.get(run, {}).get("status") in ("done", "failed")
        block = (spec.scale, spec.seed)
        blocks[block] = blocks.get(block, True) and over
    whole = {block for block, over in blocks.items() if over}
    return set(blocks) - whole if whole else set()

"""From a study's folder to the content of results.json: curves, estimate, timings, provenance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ceg_model.data import TokenData
from ceg_model.rundir import read_json
from ceg_model.study.cells import Options
from ceg_model.study.curves import Curve, Key
from ceg_model.study.estimate import estimate
from ceg_model.study.hardware import rates, split
from ceg_model.study.innovations import INNOVATIONS, is_same_maths, kernel_ops
from ceg_model.study.plan import Plan
from ceg_model.study.schedule import Index, Schedule, Tuning, schedule
from ceg_model.study.store import FIRST_FAILURE, Store

BENCH, ROOFS = "bench.json", "roofs.json"


def collect(folder: str | Path) -> dict[str, Any]:
    """Everything that the report shows. Raises ValueError where `folder` holds no study."""
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
    specs = list(found.finals().items())
    left_out = _unbalanced(plan, found, index)
    curves: list[Curve] = []
    failed = []
    clocks = store.clocks(run for run, _ in specs if index.get(run, {}).get("status") == "done")
    for run, spec in specs:
        result = index.get(run, {"status": "unfinished"})
        if result["status"] == "failed":
            again = (store.path(run) / FIRST_FAILURE).exists()
            failed.append(
                {"arm": spec.arm, "scale": spec.scale, "seed": spec.seed, "budget": spec.budget}
                | {"reason": result["reason"] + (" (twice)" if again else "")}
            )
        elif result["status"] == "done" and (spec.scale, spec.seed) not in left_out:
            budget = f"{spec.budget:g}" if len(plan.budgets) > 1 else ""
            key = Key(spec.arm, spec.scale, str(spec.seed), budget)
            curve = store.curve(run, key, clocks.get(run))
            curves += [curve] if curve is not None else []
    order = {scale.name: i for i, scale in enumerate(plan.scales)}
    curves.sort(
        key=lambda c: (
            order[c.key.scale], plan.arms.index(c.key.arm), c.key.seed, float(c.key.budget or 1)
        )
    )  # fmt: skip
    if not any(c.key.arm == plan.baseline for c in curves):
        raise ValueError(f"{folder} must hold a finished run of the baseline, got none yet")
    timings = {s.name: t for s in plan.scales if (t := store.throughput(s.name)) is not None}
    roofs = read_json(store.folder / ROOFS)
    hardware = split(plan, timings, rates(plan, specs, clocks, study["ours"]), roofs)
    answer = estimate(curves, _options(plan, hardware, roofs))
    _mark_other_kernels(answer, study["ours"])
    planned = {**found.pending, **found.runs}
    done = sum(index.get(run, {}).get("status") == "done" for run in planned)
    return {
        "title": f"The {plan.name} study",
        "subtitle": _subtitle(plan),
        "chips": _chips(plan, study),
        "titles": {arm: INNOVATIONS[arm].title for arm in plan.arms},
        "complete": {"planned": len(planned), "done": done, "failed": failed},
        "left_out": [{"scale": scale, "seed": seed} for scale, seed in sorted(left_out)],
        "sweeps": [_sweep(tuning) for tuning in found.tunings],
        "plan": study["plan"],
        "estimate": answer,
        "hardware": hardware,
        "throughput": timings,
        "curves": [_curve(c) for c in curves],
        "bench": (read_json(store.folder / BENCH) or {}).get("rows", []),
        "roofs": roofs,
        "limits": _limits(plan, answer, study["ours"]),
        "provenance": _provenance(plan, study, data, curves),
    }


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


def _sweep(tuning: Tuning) -> dict[str, Any]:
    """One arm's sweep at one scale; a loss of None is a run that failed."""
    points = sorted(tuning.losses.items())
    return {
        "scale": tuning.scale,
        "arm": tuning.arm,
        "budget": f"{tuning.budget:g}",
        "seed": str(tuning.seed),
        "points": [{"lr": lr, "loss": None if np.isinf(x) else x} for lr, x in points],
        "best_lr": tuning.choice.best,
        "inside": tuning.choice.inside,
        "reason": tuning.choice.reason or "the sweep goes on",
    }


def _options(plan: Plan, hardware: dict[str, Any], roofs: dict[str, Any] | None) -> Options:
    dtype = plan.train.get("dtype", "auto")
    return Options(
        peak_flops=(roofs or {}).get("flops", {}).get(dtype),
        baseline=plan.baseline,
        same_maths=frozenset(a for a in plan.arms[1:] if is_same_maths(a)),
        bundles={a: INNOVATIONS[a].parts for a in plan.arms if INNOVATIONS[a].parts},
        hardware={
            scale: {arm: gains["against_reference"] for arm, gains in arms.items()}
            for scale, arms in hardware.items()
        },
        untuned=plan.sweep is None,
    )


def _mark_other_kernels(answer: dict[str, Any], ours: dict[str, str | None]) -> None:
    for arm, result in answer["arms"].items():
        if any(ours.get(op) is None for op in kernel_ops(arm)):
            for part in (result, *result["scales"].values()):
                part["flags"] = [*part["flags"], "not_our_kernel"]


def _curve(curve: Curve) -> dict[str, Any]:
    assert curve.seconds is not None
    return {
        "arm": curve.key.arm,
        "scale": curve.key.scale,
        "seed": curve.key.seed,
        "budget": curve.key.budget,
        "lr": None if curve.lr is None else float(curve.lr.max()),
        "flops": curve.flops.tolist(),
        "loss": curve.loss.tolist(),
        "seconds": curve.seconds.tolist(),
    }


def _subtitle(plan: Plan) -> str:
    arms = [INNOVATIONS[arm].title for arm in plan.arms[1:]]
    return (
        f"A GPT without norms in its blocks, and {len(arms)} changes to it: {', '.join(arms)}. "
        f"Each runs at {len(plan.scales)} scales with {len(plan.seeds)} seeds: the loss tells "
        "how much compute a change is worth, and the clock how much time."
    )


def _chips(plan: Plan, study: dict[str, Any]) -> list[str]:
    environment = study["environment"]
    return [
        environment["device"],
        f"{plan.workers} processes of {plan.threads} thread{'s' if plan.threads > 1 else ''}",
        f"{len(plan.seeds)} seeds",
        f"torch {environment['versions']['torch']}",
    ]


def _limits(plan: Plan, answer: dict[str, Any], ours: dict[str, str | None]) -> list[str]:
    lines = [plan.note[:1].upper() + plan.note[1:] + "."] if plan.note else []
    if plan.sweep is None:
        lines.append(
            "No learning rate was swept: every arm runs at the baseline's. An arm that would train "
            "better at another rate is worth more than is said here."
        )
    if len(plan.seeds) < 3:
        lines.append(
            f"{len(plan.seeds)} seeds: intervals at one scale rest on "
            f"{len(plan.seeds) - 1} degree of freedom. The mean over scales is the firmer number."
        )
    lines.append(
        "The evaluation set is one sample of the text, the same for all runs: its luck is not in "
        "the intervals, which are over seeds."
    )
    labels = {trend["class"] for trend in answer["class"].values()}
    if labels <= {"inconclusive"}:
        lines.append(
            "Whether a gain grows with scale is undecided for every arm; a few small scales seldom "
            "decide it, and the answer “inconclusive” is one."
        )
    lines.append(
        "The models are far smaller than those that the published gains are about; nothing here "
        "extrapolates to them."
    )
    lines.append(
        "Arms of kind “algorithm” run on the plain reference formulas, like the baseline, so their "
        "G_hw tells what the change costs there, not what it costs with fused kernels."
    )
    lines.append(
        "The reference attention writes every intermediate to memory and computes the scores anew "
        "in the backward pass. It is the paper's question; G_hw against torch is what a user gains."
    )
    missing = sorted({op for a in plan.arms for op in kernel_ops(a) if ours.get(op) is None})
    if missing:
        lines.append(f"Our kernel for {', '.join(missing)} is not built here; stock torch ran.")
    return lines


def _provenance(
    plan: Plan, study: dict[str, Any], data: TokenData, curves: list[Curve]
) -> dict[str, str]:
    environment = study["environment"]
    git = environment["git"]
    versions = {k: v for k, v in environment["versions"].items() if v}
    return {
        "Commit": f"{git['commit'] or 'unknown'}{' with local changes' if git['dirty'] else ''}",
        "Machine": f"{environment['device']}, {plan.workers} x {plan.threads} threads",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Data": f"{data.manifest['tokenizer']} tokens, {data.manifest['n_train']} to train, "
        f"{data.manifest['n_val']} to validate, hash {data.hash[:16]}",
        "Evaluation": "; ".join(sorted({c.identity["eval_set"] for c in curves}))
        + " tokens, the same for all arms and steps",
        "FLOP convention": curves[0].identity["flop_convention"],
        "Kernels": ", ".join(
            f"{op}: {name or 'none of ours'}" for op, name in study["ours"].items()
        ),
        "Plan": f"{plan.name}: {len(plan.arms)} arms, scales "
        + ", ".join(s.name for s in plan.scales)
        + f", seeds {', '.join(map(str, plan.seeds))}",
    }

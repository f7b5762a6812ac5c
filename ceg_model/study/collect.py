"""From a study's folder to the content of results.json: curves, estimate, timings, provenance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ceg_model.data import TokenData
from ceg_model.rundir import read_json
from ceg_model.study.cells import Options
from ceg_model.study.curves import Curve
from ceg_model.study.estimate import estimate
from ceg_model.study.gather import Gathered, gather
from ceg_model.study.hardware import rates, split
from ceg_model.study.innovations import INNOVATIONS, is_same_maths, kernel_ops, twin
from ceg_model.study.machine import BENCH, ROOFS
from ceg_model.study.plan import Plan
from ceg_model.study.schedule import Tuning


def collect(folder: str | Path) -> dict[str, Any]:
    """Everything that the report shows. Raises ValueError where `folder` holds no study."""
    got = gather(folder)
    plan, study, store = got.plan, got.study, got.store
    if not any(c.key.arm == plan.baseline for c in got.curves):
        raise ValueError(f"{folder} must hold a finished run of the baseline, got none yet")
    timings = {s.name: t for s in plan.scales if (t := store.throughput(s.name)) is not None}
    roofs = read_json(store.folder / ROOFS)
    finals = list(got.found.finals().items())
    work = {run: store.flops_per_step(run) for run in got.clocks}
    in_lockstep = rates(plan, finals, got.clocks, work, study["ours"])
    hardware = split(plan, timings, in_lockstep, roofs)
    answer = estimate(got.curves, _options(got, hardware, roofs))
    _mark_other_kernels(answer, study["ours"])
    planned = {**got.found.pending, **got.found.runs}
    done = sum(got.index.get(run, {}).get("status") == "done" for run in planned)
    return {
        "title": f"The {plan.name} study",
        "subtitle": _subtitle(plan),
        "chips": _chips(plan, study),
        "titles": {arm: INNOVATIONS[arm].title for arm in plan.arms},
        "complete": {"planned": len(planned), "done": done, "failed": got.failed},
        "left_out": [{"scale": scale, "seed": seed} for scale, seed in sorted(got.left_out)],
        "sweeps": [_sweep(tuning) for tuning in got.found.tunings],
        "plan": study["plan"],
        "estimate": answer,
        "hardware": hardware,
        "throughput": timings,
        "curves": [_curve(c, timings) for c in got.curves],
        "bench": (read_json(store.folder / BENCH) or {}).get("rows", []),
        "roofs": roofs,
        "limits": _limits(plan, answer, study["ours"]),
        "provenance": _provenance(plan, study, got.data, got.curves),
    }


def _sweep(tuning: Tuning) -> dict[str, Any]:
    """One arm's sweep at one scale; a loss of None is a run that failed."""
    points = sorted(tuning.losses.items())
    return {
        "scale": tuning.scale,
        "arm": tuning.arm,
        "budget": f"{tuning.budget:g}",
        "seed": ", ".join(map(str, tuning.seeds)),
        "points": [{"lr": lr, "loss": None if np.isinf(x) else x} for lr, x in points],
        "best_lr": tuning.choice.best,
        "inside": tuning.choice.inside,
        "reason": tuning.choice.reason or "the sweep goes on",
    }


def _untuned(got: Gathered) -> bool | dict[tuple[str, str], str]:
    if got.plan.sweep is None:
        return True
    return {(t.scale, t.arm): t.choice.reason for t in got.found.tunings if not t.choice.inside}


def _options(got: Gathered, hardware: dict[str, Any], roofs: dict[str, Any] | None) -> Options:
    plan = got.plan
    dtype = plan.train.get("dtype", "auto")
    return Options(
        peak_flops=(roofs or {}).get("flops", {}).get(dtype),
        baseline=plan.baseline,
        same_maths=frozenset(a for a in plan.arms[1:] if is_same_maths(a)),
        twins={a: t for a in plan.arms if (t := twin(a)) in plan.arms and t != plan.baseline},
        bundles={a: INNOVATIONS[a].parts for a in plan.arms if INNOVATIONS[a].parts},
        hardware={
            scale: {arm: gains["against_reference"] for arm, gains in arms.items()}
            for scale, arms in hardware.items()
        },
        untuned=_untuned(got),
    )


def _mark_other_kernels(answer: dict[str, Any], ours: dict[str, str | None]) -> None:
    for arm, result in answer["arms"].items():
        if any(ours.get(op) is None for op in kernel_ops(arm)):
            for part in (result, *result["scales"].values()):
                part["flags"] = [*part["flags"], "not_our_kernel"]


def _curve(curve: Curve, timings: dict[str, Any]) -> dict[str, Any]:
    """`seconds` are those of the run, or else what its FLOPs take at the arm's timed rate."""
    seconds = curve.seconds
    timed = timings.get(curve.key.scale, {"arms": {}})["arms"].get(curve.key.arm)
    if seconds is None and timed is not None:
        seconds = curve.flops * (timed["study"]["median_s"] / timed["model_flops"])
    return {
        "arm": curve.key.arm,
        "scale": curve.key.scale,
        "seed": curve.key.seed,
        "budget": curve.key.budget,
        "lr": None if curve.lr is None else float(curve.lr.max()),
        "flops": curve.flops.tolist(),
        "loss": curve.loss.tolist(),
        "seconds": None if seconds is None else seconds.tolist(),
    }


def _subtitle(plan: Plan) -> str:
    arms = [INNOVATIONS[arm].title for arm in plan.arms[1:]]
    return (
        f"A GPT without norms in its blocks, and {len(arms)} changes to it: {', '.join(arms)}. "
        f"Each runs at {len(plan.scales)} scales with {len(plan.seeds)} seeds: the loss tells "
        "how much compute a change is worth, and the clock how much time."
    )


def _chips(plan: Plan, study: Mapping[str, Any]) -> list[str]:
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
    if plan.fast_curves:
        lines.append(
            "The curves of all arms but the baseline and its kernels were trained with our fastest "
            "kernels, since model FLOPs do not depend on them. G_hw was timed apart, step by step, "
            "with each arm's own kernels; time gains are G_alg times that, not measured by a clock."
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
    plan: Plan, study: Mapping[str, Any], data: TokenData, curves: list[Curve]
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

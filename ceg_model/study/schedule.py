"""Which runs a plan needs, as far as its results so far can tell.

Without a sweep that is known from the start. With one, an arm's runs follow from the rate that its
sweep chose, so the list grows as sweeps end; it depends on the plan and on results alone, so an
interrupted study comes to the same list.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

from ceg_model.run_id import run_ids
from ceg_model.study.innovations import twin
from ceg_model.study.plan import Plan, RunSpec, Scale, run_spec
from ceg_model.study.sweep import Choice, choose

Index = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Tuning:
    """The sweep of one arm at one scale: its runs by rate, and what they have come to."""

    arm: str
    scale: str
    seeds: tuple[int, ...]
    budget: float
    losses: dict[float, float]  # rate -> final loss, the mean over seeds; inf where a run failed
    choice: Choice


@dataclass
class Schedule:
    """Run id -> spec of all runs known by now, in the order in which they should run."""

    runs: dict[str, RunSpec] = field(default_factory=dict)
    tunings: list[Tuning] = field(default_factory=list)
    # What is expected of arms whose sweep goes on: the right number of runs, at a rate to be found.
    pending: dict[str, RunSpec] = field(default_factory=dict)

    def finals(self) -> dict[str, RunSpec]:
        return {run: spec for run, spec in self.runs.items() if not spec.sweep}


def schedule(
    plan: Plan,
    ours: Mapping[str, str | None],
    *,
    data_hash: str,
    vocab_size: int,
    index: Index,
    failed_for_good: Callable[[str], bool] = lambda run: True,
) -> Schedule:
    """`failed_for_good` says whether a run that failed had its second try."""
    out = Schedule()
    rates: dict[tuple[str, str], float | None] = {}

    # Seeds differ in nothing else, and checking a config takes longer than all the rest.
    first: dict[tuple[Any, ...], tuple[RunSpec, Callable[[int], str]]] = {}

    def spec_of(
        arm: str, scale: Scale, seed: int, *, donor: str = "", **more: Any
    ) -> tuple[str, RunSpec]:
        like = arm, scale.name, *more.items()
        if like not in first:
            spec = run_spec(plan, arm, scale, 0, ours=ours, vocab_size=vocab_size, **more)
            first[like] = spec, run_ids(spec.model, spec.train, data_hash)
        spec, run_of = first[like]
        train = copy(spec.train)  # `replace` would check it again
        object.__setattr__(train, "seed", seed)
        return run_of(seed), replace(spec, seed=seed, train=train, donor=donor)

    for scale in reversed(plan.scales) if plan.sweep else ():
        for arm in filter(plan.tunes, plan.arms):
            tuning = _tune(plan, arm, scale, spec_of, index, failed_for_good, out.runs)
            out.tunings.append(tuning)
            rates[arm, scale.name] = tuning.choice.best
    # Seed by seed when the time may run out before the runs do: what is done is then balanced.
    # In lockstep the arms of a scale and seed are one job, so the longest come first.
    for seed, scale in _blocks(plan):
        for arm in plan.arms:
            source = arm if plan.tunes(arm) else twin(arm)
            lr = rates.get((source or arm, scale.name))
            known = out.runs if plan.sweep is None or lr is not None else out.pending
            donor = ""
            for budget in plan.budgets:
                run, spec = spec_of(arm, scale, seed, budget=budget, lr=lr, donor=donor)
                known.pop(run, None)  # where it served the sweep too, it is a run of the study
                known[run] = spec
                donor = run
    return out


def _blocks(plan: Plan) -> list[tuple[int, Scale]]:
    scales = list(reversed(plan.scales))
    if len(plan.budgets) > 1:
        return [(seed, scale) for seed in plan.seeds for scale in scales]
    return [(seed, scale) for scale in scales for seed in plan.seeds]


def _tune(
    plan: Plan,
    arm: str,
    scale: Scale,
    spec_of: Callable[..., tuple[str, RunSpec]],
    index: Index,
    failed_for_good: Callable[[str], bool],
    runs: dict[str, RunSpec],
) -> Tuning:
    """Follows the sweep through the results there are; adds its runs to `runs`."""
    assert plan.sweep is not None
    seeds, budget, grid = plan.seeds[: plan.sweep.seeds], plan.sweep.budget, plan.rates(scale)
    losses: dict[float, float] = {}
    wanted = list(grid)
    while True:
        for lr in wanted:
            found: list[float] = []
            for seed in seeds:
                run, spec = spec_of(arm, scale, seed, budget=budget, lr=lr, sweep=True)
                runs[run] = spec
                result = index.get(run, {})
                if result.get("status") == "done":
                    found.append(result["eval_loss"])
                elif result.get("status") == "failed" and failed_for_good(run):
                    found.append(math.inf)
            if len(found) == len(seeds):
                losses[lr] = statistics.fmean(found)
        choice = choose(grid, losses, plan.sweep.extensions)
        if choice.best is not None or set(choice.missing) & set(wanted):
            return Tuning(arm, scale.name, seeds, budget, losses, choice)
        wanted = list(choice.missing)

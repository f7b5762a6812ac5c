"""Two benchmark runs of one machine: what became faster or slower, and what is only noise.

Two runs differ by more than the spread inside each of them: the machine is in another mood (clock
speed, neighbours). The peers tell: no change of ours moves them, so how they moved is what the
machine did. With r = ln(median before / median after) of a row, and the rows of peers as controls,

    drift = median of the controls' r,   tau = their spread beyond what their own samples explain
    ln(speed-up) = r - drift   +-   t(controls - 1) sqrt(se_before^2 + se_after^2 + tau^2 (1 + 1/m))

se: standard error of ln(median) over the samples of a run, by bootstrap; m: controls. With fewer
than three controls the drift is unknown, and so is every verdict.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ceg_kernels.measure.table import case

Key = tuple[str, ...]  # case and backend

LEAST_CONTROLS = 3
DRAWS = 1000  # of the bootstrap
FROM_QUANTILES = 1.683  # p80 - p20 of a normal distribution, in standard deviations
OF_MEDIAN = 1.2533  # standard error of a median over that of a mean


@dataclasses.dataclass(frozen=True)
class Timed:
    """One row of one run."""

    row: Mapping[str, Any]
    median_s: float
    log_se: float | None  # of ln(median_s); None where the file does not tell


@dataclasses.dataclass(frozen=True)
class Change:
    """A row of ours that both runs have. `speedup` is what is left when the drift is taken out."""

    name: str
    before_s: float
    after_s: float
    speedup: float | None
    low: float | None  # of the 95 % interval
    high: float | None
    verdict: str  # faster, slower, no difference seen, unknown


@dataclasses.dataclass(frozen=True)
class Comparison:
    changes: tuple[Change, ...]
    controls: int
    drift: float | None  # how many times faster the machine was in the second run
    tau: float | None  # standard deviation of ln(time) that comes with another run
    why_unknown: str | None
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]


def read(path: Path) -> dict[Key, Timed]:
    """The newest timed row of each case and backend.

    path: pytest-benchmark's JSON (`--benchmark-json`), which holds the samples, or the rows of
    `--results`. ValueError where it is neither.
    """
    found: dict[Key, Timed] = {}
    try:
        for row, samples in _rows(path.read_text()):
            key = (*case(row), row["backend"])
            if row["median_s"] is not None:
                found[key] = Timed(row, row["median_s"], _log_se(row, samples))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must be of --benchmark-json or --results, got {error!r} in it"
        ) from None
    if not found:
        raise ValueError(f"{path} must hold timed benchmark rows, got none")
    return found


def _rows(text: str) -> Iterator[tuple[dict[str, Any], Sequence[float] | None]]:
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None  # several lines
    if isinstance(whole, dict) and "benchmarks" in whole:
        for one in whole["benchmarks"]:
            if "op" in one["extra_info"]:  # not in benchmarks of several together
                yield one["extra_info"], one["stats"].get("data")
    else:
        for line in text.splitlines():
            yield json.loads(line), None


def _log_se(row: Mapping[str, Any], samples: Sequence[float] | None) -> float | None:
    if samples is not None and len(samples) >= 3:
        drawn = np.random.default_rng(0).choice(np.asarray(samples), (DRAWS, len(samples)))
        return float(np.log(np.median(drawn, axis=1)).std())
    if not row.get("rounds"):
        return None
    spread = math.log(row["p80_s"] / row["p20_s"]) / FROM_QUANTILES
    return OF_MEDIAN * spread / math.sqrt(row["rounds"])


def compare(before: Mapping[Key, Timed], after: Mapping[Key, Timed]) -> Comparison:
    """ValueError where the runs are not of one machine or share no row of ours."""
    machines = {t.row["versions"]["machine"] for t in (*before.values(), *after.values())}
    if len(machines) > 1:
        raise ValueError(f"runs must be of one machine, got {' and '.join(sorted(machines))}")
    both = [key for key in before if key in after]
    ours = [key for key in both if before[key].row["peer"] is None]
    if not ours:
        raise ValueError("runs must share a row of ours, got none")
    why, logs, inner = _controls(before, after, [key for key in both if key not in ours])
    drift = tau = None
    if why is None:
        drift = float(np.median(logs))
        spread = 1.4826 * float(np.median(np.abs(logs - drift)))  # of a normal distribution
        tau = math.sqrt(max(0.0, spread**2 - float(np.median(inner**2))))
    change = functools.partial(_change, before, after, drift, tau, len(logs))
    return Comparison(
        changes=tuple(map(change, ours)),
        controls=len(logs),
        drift=None if drift is None else math.exp(drift),
        tau=tau,
        why_unknown=why,
        only_before=tuple("-".join(key) for key in before if key not in after),
        only_after=tuple("-".join(key) for key in after if key not in before),
    )


def _controls(
    before: Mapping[Key, Timed], after: Mapping[Key, Timed], peers: Sequence[Key]
) -> tuple[str | None, np.ndarray, np.ndarray]:
    """Why there are too few, ln(before / after) of each, and its standard error."""
    same, logs, inner = [], [], []
    for key in peers:
        one, other = before[key], after[key]
        versions = [t.row["versions"].get("torch") for t in (one, other)]
        same.append(versions[0] == versions[1])
        if same[-1] and one.log_se is not None and other.log_se is not None:
            logs.append(math.log(one.median_s / other.median_s))
            inner.append(math.hypot(one.log_se, other.log_se))
    why = None
    if len(logs) < LEAST_CONTROLS:
        got = f"got {len(logs)}" if all(same) else "got those of two versions of torch"
        why = f"the machine's drift needs {LEAST_CONTROLS} rows of peers in both runs, {got}"
    return why, np.asarray(logs), np.asarray(inner)


def _change(
    before: Mapping[Key, Timed],
    after: Mapping[Key, Timed],
    drift: float | None,
    tau: float | None,
    controls: int,
    key: Key,
) -> Change:
    from scipy import stats

    one, other = before[key], after[key]
    name = "-".join(key)
    if drift is None or tau is None or one.log_se is None or other.log_se is None:
        return Change(name, one.median_s, other.median_s, None, None, None, "unknown")
    log = math.log(one.median_s / other.median_s) - drift
    error = math.sqrt(one.log_se**2 + other.log_se**2 + tau**2 * (1 + 1 / controls))
    half = float(stats.t.ppf(0.975, controls - 1)) * error
    verdict = "faster" if log > half else "slower" if log < -half else "no difference seen"
    low, high = math.exp(log - half), math.exp(log + half)
    return Change(name, one.median_s, other.median_s, math.exp(log), low, high, verdict)


def lines(found: Comparison) -> list[str]:
    """The comparison as text, ours that changed first."""
    order = {"slower": 0, "faster": 1, "no difference seen": 2, "unknown": 3}
    width = max(len(change.name) for change in found.changes)
    text = []
    for change in sorted(found.changes, key=lambda c: order[c.verdict]):
        ratio = f"{change.before_s / change.after_s:6.2f}x measured"
        left = "" if change.speedup is None else f", {change.speedup:.2f}x"
        interval = "" if change.low is None else f" ({change.low:.2f} to {change.high:.2f})"
        text.append(f"{change.name:{width}}  {ratio}{left}{interval}  {change.verdict}")
    if found.drift is None or found.tau is None:
        text.append(f"no verdict: {found.why_unknown}")
    else:
        text.append(
            f"the machine was {found.drift:.3f}x as fast in the second run ({found.controls} rows "
            f"of peers), taken out; another run moves a time by {found.tau:.1%} (one sigma)"
        )
    for which, names in (("first", found.only_before), ("second", found.only_after)):
        if names:
            text.append(f"{len(names)} rows are in the {which} run only: {', '.join(names[:5])}")
    return text

"""Cases, checked and then timed: one row for each of their backends.

Nothing is timed before it is right. All backends of a case are timed in the same interleaved
rounds, on the same inputs, so a row is comparable with the other rows of its case.

The speed of a machine drifts, by 10% within a minute where caches are shared with others. So
several cases are timed in *passes*, a share of each one's rounds in every pass: a median is then
over moments that lie apart, and two runs agree better than two moments do.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ceg_kernels.measure import memory, peers
from ceg_kernels.measure.ceilings import Roofs, measure
from ceg_kernels.measure.clock import Call, Timing, call_seconds, quantile, time_interleaved
from ceg_kernels.measure.roofline import bench_row, least_seconds
from ceg_kernels.measure.suite import DIRECTIONS, DTYPES, PEERS, STOCK, Case, cases, dtype_name
from ceg_kernels.op import Cost, use_backend

# What a plain formula in half precision may err, in units of what ours may: a wrong one errs more.
LOOSE = 10.0
# What is timed in the same passes, at most: bytes of inputs, and cases (a test waits for all).
_HELD_BYTES = 2 << 30
_HELD_CASES = 32

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Result:
    """A row and the samples behind it; `timing` is None where the row's status says why."""

    row: Row
    timing: Timing | None


def run_case(
    case: Case, backends: Iterable[str] | None = None, **options: Any
) -> dict[str, Result]:
    """The results of one case by backend; arguments and errors as those of `run_cases`."""
    ((_, results),) = run_cases({case: backends}, **options)
    if isinstance(results, Exception):
        raise results
    return results


def run_cases(
    chosen: Mapping[Case, Iterable[str] | None],
    *,
    roofs: Roofs,
    passes: int = 1,
    min_time_s: float = 0.2,
    max_time_s: float = 3.0,
    max_variants: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Case, dict[str, Result] | Exception]]:
    """Check, then time each case's backends (all that can run it, where None) on the same inputs.

    A backend that refuses the arguments is left out. One of ours that fails the accuracy check, and
    a peer that does not run or is wrong beyond rounding, gets a row without a time. A case that
    raises comes with what it raised: the others' results are not lost with it. Peers are compiled
    before anything is timed. On a CPU the process keeps freed memory from here on, in huge pages
    where there are some (measure/memory.py).

    With more than one pass as many cases as share them come together: at most 32, and what holds
    2 GiB of inputs. `min_time_s` and `max_time_s` are of all passes together. `progress` is told of
    each pass: its number and how many cases it has.
    """
    batch: list[_Checked] = []
    for case, backends in chosen.items():
        try:
            batch.append(_checked(case, backends, roofs, max_variants))
        except Exception as error:  # noqa: BLE001, it is handed on
            yield case, error
            continue
        # What the next case compiles would be compiled in place of this one's.
        alone = passes == 1 or "compile" in batch[-1].calls
        held = sum(one.held_bytes for one in batch)
        if alone or held > _HELD_BYTES or len(batch) == _HELD_CASES:
            yield from _timed(batch, roofs, passes, min_time_s, max_time_s, progress)
            batch = []
    yield from _timed(batch, roofs, passes, min_time_s, max_time_s, progress)


@dataclasses.dataclass(frozen=True)
class _Checked:
    """A case with its inputs and with what may be timed on them."""

    case: Case
    args: tuple
    cost: Cost
    variants: int
    errors: dict[str, float]
    refused: dict[str, str | None]  # by backend, in the order of the rows: why not, or None
    twin: dict[str, str]  # whose time serves whom as well
    calls: dict[str, list[Call]]

    @property
    def held_bytes(self) -> int:
        return self.cost.bytes * self.variants


def _checked(
    case: Case, backends: Iterable[str] | None, roofs: Roofs, max_variants: int
) -> _Checked:
    if case.device == "cpu":
        memory.prepare()
    args = case.args()
    cost = case.cost(args)
    wanted = case.backends() if backends is None else backends
    names = [name for name in wanted if case.why_not(name, args) is None]
    if "compile" in names:
        torch.compiler.reset()  # or the second shape would be compiled with symbolic sizes
    tried = {name: case.fails(name, args) for name in names if name in peers.NAMES}
    failed = {name: f"not timed: {why}" for name, why in tried.items() if why is not None}
    errors = case.errors([name for name in names if name not in failed], args)
    refused = {
        name: failed[name] if name in failed else _refusal(name, errors[name]) for name in names
    }
    # Where stock torch has nothing but the plain formula, that is measured once.
    twin = {"torch": "reference"} if {"torch", "reference"} <= set(names) else {}
    twin = {name: other for name, other in twin.items() if case.same(name, other)}
    variants = [args, *_more_variants(case, cost, roofs, max_variants)]
    calls = {
        name: [case.call(name, one) for one in variants]
        for name in names
        if refused[name] is None and name not in twin
    }
    return _Checked(case, args, cost, len(variants), errors, refused, twin, calls)


def _timed(
    batch: Sequence[_Checked],
    roofs: Roofs,
    passes: int,
    min_time_s: float,
    max_time_s: float,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[Case, dict[str, Result] | Exception]]:
    parts: list[dict[str, list[Timing]]] = [{name: [] for name in one.calls} for one in batch]
    errors: dict[Case, Exception] = {}
    for number in range(passes if batch else 0):
        if progress is not None:
            progress(number, len(batch))
        for one, found in zip(batch, parts, strict=True):
            if one.case in errors:
                continue
            try:
                timings = time_interleaved(
                    one.calls, device=one.case.device, min_time_s=min_time_s / passes,
                    min_rounds=max(3, math.ceil(5 / passes)), max_time_s=max_time_s / passes,
                )  # fmt: skip
            except Exception as error:  # noqa: BLE001, it is handed on
                errors[one.case] = error
                continue
            for name, timing in timings.items():
                found[name].append(timing)
    for one, found in zip(batch, parts, strict=True):
        if one.case in errors:
            yield one.case, errors[one.case]
            continue
        timings = {name: _merged(some) for name, some in found.items()}
        yield one.case, {name: _result(one, name, timings, roofs) for name in one.refused}


def _merged(parts: Sequence[Timing]) -> Timing:
    hot = [part.hot_s for part in parts if part.hot_s is not None]
    samples = tuple(sample for part in parts for sample in part.samples)
    return Timing(samples, hot_s=quantile(hot, 0.5) if hot else None)


def _result(one: _Checked, name: str, timings: Mapping[str, Timing], roofs: Roofs) -> Result:
    case, timing = one.case, timings.get(one.twin.get(name, name))
    if timing is not None:
        timing = dataclasses.replace(timing, call_s=_call_s(case, name, one.args, timing))
    row = bench_row(
        op=case.op, direction=case.direction, backend=name, peer=name if name in PEERS else None,
        shape=case.shape, dtype=dtype_name(one.args, case.dtype), device=case.device,
        cost=one.cost, roofs=roofs, timing=timing, reference=timings.get("reference"),
        error_over_slack=one.errors.get(name), status=one.refused[name] or "ok",
    )  # fmt: skip
    return Result(_explained(row, roofs, one.variants), timing)


def quick_bench(
    device: str = "cpu",
    *,
    dtypes: Sequence[str] = DTYPES,
    budget_s: float = 60.0,
    smoke: bool = False,
    roofs: Roofs | None = None,
    progress: Callable[[Case, int, int], None] | None = None,
) -> list[Row]:
    """Rows of every op at its quick shapes, ours against torch and the reference.

    Aims at `budget_s` seconds on two cores by giving each case an equal share; measuring the roofs,
    where they are not known yet, comes on top. `smoke`: the first dtype only, forward and backward
    apart, the inputs hot in the cache, few rounds.
    """
    roofs = measure(device) if roofs is None else roofs
    start = time.monotonic()
    directions, dtypes = (("fwd", "bwd"), dtypes[:1]) if smoke else (DIRECTIONS, dtypes)
    chosen = list(cases("quick", dtypes=dtypes, device=device, directions=directions))
    rows: list[Row] = []
    for index, case in enumerate(chosen):
        if progress is not None:
            progress(case, index, len(chosen))
        left = max(budget_s - (time.monotonic() - start), 0.0) / (len(chosen) - index)
        share = left / (2 * max(len(case.backends()), 1))  # the other half: inputs and checks
        results = run_case(
            case, roofs=roofs, min_time_s=min(0.02 if smoke else 0.2, share),
            max_time_s=min(1.0, share), max_variants=1 if smoke else 8,
        )  # fmt: skip
        rows.extend(result.row for result in results.values())
    return rows


def _refusal(backend: str, error: float) -> str | None:
    # Stock torch is timed whatever its rounding (bf16 scores, say): it is what users run, and the
    # error stands in the row. inf is no rounding: wrong shapes, integers or places of NaN.
    fine = error <= (LOOSE if backend in peers.NAMES else 1.0)
    if fine or (backend in STOCK and math.isfinite(error)):
        return None
    return f"not timed: error is {error:.3g} times the allowed"


def _more_variants(case: Case, cost: Cost, roofs: Roofs, most: int) -> list[tuple]:
    """Copies of the inputs so that a memory-bound op reads memory, not the last-level cache."""
    least = least_seconds(cost, case.dtype, roofs)
    if case.device != "cpu" or least is None or least[1] != "memory" or not cost.bytes:
        return []
    wanted = math.ceil(2 * (roofs.cache_bytes or 0) / cost.bytes)
    return [case.args() for _ in range(min(wanted, most) - 1)]


def _call_s(case: Case, backend: str, args: tuple, timing: Timing) -> float:
    """What the caller waits for one call through the public dispatcher."""
    if case.direction == "fwd_bwd" or (backend in PEERS and case.device == "cpu"):
        return timing.median_s
    op = case.ops[0]
    # On a GPU a call returns early: its time is the host's, which the device's says nothing of.
    seconds = min(0.02, timing.median_s) if case.device == "cpu" else 0.02
    if backend in peers.NAMES:
        return call_seconds(case.call(backend, args), min_time_s=seconds)
    with use_backend({op.name.removesuffix("_backward"): backend}):
        return call_seconds(lambda: op(*args), min_time_s=seconds)


def _explained(row: Row, roofs: Roofs, variants: int) -> Row:
    if (row["roof_fraction"] or 0.0) > 1.0:
        cached = row["bytes"] * variants < 2 * (roofs.cache_bytes or 0)
        why = "inputs fit in the cache" if cached else "the roof was measured at a slower moment"
        row["status"] = f"ok: above the {row['bound']} roof, {why}"
    elif row["status"] == "ok" and row["max_error_over_slack"] > 1.0:
        row["status"] = "ok: less exact than ours has to be"
    return row

"""What is benchmarked: every op x direction x shape x dtype, and the backends that can run it.

A `Case` is one set of inputs; all backends are timed on it in the same interleaved rounds, so a row
is comparable with the other rows of its case. `bench/` and `ceg demo` both run these cases.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ceg_kernels.measure import accuracy
from ceg_kernels.measure.ceilings import Roofs, measure
from ceg_kernels.measure.clock import Timing, call_seconds, time_interleaved
from ceg_kernels.measure.roofline import bench_row, least_seconds
from ceg_kernels.op import OPS, Cost, Op, use_backend

GROUPS = ("quick", "gpt2", "llama", "moe", "all")
DTYPES = ("float32", "bfloat16")
DIRECTIONS = ("fwd", "bwd", "fwd_bwd")
STOCK = ("torch", "reference")  # backends that are not ours

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One set of inputs. `op` is the forward op's name, whatever the direction."""

    op: str
    direction: str  # fwd | bwd | fwd_bwd
    shape: str
    dtype: str
    device: str

    def __str__(self) -> str:
        return f"{self.op}-{self.direction}-{self.shape}-{self.dtype}"

    @property
    def ops(self) -> tuple[Op, ...]:
        """The declarations that it runs."""
        names = {
            "fwd": (self.op,),
            "bwd": (f"{self.op}_backward",),
            "fwd_bwd": (self.op, f"{self.op}_backward"),
        }
        return tuple(OPS[name] for name in names[self.direction])

    def args(self) -> tuple:
        """Fresh arguments for the first of `ops`; the same values every time."""
        return self._make(self.ops[0])

    def cost(self, args: tuple) -> Cost:
        first = self.ops[0].cost(*args)
        if len(self.ops) == 1:
            return first
        backward = self.ops[1].cost(*self._make(self.ops[1]))
        return Cost(first.flops + backward.flops, first.bytes + backward.bytes)

    def backends(self) -> list[str]:
        """The backends that can run such arguments on this device at all.

        Variants that a backend keeps for forcing (`cpu:avx2` beside `cpu`) are left out.
        """
        able = [_able(op, self.dtype, self.device) for op in self.ops]
        names = [b.name for b in self.ops[0].backends if ":" not in b.name]
        return [name for name in names if all(name in found for found in able)]

    def same(self, backend: str, other: str) -> bool:
        """True where the two are one implementation: one measurement serves both."""
        return all(op.backend(backend).run is op.backend(other).run for op in self.ops)

    def call(self, backend: str, args: tuple) -> Callable[[], Any]:
        """One execution by that backend, without our dispatcher around it."""
        if self.direction != "fwd_bwd":
            run = self.ops[0].backend(backend).run
            return lambda: run(*args)
        return _forward_backward(self.ops[0], backend, args)

    def errors(self, backends: Iterable[str], args: tuple) -> dict[str, float]:
        """By backend, the worst output's error as a share of what is allowed: above 1 is wrong."""
        worst = dict.fromkeys(backends, 0.0)
        for op in self.ops:
            one_args = args if op is self.ops[0] else self._make(op)
            checked = _with_remembered_reference(op)
            for name in worst:
                error = accuracy.error_over_slack(checked, op.backend(name), one_args)
                worst[name] = max(worst[name], error)
        return worst

    def why_not(self, backend: str, args: tuple) -> str | None:
        return self.ops[0].backend(backend).why_not(*args)

    def _make(self, op: Op) -> tuple:
        return op.shapes[self.shape].make(getattr(torch, self.dtype), self.device)


def cases(
    group: str = "quick",
    *,
    dtypes: Sequence[str] = DTYPES,
    device: str = "cpu",
    directions: Sequence[str] = DIRECTIONS,
) -> Iterator[Case]:
    """All cases of a group of shapes, those of one op together."""
    if group not in GROUPS:
        raise ValueError(f"shapes must be one of {', '.join(GROUPS)}, got {group!r}")
    for name, op in OPS.items():
        if name.endswith("_backward"):
            continue
        backward = OPS.get(f"{name}_backward")
        for dtype in dtypes:
            if not _depends_on(op, dtype, device) and dtype != dtypes[0]:
                continue
            for direction in directions:
                if direction != "fwd" and backward is None:
                    continue
                first = backward if direction == "bwd" and backward is not None else op
                for shape, declared in first.shapes.items():
                    missing = direction == "fwd_bwd" and backward and shape not in backward.shapes
                    if group in ("all", declared.group) and not missing:
                        yield Case(name, direction, shape, dtype, device)


@dataclasses.dataclass(frozen=True)
class Result:
    """A row and the samples behind it; `timing` is None where the row's status says why."""

    row: Row
    timing: Timing | None


def run_case(
    case: Case,
    backends: Iterable[str] | None = None,
    *,
    roofs: Roofs,
    min_time_s: float = 0.2,
    max_time_s: float = 3.0,
    max_variants: int = 8,
) -> dict[str, Result]:
    """Check, then time the backends (all that can run it, unless named) on the same inputs.

    A backend that refuses the arguments is left out. One of ours that fails the accuracy check gets
    a row without a time.
    """
    args = case.args()
    cost = case.cost(args)
    names = [
        name
        for name in (case.backends() if backends is None else backends)
        if case.why_not(name, args) is None
    ]
    errors = case.errors(names, args)
    refused = {name: _refusal(name, errors[name]) for name in names}
    # Where stock torch has nothing but the plain formula, that is measured once.
    twin = {"torch": "reference"} if {"torch", "reference"} <= set(names) else {}
    twin = {name: other for name, other in twin.items() if case.same(name, other)}
    timed = [name for name in names if refused[name] is None and name not in twin]
    variants = [args, *_more_variants(case, cost, roofs, max_variants)]
    timings = time_interleaved(
        {name: [case.call(name, one) for one in variants] for name in timed},
        device=case.device,
        min_time_s=min_time_s,
        max_time_s=max_time_s,
    )
    results = {}
    for name in names:
        timing = timings.get(twin.get(name, name))
        if timing is not None:
            timing = dataclasses.replace(timing, call_s=_call_s(case, name, args, timing))
        row = bench_row(
            op=case.op, direction=case.direction, backend=name,
            peer=name if name in STOCK else None,
            shape=case.shape, dtype=_dtype_name(args, case.dtype), device=case.device, cost=cost,
            roofs=roofs, timing=timing, reference=timings.get("reference"),
            error_over_slack=errors[name], status=refused[name] or "ok",
        )  # fmt: skip
        results[name] = Result(_explained(row, roofs, len(variants)), timing)
    return results


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


def _able(op: Op, dtype: str, device: str) -> set[str]:
    """Backends that accept at least one of the op's own samples."""
    able: set[str] = set()
    names = {backend.name for backend in op.backends}
    for sample in op.samples(getattr(torch, dtype), device):
        able |= {b.name for b in op.backends if b.why_not(*sample.args) is None}
        if able == names:
            break
    return able


def _with_remembered_reference(op: Op) -> Op:
    """The op for checking several backends on the same arguments: gold and base computed once."""
    known: dict[torch.dtype | None, Any] = {}

    def reference(*args: Any) -> Any:
        floats = (a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point())
        dtype = next(floats, None)
        if dtype not in known:
            known[dtype] = op.reference(*args)
        return known[dtype]

    checked = copy.copy(op)  # shallow, so that nothing is registered again
    checked.reference = reference
    return checked


def _depends_on(op: Op, dtype: str, device: str) -> bool:
    wanted = getattr(torch, dtype)
    first = next(iter(op.samples(wanted, device)))
    return any(isinstance(a, torch.Tensor) and a.dtype == wanted for a in first.args)


def _dtype_name(args: tuple, dtype: str) -> str:
    """The dtype asked for, or that of the first tensor where the op takes no such tensor."""
    found = [str(a.dtype).removeprefix("torch.") for a in args if isinstance(a, torch.Tensor)]
    return dtype if dtype in found or not found else found[0]


def _forward_backward(op: Op, backend: str, args: tuple) -> Callable[[], Any]:
    """Forward and backward through autograd, as a training step runs them.

    Ours go through the registered op; stock torch and the reference through torch's own autograd,
    since that is what their users run.
    """
    leaves = [
        a.detach().requires_grad_(True)
        if isinstance(a, torch.Tensor) and a.is_floating_point()
        else a
        for a in args
    ]
    inputs = [a for a in leaves if isinstance(a, torch.Tensor) and a.requires_grad]
    run = op.backend(backend).run if backend in STOCK else op

    def forward() -> torch.Tensor:
        with torch.enable_grad():
            out = run(*leaves)
        return out[0] if isinstance(out, tuple | list) else out

    with use_backend({op.name: backend}):
        upstream = torch.randn_like(forward())

    def call() -> Any:
        with use_backend({op.name: backend}):
            return torch.autograd.grad(forward(), inputs, upstream, allow_unused=True)

    return call


def _refusal(backend: str, error: float) -> str | None:
    # Stock torch is timed whatever its rounding (bf16 scores, say): it is what users run, and the
    # error stands in the row. inf is no rounding: wrong shapes, integers or places of NaN.
    if error <= 1.0 or (backend in STOCK and math.isfinite(error)):
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
    if case.direction == "fwd_bwd" or (backend in STOCK and case.device == "cpu"):
        return timing.median_s
    op = case.ops[0]
    with use_backend({op.name.removesuffix("_backward"): backend}):
        return call_seconds(lambda: op(*args), min_time_s=min(0.02, timing.median_s))


def _explained(row: Row, roofs: Roofs, variants: int) -> Row:
    if (row["roof_fraction"] or 0.0) > 1.0:
        cached = row["bytes"] * variants < 2 * (roofs.cache_bytes or 0)
        why = "inputs fit in the cache" if cached else "the roof was measured at a slower moment"
        row["status"] = f"ok: above the {row['bound']} roof, {why}"
    elif row["status"] == "ok" and row["max_error_over_slack"] > 1.0:
        row["status"] = "ok: less exact than ours has to be"
    return row

"""What is benchmarked: every op x direction x shape x dtype, and the backends that can run it.

A `Case` is one set of inputs; all backends are timed on it in the same interleaved rounds, so a row
is comparable with the other rows of its case. `bench/` and `ceg demo` both run these cases. Beside
backends a case can run the peers of measure/peers.py; "backend" below means either.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ceg_kernels import OPS
from ceg_kernels.measure import accuracy, memory, peers
from ceg_kernels.measure.ceilings import Roofs, measure
from ceg_kernels.measure.clock import Timing, call_seconds, time_interleaved
from ceg_kernels.measure.roofline import bench_row, least_seconds
from ceg_kernels.op import Backend, Cost, Op, use_backend

GROUPS = ("quick", "gpt2", "llama", "moe", "all")
DTYPES = ("float32", "bfloat16")
DIRECTIONS = ("fwd", "bwd", "fwd_bwd")
STOCK = ("torch", "reference")  # backends that are not ours
PEERS = (*STOCK, *peers.NAMES)
# What a plain formula in half precision may err, in units of what ours may: a wrong one errs more.
LOOSE = 10.0

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

        Variants that a backend keeps for forcing (`cpu:avx2` beside `cpu`) are left out, and so are
        kernels for GPUs that only an interpreter runs on a CPU.
        """
        able = [_able(op, self.dtype, self.device) for op in self.ops]
        on_cpu = torch.device(self.device).type == "cpu"
        names = [b.name for b in self.ops[0].backends if b.automatic or not on_cpu]
        return [name for name in names if all(name in found for found in able)]

    def formulas(self) -> tuple[str, ...]:
        """The peers of measure/peers.py that can run it; none has a backward by itself."""
        return () if self.direction == "bwd" else peers.of(self.op)

    def same(self, backend: str, other: str) -> bool:
        """True where the two are one implementation: one measurement serves both."""
        return all(op.backend(backend).run is op.backend(other).run for op in self.ops)

    def call(self, backend: str, args: tuple) -> Callable[[], Any]:
        """One execution by that backend, without our dispatcher around it."""
        found = _backend(self.ops[0], backend)
        args, run = peers.prepared(found, args), found.run
        if self.direction != "fwd_bwd":
            return lambda: run(*args)
        return _forward_backward(self.ops[0], backend, args)

    def fails(self, peer: str, args: tuple) -> str | None:
        """Runs a peer once, and so compiles it; the error that it raises, or None."""
        try:
            self.call(peer, args)()
        # torch.compile without a compiler, scores without memory, a library of another version
        except (RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return None

    def errors(self, backends: Iterable[str], args: tuple) -> dict[str, float]:
        """By backend, the worst output's error as a share of what is allowed: above 1 is wrong.

        Of a peer's forward and backward only the forward: the rest is torch's autograd.
        """
        worst = dict.fromkeys(backends, 0.0)
        for op in self.ops:
            one_args = args if op is self.ops[0] else self._make(op)
            checked = accuracy.with_remembered_reference(op)
            for name in worst:
                if name not in peers.NAMES:
                    error = accuracy.error_over_slack(checked, op.backend(name), one_args)
                elif op is self.ops[0]:
                    error = _formula_error(checked, _backend(op, name), one_args)
                else:
                    continue
                worst[name] = max(worst[name], error)
        return worst

    def why_not(self, backend: str, args: tuple) -> str | None:
        return _backend(self.ops[0], backend).why_not(*args)

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

    A backend that refuses the arguments is left out. One of ours that fails the accuracy check, and
    a peer that does not run or is wrong beyond rounding, gets a row without a time. Peers are
    compiled before anything is timed. On a CPU the process keeps freed memory from here on
    (measure/memory.py), so that outputs are warm.
    """
    if case.device == "cpu":
        memory.keep_freed()
    args = case.args()
    cost = case.cost(args)
    names = [
        name
        for name in (case.backends() if backends is None else backends)
        if case.why_not(name, args) is None
    ]
    if "compile" in names:
        torch.compiler.reset()  # or the second shape would be compiled with symbolic sizes
    tried = {name: case.fails(name, args) for name in names if name in peers.NAMES}
    failed = {name: f"not timed: {why}" for name, why in tried.items() if why is not None}
    errors = case.errors([name for name in names if name not in failed], args)
    refused = failed | {name: _refusal(name, error) for name, error in errors.items()}
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
            peer=name if name in PEERS else None,
            shape=case.shape, dtype=_dtype_name(args, case.dtype), device=case.device, cost=cost,
            roofs=roofs, timing=timing, reference=timings.get("reference"),
            error_over_slack=errors.get(name), status=refused[name] or "ok",
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


def _backend(op: Op, name: str) -> Backend:
    return peers.find(op.name, name) or op.backend(name)


def _able(op: Op, dtype: str, device: str) -> set[str]:
    """Backends that accept at least one of the op's own samples."""
    able: set[str] = set()
    names = {backend.name for backend in op.backends}
    for sample in op.samples(getattr(torch, dtype), device):
        able |= {b.name for b in op.backends if b.why_not(*sample.args) is None}
        if able == names:
            break
    return able


def _formula_error(op: Op, formula: Backend, args: tuple) -> float:
    """The error of the outputs that a peer has, in whatever dtype it has them.

    Integers count only where there is nothing else: equal scores may be ranked either way.
    """
    outs = accuracy.as_tuple(formula.run(*peers.prepared(formula, args)))
    likes = accuracy.as_tuple(op.fake(*args))[: len(outs)]
    kept = [i for i, like in enumerate(likes) if like.is_floating_point()] or range(len(likes))
    checked = copy.copy(op)
    checked.reference = lambda *a: tuple(accuracy.as_tuple(op.reference(*a))[i] for i in kept)
    checked.fake = lambda *a: tuple(accuracy.as_tuple(op.fake(*a))[i] for i in kept)
    checked.fp32_reductions = tuple(n for n, i in enumerate(kept) if i in op.fp32_reductions)
    return accuracy.compare(checked, tuple(outs[i].to(likes[i].dtype) for i in kept), args)


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

    Ours go through the registered op; peers through torch's own autograd, since that is what their
    users run.
    """
    leaves = [
        a.detach().requires_grad_(True)
        if isinstance(a, torch.Tensor) and a.is_floating_point()
        else a
        for a in args
    ]
    inputs = [a for a in leaves if isinstance(a, torch.Tensor) and a.requires_grad]
    run = _backend(op, backend).run if backend in PEERS else op
    forced = None if backend in PEERS else {op.name: backend}

    def forward() -> torch.Tensor:
        with torch.enable_grad():
            out = run(*leaves)
        return out[0] if isinstance(out, tuple | list) else out

    with use_backend(forced):
        upstream = torch.randn_like(forward())

    def call() -> Any:
        with use_backend(forced):
            return torch.autograd.grad(forward(), inputs, upstream, allow_unused=True)

    return call


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
    if backend in peers.NAMES:
        return call_seconds(case.call(backend, args), min_time_s=min(0.02, timing.median_s))
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

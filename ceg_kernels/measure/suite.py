"""What is benchmarked: every op x direction x shape x dtype, and the backends that can run it.

A `Case` is one set of inputs. `bench/` and `ceg demo` both run these cases, through measure/run.py.
Beside backends a case can run the peers of measure/peers.py; "backend" below means either.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ceg_kernels import OPS
from ceg_kernels.measure import accuracy, peers
from ceg_kernels.op import Backend, Cost, Op, use_backend

GROUPS = ("quick", "gpt2", "llama", "moe", "all")
DTYPES = ("float32", "bfloat16")
DIRECTIONS = ("fwd", "bwd", "fwd_bwd")
STOCK = ("torch", "reference")  # backends that are not ours
PEERS = (*STOCK, *peers.NAMES)


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


def dtype_name(args: tuple, dtype: str) -> str:
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

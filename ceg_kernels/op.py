"""How an op is declared, registered with torch and dispatched. This file knows no op by name.

A declaration (`Op`) is the one source for everything that is known about an op: tests, benchmarks,
the roofline, the model's FLOP count and `explain` all iterate `OPS`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

OPS: dict[str, Op] = {}

_LIB = torch.library.Library("ceg", "DEF")
_BELOW_AUTOGRAD = torch._C._after_autograd_keyset
_VIEWS = torch._C.DispatchKey.ADInplaceOrView  # set on every tensor; no op of ours has work there
_DEVICES = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
_FORCED: ContextVar[str | Mapping[str, str] | None] = ContextVar("ceg_backend", default=None)
_CACHE_LIMIT = 4096  # distinct argument descriptions kept per op; a loop over lengths must not leak


@dataclass(frozen=True)
class Cost:
    """What the maths requires, whoever computes it."""

    flops: int  # masked-out pairs and recomputation are not counted
    bytes: int  # compulsory traffic: each input read once, each output written once


@dataclass(frozen=True)
class Backend:
    """One implementation of an op."""

    name: str
    run: Callable[..., Any]
    # Why these arguments are refused, or None. May look at devices, dtypes, last dimensions and
    # flags only: the answer is cached on those (`_static`).
    why_not: Callable[..., str | None] = lambda *args: None
    executed_flops: Callable[..., int] | None = None  # with recomputation and padding, if known
    automatic: bool = True  # False: runs only when asked for by name
    # Why these arguments are not given to it unasked all the same: it has not been validated on
    # their device. Cached as why_not is.
    unproven: Callable[..., str | None] = lambda *args: None

    def takes(self, *args: Any) -> bool:
        """Whether it runs these arguments unasked."""
        return self.automatic and self.why_not(*args) is None and self.unproven(*args) is None


@dataclass(frozen=True)
class Sample:
    """Arguments for a correctness check."""

    name: str
    args: tuple


@dataclass(frozen=True)
class Shape:
    """Arguments at a named size, for the benchmarks. `group`: quick, gpt2, llama or moe."""

    group: str
    make: Callable[[torch.dtype, str], tuple]


@dataclass(frozen=True)
class ErrorInput:
    """A call that must be refused, and what the error has to say."""

    call: Callable[[], Any]
    match: str
    error: type[Exception] = ValueError


@dataclass
class Op:
    """The declaration of one op; creating it registers `torch.ops.ceg.<name>`.

    `backward(ctx, *grads)` and `save(ctx, inputs, output)` are as for
    `torch.library.register_autograd`; gradients of unused outputs arrive as None.
    """

    name: str
    schema: str
    reference: Callable[..., Any]  # plain PyTorch in the dtype it is given: in fp64 it is the gold
    fake: Callable[..., Any]
    cost: Callable[..., Cost]
    samples: Callable[[torch.dtype, str], Iterator[Sample]]
    shapes: Mapping[str, Shape]
    backends: tuple[Backend, ...]  # in priority order, the reference last
    slack: float = 2.0  # see ceg_kernels/measure/accuracy.py
    fp32_reductions: tuple[int, ...] = ()  # outputs held to the slack of long fp32 sums
    error_inputs: Callable[[], Iterator[ErrorInput]] = lambda: iter(())
    save: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None
    autocast: Callable[..., tuple] | None = None  # (dtype, *args) -> args in the autocast dtype
    overload: Any = field(init=False, repr=False)
    _chosen: dict = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.backends[-1].name != "reference":
            raise ValueError(f"the last backend of {self.name} must be reference")
        OPS[self.name] = self
        _LIB.define(self.name + self.schema)
        _LIB.impl(self.name, self._run, "CompositeExplicitAutograd")
        qualified = f"ceg::{self.name}"
        torch.library.register_fake(qualified, self.fake, lib=_LIB)
        if self.backward is not None:
            _LIB.impl(self.name, self._differentiable(), "Autograd", with_keyset=True)
        self.overload = getattr(torch.ops.ceg, self.name).default
        if self.autocast is not None:
            for device in ("CPU", "CUDA"):
                _LIB.impl(self.name, self._autocast(device), f"Autocast{device}")
        register_flop_formula(getattr(torch.ops.ceg, self.name), get_raw=True)(self._flops)

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)

    def backend(self, name: str) -> Backend:
        """The backend of that name; ValueError names those that there are."""
        for backend in self.backends:
            if backend.name == name:
                return backend
        names = ", ".join(b.name for b in self.backends)
        raise ValueError(f"backend of {self.name} must be one of {names}, got {name!r}")

    def choose(self, *args: Any) -> Backend:
        """The backend that runs these arguments here and now; a forced one that cannot, raises."""
        wanted = self._wanted()
        key = wanted, *_static(args)
        if (chosen := self._chosen.get(key)) is None:
            if len(self._chosen) >= _CACHE_LIMIT:
                self._chosen.clear()
            chosen = self._chosen[key] = self._choose(wanted, args)
        return chosen

    def explain(self, *args: Any) -> str:
        """One line per backend: that it runs these arguments, or why it does not."""
        lines = [f"{self.name}({', '.join(map(_describe, args))})"]
        taken = False
        for backend in self.backends:
            reason = backend.why_not(*args)
            if reason is None and not taken and backend.takes(*args):
                reason, taken = "runs these arguments: chosen unless another is forced", True
            elif reason is None:
                doubt = backend.unproven(*args)
                but = f", but {doubt}" if doubt else ""
                reason = f"could run them{but}: use_backend forces it"
            lines.append(f"  {backend.name}: {reason}")
        return "\n".join(lines)

    def _wanted(self) -> str | None:
        forced = _FORCED.get()
        if forced is None or isinstance(forced, str):
            return forced
        return forced.get(self.name) or forced.get(self.name.removesuffix("_backward"))

    def _choose(self, wanted: str | None, args: tuple) -> Backend:
        if wanted is not None:
            backend = self.backend(wanted)
            if (reason := backend.why_not(*args)) is not None:
                raise RuntimeError(f"backend {wanted} was forced but refuses: {reason}\n"
                                   + self.explain(*args))  # fmt: skip
            return backend
        return next(b for b in self.backends if b.takes(*args))

    def _run(self, *args: Any) -> Any:
        out = self.choose(*args).run(*args)
        # The fakes promise dense outputs; plain torch formulas pass the strides of inputs on.
        return out.contiguous() if isinstance(out, torch.Tensor) else _dense(out)

    def _flops(self, *args: Any, out_val: Any = None) -> int:
        return self.cost(*args).flops

    def _differentiable(self) -> Callable[..., Any]:
        """The kernel at torch's Autograd key.

        torch.library.register_autograd makes one that does the same and costs a small call 30 us
        more: it reads the schema and goes through the dispatcher once again each time.
        """
        save, backward = self.save, self.backward
        assert save is not None
        assert backward is not None

        def forward(ctx: Any, keys: Any, *args: Any) -> Any:
            out = self._below_autograd(keys, args)
            # Autograd may run the backward in another thread, where the ContextVar is not set.
            ctx.forced = _FORCED.get()
            ctx.set_materialize_grads(False)
            save(ctx, args, out)
            return out

        def differentiate(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"ceg::{self.name} must be differentiated once only, got create_graph=True:"
                    " its backward has no gradient"
                )
            if all(grad is None for grad in grads):
                return (None,) * (1 + len(self.overload._schema.arguments))
            token = _FORCED.set(ctx.forced)
            try:
                of_args = backward(ctx, *grads)
            finally:
                _FORCED.reset(token)
            return None, *(of_args if isinstance(of_args, tuple) else (of_args,))

        functions = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
        function: Any = type(f"ceg_{self.name}", (torch.autograd.Function,), functions)

        def run(keys: Any, *args: Any) -> Any:
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
                return function.apply(keys, *args)
            return self._below_autograd(keys, args)

        return run

    def _below_autograd(self, keys: Any, args: tuple) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():  # which makes no output a view
            keys = keys & _BELOW_AUTOGRAD
            # Nothing between here and the device (a mode, a subclass, a transform) asks to see it.
            if keys.remove(_VIEWS).highestPriorityTypeId() in _DEVICES:
                return self._run(*args)
            return self.overload.redispatch(keys, *args)

    def _autocast(self, device: str) -> Callable[..., Any]:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

        def run(*args: Any) -> Any:
            assert self.autocast is not None
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return self(*self.autocast(torch.get_autocast_dtype(device.lower()), *args))

        return run


@contextlib.contextmanager
def use_backend(backend: str | Mapping[str, str] | None) -> Iterator[None]:
    """Force a backend for the ops called inside (and for their backward).

    `backend`: a name for all ops, or `{op: name}` for some (an op's entry covers its backward), or
    None for the automatic choice. Raises ValueError for a name that no op has; an op that cannot
    run its arguments on the forced backend raises RuntimeError and says why: nothing falls back.
    """
    for op, name in backend.items() if isinstance(backend, Mapping) else ():
        if op not in OPS:
            raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
        OPS[op].backend(name)
    if isinstance(backend, str) and not any(
        backend == b.name for op in OPS.values() for b in op.backends
    ):
        raise ValueError(f"backend must be one of {', '.join(backends())}, got {backend!r}")
    token = _FORCED.set(backend)
    try:
        yield
    finally:
        _FORCED.reset(token)


def backends() -> tuple[str, ...]:
    """The names of all backends that any op has, in priority order."""
    return tuple(dict.fromkeys(b.name for op in OPS.values() for b in op.backends))


def explain(op: str, *args: Any) -> str:
    """Why each backend of `op` runs or refuses `args` (those of `torch.ops.ceg.<op>`)."""
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    return OPS[op].explain(*args)


def _dense(tensors: tuple) -> tuple:
    return tuple(t.contiguous() for t in tensors)


def _static(args: tuple) -> list:
    """What a choice may depend on; sizes other than the last are left out on purpose."""
    return [
        (a.device, a.dtype, a.dim(), a.shape[-1] if a.dim() else 0)
        if isinstance(a, torch.Tensor)
        else (a != 0.0 if isinstance(a, float) else a)
        for a in args
    ]


def _describe(a: Any) -> str:
    if isinstance(a, torch.Tensor):
        return f"{str(a.dtype).removeprefix('torch.')}{list(a.shape)} on {a.device}"
    return repr(a)

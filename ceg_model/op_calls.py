"""Which backends a model's ops really run, and the FLOPs that they execute."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ceg_kernels import OPS


class OpCalls(TorchDispatchMode):
    """Records the ceg ops that run inside: `with OpCalls() as calls: loss.backward()`.

    backends: op -> name of the backend that ran it (several, comma-separated, when calls differ).
    extra_flops: executed minus model FLOPs: the recomputation and padding of those backends, which
    belong to hardware utilisation and never to C. None once an op whose backends differ in what
    they execute (some of them say so) ran on one that does not say.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backends: dict[str, str] = {}
        self.extra_flops: int | None = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "ceg":
            self._record(func._schema.name.removeprefix("ceg::"), args)
        return func(*args, **(kwargs or {}))

    def _record(self, name: str, args: tuple) -> None:
        op = OPS[name]
        backend = op.choose(*args)
        names = set(self.backends.get(name, backend.name).split(",")) | {backend.name}
        self.backends[name] = ",".join(sorted(names))
        executed: Callable[..., int] | None = backend.executed_flops
        if executed is not None and self.extra_flops is not None:
            self.extra_flops += executed(*args) - op.cost(*args).flops
        elif executed is None and any(b.executed_flops for b in op.backends):
            self.extra_flops = None


class OpArguments(OpCalls):
    """Beside that: every different call, how often it came (`counts`), and its tensors.

    Calls are the same whose tensors agree in shape, strides and dtype, and their other arguments
    too; `arguments` keeps a detached copy of the first one's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[tuple] = collections.Counter()
        self.arguments: dict[tuple, tuple] = {}

    def _record(self, name: str, args: tuple) -> None:
        super()._record(name, args)
        key = (name, *(_described(a) for a in args))
        self.counts[key] += 1
        if key not in self.arguments:
            self.arguments[key] = tuple(
                a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args
            )


def _described(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return tuple(argument.shape), argument.stride(), argument.dtype
    return argument

"""The processes that train one model: one, or those that torchrun started."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class ProcessGroup:
    rank: int = 0
    world: int = 1

    @classmethod
    @contextmanager
    def joined(cls, device: torch.device) -> Iterator[ProcessGroup]:
        """The group of this process; under torchrun it is joined here and left at the end."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # torchrun's protocol, not a switch of ours
            yield cls()
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            yield cls(dist.get_rank(), dist.get_world_size())
            # A thread of Gloo's lets go of the last broadcast's tensors, for which it needs Python,
            # and aborts the process where that ends meanwhile. Whoever waits here leaves it free.
            dist.barrier()
        finally:
            dist.destroy_process_group()

    def data_parallel(self, model: nn.Module, device: torch.device) -> nn.Module:
        """`model`, with gradients averaged over the processes in its backward."""
        if self.world == 1:
            return model
        ids = [device.index] if device.type == "cuda" else None
        # No broadcast of buffers: they count this process's tokens until `after_step` adds them up.
        # torch 2.13 renamed the argument.
        known = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {name: False}
        return DistributedDataParallel(model, device_ids=ids, **options)

    def accumulating(self, model: nn.Module, more: bool) -> AbstractContextManager[Any]:
        """Around a backward: with `more` to come, gradients stay in this process."""
        if more and isinstance(model, DistributedDataParallel):
            return model.no_sync()
        return nullcontext()

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over the processes of a tensor that each of them has."""
        if self.world > 1:
            dist.all_reduce(value)
            value /= self.world
        return value

    def from_first(self, value: Any) -> Any:
        """The first process's `value`, in all of them."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

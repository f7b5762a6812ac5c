"""Unwritten outputs fail: in tests, torch.empty and its kin hand out NaN (or absurd integers).

And Triton's interpreter rounds as a GPU does: its own cast to bf16 cuts bits off. Nor does it get
ready anew in each call of a device function, which takes most of its time.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_sim
import numpy as np
import pytest
import torch

from ceg_kernels import triton as our_triton


def poison(t: torch.Tensor) -> torch.Tensor:
    """Fill `t` with what no kernel may leave behind."""
    if t.layout is not torch.strided or t.numel() == 0:
        return t
    with torch.no_grad():
        if t.is_floating_point() or t.is_complex():
            return t.fill_(float("nan"))
        if t.dtype == torch.bool:
            return t.fill_(True)
        # Half of the least, so that adding a small offset to it does not wrap around.
        return t.fill_(torch.iinfo(t.dtype).min // 2 or torch.iinfo(t.dtype).max)


def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = make(*args, **kwargs)
        return made if kwargs.get("out") is not None else poison(made)

    return empty


def pytest_itemcollected(item: pytest.Item) -> None:
    """Reports name the CUDA kernel that a test runs on a GPU, for tools/validation.py."""
    params = getattr(item, "callspec", None) and item.callspec.params
    if params and (kernel := cuda_sim.kernel_on_gpu(params, torch.cuda.is_available())) is not None:
        item.user_properties.append(("cuda_kernel", kernel))


@pytest.fixture(autouse=True)
def nan_filled_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))


@pytest.fixture
def module() -> Iterator[ModuleType]:
    """The simulator of the CUDA kernels, with its standard device."""
    loaded = cuda_sim.load()
    yield loaded
    loaded.set_device()


@pytest.fixture
def sim(module: ModuleType) -> Callable[[str], Any]:
    """`sim(op)`: the op's backend `cuda`, run by the simulator."""
    return functools.partial(cuda_sim.backend, module)


@pytest.fixture(scope="session", autouse=True)
def interpreter_rounds_to_nearest_even() -> Iterator[None]:
    if our_triton.MISSING is not None or not our_triton.INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    cut = interpreter._convert_float

    def convert(data: np.ndarray, source: Any, to: Any, mode: Any) -> np.ndarray:
        if (source, to) != (tl.float32, tl.bfloat16):
            return cut(data, source, to, mode)
        single = torch.from_numpy(np.array(data, dtype=np.float32))  # a copy: it may be read-only
        return single.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        yield


@pytest.fixture(scope="session", autouse=True)
def interpreter_patches_a_module_once() -> Iterator[None]:
    if our_triton.MISSING is not None or not our_triton.INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    patched = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The launch has patched triton.language; what only device functions import is left.
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


@pytest.fixture
def far(tmp_path: Path) -> torch.Tensor:
    """A tensor of 3 * 2^31 bf16 numbers; without a GPU a file of holes, 12 GiB that nobody has.

    Offsets are taken from its middle, so that one that wrapped around at 2^31 reads zeros.
    """
    size = 3 * 2**31
    if torch.cuda.is_available():
        if torch.cuda.mem_get_info()[0] < 3 * size:
            pytest.skip("needs 18 GiB of free GPU memory")
        return torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    file = tmp_path / "holes"
    file.touch()
    os.truncate(file, 2 * size)
    return torch.from_file(str(file), shared=True, size=size, dtype=torch.bfloat16)

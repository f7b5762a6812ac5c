"""The roofs of a GPU without one: the kernels in the simulator, and what `measure` makes of them.

Left out: every rate. That the instructions are there as often as counted is in test_cuda_build.py.
"""

import contextlib
import types

import cuda_sim
import pytest
import torch

from ceg_kernels import native
from ceg_kernels.measure import ceilings, gpu_roofs
from ceg_kernels.measure.table import roofs_lines

needs_simulator = cuda_sim.needed
THREADS = 256


@needs_simulator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vectors", [1, 255, 1024, 3 * 1024 + 257])
def test_the_copy_copies_what_it_should_and_no_more(module, vectors, dtype):
    size, beside = vectors * 16 // dtype.itemsize, 16 // dtype.itemsize
    source, target = (torch.randn(size + 2 * beside).to(dtype) for _ in range(2))
    expected = target.clone()
    expected[beside:-beside] = source[beside:-beside]
    gpu_roofs.copy(source[beside:-beside], target[beside:-beside], launch=native.Cuda(module))()
    assert torch.equal(target, expected)


@needs_simulator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_each_chain_is_multiplied_and_added_to_as_often_as_asked(module, dtype):
    start, out = torch.arange(16, dtype=dtype), torch.empty(2 * THREADS, dtype=dtype)
    flops = module.roofs_fma(start, out, 0.5, 1.0, 16)
    assert flops == 2 * 16 * 16 * out.numel()
    assert (out == (2 + (start - 2) * 2.0**-16).sum()).all()  # exact in either


@needs_simulator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_each_warp_sums_products_on_tensor_cores(module, dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-4, 5, s, generator=generator).to(dtype) for s in ((16, 16), (16, 64)))
    out = torch.empty(2 * THREADS)
    flops = module.roofs_mma(a, b, out, 32)
    assert flops == 2 * 16 * 16 * 64 * 32 * out.numel() / 32
    product = 32 * (a.double() @ b.double())
    for lane in range(32):  # rows and columns of its accumulators, by the manual
        row, column = lane // 4, lane % 4 * 2
        mine = product[[row, row + 8]].view(2, 8, 8)[:, :, [column, column + 1]]
        assert (out[lane::32] == mine.sum()).all(), lane


@needs_simulator
def test_what_the_clock_is_given_has_the_size_of_the_gpu(module):
    module.set_device(multiprocessors=2)
    launch = native.Cuda(module)
    assert launch.threads() == 2 * 4 * THREADS
    for dtype, per_thread in (("float32", 2 * 16), ("float64", 2 * 16), ("bfloat16", 1024)):
        call = gpu_roofs.multiply(dtype, "cpu", launch=launch, rounds=16)
        assert call() == 16 * per_thread * launch.threads()
    module.launched()
    call()
    assert module.launched() == ["roofs_mma_kernel"]


X = torch.zeros(16)


@needs_simulator
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: m.roofs_copy(X[:3], X[:3]), "whole vectors of 16 bytes .*, got 3 elements"),
        (lambda m: m.roofs_copy(X[1:5], X[:4]), "that start at one, got 4 elements"),
        (lambda m: m.roofs_copy(X, X[:8]), r"target must have shape \(16,\), got \(8,\)"),
        (lambda m: m.roofs_fma(X, torch.zeros(100), 1, 1, 16), "a multiple of 256 .*, got 100"),
        (lambda m: m.roofs_fma(X, torch.zeros(256), 1, 1, 8), "multiple of 16, got 8"),
        (lambda m: m.roofs_fma(X.half(), torch.zeros(256), 1, 1, 16), "start must .*, got float16"),
        (lambda m: m.roofs_mma(X.view(4, 4), X, X, 16), r"a must have shape \(16, 16\), got"),
    ],
)
def test_refusals(module, call, match):
    with pytest.raises(ValueError, match=match):
        call(module)


@pytest.fixture
def made_up_gpu(monkeypatch):
    """A GPU whose roofs are the numbers of work that the clock is asked about."""
    asked = []

    def rate(name, value):
        assert torch.get_float32_matmul_precision() == "highest"
        asked.append(name)
        return value

    def copy(size, *args):
        assert size > 10 * (50 << 20)
        return rate("copy", 7.0 + len(args))  # ours comes with one more argument

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    properties = types.SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "made up")
    monkeypatch.setattr(ceilings, "_matmul_flops", lambda t, n, *a: rate("matmul", 3.0 + n / 1e5))
    monkeypatch.setattr(ceilings, "_register_flops", lambda *a: rate("register", 5.0))
    monkeypatch.setattr(ceilings, "_copy_bytes_per_s", copy)
    return asked


def test_the_roof_is_the_best_of_ours_and_torch_s_and_says_which(made_up_gpu, monkeypatch):
    monkeypatch.setattr(gpu_roofs, "why_not", lambda device: None)
    before = torch.get_float32_matmul_precision()
    roofs = ceilings._measure_cuda("cuda", 0.1)
    assert torch.get_float32_matmul_precision() == before
    assert roofs.flops_source == {
        "float64": "fma", "float32": "fma", "bfloat16": "mma.sync", "float16": "mma.sync"
    }  # fmt: skip
    assert set(roofs.flops.values()) == {5.0}
    assert roofs.matmul_flops["bfloat16"] == 3.0 + 16384 / 1e5  # the best of several sizes
    assert (roofs.copy_source, roofs.cache_bytes) == ("native", 50 << 20)


def test_without_our_kernels_torch_alone_says_the_roof(made_up_gpu, monkeypatch):
    monkeypatch.setattr(gpu_roofs, "why_not", lambda device: "built without CUDA (test)")
    roofs = ceilings._measure_cuda("cuda", 0.1)
    assert set(roofs.fma_flops.values()) == {None}
    assert set(roofs.flops_source.values()) == {"matmul"}
    assert roofs.copy_source == "torch"
    assert "register" not in made_up_gpu


def test_the_rate_of_the_registers_stands_beside_a_faster_matmul(made_up_gpu, monkeypatch):
    monkeypatch.setattr(gpu_roofs, "why_not", lambda device: None)
    monkeypatch.setattr(ceilings, "_register_flops", lambda *a: 2e9)
    monkeypatch.setattr(ceilings, "_matmul_flops", lambda *a: 9e9)
    lines = roofs_lines(ceilings._measure_cuda("cuda", 0.1))
    assert "  bfloat16: 9 GF/s (matmul; from registers 2)" in lines


def test_the_peak_of_a_process_on_a_gpu(made_up_gpu, monkeypatch):
    monkeypatch.setattr(gpu_roofs, "why_not", lambda device: None)
    assert ceilings.peak_flops("bfloat16", "cuda:0") == 5.0

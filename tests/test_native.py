"""The native module by itself: arguments, refusals, ISA levels, threads, roofs. No torch is needed
except where a test says so; the accuracy of the kernels is the business of the grid over OPS."""

import glob
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

_C = pytest.importorskip("ceg_kernels._C", reason="the native module is not built")

LEVELS = _C.isa_levels()["available"]


class Inputs:
    """The same random arrays for each instance."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def floats(self, *shape, dtype=np.float32):
        return self.generator.standard_normal(shape).astype(dtype)

    def integers(self, end, *shape):
        return self.generator.integers(0, end, shape).astype(np.int32)


def empty(*shape, dtype=np.float32):
    fill = np.nan if np.issubdtype(dtype, np.floating) else -7
    return np.full(shape, fill, dtype=dtype)


def rms_norm(x, weight=None, residual=None, **options):
    wide = np.float64 if x.dtype == np.float64 else np.float32
    y, rstd = empty(*x.shape, dtype=x.dtype), empty(x.shape[0], dtype=wide)
    total = None if residual is None else empty(*x.shape, dtype=x.dtype)
    _C.rms_norm_fwd(x, weight, residual, y, total, rstd, 1e-6, **options)
    return y, rstd


# Each launcher on inputs large enough for several threads and with a partial last vector:
# run(inputs, **threads or isa) -> outputs.


def run_rms_norm(inputs, **options):
    x, residual = inputs.floats(500, 203), inputs.floats(500, 203)
    return rms_norm(x, inputs.floats(203), residual, **options)


def run_rms_norm_bwd(inputs, **options):
    h, dy = inputs.floats(500, 203), inputs.floats(500, 203)
    weight, rstd = inputs.floats(203), np.abs(inputs.floats(500))
    dx, dweight = empty(500, 203), empty(203)
    _C.rms_norm_bwd(dy, None, h, weight, rstd, dx, dweight, 1.0, **options)
    return dx, dweight


def run_rope(inputs, **options):
    q, k = inputs.floats(2, 65, 5, 46), inputs.floats(2, 65, 1, 46)
    cos, sin, positions = inputs.floats(70, 21), inputs.floats(70, 21), inputs.integers(70, 2, 65)
    outputs = []
    for interleaved in (False, True):
        q_out, k_out = empty(*q.shape), empty(*k.shape)
        _C.rope(q, k, cos, sin, positions, q_out, k_out, interleaved, **options)
        outputs += [q_out, k_out]
    return tuple(outputs)


def run_route(inputs, **options):
    weights, ids = empty(700, 3), empty(700, 3, dtype=np.int32)
    counts = empty(37, dtype=np.int32)
    logits, bias = inputs.floats(700, 37), inputs.floats(37)
    _C.moe_route(logits, bias, weights, ids, counts, "softmax", True, **options)
    return weights, ids, counts


def run_route_bwd(inputs, **options):
    _, ids, _ = run_route(inputs)
    dlogits = empty(700, 37)
    dweights, logits = inputs.floats(700, 3), inputs.floats(700, 37)
    _C.moe_route_bwd(dweights, logits, ids, dlogits, "softmax", False, **options)
    return (dlogits,)


def index(ids, experts, capacity, **options):
    slots, sources = empty(*ids.shape, dtype=np.int32), empty(ids.size, dtype=np.int32)
    offsets = empty(experts + 1, dtype=np.int32)
    _C.moe_index(ids, slots, sources, offsets, capacity, **options)
    return slots, sources, offsets


def run_index(inputs, **options):
    return index(inputs.integers(12, 9000, 2), 12, 1400, **options)


def run_dispatch_combine(inputs, **options):
    slots, sources, _ = index(inputs.integers(12, 300, 2), 12, 45)
    x, weights, rows = inputs.floats(300, 203), inputs.floats(300, 2), empty(600, 203)
    _C.moe_dispatch(x, sources, 2, rows, **options)
    combined, plain = empty(300, 203), empty(300, 203)
    _C.moe_combine(rows, slots, weights, combined, **options)
    _C.moe_combine(rows, slots, None, plain, **options)
    dy, dweights = empty(600, 203), empty(300, 2)
    _C.moe_combine_bwd(x, rows, sources, slots, weights, dy, dweights, **options)
    return rows, combined, plain, dy, dweights


RUNS = (
    run_rms_norm,
    run_rms_norm_bwd,
    run_rope,
    run_route,
    run_route_bwd,
    run_index,
    run_dispatch_combine,
)


@pytest.mark.parametrize("run", RUNS)
def test_any_number_of_threads_gives_the_same_bits(run):
    expected = run(Inputs(), threads=1)
    for threads in (2, 3, 7, 0):
        for got, want in zip(run(Inputs(), threads=threads), expected, strict=True):
            np.testing.assert_array_equal(got, want, err_msg=f"threads={threads}")


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("run", RUNS)
def test_isa_levels_agree(run, isa):
    for got, want in zip(run(Inputs(), isa=isa), run(Inputs(), isa="portable"), strict=True):
        assert not np.isnan(got).any()
        # Sums are taken in another order; nothing else may differ.
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_in_place(isa, dtype, interleaved):
    inputs = Inputs()
    q, k = inputs.floats(2, 65, 5, 46, dtype=dtype), inputs.floats(2, 65, 1, 46, dtype=dtype)
    cos, sin = inputs.floats(65, 21), inputs.floats(65, 21)  # four columns are only copied
    apart = empty(*q.shape, dtype=dtype), empty(*k.shape, dtype=dtype)
    _C.rope(q, k, cos, sin, None, *apart, interleaved, inverse=True, isa=isa)
    _C.rope(q, k, cos, sin, None, q, k, interleaved, inverse=True, isa=isa)
    np.testing.assert_array_equal(q, apart[0])
    np.testing.assert_array_equal(k, apart[1])


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("experts", "top_k"), [(21, 5), (3, 3), (16, 1), (40, 40)])
def test_experts_in_the_order_of_torch_sort(isa, dtype, experts, top_k):
    """NaN above infinity, zeros equal, the lower index of equal ones first, -inf last."""
    numbers = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -2.5], dtype)
    tokens = 35  # three vectors of some level, the last in part
    logits = np.random.default_rng(0).choice(numbers, (tokens, experts))
    logits[3], logits[4] = -np.inf, 1.0
    wide = np.float64 if dtype == np.float64 else np.float32
    ids, counts = np.empty((tokens, top_k), np.int32), np.empty(experts, np.int32)
    weights = empty(tokens, top_k, dtype=wide)
    _C.moe_route(logits, None, weights, ids, counts, "sigmoid", False, isa=isa)
    # lexsort is stable and takes its last key first; NaN is the only number unequal to itself.
    number = np.nan_to_num(logits.astype(wide), nan=0.0, posinf=np.inf, neginf=-np.inf)
    expected = np.stack(
        [np.lexsort((-n, row == row)) for n, row in zip(number, logits, strict=True)]
    )
    np.testing.assert_array_equal(ids, expected[:, :top_k])
    np.testing.assert_array_equal(counts, np.bincount(ids.ravel(), minlength=experts))
    chosen = np.take_along_axis(logits.astype(wide), ids, 1)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(weights, 1 / (1 + np.exp(-chosen)), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_dtypes(dtype):
    x = Inputs().floats(5, 40, dtype=dtype)
    y, rstd = rms_norm(x)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    assert rstd.dtype == (np.float64 if dtype == np.float64 else np.float32)
    np.testing.assert_allclose(y, expected, rtol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("sources", ["plan", "duplicates"])
def test_dispatch_of_more_than_the_caches_hold(sources):
    rows = 40_000  # times 512 bytes: no L2 is larger than 20 MB
    ids = Inputs().integers(12, rows // 2, 2)
    order = index(ids, 12, 3000)[1] if sources == "plan" else np.arange(rows, dtype=np.int32) // 7
    assert (order < 0).any() == (sources == "plan")
    x, out = Inputs().floats(rows // 2, 128), empty(rows, 128)
    _C.moe_dispatch(x, order, 2, out)
    np.testing.assert_array_equal(out, np.where(order[:, None] < 0, 0, x[order // 2]))


# ---- arrays of any framework ---------------------------------------------------------------


class OldExporter:
    """DLPack from before 1.0: no max_version."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, stream=None):
        return self.array.__dlpack__()


def test_strided_rows_and_exporters():
    wide = Inputs().floats(6, 50)
    x = wide[::2, 3:40]
    expected, _ = rms_norm(np.ascontiguousarray(x))
    np.testing.assert_array_equal(rms_norm(x)[0], expected)
    read_only = x.copy()
    read_only.flags.writeable = False
    np.testing.assert_array_equal(rms_norm(read_only)[0], expected)
    y, rstd = empty(3, 37), empty(3)
    _C.rms_norm_fwd(OldExporter(x), None, None, y, None, rstd, 1e-6)
    np.testing.assert_array_equal(y, expected)


def test_torch_parameters_are_taken_as_they_are():
    torch = pytest.importorskip("torch")
    x = torch.nn.Parameter(torch.randn(3, 8))
    y, rstd = torch.empty(3, 8), torch.empty(3)
    _C.rms_norm_fwd(x, None, None, y, None, rstd, 1e-6)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x.detach(), (8,), eps=1e-6))


# ---- roofs, levels, processes --------------------------------------------------------------


def test_roofs():
    assert LEVELS[0] == "portable"
    # On Intel the bf16 dot product is slower than fp32 FMA: csrc/cpu/isa.cpp has the numbers.
    intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    preferred = [level for level in LEVELS if not (intel and level == "avx512bf16")]
    assert _C.isa_levels()["default"] == preferred[-1]
    assert set(LEVELS) <= set(_C.isa_levels()["built"])
    for isa in LEVELS:
        assert _C.fma_flops("float32", 1, 0.01, isa) > _C.fma_flops("float64", 1, 0.01, isa) / 4 > 0
        dots = isa in ("avx512bf16", "amx")
        assert (_C.fma_flops("bfloat16", 1, 0.01, isa) is not None) == dots
    assert _C.fma_flops("float16", 1, 0.01) is None  # computed in float32
    assert _C.copy_bandwidth(1 << 20, 1, 0.01) > 0


def test_cuda_is_listed_or_says_why_not():
    info = _C.build_info()
    assert bool(info["cuda_archs"]) != bool(info["cuda_why_not"])
    if not info["cuda_archs"]:
        assert _C.cuda_devices() is None
        return
    if not glob.glob("/dev/nvidia[0-9]*"):
        with pytest.raises(RuntimeError, match="cudaGetDeviceCount: "):  # the driver's own reason
            _C.cuda_devices()
        return
    assert all(d["memory_bytes"] > 0 and d["multiprocessors"] > 0 for d in _C.cuda_devices())


def python(code):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )


def test_launchers_without_torch():
    done = python(
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np, ceg_kernels\n"
        "from ceg_kernels import _C\n"
        "x, y, rstd = np.ones((2, 4), 'f'), np.empty((2, 4), 'f'), np.empty(2, 'f')\n"
        "_C.rms_norm_fwd(x, None, None, y, None, rstd, 0.0)\n"
        "assert (y == 1).all() and ceg_kernels.build_info()['native']\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("first", ["ceg_kernels.OPS", "ceg_kernels.build_info()"])
def test_torch_and_the_kernels_share_one_thread_pool(first):
    pytest.importorskip("torch")
    done = python(
        f"import ceg_kernels; {first}; import torch\n"
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line})"
    )
    assert done.stdout.count("libgomp") == 1, done.stdout + done.stderr

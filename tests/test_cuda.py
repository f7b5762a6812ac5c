"""CUDA kernels without a GPU: the op grid in the simulator, refusals, and what a GPU would add.

The sources are those that nvcc compiles, and the Python glue is the backend's own with the
simulator's module in place of `_C.cuda`. Left out: anything about speed, fences, and the order in
which a GPU runs blocks at the same time. The grid runs with threads in forward order and in
reverse: outputs with other bits mean that some thread reads what another has yet to write.
"""

import cuda_sim
import numpy as np
import pytest
import torch
from numerics import as_tuple, compare, error_over_slack
from torch.library import opcheck

import ceg_kernels
from ceg_kernels import OPS, explain, native, rope_table, use_backend
from ceg_kernels.ops import arguments

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Attention, which has no fp32 and refuses more, is in test_cuda_attention.py.
ON_CUDA = [
    op
    for op in OPS.values()
    if "cuda" in [b.name for b in op.backends] and "attention" not in op.name
]

# dx, long rows' shares of dweight, their sum; zeros to count tokens from, where these are many; q
# and k of rope are one, and so are all others.
MOST_LAUNCHES = {"rms_norm_backward": 3, "moe_route": 2}

needs_simulator = cuda_sim.needed


@pytest.fixture
def as_cuda(sim, monkeypatch):
    """The simulator is the backend `cuda` of every op."""
    for op in ON_CUDA:
        ours = sim(op.name)
        replaced = tuple(ours if b.name == "cuda" else b for b in op.backends)
        monkeypatch.setattr(op, "backends", replaced)
        monkeypatch.setattr(op, "_chosen", {})


@needs_simulator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ON_CUDA, ids=lambda op: op.name)
def test_accuracy_and_the_same_bits_in_any_order_of_threads(sim, module, op, dtype):
    backend = sim(op.name)
    for sample in op.samples(dtype, "cpu"):
        module.launched()
        outs = as_tuple(backend.run(*sample.args))
        assert len(module.launched()) <= MOST_LAUNCHES.get(op.name, 1), sample.name
        worst = compare(op, outs, sample.args)
        assert worst <= 1, f"{sample.name}: error is {worst:.2f} times what the rule allows"
        module.set_device(order="reverse")
        for a, b in zip(outs, as_tuple(backend.run(*sample.args)), strict=True):
            assert torch.equal(bits(a), bits(b)), f"{sample.name}: depends on the order of threads"
        module.set_device()


def bits(t):
    return t.view({2: torch.int16, 4: torch.int32}[t.dtype.itemsize])


# One for each kernel: rows of a warp, of 128, 256 and 512 threads, and beyond registers.
ROWS = {"rms_norm": (1000, 4096, 8192, 16384, 16392), "rms_norm_backward": (1000, 4096, 8192, 8200)}


@needs_simulator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "size"), [(op, size) for op in ROWS for size in ROWS[op]])
def test_every_length_of_rows(sim, op, size, dtype):
    make = arguments.maker(dtype, "cpu")
    rows = 3 if op == "rms_norm" else 11
    h, weight, more = make(rows, size), make(size), make(rows, size)
    if op == "rms_norm":
        args = (h, weight, more, 1e-6, 1.0)
    else:
        rstd = OPS["rms_norm"].reference(h.double(), None, None, 1e-6, 0.0)[2].float()
        args = (make(rows, size), more, h, weight, rstd, 1.0)
    assert error_over_slack(OPS[op], sim(op), args) <= 1


@needs_simulator
@pytest.mark.parametrize("multiprocessors", [1, 2, 40])
def test_dweight_for_any_number_of_blocks(sim, module, multiprocessors):
    module.set_device(multiprocessors=multiprocessors)
    samples = {s.name: s.args for s in OPS["rms_norm_backward"].samples(torch.float32, "cpu")}
    for name in ("x[300, 128]", "x[8, 4099]"):
        worst = error_over_slack(OPS["rms_norm_backward"], sim("rms_norm_backward"), samples[name])
        assert worst <= 1, name


@needs_simulator
def test_rotation_in_place(sim, module):
    args = next(s.args for s in OPS["rope"].samples(torch.float32, "cpu") if s.name == "views")
    q, k, cos, sin, *_ = args
    expected = sim("rope").run(*args)
    q, k = q.clone(), k.clone()
    module.rope(q, k, cos[:33], sin[:33], None, q, k)
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])


@needs_simulator
@pytest.mark.parametrize("bad", [-1, 4, 2**40])
def test_positions_outside_the_table_are_nan(sim, bad):
    q = torch.ones(1, 3, 2, 8)
    positions = torch.tensor([[0, bad, 3]])
    out, _ = sim("rope").run(q, q, *rope_table(4, 8), positions, False, False)
    assert out[:, 1].isnan().all()
    assert out[:, [0, 2]].isfinite().all()


@needs_simulator
def test_the_gradient_goes_through_the_kernels(as_cuda):
    make = arguments.maker(torch.float32, "cpu")
    q, weight = make(2, 5, 4, 16).requires_grad_(), make(16).requires_grad_()
    k, table, upstream = make(2, 5, 2, 16), rope_table(5, 16), make(2, 5, 4, 16)
    grads = {}
    for backend in ("cuda", "reference"):
        with use_backend(backend):
            out, _ = ceg_kernels.rope(ceg_kernels.rms_norm(q, weight), k, *table)
        grads[backend] = torch.autograd.grad(out, (q, weight), upstream)
    for ours, theirs in zip(grads["cuda"], grads["reference"], strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_simulator
@pytest.mark.parametrize("op", ON_CUDA, ids=lambda op: op.name)
def test_opcheck_and_what_the_fakes_promise(as_cuda, op):
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    for sample in list(op.samples(torch.float32, "cpu"))[::4]:
        meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in sample.args]
        with use_backend("cuda"):
            result = opcheck(op.overload, sample.args, test_utils=tests, raise_exception=False)
            outs = as_tuple(op(*sample.args))
        assert set(result.values()) == {"SUCCESS"}, (sample.name, result)
        for out, fake in zip(outs, as_tuple(op.fake(*meta)), strict=True):
            assert (out.shape, out.dtype) == (fake.shape, fake.dtype), sample.name


@needs_simulator
@pytest.mark.parametrize(("kind", "index"), [(2, 0), (2, 1), (7, 3)])
def test_arrays_on_another_device_are_refused(module, kind, index):
    x = torch.zeros(2, 8)
    weight = cuda_sim.Elsewhere(torch.zeros(8), kind, index)
    place = f"cuda:{index}" if kind == 2 else rf"DLPack device \({kind}, {index}\)"
    with pytest.raises(ValueError, match=f"weight must be on cpu, got {place}"):
        module.rms_norm_fwd(x, weight, None, x, None, torch.zeros(2), 1e-6)


@needs_simulator
def test_address_sanitizer_finds_nothing():
    code = (
        "import torch, dataclasses; from functools import partial\n"
        "from ceg_kernels import OPS, native\n"
        f"for op in {[op.name for op in ON_CUDA]}:\n"
        "    run = partial(OPS[op].backend('cuda').run.func, launch=native.Cuda(sim))\n"
        "    for dtype in (torch.float32, torch.bfloat16):\n"
        "        for i, sample in enumerate(OPS[op].samples(dtype, 'cpu')):\n"
        "            if i % 2 == (dtype == torch.bfloat16): run(*sample.args)\n"
        "    print(op)\n"
    )
    done = cuda_sim.run_under_asan(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [op.name for op in ON_CUDA]


# ---- refusals ------------------------------------------------------------------------------

X = torch.zeros(2, 8)
ARGS = (X, None, None, 1e-6, 0.0)


def refusal(op="rms_norm", args=ARGS):
    return OPS[op].backend("cuda").why_not(*args)


class Extension:
    """What the module would say that was built with CUDA, or without."""

    def __init__(self, why_not="", archs="80-real 90a-real 90-virtual", norm="abc"):
        self.why_not, self.archs, self.norm = why_not, archs, norm

    def build_info(self):
        return {"cuda_why_not": self.why_not, "cuda_archs": self.archs}

    def kernel_hashes(self):
        return f"moe=def rms_norm={self.norm} "


def test_refusals_say_why(monkeypatch):
    monkeypatch.setattr(native, "MISSING", "the extension is not built (test)")
    assert refusal() == "the extension is not built (test)"
    monkeypatch.setattr(native, "MISSING", None)
    monkeypatch.setattr(native, "_C", Extension("nvcc not found"))
    assert refusal() == "the extension was built without CUDA (nvcc not found)"
    monkeypatch.setattr(native, "_C", Extension())
    assert refusal() == "needs tensors on cuda, got one on cpu"


@pytest.fixture
def on_gpu(monkeypatch):
    """`args` as if they were on a GPU of that capability."""

    class Pretended(torch.Tensor):
        device = torch.device("cuda", 1)

    def make(capability, dtype=torch.bfloat16):
        monkeypatch.setattr(native, "MISSING", None)
        monkeypatch.setattr(native, "_C", Extension())
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return (torch.zeros(2, 8, dtype=dtype).as_subclass(Pretended), *ARGS[1:])

    return make


def test_old_gpus_and_fp64_are_refused(on_gpu):
    assert refusal(args=on_gpu((7, 5))) == "needs a GPU of sm_80 or newer, got sm_75"
    wanted = r"needs dtype in {float32, bfloat16, float16}, got float64"
    assert refusal(args=on_gpu((9, 0), torch.float64)) == wanted
    assert refusal(args=on_gpu((8, 0))) is None


@pytest.mark.parametrize(
    ("archs", "runs", "refused"),
    [
        ("80-real", [(8, 0), (8, 6), (8, 9)], [(9, 0), (12, 0)]),
        ("86-real 90a-real", [(8, 6), (8, 9), (9, 0)], [(8, 0), (10, 0)]),
        ("90a-real 90-virtual", [(9, 0), (10, 0), (12, 0)], [(8, 0), (8, 9)]),
        ("100f-real", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("89", [(8, 9), (9, 0)], [(8, 0), (8, 6)]),
        ("all-major", [(8, 0), (12, 0)], []),
    ],
)
def test_gpus_that_the_build_is_not_for_are_refused(on_gpu, monkeypatch, archs, runs, refused):
    for capability in (*runs, *refused):
        args = on_gpu(capability)
        monkeypatch.setattr(native, "_C", Extension(archs=archs))
        family = f"sm_{capability[0]}{capability[1]}"
        wanted = f"the extension was built for GPUs of {archs}, got {family}"
        assert refusal(args=args) == (None if capability in runs else wanted)


def test_a_kernel_runs_unasked_only_where_it_is_validated(on_gpu, monkeypatch):
    monkeypatch.setattr(OPS["rms_norm"], "_chosen", {})
    args = on_gpu((9, 0))
    assert OPS["rms_norm"].choose(*args).name == "torch"
    line = "cuda: could run them, but not yet validated on sm_90: use_backend forces it"
    assert line in explain("rms_norm", *args)
    with use_backend("cuda"):
        assert OPS["rms_norm"].choose(*args).name == "cuda"
    record = {"commit": "test", "kernel": "abc"}
    monkeypatch.setattr(native, "VALIDATED", {"rms_norm": {"sm_90": record}})
    monkeypatch.setattr(OPS["rms_norm"], "_chosen", {})
    assert OPS["rms_norm"].choose(*args).name == "cuda"
    assert OPS["rms_norm"].choose(*on_gpu((8, 0))).name == "cuda"  # cached: the device is the same
    monkeypatch.setattr(OPS["rms_norm"], "_chosen", {})
    assert OPS["rms_norm"].choose(*on_gpu((8, 0))).name == "torch"


@pytest.mark.parametrize(
    ("op", "record", "counts"),
    [
        ("rms_norm", {"kernel": "abc"}, True),
        ("rms_norm_backward", {"kernel": "abc"}, True),
        ("rms_norm", {"kernel": "abd"}, False),
        ("rms_norm", {}, False),  # as validations were written before they had a hash
        ("rope", {"kernel": None}, False),  # of which the build has no kernels
    ],
)
def test_a_validation_counts_for_the_kernels_that_it_was_of(
    on_gpu, monkeypatch, op, record, counts
):
    args = on_gpu((9, 0))
    monkeypatch.setattr(native, "VALIDATED", {op: {"sm_90": {"commit": "f00", **record}}})
    stale = "was validated on sm_90 as other sources (commit f00): run `make gpu` again"
    assert native.unvalidated(op, *args) == (None if counts else stale)


def test_a_changed_kernel_does_not_run_unasked(on_gpu, monkeypatch):
    args = on_gpu((9, 0))
    record = {"commit": "f00", "kernel": "abc"}
    monkeypatch.setattr(native, "VALIDATED", {"rms_norm": {"sm_90": record}})
    for norm, runs in (("abc", "cuda"), ("abd", "torch")):
        monkeypatch.setattr(native, "_C", Extension(norm=norm))
        monkeypatch.setattr(OPS["rms_norm"], "_chosen", {})
        assert OPS["rms_norm"].choose(*args).name == runs
    assert "could run them, but was validated on sm_90 as other" in explain("rms_norm", *args)


def test_what_is_validated_names_ops_that_are_there():
    for op, families in native.VALIDATED.items():
        assert OPS[op].backend("cuda")
        for family, record in families.items():
            assert family.startswith("sm_")
            assert {"gpu", "commit", "kernel"} <= set(record)


with_cuda = pytest.mark.skipif(not hasattr(native._C, "cuda"), reason="built without CUDA")


@with_cuda
def test_the_real_launchers_refuse_arrays_that_are_not_on_a_gpu():
    x, rstd = np.zeros((2, 8), np.float32), np.zeros(2, np.float32)
    with pytest.raises(ValueError, match="x must be on a GPU, got cpu"):
        native._C.cuda.rms_norm_fwd(x, None, None, x, None, rstd, 1e-6)
    with pytest.raises(ValueError, match="h must be on a GPU, got cpu"):
        native._C.cuda.rms_norm_bwd(x, None, x, None, rstd, x, None, None)
    q, table = np.zeros((1, 2, 1, 8), np.float32), np.zeros((2, 4), np.float32)
    with pytest.raises(ValueError, match="q must be on a GPU, got cpu"):
        native._C.cuda.rope(q, None, table, table, None, q, None)


@with_cuda
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_driver_s_reason_is_the_error():
    x, rstd = (cuda_sim.Elsewhere(torch.zeros(*size), 2, 0) for size in ((2, 8), (2,)))
    for call in (
        lambda: native._C.cuda.rms_norm_fwd(x, None, None, x, None, rstd, 1e-6),
        native._C.cuda.kernel_attributes,
    ):
        with pytest.raises(RuntimeError, match=r"CUDA driver|CUDA-capable device"):
            call()

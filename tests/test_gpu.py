"""What only a GPU can tell: blocks that run at the same time, streams, graphs, real offsets.

The grid over samples is test_ops.py's, which takes `cuda` beside `cpu` where there is a GPU. Here
both of our backends for it, forced, at the sizes of the benchmarks and in the ways that users call
them. Without a GPU all of it is skipped; the simulator and the interpreter have their own files.
"""

import cuda_sim
import pytest
import torch
from numerics import as_tuple, compare, error_over_slack

import ceg_kernels
from ceg_kernels import OPS, native, rope_table, triton, use_backend
from ceg_kernels.measure import gpu_roofs
from ceg_kernels.ops import arguments

DEVICE = "cuda"
BACKENDS = ("cuda", "triton")
DTYPES = (torch.bfloat16, torch.float32)
GRID = [
    pytest.param(op.name, b.name, id=f"{op.name}-{b.name}")
    for op in OPS.values()
    for b in op.backends
    if b.name in BACKENDS
]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
over_the_grid = pytest.mark.parametrize(("op", "backend"), GRID)


def benchmarked(op, backend):
    """Arguments of the quick benchmarks, in the dtypes that the backend takes."""
    for dtype in DTYPES:
        for name, shape in OPS[op].shapes.items():
            if shape.group != "quick":
                continue
            args = shape.make(dtype, DEVICE)
            if OPS[op].backend(backend).why_not(*args) is None:
                yield f"{name} {dtype}", args


@over_the_grid
def test_accuracy_at_the_sizes_of_the_benchmarks(op, backend):
    found = dict(benchmarked(op, backend))
    assert found
    for name, args in found.items():
        assert error_over_slack(OPS[op], backend, args) <= 1, name


@over_the_grid
def test_same_bits_every_time(op, backend):
    _, args = next(benchmarked(op, backend))
    run = OPS[op].backend(backend).run
    first = as_tuple(run(*args))
    for _ in range(20):
        for a, b in zip(first, as_tuple(run(*args)), strict=True):
            assert torch.equal(a, b)


@over_the_grid
def test_the_current_stream_and_a_captured_graph(op, backend):
    _, args = next(benchmarked(op, backend))
    run = OPS[op].backend(backend).run
    expected = as_tuple(run(*args))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            outs = as_tuple(run(*args))
    torch.cuda.current_stream().wait_stream(side)
    assert all(map(torch.equal, expected, outs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = as_tuple(run(*args))
    graph.replay()
    assert all(map(torch.equal, expected, captured))


@over_the_grid
def test_compiles_without_a_graph_break(op, backend):
    _, args = next(benchmarked(op, backend))
    torch._dynamo.reset()
    with use_backend({op: backend}):
        compiled = torch.compile(OPS[op].overload, fullgraph=True, backend="aot_eager")(*args)
        assert all(map(torch.equal, as_tuple(OPS[op](*args)), as_tuple(compiled)))


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(("op", "backend"), [("attention_backward", "cuda")])
def test_two_passes_and_one_have_the_gradients_of_the_formula(op, backend, d):
    """Where there is one: long sequences, of which each takes sums from several blocks of keys."""
    make = arguments.maker(torch.bfloat16, DEVICE)
    q, k, v, dout = make(2, 900, 4, d), make(2, 1100, 2, d), make(2, 1100, 2, d), make(2, 900, 4, d)
    tail = None, None, 900, 1100, None, None, d**-0.5, True, 700, 0, 0.0
    args = (dout, None, q, k, v, *OPS["attention"].backend(backend).run(q, k, v, *tail), *tail)
    run = OPS[op].backend(backend).run.func
    for launch in (native.Cuda(), cuda_sim.TwoPasses()):
        first = as_tuple(run(*args, launch=launch))
        assert compare(OPS[op], first, args) <= 1
        for _ in range(10):
            assert all(map(torch.equal, first, as_tuple(run(*args, launch=launch))))


STRIDE = 2**31  # elements, so that an offset computed in 32 bits wraps around


@pytest.mark.parametrize("dimension", [0, 1, 2])
@pytest.mark.parametrize(("op", "backend"), [("attention", "cuda"), ("rope", "cuda")])
def test_offsets_beyond_32_bits(far, op, backend, dimension):
    shape, strides = [1, 1, 1, 64], [64, 64, 64, 1]
    shape[dimension], strides[dimension] = 2, STRIDE
    x = far.as_strided(shape, strides, STRIDE - 64)
    x.copy_(arguments.maker(torch.bfloat16, DEVICE)(*shape))
    near, run = x.clone(), OPS[op].backend(backend).run
    if op == "rope":
        tail = (*rope_table(2, 64, device=DEVICE), None, False, False)
        assert compare(OPS[op], as_tuple(run(x, x, *tail)), (near, near, *tail)) <= 1
        return
    # Two queries are decoding, which has kernels of its own.
    many = arguments.maker(torch.bfloat16, DEVICE)(shape[0], 20, shape[2], 64)
    for q, near_q in ((x, near), (many, many)):
        tail = None, None, q.shape[1], shape[1], None, None, 0.2, False, -1, -1, 0.0
        outs = as_tuple(run(q, x, x, *tail))
        assert compare(OPS[op], outs, (near_q, near, near, *tail)) <= 1


FLAGS = {
    "plain": {},
    "window": {"left": 5000},
    "everything": {"left": 9000, "softcap": 5.0, "with_sink": True, "with_slopes": True},
}


def decoding(keys, queries, heads, kv_heads, d, *, left=-1, softcap=0.0, with_sink=False,
             with_slopes=False):  # fmt: skip
    make = arguments.maker(torch.bfloat16, DEVICE)
    q, k, v = make(2, queries, heads, d), make(2, keys, kv_heads, d), make(2, keys, kv_heads, d)
    sink = make(heads).float() if with_sink else None
    slopes = make(heads).abs().float() * 1e-3 if with_slopes else None
    return (q, k, v, None, None, queries, keys, slopes, sink, d**-0.5, True, left, -1, softcap)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize(("queries", "d"), [(1, 64), (1, 128), (4, 128), (1, 256)])
@pytest.mark.parametrize(("op", "backend"), [("attention", "cuda")])  # Triton would compile long
def test_decoding_at_16384_keys(op, backend, queries, d, flags):
    args = decoding(16384, queries, 16, 2, d, **FLAGS[flags])
    assert error_over_slack(OPS[op], backend, args) <= 1
    run = OPS[op].backend(backend).run
    first = as_tuple(run(*args))
    for _ in range(20):
        assert all(map(torch.equal, first, as_tuple(run(*args))))


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_block_has_the_gradients_of_the_formula(backend):
    make = arguments.maker(torch.bfloat16, DEVICE)
    leaves = [make(2, 300, 4, 64).requires_grad_(), make(64).requires_grad_()]
    table, upstream = rope_table(300, 64, device=DEVICE), make(2, 300, 4, 64)

    def block(x, weight):
        q, k = ceg_kernels.rope(ceg_kernels.rms_norm(x, weight), x, *table)
        return ceg_kernels.flash_attention(q, k, x, causal=True)

    grads = {}
    for name in (backend, "reference"):
        with use_backend(name):
            grads[name] = torch.autograd.grad(block(*leaves), leaves, upstream)
    for ours, formula in zip(grads[backend], grads["reference"], strict=True):
        scale = formula.float().abs().max()
        assert (ours.float() - formula.float()).abs().max() <= 0.02 * scale  # 16 bits, four ops


@pytest.mark.skipif(not hasattr(native._C, "cuda"), reason="built without CUDA")
def test_whole_list_of_kernels_is_what_the_compiler_said():
    kernels = native._C.cuda.kernel_attributes()
    assert len(kernels) > 50
    for kernel in kernels:
        assert kernel["spill_bytes"] == 0, kernel
        assert kernel["blocks_per_multiprocessor"] > 0, kernel


@pytest.mark.skipif(not hasattr(native._C, "cuda"), reason="built without CUDA")
def test_whole_gpu_multiplies_and_copies_at_its_roofs():
    """Values, not rates: those are `ceg info`'s."""
    start, out = torch.arange(16.0, device=DEVICE), torch.empty(512, device=DEVICE)
    native.Cuda()("roofs_fma", start, out, 0.5, 1.0, 16)
    assert (out == (2 + (start - 2) * 2.0**-16).sum()).all()
    source = torch.randn(3 << 20, device=DEVICE)
    target = torch.empty_like(source)
    gpu_roofs.copy(source, target)()
    assert torch.equal(source, target)
    for dtype, rounds in gpu_roofs.ROUNDS.items():
        assert gpu_roofs.multiply(dtype)() >= rounds


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_process_goes_on_after_it_ran_out_of_memory(backend):
    if backend == "triton" and triton.MISSING is not None:
        pytest.skip(triton.MISSING)
    x = torch.zeros(1, device=DEVICE, dtype=torch.bfloat16).expand(2**20, 2**20)
    with use_backend(backend), pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        ceg_kernels.rms_norm(x)
    x = arguments.maker(torch.bfloat16, DEVICE)(4, 64)
    with use_backend(backend):
        assert ceg_kernels.rms_norm(x).isfinite().all()

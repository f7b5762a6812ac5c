"""The attention forward for sm_90a without such a GPU: TMA, mbarriers and wgmma in the simulator.

Copies and products happen there when no thread can go on without them or, in reverse order, at
once: see csrc/cuda/sim. Left out: speed, fences between proxies (every write is seen at once), and
whether the hardware reads descriptors as the manual says.
"""

import itertools

import cuda_sim
import numpy as np
import pytest
import torch
from numerics import as_tuple, compare
from test_cuda_attention import DTYPES, FLAGS, bits, fits, normal, tail

from ceg_kernels import OPS

pytestmark = cuda_sim.needed
SM90, SM80 = "attention_sm90_fwd_kernel", "attention_fwd_kernel"


@pytest.fixture
def hopper(module):
    """Makes the simulated GPU one of sm_90; called again, with another order of threads."""

    def become(**options):
        module.launched()
        module.set_device(**{"capability": 90, "shared_limit": 227 << 10, **options})

    become()
    return become


def expected_kernel(sample):
    q, k, v = (a for a in sample.args[:3])
    if max(q.shape[-1], v.shape[-1]) > 128 or k.numel() == 0:
        return SM80
    return SM90


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_and_the_same_bits_in_any_order_of_threads(sim, module, hopper, dtype):
    op, run, ran = OPS["attention"], sim("attention").run, []
    for sample in filter(fits, op.samples(dtype, "cpu")):
        hopper()
        outs = as_tuple(run(*sample.args))
        kernels = module.launched()
        if sample.args[0].numel():
            assert kernels == [expected_kernel(sample)], sample.name
            ran += kernels
        worst = compare(op, outs, sample.args)
        assert worst <= 1, f"{sample.name}: error is {worst:.2f} times what the rule allows"
        if sample.args[3] is None and sample.args[0].shape[0] >= 16:
            continue  # many blocks of one kind: slow, and nothing new
        hopper(order="reverse")
        for a, b in zip(outs, as_tuple(run(*sample.args)), strict=True):
            assert torch.equal(bits(a), bits(b)), f"{sample.name}: depends on the order of threads"
    assert ran.count(SM90) > 25


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("d", [64, 128])
def test_many_tiles_on_few_and_on_many_multiprocessors(sim, module, hopper, d, flags):
    tq, tk = 300, 470
    q, k, v = normal(1, tq, 2, d), normal(1, tk, 1, d, seed=2), normal(1, tk, 1, d, seed=3)
    args = (q, k, v, *tail(tq, tk, scale=d**-0.5, **FLAGS[flags]))
    hopper(multiprocessors=40, order="shuffled")
    alone = sim("attention").run(*args)
    hopper(multiprocessors=1)
    for a, b in zip(sim("attention").run(*args), alone, strict=True):
        assert torch.equal(bits(a), bits(b))
    assert module.launched() == [SM90]
    assert compare(OPS["attention"], alone, args) <= 1


def test_strangers_behind_a_tensor_or_a_sequence_are_not_read(sim, hopper):
    """NaN beyond the last row, beyond head_dim, and in the other sequences of a packed batch."""
    room = torch.full((3, 300, 4, 80), torch.nan, dtype=torch.bfloat16)
    q, k, v = (room[i, :177, 1:3, :72] for i in range(3))
    for i, t in enumerate((q, k, v)):
        t.copy_(normal(177, 2, 72, seed=i))
    dense = (q[None], k[None], v[None], *tail(177, 177, causal=True))
    expected = sim("attention").run(*(t.clone() for t in dense[:3]), *dense[3:])
    assert expected[0].isfinite().all()
    for a, b in zip(sim("attention").run(*dense), expected, strict=True):
        assert torch.equal(a, b)

    cu = torch.tensor([0, 20, 197, 300], dtype=torch.int32)
    packed = [torch.full((300, 2, 72), torch.nan, dtype=torch.bfloat16) for _ in range(3)]
    for t, own in zip(packed, (q, k, v), strict=True):
        t[20:197] = own
    out, lse = sim("attention").run(*packed, cu, cu, 177, 177, *dense[7:])
    assert torch.equal(out[20:197], expected[0][0])
    assert torch.equal(lse[:, 20:197], expected[1][0])


def test_nan_goes_where_it_is_seen_and_nowhere_else(sim, hopper):
    q, k, v = (normal(1, 200, 1, 64, seed=i) for i in range(3))
    q[:, 150] = torch.nan
    k[:, 190] = torch.nan
    out, lse = sim("attention").run(q, k, v, *tail(200, 200, causal=True))
    wrong = torch.zeros(200, dtype=torch.bool)
    wrong[150], wrong[190:] = True, True
    assert torch.equal(lse[0, 0].isnan(), wrong)
    assert torch.equal(out[0, :, 0].isnan().any(-1), wrong)


def test_what_it_cannot_do_the_kernel_for_sm_80_does(sim, module, hopper):
    q, k = normal(2, 20, 2, 64), normal(1, 20, 2, 64, seed=1)
    run = sim("attention").run
    expanded = k.expand(2, -1, -1, -1)
    cases = {
        "needs head_dim <= 128, got 136": (90, (normal(2, 20, 1, 136),) * 3),
        "k needs strides of a positive multiple of 16 bytes below 2^40, got 0": (
            90, (q, expanded, expanded)),
        "k needs 1 to 2^32 items in each dimension, got 0": (90, (q, q[:, :0], q[:, :0])),
        "needs sm_90, got sm_80": (80, (q, q, q)),
        "needs sm_90, got sm_100": (100, (q, q, q)),
        "": (90, (q, q, q)),
    }  # fmt: skip
    for why, (capability, qkv) in cases.items():
        hopper(capability=capability)
        lengths = (None, None, 20, qkv[1].shape[1])
        assert module.attention_fwd_sm90_why_not(*qkv, *lengths) == why
        run(*qkv, *lengths, *tail(20, 20)[4:])
        assert module.launched() == [SM80 if why else SM90], why


def test_address_sanitizer_is_silent():
    code = (
        "from functools import partial\nimport torch\nfrom ceg_kernels import OPS, native\n"
        "sim.set_device(capability=90, shared_limit=227 << 10)\n"
        "run = partial(OPS['attention'].backend('cuda').run.func, launch=native.Cuda(sim))\n"
        "for s in OPS['attention'].samples(torch.bfloat16, 'cpu'):\n"
        "    if s.name in ('gqa 4/2 D80', 'causal 257', 'varlen everything', 'packed qkv'):\n"
        "        run(*s.args); print(*sim.launched())\n"
    )
    done = cuda_sim.run_under_asan(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [SM90] * 4


# Index arithmetic.

TILES = list(itertools.product((64, 128), (64, 128)))


@pytest.mark.parametrize(("rows", "columns"), TILES)
def test_panels_hold_each_chunk_once(module, rows, columns):
    places = itertools.product(range(rows), range(columns // 8))
    offsets = sorted(module.panels_offset(rows, columns, r, c) for r, c in places)
    assert offsets == list(range(0, rows * columns * 2, 16))


@pytest.mark.parametrize(("rows", "columns"), TILES)
@pytest.mark.parametrize("dense_in_k", [True, False])
def test_descriptors_find_each_item_of_a_tile(module, rows, columns, dense_in_k):
    start = 5 << 10
    steps, across = (columns, rows) if dense_in_k else (rows, columns)
    for step, k in itertools.product(range(steps // 16), range(16)):
        for mn in range(across):
            row, column = (mn, 16 * step + k) if dense_in_k else (16 * step + k, mn)
            at = module.panels_offset(rows, columns, row, column // 8) + column % 8 * 2
            found = module.operand_address(rows, columns, start, dense_in_k, step, mn, k)
            assert found == start + at


def test_descriptors_have_the_fields_of_the_manual(module):
    bits_of = module.matrix_descriptor(0x3FFF0, 16, 1024)
    assert bits_of == 0x3FFF | 1 << 16 | 64 << 32 | 1 << 62
    assert module.matrix_descriptor(0x40010, 0, 0) == 1 | 1 << 62  # 18 bits of an address


# The simulation itself.


def product(module, fault, rows=128, columns=64, **device):
    module.set_device(**device)
    x = np.random.default_rng(0).integers(-4, 5, (rows, columns)).astype(np.float16)
    out = np.zeros((64, 64), np.float32)
    module.selftest_sm90(fault, x, out)
    full = np.zeros((128, 64), np.float32)
    full[:rows, :columns] = x
    return out, full[:64] @ full[64:].T


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
@pytest.mark.parametrize(("rows", "columns"), [(128, 64), (100, 40), (64, 8)])
def test_a_product_is_exact_and_zeros_fill_what_is_not_there(module, order, rows, columns):
    ours, theirs = product(module, "none", rows, columns, order=order)
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("fault", ["no_barrier_wait", "no_wgmma_wait"])
def test_what_is_read_before_its_wait_is_nan(module, fault):
    assert np.isnan(product(module, fault)[0]).all()


def test_what_is_overwritten_before_its_wait_depends_on_the_order(module):
    late, theirs = product(module, "overwrites_operand")
    assert not np.array_equal(late, theirs)
    assert np.array_equal(product(module, "overwrites_operand", order="reverse")[0], theirs)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("no_wgmma_fence", "wgmma.mma_async: needs a wgmma.fence before it"),
        ("writes_accumulators", "accumulators were written between issue and wait_group"),
        ("barrier_not_initialised", "mbarrier: used before mbarrier.init"),
        ("arrives_twice", "mbarrier.arrive: all that the phase expects have arrived"),
        ("expects_too_much", "no thread can go on: 128 wait in mbarrier.try_wait"),
    ],
)
def test_what_the_manual_forbids_is_an_exception(module, fault, text):
    with pytest.raises(RuntimeError, match=text):
        product(module, fault)

"""The attention kernels for sm_90a without such a GPU: TMA, mbarriers and wgmma in the simulator.

Copies and products happen there when no thread can go on without them or, in reverse order, at
once: see csrc/cuda/sim. Left out: speed, fences between proxies (every write is seen at once), and
whether the hardware reads descriptors as the manual says.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cuda_sim
import numpy as np
import pytest
import torch
from numerics import as_tuple, compare
from test_cuda_attention import BOTH, DTYPES, FLAGS, bits, fits, normal, tail

from ceg_kernels import OPS, native

pytestmark = cuda_sim.needed
SM80 = {
    "attention": ["attention_fwd_kernel"],
    "attention_backward": ["attention_bwd_dkdv_kernel", "attention_bwd_dq_kernel"],
}
DECODE = ["attention_decode_kernel"]
SM90 = {
    "attention": ["attention_sm90_fwd_kernel"],
    "attention_backward": ["attention_sm90_bwd_kernel", "attention_sm90_bwd_sum_kernel"],
    "two passes": ["attention_sm90_bwd_dkdv_kernel", "attention_sm90_bwd_dq_kernel"],
}


@pytest.fixture
def backward(module):
    """The backward in one pass, or two, with tensors on the CPU."""

    def run(*args, passes=1):
        launch = (native.Cuda if passes == 1 else cuda_sim.TwoPasses)(module)
        return as_tuple(OPS["attention_backward"].backend("cuda").run.func(*args, launch=launch))

    return run


@pytest.fixture
def hopper(module):
    """Makes the simulated GPU one of sm_90; called again, with another order of threads."""

    def become(**options):
        module.launched()
        module.set_device(**{"capability": 90, "shared_limit": 227 << 10, **options})

    become()
    return become


def launched(module):
    """The kernels that visit pairs."""
    return [k for k in module.launched() if not k.endswith(("_delta_kernel", "_dsink_kernel"))]


def expected_kernels(op, passes, sample):
    if op == "attention" and sample.args[5] <= 16:
        return DECODE
    q, k, v = sample.args[:3] if op == "attention" else sample.args[2:5]
    if k.numel() == 0:
        return SM80[op]
    narrow = max(q.shape[-1], v.shape[-1]) <= 128
    return SM90[op if op == "attention" or (passes == 1 and narrow) else "two passes"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "passes"), [(BOTH[0], 1), (BOTH[1], 1), (BOTH[1], 2)])
def test_accuracy_and_the_same_bits_in_any_order_of_threads(
    sim, module, hopper, backward, op, passes, dtype
):
    run = sim(op).run if op == "attention" else partial(backward, passes=passes)
    ran = []
    for sample in filter(fits, OPS[op].samples(dtype, "cpu")):
        dense = all(not isinstance(a, torch.Tensor) or a.dtype != torch.int32 for a in sample.args)
        many = dense and sample.args[0].shape[0] >= 16  # blocks of one kind: slow, nothing new
        if many and op == "attention_backward":
            continue
        hopper()
        outs = as_tuple(run(*sample.args))
        kernels = launched(module)
        if sample.args[0].numel():
            assert kernels[-1:] == expected_kernels(op, passes, sample)[-1:], sample.name
            ran += kernels
        worst = compare(OPS[op], outs, sample.args)
        assert worst <= 1, f"{sample.name}: error is {worst:.2f} times what the rule allows"
        if many or dtype == torch.float16:  # who waits for whom does not depend on the type
            continue
        hopper(order="reverse")
        for a, b in zip(outs, as_tuple(run(*sample.args)), strict=True):
            assert torch.equal(bits(a), bits(b)), f"{sample.name}: depends on the order of threads"
    for kernel in SM90["two passes" if passes == 2 else op]:
        assert ran.count(kernel) > 25


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("d", [64, 128])
def test_many_tiles_on_few_and_on_many_multiprocessors(sim, module, hopper, backward, d, flags):
    tq, tk = 300, 470
    q, dout = normal(1, tq, 2, d), normal(1, tq, 2, d, seed=1)
    k, v = normal(1, tk, 1, d, seed=2), normal(1, tk, 1, d, seed=3)
    args = (q, k, v, *tail(tq, tk, scale=d**-0.5, **FLAGS[flags]))

    def run(**options):
        hopper(**options)
        forward = sim("attention").run(*args)
        saved = (dout, None, q, k, v, *forward, *args[3:])
        return args, forward, saved, backward(*saved, passes=2)

    alone = run(multiprocessors=40, order="shuffled")
    again = run(multiprocessors=1)
    assert launched(module) == SM90["attention"] + SM90["two passes"]
    for i, op in ((1, "attention"), (3, "attention_backward")):
        for a, b in zip(again[i], alone[i], strict=True):
            assert torch.equal(bits(a), bits(b))
        assert compare(OPS[op], alone[i], alone[i - 1]) <= 1


# Of tiles of 128 keys, four: a split has all of them, or two, with queries between both that see
# neither, or one.
ONE_PASS_FLAGS = {**FLAGS, "full": {}, "narrow": {"window": (20, 10)}}


@pytest.mark.parametrize("flags", ONE_PASS_FLAGS)
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (128, 128), (40, 72)])
@pytest.mark.parametrize("packed", [False, True])
def test_one_pass_sums_dq_over_any_splits(module, sim, hopper, backward, d, dv, packed, flags):
    """Which follow from shape and multiprocessors, and with them the last bits of dq."""
    q, dout = normal(300, 2, d), normal(300, 2, dv, seed=1)
    k, v = normal(470, 1, d, seed=2), normal(470, 1, dv, seed=3)
    rest = tail(300, 470, scale=d**-0.5, **ONE_PASS_FLAGS[flags])
    if packed:  # also a sequence without queries, one without keys, one with one key in its tile
        cu = ([0, 1, 1, 60, 61, 300], [0, 70, 75, 75, 204, 470])
        rest = (*(torch.tensor(c, dtype=torch.int32) for c in cu), 240, 266, *rest[4:])
        args = (q, k, v, *rest)
    else:
        q, dout, k, v = (t[None] for t in (q, dout, k, v))
        args = (q, k, v, *rest)
    tiles, width = 9 if packed else 5, 64 if dv == 64 else 128
    choices = ((1, 1), (10, 2), (40, 3)) if packed else ((1, 1), (2, 2), (40, 4))
    hopper()
    saved = (dout, None, q, k, v, *sim("attention").run(*args), *rest)
    found = []
    for (multiprocessors, splits), order in zip(
        choices, ("reverse", "shuffled", "reverse"), strict=True
    ):
        hopper(multiprocessors=multiprocessors)
        shape = (dout, q, k, v, *rest[:4])
        assert module.attention_bwd_rows(*shape) == splits * tiles * 2 * width
        outs = backward(*saved)
        assert launched(module) == SM90["attention_backward"]
        assert compare(OPS["attention_backward"], outs, saved) <= 1
        hopper(multiprocessors=multiprocessors, order=order)
        for a, b in zip(outs, backward(*saved), strict=True):
            assert torch.equal(bits(a), bits(b))
        found.append(outs[1:])
    for other in found[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(other, found[0], strict=True))


def test_keys_past_the_end_have_no_weight(sim, hopper, backward):
    """Their logit is 0, beside rows with a log-sum-exp of -200, and exp(200) is infinite."""
    q, k = torch.full((1, 150, 1, 64), 5.0), torch.full((1, 150, 1, 64), -5.0)
    q, k = (t.to(torch.bfloat16) for t in (q, k))
    v, dout = normal(1, 150, 1, 64), normal(1, 150, 1, 64, seed=1)
    args = (q, k, v, *tail(150, 150, scale=0.125))
    hopper()
    saved = (dout, None, q, k, v, *sim("attention").run(*args), *args[3:])
    assert saved[6].max() < -190
    for passes in (1, 2):
        assert compare(OPS["attention_backward"], backward(*saved, passes=passes), saved) <= 1


def test_one_pass_or_two(module, hopper):
    def asked(*shape, dv=None, **device):
        hopper(**device)
        q, v = (
            torch.empty(*shape[:3], d, dtype=torch.bfloat16) for d in (shape[3], dv or shape[3])
        )
        args = (v, q, q, v, None, None, shape[1], shape[1])
        why = module.attention_bwd_one_pass_why_not(*args)
        assert (module.attention_bwd_rows(*args) == 0) == bool(why)
        return why

    assert asked(1, 300, 2, 128) == ""
    assert asked(1, 300, 2, 64, capability=80) == "needs sm_90, got sm_80"
    assert asked(1, 300, 2, 64, dv=192) == "needs head_dim <= 128, got 192"
    assert asked(1, 2**16, 2, 64, multiprocessors=32) == ""
    why = asked(1, 2**16, 2, 64, multiprocessors=64)
    assert why == "needs at most 512 MiB for the sums of dq, got 1024"


def test_the_sums_of_dq_have_the_shape_that_was_asked_for(module, hopper):
    @dataclass(frozen=True)
    class Wrong(native.Cuda):
        change: Callable = lambda sums: sums

        def workspace(self, name, columns, dtype, *of):
            (sums,) = super().workspace(name, columns, dtype, *of)
            return (self.change(sums),)

    q, lse = normal(1, 20, 2, 64), torch.zeros(1, 2, 20)
    args = (q, None, q, q, q, q, lse, *tail(20, 20))
    run = OPS["attention_backward"].backend("cuda").run.func
    for text, change in (
        (r"sums must have shape \(128, 64\), got \(127, 64\)", lambda t: t[1:]),
        ("sums must be float32, got float16", lambda t: t.half()),
        (
            "sums must be dense from a multiple of 16 bytes on",
            lambda t: torch.cat((t, t), 1)[:, 64:],
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            run(*args, launch=Wrong(module, change))


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize(
    ("d", "dv", "dtype"),
    [(256, 256, torch.bfloat16), (192, 128, torch.float16), (64, 200, torch.bfloat16)],
)
def test_many_tiles_of_wide_heads(sim, module, hopper, d, dv, dtype, flags):
    """Of which dK and dV have tiles of 64 keys, whose probabilities two warpgroups share.

    The sink is in lse. Its own gradient is not asked for: of two numbers, it passes by luck.
    """
    cu_q = torch.tensor([0, 1, 140, 300], dtype=torch.int32)
    cu_k = torch.tensor([0, 70, 75, 370], dtype=torch.int32)
    q, k = normal(300, 2, d, dtype=dtype), normal(370, 1, d, dtype=dtype, seed=2)
    dout, v = (normal(t, h, dv, dtype=dtype, seed=t) for t, h in ((300, 2), (370, 1)))
    rest = tail(300, 370, scale=d**-0.5, **FLAGS[flags])
    for args, do in (
        ((q[None], k[None], v[None], *rest), dout[None]),
        ((q, k, v, cu_q, cu_k, 160, 295, *rest[4:]), dout),
    ):
        hopper(multiprocessors=40, order="shuffled")
        alone = sim("attention").run(*args)
        backward = (do, None, *args[:3], *alone, *args[3:8], None, *args[9:])
        gradients = as_tuple(sim("attention_backward").run(*backward))
        hopper(multiprocessors=1)
        again = sim("attention").run(*args), as_tuple(sim("attention_backward").run(*backward))
        assert launched(module) == SM90["attention"] + SM90["two passes"]
        for a, b in zip(sum(again, ()), (*alone, *gradients), strict=True):
            assert torch.equal(bits(a), bits(b))
        assert compare(OPS["attention"], alone, args) <= 1
        assert compare(OPS["attention_backward"], gradients, backward) <= 1


@pytest.mark.parametrize(("d", "passes"), [(72, 1), (72, 2), (200, 2)])
def test_strangers_behind_a_tensor_or_a_sequence_are_not_read(sim, hopper, backward, d, passes):
    """NaN beyond the last row, beyond head_dim, and in the other sequences of a packed batch."""
    room = torch.full((4, 300, 4, d + 8), torch.nan, dtype=torch.bfloat16)
    own = [room[i, :177, 1:3, :d] for i in range(4)]
    for i, t in enumerate(own):
        t.copy_(normal(177, 2, d, seed=i))
    rest = tail(177, 177, causal=True)
    run, backward = sim("attention").run, partial(backward, passes=passes)
    q, k, v, dout = (t[None].clone() for t in own)
    expected = run(q, k, v, *rest)
    gradients = backward(dout, None, q, k, v, *expected, *rest)[:3]
    assert all(t.isfinite().all() for t in (*expected, *gradients))
    q, k, v, dout = (t[None] for t in own)
    for a, b in zip(run(q, k, v, *rest), expected, strict=True):
        assert torch.equal(a, b)
    beside = backward(dout, None, q, k, v, *expected, *rest)[:3]
    for a, b in zip(beside, gradients, strict=True):
        assert torch.equal(a, b)

    cu = torch.tensor([0, 20, 197, 300], dtype=torch.int32)
    packed = [torch.full((300, 2, d), torch.nan, dtype=torch.bfloat16) for _ in own]
    for t, inside in zip(packed, own, strict=True):
        t[20:197] = inside
    q, k, v, dout = packed
    out, lse = run(q, k, v, cu, cu, 177, 177, *rest[4:])
    assert torch.equal(out[20:197], expected[0][0])
    assert torch.equal(lse[:, 20:197], expected[1][0])
    between = backward(dout, None, q, k, v, out, lse, cu, cu, 177, 177, *rest[4:])[:3]
    for a, b in zip(between, gradients, strict=True):
        assert torch.equal(a[20:197], b[0])


@pytest.mark.parametrize("passes", [1, 2])
def test_nan_goes_where_it_is_seen_and_nowhere_else(sim, hopper, backward, passes):
    q, k, v, dout = (normal(1, 200, 1, 64, seed=i) for i in range(4))
    q[:, 150] = torch.nan
    k[:, 190] = torch.nan
    args = (q, k, v, *tail(200, 200, causal=True))
    out, lse = sim("attention").run(*args)
    wrong = torch.zeros(200, dtype=torch.bool)
    wrong[150], wrong[190:] = True, True
    assert torch.equal(lse[0, 0].isnan(), wrong)
    assert torch.equal(out[0, :, 0].isnan().any(-1), wrong)
    # Of the backward, for whole blocks: a product with 0 is NaN.
    dq, dk, dv, _ = backward(dout, None, q, k, v, out, lse, *args[3:], passes=passes)
    assert dq[0, :128].isfinite().all()
    assert dq[0, wrong].isnan().all()
    assert dk[0, 191:].isnan().all()  # of query 191, which sees key 190
    assert dv[0, 191:].isnan().all()


def test_what_it_cannot_do_the_kernels_for_sm_80_do(sim, module, hopper):
    q, k = normal(2, 20, 2, 64), normal(1, 20, 2, 64, seed=1)
    run, backward = sim("attention").run, sim("attention_backward").run
    expanded = k.expand(2, -1, -1, -1)
    cases = {
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
        kernels = SM80 if why else SM90
        assert module.attention_fwd_sm90_why_not(*qkv, *lengths) == why
        forward = run(*qkv, *lengths, *tail(20, 20)[4:])
        assert launched(module) == kernels["attention"], why
        assert module.attention_bwd_sm90_why_not(qkv[0], *qkv, *lengths) == why
        backward(qkv[0], None, *qkv, *forward, *lengths, *tail(20, 20)[4:])
        assert launched(module)[-1:] == kernels["attention_backward"][-1:], why

    hopper()
    why = module.attention_bwd_sm90_why_not(expanded, q, q, q, None, None, 20, 20)
    assert why == "dout needs strides of a positive multiple of 16 bytes below 2^40, got 0"


def test_address_sanitizer_is_silent():
    code = (
        "from functools import partial\nimport torch\nfrom ceg_kernels import OPS, native\n"
        "sim.set_device(capability=90, shared_limit=227 << 10)\n"
        "for op in ('attention', 'attention_backward'):\n"
        "    run = partial(OPS[op].backend('cuda').run.func, launch=native.Cuda(sim))\n"
        "    for s in OPS[op].samples(torch.bfloat16, 'cpu'):\n"
        "        names = ('D256', 'gqa 4/2 D80', 'causal 257', 'varlen everything', 'packed qkv')\n"
        "        if s.name in names:\n"
        "            run(*s.args); print(*sim.launched()[-1:])\n"
    )
    done = cuda_sim.run_under_asan(code)
    assert done.returncode == 0, done.stderr
    forward, one, two = (SM90[op][-1] for op in (*BOTH, "two passes"))
    ran = done.stdout.split()
    assert ran[:5] == [forward] * 5
    assert sorted(ran[5:]) == sorted([one] * 4 + [two])


# Index arithmetic.

TILES = list(itertools.product((64, 128), (64, 128, 256)))


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


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_a_ring_has_its_stages_in_turn_and_changes_parity_with_each_round(module, stages):
    assert module.ring(stages, 20) == [(i % stages, i // stages % 2) for i in range(20)]


@pytest.mark.parametrize("tiles", [1, 2, 5, 16])
def test_each_tile_of_keys_is_dealt_to_one_split(module, tiles):
    for splits in range(1, tiles + 1):
        dealt = []
        for split in range(splits):
            own = [module.dealt_tile(split, turn, splits) for turn in range(tiles)]
            own = [tile for tile in own if tile < tiles]
            assert own == sorted(own)
            assert (own[0], own[-1]) == (split, module.last_dealt_tile(split, tiles, splits))
            dealt += own
        assert sorted(dealt) == list(range(tiles))


def test_there_are_as_few_splits_as_keep_all_multiprocessors_busy(module):
    for heads, tiles, processors in itertools.product((1, 8, 48, 300), (1, 8, 33), (1, 3, 132)):

        def taken(splits, heads=heads, tiles=tiles, processors=processors):
            return -(-heads * splits // processors) * -(-tiles // splits)

        most = min(tiles, processors)
        assert module.splits_of(heads, tiles, processors) == min(range(1, most + 1), key=taken)


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

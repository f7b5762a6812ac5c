"""CUDA attention for a few queries, in the simulator: keys in chunks, heads of a group in one tile.

The op's own samples of few queries run in test_cuda_attention.py too, on a GPU so small that most
have one chunk. Left out: fp32 and head_dims that are no multiple of 8 (refused), speed.
"""

import itertools
import math

import cuda_sim
import pytest
import torch
from numerics import as_tuple, compare
from test_cuda_attention import DTYPES, bits, fits, launch, normal, tail, zeros

from ceg_kernels import OPS

pytestmark = cuda_sim.needed
ONE = ["attention_decode_kernel"]
SEVERAL = [*ONE, "attention_decode_merge_kernel"]
FEW = 16  # queries


@pytest.fixture
def run(sim, module):
    """Runs, asserts which kernels did, the accuracy, and the same bits in any order of threads."""

    def run(args, kernels=None, **device):
        outs = []
        for order in ("forward", "reverse", "shuffled"):
            module.launched()
            module.set_device(order=order, **{"multiprocessors": 40, **device})
            outs.append(as_tuple(sim("attention").run(*args)))
            assert kernels is None or module.launched() == kernels
        for other in outs[1:]:
            for a, b in zip(outs[0], other, strict=True):
                assert torch.equal(bits(a), bits(b)), "depends on the order of threads"
        worst = compare(OPS["attention"], outs[0], args)
        assert worst <= 1, f"error is {worst:.2f} times what the rule allows"
        return outs[0]

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_of_few_queries_on_a_gpu_with_room_for_chunks(module, run, dtype):
    ran = []
    for sample in filter(fits, OPS["attention"].samples(dtype, "cpu")):
        if sample.args[5] <= FEW:
            run(sample.args, multiprocessors=80)
            ran.append(sample.name)
    assert {"one key", "decode", "four queries", "no keys", "no queries", "no batch"} <= set(ran)


# q heads and key heads, queries: rows of a group that fill half a tile, one, and two, the last of
# which begins and ends in the midst of a query's heads.
GROUPS = {"8:1": (8, 1, 1), "16:2, two queries": (16, 2, 2), "5:1, four queries": (5, 1, 4)}


def flags(heads, **more):
    return {
        "plain": {},
        "causal": {"causal": True},
        "window": {"window": (607, 3)},
        "everything": {
            "slopes": normal(heads, dtype=torch.float32).abs() * 0.02,
            "sink": normal(heads, dtype=torch.float32, seed=1), "causal": True,
            "window": (900, -1), "softcap": 4.0,
        },
    }  # fmt: skip


@pytest.mark.parametrize("flag", flags(1))
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(
    ("d", "dv", "dtype"),
    [
        (64, 64, torch.bfloat16), (128, 128, torch.bfloat16), (256, 256, torch.bfloat16),
        (72, 72, torch.float16), (40, 200, torch.float16), (128, 64, torch.float16),
    ],
)  # fmt: skip
def test_chunks_and_groups(run, d, dv, dtype, group, flag):
    heads, kv_heads, tq = GROUPS[group]
    tk = 1111
    q = normal(1, tq, heads, d, dtype=dtype)
    k, v = (normal(1, tk, kv_heads, w, dtype=dtype, seed=i) for i, w in ((2, d), (3, dv)))
    args = (q, k, v, *tail(tq, tk, scale=d**-0.5, **flags(heads)[flag]))
    run(args, SEVERAL)


@pytest.mark.parametrize("d", [64, 256])
def test_more_chunks_than_a_block_merges_at_once(run, d):
    q, k, v = (normal(1, t, h, d, seed=t) for t, h in ((1, 2), (5000, 1), (5000, 1)))
    run((q, k, v, *tail(1, 5000, scale=d**-0.5)), SEVERAL)


def test_strides_as_they_lie(run):
    q = normal(2, 8, 3, 64).transpose(1, 2)
    k, v = normal(2, 2, 2, 700, 64).transpose(2, 3)
    run((q, k, v, *tail(3, 700, causal=True)), SEVERAL)


# Sequences of one packed batch, (queries, keys): long and short, without keys, without queries,
# blind first queries, one key.
PACKED = ((3, 1500), (2, 0), (0, 40), (5, 3), (1, 1), (16, 300), (2, 257))


def packed(heads=4, kv_heads=2, d=64, dtype=torch.bfloat16):
    starts = [[0, *itertools.accumulate(lengths)] for lengths in zip(*PACKED, strict=True)]
    q = normal(starts[0][-1], heads, d, dtype=dtype)
    k, v = (normal(starts[1][-1], kv_heads, d, dtype=dtype, seed=i) for i in (1, 2))
    return (q, k, v, *(torch.tensor(s, dtype=torch.int32) for s in starts), 16, 1500)


@pytest.mark.parametrize("flag", flags(1))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences(run, dtype, flag):
    args = packed(dtype=dtype)
    rest = tail(0, 0, **flags(4)[flag])[4:]
    out, lse = run((*args, *rest), SEVERAL, multiprocessors=200)
    blind = slice(3, 5)  # of the sequence without keys
    sink = rest[1]
    assert (out[blind] == 0).all()
    assert torch.equal(lse[:, blind], (sink if sink is not None else torch.full((4,), -math.inf))
                       [:, None].expand(4, 2))  # fmt: skip


def test_strangers_are_not_read(sim, module):
    """NaN left of the window, behind the last row, beyond head_dim, in other sequences."""
    module.set_device(multiprocessors=100)
    left = 701
    room = torch.full((2, 1000, 3, 80), torch.nan, dtype=torch.bfloat16)
    k, v = room[:, 100:900, 1:2, :72]
    q, near_k, near_v = normal(2, 8, 72), *(normal(800, 1, 72, seed=i) for i in (1, 2))
    rest = tail(2, 800, window=(left, 0))
    expected = sim("attention").run(q[None], near_k[None], near_v[None], *rest)
    assert module.launched()[-2:] == SEVERAL
    assert expected[0].isfinite().all()
    k.copy_(near_k)
    v.copy_(near_v)
    room[:, : 900 - 2 - left] = torch.nan
    for a, b in zip(sim("attention").run(q[None], k[None], v[None], *rest), expected, strict=True):
        assert torch.equal(a, b)

    cu_q, cu_k = (torch.tensor(c, dtype=torch.int32) for c in ([0, 1, 3, 5], [0, 100, 900, 1000]))
    module.set_device(multiprocessors=300)  # which three sequences share
    out, lse = sim("attention").run(
        torch.cat((q[:1], q, q)), *room[:, :, 1:2, :72], cu_q, cu_k, 2, 800, *rest[4:]
    )
    assert torch.equal(out[1:3], expected[0][0])
    assert torch.equal(lse[:, 1:3], expected[1][0])
    assert out[:1].isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_goes_where_it_is_seen_and_nowhere_else(sim, module, value):
    """In the keys of one key head, and to the right of the first query."""
    module.set_device(multiprocessors=20)
    q, k, v = normal(1, 2, 4, 64).abs(), *(normal(1, 900, 2, 64, seed=i) for i in (1, 2))
    args = (q, k, v, *tail(2, 900, causal=True))
    clean, clean_lse = sim("attention").run(*args)
    assert module.launched()[-2:] == SEVERAL
    k[0, 899, 1] = value
    out, lse = sim("attention").run(*args)
    seen = torch.zeros(2, 4, dtype=torch.bool)
    seen[1, 2:] = value != -math.inf  # weighs 0, and others are seen
    assert torch.equal(out[0].isnan().all(-1), seen)
    assert torch.equal(lse[0].T.isnan(), seen)
    untouched = torch.ones(2, 4, dtype=torch.bool)
    untouched[1, 2:] = False
    assert torch.equal(out[0][untouched], clean[0][untouched])
    assert torch.equal(lse[0].T[untouched], clean_lse[0].T[untouched])


def test_a_single_key_that_is_nan(sim):
    """A maximum of nothing, and still a row that saw something."""
    q, k = normal(1, 1, 8, 64), torch.full((1, 1, 1, 64), math.nan, dtype=torch.bfloat16)
    out, lse = sim("attention").run(q, k, normal(1, 1, 1, 64), *tail(1, 1))
    assert out.isnan().all()
    assert lse.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slope", [-1, 1])
def test_large_logits_that_rise_and_fall_over_the_chunks(run, dtype, slope):
    """A maximum in the thousands that each step, warp and chunk moves, or none after the first."""
    q, k, v = (normal(1, t, h, 64, dtype=dtype, seed=t) for t, h in ((1, 8), (1500, 1), (1501, 1)))
    q[..., 0] = 40
    k[0, :, 0, 0] = slope * torch.linspace(-50, 50, 1500).to(dtype)
    run((q, k, v[:, :1500], *tail(1, 1500, scale=1.0)), SEVERAL)


@pytest.mark.parametrize("multiprocessors", [1, 7, 40])
@pytest.mark.parametrize(("tq", "group"), [(1, 8), (3, 1), (16, 2)])
def test_each_visible_key_counts_once(sim, module, tq, group, multiprocessors):
    """Equal scores: a row's exp(lse) is the number of its keys, and out the mean of theirs."""
    module.set_device(multiprocessors=multiprocessors)
    v = torch.zeros(1, 700, 1, 8, dtype=torch.float16)
    v[0, :, 0, 0] = torch.arange(700) % 2
    v[0, :, 0, 1:6] = (torch.arange(700)[:, None] >> torch.arange(4, 9)) % 2
    v[0, :, 0, 7] = 1
    q = torch.zeros(1, tq, group, 8, dtype=torch.float16)
    for tk, left in itertools.product((1, 15, 64, 255, 256, 257, 513, 640, 700), (-1, 0, 255, 447)):
        keys = v[:, :tk]
        args = (q, torch.zeros_like(keys), keys, *tail(tq, tk, causal=True, window=(left, -1)))
        out, lse = sim("attention").run(*args)
        for i in range(tq):
            beside = i + tk - tq
            seen = keys[0, max(0, beside - left if left >= 0 else 0) : max(0, beside + 1), 0]
            if len(seen) == 0:
                assert (lse[0, :, i] == -math.inf).all()
                continue
            assert (lse[0, :, i].exp() - len(seen)).abs().max() < 0.05, (tk, left, i)
            error = out[0, i].double() - seen.double().mean(0)
            assert error.abs().max() <= 2**-11, (tk, left, i)  # one rounding to fp16


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_the_rule_is_the_same_on_every_gpu(sim, module, capability):
    module.set_device(capability=capability, shared_limit=(227 if capability == 90 else 99) << 10)
    longer = "attention_sm90_fwd_kernel" if capability == 90 else "attention_fwd_kernel"
    for tq, kernel in ((FEW, ONE[0]), (FEW + 1, longer)):
        q, k = normal(1, tq, 2, 64), normal(1, 40, 1, 64)
        module.launched()
        sim("attention").run(q, k, k, *tail(tq, 40))
        assert module.launched() == [kernel]
        why = module.attention_fwd_sm90_why_not(q, k, k, None, None, tq, 40)
        ours = "needs more than 16 queries, got 16: attention_decode_kernel takes them"
        assert (why == ours) == (tq == FEW)


def test_the_workspace_is_asked_for_and_checked(module):
    q, k = zeros(1, 1, 8, 64), zeros(1, 600, 2, 64)
    problem = (q, k, k, None, None, 1, 600)
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    module.set_device(multiprocessors=40)
    rows, columns = 3 * 8, 64 + 2
    assert module.attention_fwd_rows(*problem) == rows
    assert module.attention_fwd_rows(*problem, window_left=100) == 0  # one chunk
    assert module.attention_fwd_rows(zeros(1, 17, 8, 64), k, k, None, None, 17, 600) == 0
    given = {**dict(zip(names, problem, strict=True)), "out": zeros(1, 1, 8, 64),
             "lse": torch.zeros(1, 8, 1)}  # fmt: skip
    launch(module, {**given, "parts": torch.zeros(rows, columns)})
    refused = {
        rf"parts must have shape \({rows}, {columns}\), got \(7, 1\)": torch.zeros(7, 1),
        "parts must be float32, got float64": torch.zeros(rows, columns, dtype=torch.float64),
        "parts must be dense from a multiple of 16 bytes": torch.zeros(rows * columns + 1)[1:].view(
            rows, columns
        ),
    }
    for text, parts in refused.items():
        with pytest.raises(ValueError, match=text):
            launch(module, {**given, "parts": parts})


def test_address_sanitizer_is_silent():
    code = (
        "from functools import partial\nimport torch\nfrom ceg_kernels import OPS, native\n"
        "import test_cuda_decode as t\n"
        "sim.set_device(multiprocessors=100)\n"
        "run = partial(OPS['attention'].backend('cuda').run.func, launch=native.Cuda(sim))\n"
        "for d in (64, 72, 256):\n"
        "    for flag in t.flags(1):\n"
        "        rest = t.tail(0, 0, **t.flags(4)[flag])[4:]\n"
        "        run(*t.packed(d=d), *rest); print(*sim.launched())\n"
    )
    done = cuda_sim.run_under_asan(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [" ".join(SEVERAL)] * 12


# Index arithmetic.


def test_up_to_16_queries_however_many_heads_share_keys(module):
    for max_q, group in itertools.product((0, 1, 15, 16, 17, 2**29), (1, 8, 2**24)):
        assert module.is_decoding(max_q, group) == (max_q <= FEW)
    # Whose rows would not fit 32 bits.
    assert module.is_decoding(16, 2**25)
    assert not module.is_decoding(16, 2**25 + 1)


def test_the_tiles_read_keys_no_more_often_than_a_head_at_a_time(module):
    for max_q, group in itertools.product(range(1, FEW + 1), range(1, 70)):
        tiles, _, _ = module.split_of(max_q * group, 1, 1, 1)
        assert tiles <= group
        assert 16 * (tiles - 1) < max_q * group <= 16 * tiles


@pytest.mark.parametrize("multiprocessors", [1, 3, 40, 132])
def test_chunks_hold_all_keys_and_blocks_run_at_once(module, multiprocessors):
    for rows, heads, keys in itertools.product(
        (0, 1, 16, 17, 64), (0, 1, 8, 300, 2**26), (0, 1, 63, 256, 257, 999, 16384, 2**29)
    ):
        tiles, chunks, size = module.split_of(rows, heads, keys, multiprocessors)
        assert chunks >= 1
        assert size % 64 == 0
        assert size >= 256
        assert chunks * size >= keys
        assert (chunks - 1) * size < max(keys, 1)
        assert chunks == 1 or chunks * tiles * heads <= 2 * multiprocessors
        # As short as the least, or as many as there is room for but for rounding.
        wanted = max(1, 2 * multiprocessors // max(tiles * heads, 1))
        assert size == 256 or (size - 64) * wanted < keys


def test_each_tile_chunk_and_head_is_taken_once(module):
    for tiles, chunks, heads in itertools.product((1, 2, 5), (1, 3, 8), (1, 2, 7)):
        places = module.split_places(tiles, chunks, heads)
        everything = itertools.product(range(heads), range(chunks), range(tiles))
        assert places == [(t, c, h) for h, c, t in everything]


def test_each_key_from_the_first_that_is_seen_is_in_one_chunk(module):
    for chunks, size, first, n_k in itertools.product(
        (1, 2, 3, 5), (4, 7), (0, 1, 6, 20), (0, 1, 4, 7, 8, 20, 28, 40)
    ):
        ranges = module.split_keys(chunks, size, first, n_k)
        keys = [k for start, stop in ranges for k in range(start, stop)]
        assert keys == list(range(first, n_k))  # more than fit, too: the last takes them
        assert all(start == first + i * size for i, (start, _) in enumerate(ranges))


def test_no_sequence_sees_more_keys_than_the_chunks_are_made_for(module):
    for max_q, max_k, left in itertools.product((1, 2, 5), (0, 1, 4, 9), (0, 1, 3, 20, 2**29)):
        seen = [
            n_k - max(n_k - n_q - left, 0)
            for n_q in range(1, max_q + 1)
            for n_k in range(max_k + 1)
        ]
        assert max(seen) == module.most_seen(max_q, max_k, left)

"""Triton attention beyond the grid over OPS: both schedules of the backward (the grid has dQ in one
pass), tiles of every kind in one row of tiles (partly masked on the left, whole, partly masked on
the right, past the end), keys in chunks, bits that do not depend on strides or on what else is in
the batch, where NaN may go, extreme logits, refusals.

Left out, as in the formula itself: a NaN in v or dout, which 0 * NaN carries to rows that do not
see it.
"""

import math

import pytest
import torch
from numerics import compare

from ceg_kernels import OPS, flash_attention_varlen, triton, use_backend
from ceg_kernels.ops.attention import ATTENTION, ATTENTION_BACKWARD
from ceg_kernels.ops.attention_reference import reference

pytestmark = pytest.mark.skipif(triton.MISSING is not None, reason=str(triton.MISSING))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

forward = ATTENTION.backend("triton").run
backward = ATTENTION_BACKWARD.backend("triton").run


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def tail(tq, tk, *, slopes=None, sink=None, scale=0.2, causal=False, window=(-1, -1), softcap=0.0):
    return None, None, tq, tk, slopes, sink, scale, causal, *window, softcap


def forced(tiles):
    from ceg_kernels.triton import attention_config as config

    return config.forced({kernel: config.Tile(*tile) for kernel, tile in tiles.items()})


def saved(args, dtype=torch.float32):
    """What a forward leaves to its backward: out and lse."""
    q, k, v, *rest = args
    rest = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in rest]
    out, lse = reference(q.double(), k.double(), v.double(), *rest)
    return out.to(dtype), lse.float()


LONG = {
    "causal": (torch.float32, {"causal": True}),
    "full": (torch.float16, {}),
    "window": (torch.float32, {"window": (170, 140)}),
    "everything": (torch.bfloat16, {
        "slopes": normal(4).abs() * 0.02, "sink": normal(4, seed=1), "causal": True,
        "window": (200, -1), "softcap": 4.0,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_many_tiles_match_the_formula(name):
    dtype, flags = LONG[name]
    tq, tk = 400, 310
    q, dout = (normal(1, tq, 4, 40, dtype=dtype, seed=i) for i in (0, 1))
    k, v = (normal(1, tk, 2, 40, dtype=dtype, seed=i) for i in (2, 3))
    args = q, k, v, *tail(tq, tk, **flags)
    assert compare(ATTENTION, forward(*args), args) <= 1
    out, lse = saved(args, dtype)
    given = dout, normal(*lse.shape), q, k, v, out, lse, *args[3:]
    assert compare(ATTENTION_BACKWARD, backward(*given), given) <= 1
    with forced({"bwd": (0, 0, 0, 0)}):
        assert compare(ATTENTION_BACKWARD, backward(*given), given) <= 1


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_programs_of_several_tiles_change_no_bit(packed):
    """In the interpreter two programs of 8 tiles, of which one is not there; or more than tiles."""
    q, k, v = (normal(1, 70, 3, 16, seed=i) for i in range(3))
    args = q, k, v, *tail(70, 70, causal=True)
    if packed:  # most tiles are empty, and the first 20 queries have no key: nothing is added up
        cu_q, cu_k = ([0, 0, 20, 20, 70], [0, 10, 10, 30, 70])
        cu = (torch.tensor(c, dtype=torch.int32, device=DEVICE) for c in (cu_q, cu_k))
        args = q[0], k[0], v[0], *cu, 50, 40, *args[7:]
    with forced({"fwd": (16, 16, 4, 1, 0)}):
        one = forward(*args)
    assert compare(ATTENTION, one, args) <= 1
    for programs in (1, 30):
        with forced({"fwd": (16, 16, 4, 1, programs)}):
            several = forward(*args)
        assert all(torch.equal(a, b) for a, b in zip(several, one, strict=True))


@pytest.mark.skipif(DEVICE == "cuda", reason="looks into the interpreter")
def test_programs_share_out_a_causal_mask(monkeypatch):
    """Two programs, one after the other: the longest tiles first, and nobody has much more."""
    from ceg_kernels.triton import attention

    seen = []

    def spy(*args, run=attention.partners):
        seen.append(int(args[1]) + 1)  # keys, where query i sees i + 1
        return run(*args)

    monkeypatch.setattr(attention, "partners", spy)
    with forced({"fwd": (16, 64, 4, 1, 1)}):
        forward(*(normal(1, 110, 3, 16) for _ in range(3)), *tail(110, 110, causal=True))
    assert sorted(seen) == sorted([16, 32, 48, 64, 80, 96, 110] * 3)
    first, second = seen[:11], seen[11:]
    for turns in (first, second):
        assert turns == sorted(turns, reverse=True)
        assert turns[0] == 110
    assert abs(sum(first) - sum(second)) <= 16
    seen.clear()
    q, cu = normal(55, 1, 16), torch.tensor([0, 0, 15, 55], dtype=torch.int32)
    with forced({"fwd": (16, 64, 4, 1, 1)}):
        forward(q, q, q, cu, cu, 40, 40, *tail(40, 40, causal=True)[4:])
    assert sorted(seen) == [15, 16, 32, 40]  # nobody visits keys for tiles that are not there


@pytest.mark.skipif(DEVICE == "cuda", reason="looks into the interpreter")
def test_only_blocks_that_a_border_crosses_are_masked(monkeypatch):
    """Four tiles of 64 queries by four of keys under a causal mask: the diagonal."""
    from ceg_kernels.triton import attention, attention_backward_keys, attention_backward_queries

    blocks = {}

    def watch(module, name, first, masked):
        run = getattr(module, name)

        def spy(*args):
            start, stop = (int(args[i]) for i in (first, first + 1))
            kind = name, bool(args[masked])
            blocks[kind] = blocks.get(kind, 0) + len(range(start, stop, 64))
            return run(*args)

        monkeypatch.setattr(module, name, spy)

    watch(attention, "visit", 9, -1)
    watch(attention_backward_queries, "_visit_keys", 11, -1)
    watch(attention_backward_keys, "visit_queries", 13, -2)
    q = normal(1, 256, 1, 16)
    with forced({"fwd": (64, 64, 4, 1), "bwd": (0, 0, 0, 0)}):
        _both(q, q, q, q, *tail(256, 256, causal=True))
    visits = ("visit", "_visit_keys", "visit_queries")
    assert blocks == {(name, masked): 4 if masked else 6 for name in visits for masked in (0, 1)}


EVERYTHING = {
    "slopes": normal(6).abs() * 0.05, "sink": normal(6, seed=1), "causal": True, "softcap": 4.0,
}  # fmt: skip
FEW = {
    "full": (torch.float32, {}),
    "window": (torch.float32, {"window": (250, 2)}),
    "narrow window": (torch.float32, {"window": (20, 3)}),
    "everything": (torch.bfloat16, {**EVERYTHING, "window": (200, -1)}),
}


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_few_queries_over_chunks_of_keys(name, packed):
    """Heads of a group of 3 and 5 queries in a tile; 400 keys in 4 chunks of 128."""
    dtype, flags = FEW[name]
    q, k, v = normal(1, 5, 6, 40), normal(1, 400, 2, 40), normal(1, 400, 2, 24)
    args = *(t.to(dtype) for t in (q, k, v)), *tail(5, 400, **flags)
    if packed:  # the first sequence ends in the second chunk, the second has no key, the third all
        cu_q, cu_k = ([0, 2, 3, 5, 5], [0, 150, 150, 400, 400])
        cu = (torch.tensor(c, dtype=torch.int32, device=DEVICE) for c in (cu_q, cu_k))
        args = *(t[0] for t in args[:3]), *cu, 2, 250, *args[7:]
    with forced({"decode": (16, 32, 4, 1, 64)}):
        assert compare(ATTENTION, forward(*args), args) <= 1


def test_the_chunks_follow_from_the_shape_and_the_table():
    from ceg_kernels.triton.attention_config import Tile
    from ceg_kernels.triton.attention_decode import chunks_of
    from ceg_kernels.triton.attention_problem import case, problem_of

    def chunks(batch, keys, queries=1, **flags):
        args = case(batch, keys, 8, 8, 64, queries=queries, **flags)
        return chunks_of(Tile(16, 64, 4, 2, 264), problem_of(*args[:9], *args[10:]), 8)

    assert chunks(1, 4096) == (16, 256)  # no chunk has fewer than 4 blocks
    assert chunks(1, 16384) == (32, 512)  # of 33 wanted: chunks are whole blocks
    assert chunks(64, 4096) == (1, 4096)
    assert chunks(1, 16384, left=4096) == (17, 256)  # those of the window, wherever it begins
    assert chunks(1, 0) == (1, 256)
    assert chunks(0, 4096)[0] > 0


SLICED = {  # dtype, head_dim, that of v, slice, flags
    "D160 causal": (torch.float32, 160, 160, 32, {"causal": True}),
    "D192 window": (torch.float32, 192, 40, 64, {"window": (20, 9)}),
    "D256 full": (torch.float32, 256, 256, 128, {}),
    "D130, v wider": (torch.float32, 130, 250, 64, {"causal": True}),
    "D256 half": (torch.bfloat16, 256, 200, 128, {"window": (20, -1)}),
    "D250 packed, everything": (torch.float32, 250, 256, 64, {
        "slopes": normal(2).abs() * 0.02, "sink": normal(2, seed=1), "causal": True,
        "window": (30, -1), "softcap": 4.0,
    }),
}  # fmt: skip


@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "two passes"])
@pytest.mark.parametrize("name", SLICED)
def test_head_dims_in_slices(name, one_pass):
    """Columns past head_dim in the last slice; v with other slices than k."""
    dtype, d, dv, slice_, flags = SLICED[name]
    q, k, v = normal(1, 40, 2, d), normal(1, 50, 1, d, seed=1), normal(1, 50, 1, dv, seed=2)
    args = *(t.to(dtype) for t in (q, k, v)), *tail(40, 50, scale=d**-0.5, **flags)
    if "packed" in name:  # a sequence without queries, one without keys
        cu_q, cu_k = ([0, 0, 27, 30, 40], [0, 5, 40, 40, 50])
        cu = (torch.tensor(c, dtype=torch.int32, device=DEVICE) for c in (cu_q, cu_k))
        args = *(t[0] for t in args[:3]), *cu, 27, 35, *args[7:]
    out, lse = saved(args, dtype)
    given = normal(*out.shape, seed=3).to(dtype), normal(*lse.shape), *args[:3], out, lse, *args[3:]
    tiles = {"bwd": (16, 32, 4, 1, 2), "bwd_dkdv": (16, 32, 4, 1, 0), "bwd_dq": (32, 16, 4, 1, 0)}
    sliced = {kernel: (*tile, slice_) for kernel, tile in tiles.items()}
    with forced(sliced if one_pass else sliced | {"bwd": (0, 0, 0, 0)}):
        assert compare(ATTENTION_BACKWARD, backward(*given), given) <= 1


@pytest.mark.parametrize("window", [(20, 9), (-1, 9), (20, -1)])
def test_one_pass_over_keys_far_apart(window):
    """Programs have blocks of keys between which lie queries that see none of them."""
    q, k, v, dout = (normal(1, 330, 1, 16, seed=i) for i in range(4))
    args = q, k, v, *tail(330, 330, window=window)
    given = dout, None, q, k, v, *saved(args), *args[3:]
    with forced({"bwd": (32, 32, 4, 1, 3)}):
        assert compare(ATTENTION_BACKWARD, backward(*given), given) <= 1


CANCELLING = {"two passes": (0, 0, 0, 0), "one": (64, 64, 4, 1, 2), "sliced": (64, 64, 4, 1, 2, 16)}


@pytest.mark.parametrize("bwd", CANCELLING.values(), ids=CANCELLING)
def test_what_keys_have_in_common_cancels_in_dq(bwd):
    # dS sums to 0 over the keys, rounded dS does not: the difference comes back times 50.
    q, k, v, dout = (normal(1, 150, 1, 32, dtype=torch.bfloat16, seed=i) for i in range(4))
    k[..., 0] = 50
    args = q, k, v, *tail(150, 150)
    given = dout, None, q, k, v, *saved(args, torch.bfloat16), *args[3:]
    with forced({"bwd": bwd}):
        assert compare(ATTENTION_BACKWARD, backward(*given), given) <= 1


def test_keys_past_the_end_leave_nothing_in_dq():
    # Logits of -200: the weights of keys that are not there would be exp(200).
    q, k, v, dout = (normal(1, 70, 1, 16, seed=i) for i in range(4))
    q[..., 0], k[..., 0] = 10, -20
    args = q, k, v, *tail(70, 70, scale=1.0)
    given = dout, None, q, k, v, *saved(args), *args[3:]
    assert compare(ATTENTION_BACKWARD, backward(*given), given) <= 1


def test_the_splits_follow_from_the_shape_and_the_table():
    from ceg_kernels.triton.attention_backward import MOST_BYTES, splits_of
    from ceg_kernels.triton.attention_config import UNUSED, Tile
    from ceg_kernels.triton.attention_problem import case, problem_of

    def splits(tile, *sizes, **flags):
        args = case(*sizes, **flags)
        return splits_of(tile, problem_of(*args[:9], *args[10:]), args[0])

    tile = Tile(64, 128, 8, 2, 132)
    assert splits(tile, 4, 1024, 12, 12, 64) == 3
    assert splits(tile, 4, 1024, 24, 12, 64) == 3  # of the heads those of the keys count
    assert splits(tile, 1, 300, 2, 2, 64) == 3  # no more than blocks of keys
    assert splits(tile, 4, 1024, 12, 12, 64, packed=True) == 3
    assert splits(UNUSED, 4, 1024, 12, 12, 64) == 0
    one = 4 * 4096 * 16 * 128  # of a split
    assert MOST_BYTES // one == 16
    assert splits(tile, 1, 4096, 16, 4, 128) == 16  # of 33 wanted
    assert splits(tile, 1, 4096, 16, 16, 128) == 9
    assert splits(tile, 1, 8192, 16, 4, 128) == 0  # 8 are less than half of 33


def _both(dout, *args):
    out, lse = forward(*args)
    return out, lse, *backward(dout, None, *args[:3], out, lse, *args[3:])


def test_strides_change_no_bit():
    packed = normal(2, 150, 3, 2, 40)
    q, k, v = packed.unbind(2)
    rest, dout = tail(150, 150, causal=True), normal(2, 150, 2, 40, seed=1)
    first = _both(dout, *(t.contiguous() for t in (q, k, v)), *rest)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    for views in ((q, k, v), turned):
        for ours, other in zip(_both(dout, *views, *rest), first, strict=True):
            assert torch.equal(ours, other)


@pytest.mark.parametrize("bwd", [(0, 0, 0, 0), (64, 64, 4, 1, 1)], ids=["two passes", "one"])
def test_other_sequences_change_no_bit(bwd):
    """Sequences packed behind each other against each alone: nothing is read across the border.

    One split, where more would depend on the number of sequences.
    """
    lengths = [70, 40, 0, 133]  # none so short that its tile is another
    cu = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    q, dout, v = (normal(243, 2, 24, seed=i) for i in range(3))
    k = normal(243, 2, 24, seed=3)
    flags = None, None, 0.2, True, -1, -1, 0.0
    with forced({"bwd": bwd}):
        out, lse, dq, dk, dv, _ = _both(dout, q, k, v, cu, cu, 133, 133, *flags)
    first = 0
    for length in lengths:
        own = slice(first, first + length)
        given = (t[own][None] for t in (dout, q, k, v))
        with forced({"bwd": bwd}):
            alone = _both(*given, None, None, length, length, *flags)
        for packed, one in zip((out, dq, dk, dv), (alone[0], *alone[2:5]), strict=True):
            assert torch.equal(packed[own], one[0])
        assert torch.equal(lse[:, own], alone[1][0])
        first += length


# Of three tiles, an interpreter's program takes the second and then the first: the NaN stays there.
@pytest.mark.parametrize(("bad", "at"), [(math.nan, 100), (math.inf, 0), (-math.inf, 149)])
def test_bad_values_stay_with_who_sees_them(bad, at):
    t = 150
    q, k, v, dout = (normal(1, t, 1, 24, seed=i) for i in range(4))
    rest = tail(t, t, causal=True)
    clean, clean_lse, clean_dq, *_ = _both(dout, q, k, v, *rest)
    others = [i for i in range(t) if i != at]
    spoiled = q.clone()
    spoiled[0, at, 0, 3] = bad
    out, lse, dq, *_ = _both(dout, spoiled, k, v, *rest)
    if math.isnan(bad):
        assert out[0, at].isnan().all()
    assert torch.equal(out[0, others], clean[0, others])
    assert torch.equal(lse[..., others], clean_lse[..., others])
    assert torch.equal(dq[0, others], clean_dq[0, others])
    spoiled = k.clone()
    spoiled[0, at, 0, 3] = bad
    out, lse = forward(q, spoiled, v, *rest)
    assert torch.equal(out[0, :at], clean[0, :at])
    assert torch.equal(lse[..., :at], clean_lse[..., :at])
    if math.isnan(bad):
        assert out[0, at:].isnan().all()


def test_a_head_of_one_element_need_not_be_dense():
    # Its last stride means nothing to torch, and everything to a descriptor.
    q, k, v = (normal(1, 37, 2, 8, seed=i).bfloat16()[..., ::8] for i in range(3))
    assert q.stride(-1) == 8
    args = q, k, v, *tail(37, 37, causal=True)
    assert compare(ATTENTION, forward(*args), args) <= 1


def test_rows_that_see_nothing():
    # Tq > Tk under a causal mask: the first 60 queries are blind.
    q, dout = normal(1, 200, 2, 16), normal(1, 200, 2, 16, seed=1)
    k, v = normal(1, 140, 2, 16), normal(1, 140, 2, 16, seed=2)
    sink = torch.tensor([0.5, -math.inf], device=DEVICE)
    for given, lse_there in ((None, [-math.inf] * 2), (sink, sink.tolist())):
        rest = tail(200, 140, causal=True, sink=given)
        out, lse, dq, dk, dv, _ = _both(dout, q, k, v, *rest)
        assert (out[:, :60] == 0).all()
        assert (dq[:, :60] == 0).all()
        for head in range(2):
            assert (lse[0, head, :60] == lse_there[head]).all()
        assert all(t.isfinite().all() for t in (out[:, 60:], dq, dk, dv))


@pytest.mark.parametrize("size", [30.0, 3e4], ids=["thousands", "beyond fp16"])
@pytest.mark.parametrize("slopes", [None, torch.ones(1, device=DEVICE)], ids=["plain", "alibi"])
def test_huge_logits(size, slopes):
    q, v = normal(1, 150, 1, 32) * size, normal(1, 150, 1, 32)
    args = q, q / size, v, *tail(150, 150, causal=True, slopes=slopes)
    assert compare(ATTENTION, forward(*args), args) <= 1


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_negative_and_zero_scale(scale):
    args = *(normal(1, 140, 1, 24, seed=i) for i in range(3)), *tail(140, 140, scale=scale)
    assert compare(ATTENTION, forward(*args), args) <= 1


def test_small_logits_under_a_softcap_keep_their_digits():
    # tanh near 0: a cap of 50 would magnify what 1 - 2 / (exp + 1) loses there.
    args = *(normal(1, 64, 1, 24, seed=i) for i in range(3)), *tail(64, 64, softcap=50.0)
    assert compare(ATTENTION, forward(*args), args) <= 1


@pytest.mark.parametrize("d", [1, 31, 250])
def test_head_dims_that_fill_no_tile(d):
    q, k, v, dout = (normal(1, 37, 2, d, dtype=torch.bfloat16, seed=i) for i in range(4))
    args = q, k, v, *tail(37, 37, causal=True)
    assert compare(ATTENTION, forward(*args), args) <= 1
    given = dout, None, q, k, v, *saved(args, torch.bfloat16), *args[3:]
    assert compare(ATTENTION_BACKWARD, backward(*given), given) <= 1


@pytest.mark.parametrize("op", ["attention", "attention_backward"])
def test_refusals_say_why(op):
    q = torch.zeros(1, 2, 1, 264, device=DEVICE)
    cases = [(q, "needs head_dim <= 256, got 264"), (q[..., :8].double(), "got float64")]
    for bad, match in cases:
        args = bad, bad, bad, *tail(2, 2)
        if op == "attention_backward":
            args = bad, None, *args[:3], bad, torch.zeros(1, 1, 2, device=DEVICE), *args[3:]
        with use_backend("triton"), pytest.raises(RuntimeError, match=f"refuses: .*{match}"):
            OPS[op].choose(*args)


def test_too_many_rows_are_refused():
    q = torch.zeros(16, device=DEVICE).expand(1, 2**30, 1, 16)
    for given in ((q, q[:, :1], q[:, :1]), (q[:, :1], q, q)):
        name = "q" if given[0] is q else "k"
        with pytest.raises(ValueError, match=rf"{name} must have fewer than 2\^30 rows, got 1073"):
            forward(*given, *tail(given[0].shape[1], given[1].shape[1]))


@pytest.mark.skipif(DEVICE == "cuda", reason="looking at them would wait for the GPU")
@pytest.mark.parametrize(
    ("cu", "longest", "match"),
    [
        ([0, 4, 2, 5], 4, "cu_seqlens_q must rise from 0 to 5 without falling"),
        ([0, 4, 5, 6], 4, "cu_seqlens_q must rise from 0 to 5 without falling"),
        ([0, 1, 1, 5], 3, "cu_seqlens_q must hold sequences of at most max_seqlen 3, got 4"),
    ],
)
def test_wrong_cu_seqlens_are_seen(cu, longest, match):
    q = torch.zeros(5, 1, 16)
    cu = torch.tensor(cu, dtype=torch.int32)
    with use_backend("triton"), pytest.raises(ValueError, match=match):
        flash_attention_varlen(q, q, q, cu, cu, longest, longest)

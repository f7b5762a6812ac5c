"""The attention kernels of each ISA level beyond the grid over OPS: several blocks of keys and
queries, bits that do not depend on the threads, where NaN and infinity may go, extreme logits."""

import math

import pytest
import torch

from ceg_kernels.measure.accuracy import compare
from ceg_kernels.ops.attention import ATTENTION, ATTENTION_BACKWARD
from ceg_kernels.ops.attention_reference import reference

_C = pytest.importorskip("ceg_kernels._C", reason="the native module is not built")

LEVELS = _C.isa_levels()["available"]
pytestmark = pytest.mark.parametrize("isa", LEVELS)


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def tail(tq, tk, *, slopes=None, sink=None, scale=0.2, causal=False, window=(-1, -1), softcap=0.0):
    return None, None, tq, tk, slopes, sink, scale, causal, *window, softcap


def forward(isa, q, k, v, rest, threads=2):
    cu_q, cu_k, max_q, max_k, slopes, sink, *flags = rest
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1])
    _C.attention_fwd(
        q, k, v, cu_q, cu_k, max_q, max_k, slopes, sink, out, lse, *flags, threads, isa
    )
    return out, lse


def backward(isa, dout, dlse, q, k, v, out, lse, rest, threads=2):
    cu_q, cu_k, max_q, max_k, slopes, sink, *flags = rest
    grads = [torch.empty_like(t) for t in (q, k, v)]
    dsink = None if sink is None else torch.empty_like(sink)
    _C.attention_bwd(
        dout, dlse, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, slopes, sink, *grads, dsink,
        *flags, threads, isa,
    )  # fmt: skip
    return *grads, lse.new_zeros(0) if dsink is None else dsink


# Sizes that need several blocks of keys (128), of queries (96) and more than one task.
# Left out: dtypes that share the fp32 engine with others (fp16), every product of flags.
LONG = {
    "causal": {"causal": True},
    "full": {},
    "window": {"window": (90, 20)},
    "everything": {
        "slopes": normal(4).abs() * 0.02, "sink": normal(4, seed=1), "causal": True,
        "window": (200, -1), "softcap": 4.0,
    },
}  # fmt: skip


def long_inputs(dtype, flags, tq=400, tk=310, heads=4, kv_heads=2, d=40):
    q, dout = (normal(1, tq, heads, d, dtype=dtype, seed=i) for i in (0, 1))
    k, v = (normal(1, tk, kv_heads, d, dtype=dtype, seed=i) for i in (2, 3))
    return dout, q, k, v, tail(tq, tk, **flags)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("flags", LONG.values(), ids=LONG)
def test_many_blocks_match_the_reference(isa, flags, dtype):
    dout, q, k, v, rest = long_inputs(dtype, flags)
    assert compare(ATTENTION, forward(isa, q, k, v, rest), (q, k, v, *rest)) <= 1
    out, lse = reference(*(t.double() for t in (q, k, v)), *rest)
    args = dout, normal(*lse.shape), q, k, v, out.to(dtype), lse.float()
    grads = backward(isa, *args, rest)
    assert compare(ATTENTION_BACKWARD, grads, (*args, *rest)) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("flags", LONG.values(), ids=LONG)
def test_bits_do_not_depend_on_the_threads(isa, flags, dtype):
    # One thread takes whole heads and adds up dQ on the way; three for two kv heads would idle,
    # so that they go over the keys and the queries separately.
    dout, q, k, v, rest = long_inputs(dtype, flags)
    runs = []
    for threads in (1, 2, 3, 7):
        out, lse = forward(isa, q, k, v, rest, threads)
        runs.append((out, lse, *backward(isa, dout, None, q, k, v, out, lse, rest, threads)))
    for run in runs[1:]:
        for ours, first in zip(run, runs[0], strict=True):
            assert torch.equal(ours, first)


# Few queries against many keys: the keys are cut into chunks, whose partial results are merged.
# A window begins inside a block and leaves keys without a query.
DECODE = {
    "one query": (1, 5000, {"causal": True}),
    "three queries": (3, 5000, {"causal": True}),
    "window": (3, 5000, {"causal": True, "window": (1900, -1)}),
    "sink": (1, 5000, {"sink": normal(4, seed=1)}),
    "everything": (3, 5000, {
        "slopes": normal(4).abs() * 0.001, "sink": normal(4, seed=1), "causal": True,
        "window": (4000, -1), "softcap": 4.0,
    }),
    "D80": (2, 1300, {"causal": True}),
    "24 rows": (12, 1100, {"causal": True, "window": (600, -1)}),
}  # fmt: skip


def decode_inputs(name, dtype):
    tq, tk, flags = DECODE[name]
    d = 80 if name == "D80" else 64
    q = normal(1, tq, 4, d, dtype=dtype)
    k, v = (normal(1, tk, 2, d, dtype=dtype, seed=i) for i in (1, 2))
    return q, k, v, tail(tq, tk, **flags)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", DECODE)
def test_decoding_matches_the_reference_with_any_number_of_threads(isa, name, dtype):
    q, k, v, rest = decode_inputs(name, dtype)
    first = forward(isa, q, k, v, rest, threads=1)
    assert compare(ATTENTION, first, (q, k, v, *rest)) <= 1
    for threads in (2, 3):
        for ours, other in zip(forward(isa, q, k, v, rest, threads), first, strict=True):
            assert torch.equal(ours, other)


@pytest.mark.parametrize("causal", [False, True])
def test_decoding_of_sequences_of_all_lengths(isa, causal):
    # No query, no key, more queries than keys, one chunk, several.
    lengths_q, lengths_k = [1, 0, 3, 4, 2, 1], [1500, 700, 0, 2, 300, 2000]
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    q, k, v = normal(11, 4, 32), normal(4502, 2, 32, seed=1), normal(4502, 2, 32, seed=2)
    flags = None, None, 0.2, causal, -1, -1, 0.0
    args = q, k, v, cu_q, cu_k, 4, 2000, *flags
    runs = []
    for threads in (1, 3):
        out, lse = torch.empty(11, 4, 32), torch.empty(4, 11)
        _C.attention_fwd(*args[:9], out, lse, *args[9:], threads, isa)
        runs.append((out, lse))
    assert compare(ATTENTION, runs[0], args) <= 1
    for ours, other in zip(*runs, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_decoding_keeps_bad_values_with_who_sees_them(isa, bad):
    q, k, v, rest = decode_inputs("three queries", torch.float32)
    clean, lse = forward(isa, q, k, v, rest)
    for name, at in (("v", 4998), ("k", 4998), ("v", 700), ("k", 700)):
        args = {"k": k.clone(), "v": v.clone()}
        args[name][0, at, 0, 3] = bad
        out, lse_bad = forward(isa, q, args["k"], args["v"], rest)
        blind = 1 if at > 4997 else 0  # the first query sees keys up to 4997
        assert torch.equal(out[:, :blind], clean[:, :blind])
        assert torch.equal(out[:, :, 2:], clean[:, :, 2:])  # the other kv head
        assert torch.equal(lse_bad[:, :, :blind], lse[:, :, :blind])
        if name == "v":
            assert not out[0, blind:, :2, 3].isfinite().any()
            others = [d for d in range(64) if d != 3]
            assert torch.equal(out[..., others], clean[..., others])
        elif math.isnan(bad):
            assert out[0, blind:, :2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_halves_of_16_bit_dq_in_either_schedule(isa, dtype):
    # One pass keeps the lower halves of all queries' sums, two passes those of a task.
    dout, q, k, v, rest = long_inputs(dtype, {"causal": True}, tq=140, tk=140, heads=2)
    out, lse = forward(isa, q, k, v, rest)
    one, two = (backward(isa, dout, None, q, k, v, out, lse, rest, n) for n in (1, 5))
    for ours, other in zip(one, two, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("threads", [1, 5])
def test_sums_of_dq_touch_nothing_beside_their_rows(isa, dtype, threads):
    # The output holds the sums on the way, so rows that fill no vector must not spill over.
    dout, q, k, v, rest = long_inputs(dtype, {"causal": True}, tq=140, tk=140, heads=2, d=41)
    out, lse = forward(isa, q, k, v, rest)
    dense, *_ = backward(isa, dout, None, q, k, v, out, lse, rest, threads)
    packed = torch.full((1, 140, 2, 43), 7.0, dtype=dtype)
    _, _, max_q, max_k, slopes, sink, *flags = rest
    grads = packed[..., 1:42], torch.empty_like(k), torch.empty_like(v)
    _C.attention_bwd(
        dout, None, q, k, v, out, lse, None, None, max_q, max_k, slopes, sink, *grads, None,
        *flags, threads, isa,
    )  # fmt: skip
    assert torch.equal(packed[..., 1:42], dense)
    assert (packed[..., [0, 42]] == 7).all()


SPOTS = [(math.nan, 131), (math.inf, 131), (math.nan, 0), (-math.inf, 199)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("bad", "at"), SPOTS)
def test_bad_values_stay_with_who_sees_them(isa, bad, at, dtype):
    t = 200
    rest = tail(t, t, causal=True)
    dout, q, k, v = (normal(1, t, 1, 24, dtype=dtype, seed=i) for i in range(4))
    clean, lse = forward(isa, q, k, v, rest)

    # A query: its own row only. Its gradients reach the keys it sees.
    spoiled = q.clone()
    spoiled[0, at, 0, 3] = bad
    out, _ = forward(isa, spoiled, k, v, rest)
    others = [i for i in range(t) if i != at]
    assert torch.equal(out[0, others], clean[0, others])
    if math.isnan(bad):
        assert out[0, at].isnan().all()
    spoiled = dout.clone()
    spoiled[0, at, 0, 3] = bad
    dq, dk, dv, _ = backward(isa, spoiled, None, q, k, v, clean, lse, rest)
    assert dq[0, others].isfinite().all()
    assert dk[0, at + 1 :].isfinite().all()
    assert dv[0, at + 1 :].isfinite().all()
    assert not dv[0, : at + 1, 0, 3].isfinite().any()

    # A value or a key: no row before it.
    for name in "vk":
        args = {"k": k.clone(), "v": v.clone()}
        args[name][0, at, 0, 3] = bad
        out, lse_bad = forward(isa, q, args["k"], args["v"], rest)
        assert torch.equal(lse_bad[..., :at], lse[..., :at])
        torch.testing.assert_close(out[0, :at], clean[0, :at], rtol=2e-2, atol=2e-2)
        dq, _, _, _ = backward(isa, dout, None, q, args["k"], args["v"], clean, lse, rest)
        assert dq[0, :at].isfinite().all()
        if name == "v":
            assert not out[0, at:, 0, 3].isfinite().any()
        elif math.isnan(bad):
            assert out[0, at:].isnan().all()


def test_rows_that_see_nothing(isa):
    # Tq > Tk under a causal mask: the first 60 queries are blind.
    q, dout = normal(1, 200, 2, 16), normal(1, 200, 2, 16, seed=1)
    k, v = normal(1, 140, 2, 16), normal(1, 140, 2, 16, seed=2)
    sink = torch.tensor([0.5, -math.inf])
    for given, lse_there in ((None, [-math.inf] * 2), (sink, sink.tolist())):
        rest = tail(200, 140, causal=True, sink=given)
        out, lse = forward(isa, q, k, v, rest)
        dq, dk, dv, _ = backward(isa, dout, None, q, k, v, out, lse, rest)
        assert (out[:, :60] == 0).all()
        assert (dq[:, :60] == 0).all()
        assert (lse[0, 0, :60] == lse_there[0]).all()
        assert (lse[0, 1, :60] == lse_there[1]).all()
        assert all(t.isfinite().all() for t in (out[:, 60:], dq, dk, dv))


@pytest.mark.parametrize("size", [30.0, 3e4], ids=["thousands", "beyond fp16"])
def test_huge_logits(isa, size):
    q, v = normal(1, 150, 1, 32) * size, normal(1, 150, 1, 32)
    rest = tail(150, 150, causal=True)
    assert compare(ATTENTION, forward(isa, q, q / size, v, rest), (q, q / size, v, *rest)) <= 1


def test_negative_and_zero_scale(isa):
    q, k, v = (normal(1, 140, 1, 24, seed=i) for i in range(3))
    for scale in (-0.3, 0.0):
        rest = tail(140, 140, scale=scale)
        assert compare(ATTENTION, forward(isa, q, k, v, rest), (q, k, v, *rest)) <= 1


def test_denormals_cost_nothing_and_are_left_alone(isa):
    # The kernels treat denormals as zero on their own threads only.
    tiny = torch.full((1, 64, 1, 16), 1e-40)
    rest = tail(64, 64)
    out, lse = forward(isa, tiny, tiny, tiny, rest, threads=1)
    assert out.abs().max() <= 1e-38
    assert torch.allclose(lse, torch.full_like(lse, math.log(64)))
    assert (torch.full((4,), 1e-40) * 0.5 > 0).all()


def test_fp16_denormals_are_read(isa):
    # Values below 6e-5 are denormal in fp16, not in the fp32 they become.
    k = normal(1, 40, 1, 32, dtype=torch.float16)
    v = k * 1e-5
    rest = tail(40, 40)
    assert v.abs().max() > 1e-5
    assert compare(ATTENTION, forward(isa, k, k, v, rest), (k, k, v, *rest)) <= 1


def test_inputs_of_a_larger_tensor(isa):
    # Views of a packed (B, T, 3, H, D) and of a (B, H, T, D) tensor are read in place.
    packed = normal(2, 150, 3, 4, 32)
    q, k, v = packed.unbind(2)
    rest = tail(150, 150, causal=True)
    dense = [t.contiguous() for t in (q, k, v)]
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    first, lse = forward(isa, *dense, rest)
    for views in ((q, k, v), turned):
        assert torch.equal(forward(isa, *views, rest)[0], first)
        ours = backward(isa, first, None, *views, first, lse, rest)
        for mine, other in zip(
            ours, backward(isa, first, None, *dense, first, lse, rest), strict=True
        ):
            assert torch.equal(mine, other)


def test_torch_matmuls_around_it_keep_their_bits(isa):
    # Level amx configures the thread's tile registers, which torch's bf16 matmuls use as well.
    a, q = normal(96, 96, dtype=torch.bfloat16), normal(1, 70, 2, 40, dtype=torch.bfloat16)
    before = a @ a
    out, _ = forward(isa, q, q, q, tail(70, 70), threads=1)
    assert torch.equal(a @ a, before)
    assert torch.equal(forward(isa, q, q, q, tail(70, 70), threads=1)[0], out)


@pytest.mark.parametrize("d", [1, 31, 33, 250])
def test_head_dims_that_fill_no_tile(isa, d):
    q, k, v, dout = (normal(1, 37, 2, d, dtype=torch.bfloat16, seed=i) for i in range(4))
    rest = tail(37, 37, causal=True)
    out, lse = forward(isa, q, k, v, rest)
    assert compare(ATTENTION, (out, lse), (q, k, v, *rest)) <= 1
    args = dout, None, q, k, v, out, lse
    assert compare(ATTENTION_BACKWARD, backward(isa, *args, rest), (*args, *rest)) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_executed_flops_are_those_of_the_schedule(isa, dtype):
    """A full mask in whole blocks executes what the maths asks for, and the scores again."""

    def ratios(heads, tokens, d, causal=False):
        q, k, v, dout = (normal(1, tokens, heads, d, dtype=dtype, seed=s) for s in range(4))
        rest = tail(tokens, tokens, causal=causal)
        out, lse = ATTENTION.backend(f"cpu:{isa}").run(q, k, v, *rest)
        for op, args in (
            (ATTENTION, (q, k, v)),
            (ATTENTION_BACKWARD, (dout, None, q, k, v, out, lse)),
        ):
            executed = op.backend(f"cpu:{isa}").executed_flops(*args, *rest)
            yield executed / op.cost(*args, *rest).flops

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert list(ratios(4, 256, 64)) == [1, 10 / 8]  # one pass, in which each head has a thread
        assert list(ratios(1, 256, 64)) == [1, 14 / 8]  # two passes
        assert all(1 < r < 2.2 for r in ratios(4, 512, 64, True))  # parts of masked blocks
        assert all(r > 1 for r in ratios(4, 256, 37))  # padding
    finally:
        torch.set_num_threads(threads)

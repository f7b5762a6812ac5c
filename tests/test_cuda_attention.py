"""CUDA attention without a GPU: the op's samples in the simulator, many tiles, NaN, refusals, and
the index arithmetic for every argument.

Left out: fp32 and head_dims that are no multiple of 8 (both refused), and anything about speed.
"""

import itertools
from functools import partial

import cuda_sim
import pytest
import torch
from numerics import as_tuple, compare

from ceg_kernels import OPS
from ceg_kernels.ops import attention
from ceg_kernels.ops.attention_reference import reference

pytestmark = cuda_sim.needed

DTYPES = (torch.bfloat16, torch.float16)
BOTH = ("attention", "attention_backward")
TILES = (64, 128, 256)  # head_dims


def fits(sample):
    q = next(a for a in sample.args if isinstance(a, torch.Tensor))
    return q.shape[-1] % 8 == 0


def bits(t):
    return t.view({2: torch.int16, 4: torch.int32}[t.dtype.itemsize])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", BOTH)
def test_accuracy_and_the_same_bits_in_any_order_of_threads(sim, module, op, dtype):
    ran = 0
    for sample in filter(fits, OPS[op].samples(dtype, "cpu")):
        ran += 1
        outs = as_tuple(sim(op).run(*sample.args))
        worst = compare(OPS[op], outs, sample.args)
        assert worst <= 1, f"{sample.name}: error is {worst:.2f} times what the rule allows"
        module.set_device(order="reverse")
        for a, b in zip(outs, as_tuple(sim(op).run(*sample.args)), strict=True):
            assert torch.equal(bits(a), bits(b)), f"{sample.name}: depends on the order of threads"
        module.set_device()
    assert ran > 30


def normal(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def tail(tq, tk, *, slopes=None, sink=None, scale=0.1, causal=False, window=(-1, -1), softcap=0.0):
    return None, None, tq, tk, slopes, sink, scale, causal, *window, softcap


# Tiles with blocks that are masked on the left, not at all, on the right, and past the end.
FLAGS = {
    "causal": {"causal": True},
    "window": {"window": (150, 60)},
    "everything": {
        "slopes": normal(2, dtype=torch.float32).abs() * 0.02,
        "sink": normal(2, dtype=torch.float32, seed=1), "causal": True, "window": (170, -1),
        "softcap": 4.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("d", TILES)
def test_many_tiles(sim, d, flags):
    tq, tk = 300, 370
    q, dout = (normal(1, tq, 2, d, seed=i) for i in (0, 1))
    k, v = (normal(1, tk, 1, d, seed=i) for i in (2, 3))
    args = (q, k, v, *tail(tq, tk, scale=d**-0.5, **FLAGS[flags]))
    out, lse = sim("attention").run(*args)
    assert compare(OPS["attention"], (out, lse), args) <= 1
    backward = (dout, None, q, k, v, out, lse, *args[3:])
    grads = sim("attention_backward").run(*backward)
    assert compare(OPS["attention_backward"], as_tuple(grads), backward) <= 1


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_a_scale_that_does_not_keep_the_order_of_scores(sim, scale):
    qkv = (normal(1, 70, 2, 64, seed=i) for i in range(3))
    args = (*qkv, None, None, 70, 70, None, None, scale, True, -1, -1, 0.0)
    assert compare(OPS["attention"], as_tuple(sim("attention").run(*args)), args) <= 1


def test_nan_goes_where_it_is_seen_and_nowhere_else(sim):
    q, k, v, dout = (normal(1, 200, 1, 64, seed=i) for i in range(4))
    q[:, 150] = torch.nan
    k[:, 190] = torch.nan
    args = (q, k, v, *tail(200, 200, causal=True))
    out, lse = sim("attention").run(*args)
    wrong = torch.zeros(200, dtype=torch.bool)
    wrong[150], wrong[190:] = True, True
    assert torch.equal(lse[0, 0].isnan(), wrong)
    assert torch.equal(out[0, :, 0].isnan().any(-1), wrong)
    dq, dk, dv, _ = sim("attention_backward").run(dout, None, q, k, v, out, lse, *args[3:])
    assert dq[0, :150].isfinite().all()
    assert dq[0, 150].isnan().all()
    assert dk[0, 191:].isnan().all()  # of query 191, which sees key 190
    assert dv[0, 191:].isnan().all()


def test_strangers_behind_a_tensor_or_a_sequence_are_not_read(sim):
    """NaN beyond the last row, beyond head_dim, and in the other sequences of a packed batch."""
    room = torch.full((3, 100, 4, 80), torch.nan, dtype=torch.bfloat16)
    q, k, v = (room[i, :77, 1:3, :40] for i in range(3))
    for i, t in enumerate((q, k, v)):
        t.copy_(normal(77, 2, 40, seed=i))
    dense = (q[None], k[None], v[None], *tail(77, 77, causal=True))
    expected = sim("attention").run(*(t.clone() for t in dense[:3]), *dense[3:])
    assert expected[0].isfinite().all()
    for a, b in zip(sim("attention").run(*dense), expected, strict=True):
        assert torch.equal(a, b)

    cu = torch.tensor([0, 20, 97, 100], dtype=torch.int32)
    packed = [torch.full((100, 2, 40), torch.nan, dtype=torch.bfloat16) for _ in range(4)]
    dout = normal(77, 2, 40, seed=3)
    for t, own in zip(packed, (q, k, v, dout), strict=True):
        t[20:97] = own
    rest = (cu, cu, 77, 77, *dense[5 + 2 :])
    out, lse = sim("attention").run(*packed[:3], *rest)
    assert torch.equal(out[20:97], expected[0][0])
    assert torch.equal(lse[:, 20:97], expected[1][0])
    grads = sim("attention_backward").run(packed[3], None, *packed[:3], out, lse, *rest)
    alone = sim("attention_backward").run(dout[None], None, *dense[:3], *expected, *dense[3:])
    for a, b in zip(grads[:3], alone[:3], strict=True):
        assert torch.equal(a[20:97], b[0])


def test_the_backward_of_a_head_does_not_depend_on_its_neighbours(sim):
    q, k, v, dout = (normal(2, 90, 4, 32, seed=i) for i in range(4))
    args = (q, k, v, *tail(90, 90, causal=True))
    out, lse = (t.to(torch.bfloat16) if t.dim() == 4 else t.float() for t in reference(
        *(t.double() for t in args[:3]), *args[3:]))  # fmt: skip
    run = sim("attention_backward").run
    whole = run(dout, None, q, k, v, out, lse, *args[3:])
    one = run(*(t if t is None else t[1:, :, 2:3] for t in (dout, None, q, k, v, out)),
              lse[1:, 2:3], *args[3:])  # fmt: skip
    for a, b in zip(whole[:3], one[:3], strict=True):
        assert torch.equal(a[1:, :, 2:3], b)


REFUSED = {
    "needs dtype in {bfloat16, float16}, got float32": (torch.float32, 64, 64),
    "needs head_dim of q and k divisible by 8 and <= 256, got 60": (torch.bfloat16, 60, 64),
    "needs head_dim of v divisible by 8 and <= 256, got 264": (torch.bfloat16, 64, 264),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_the_backend_refuses(monkeypatch, text):
    monkeypatch.setattr(attention.native, "cuda_why_not", lambda *args: None)
    dtype, d, dv = REFUSED[text]
    q, v = torch.zeros(1, 4, 2, d, dtype=dtype), torch.zeros(1, 4, 2, dv, dtype=dtype)
    args = (q, q, v, *tail(4, 4))
    assert OPS["attention"].backend("cuda").why_not(*args) == text
    backward = (v, None, q, q, v, v, q, *tail(4, 4))
    assert OPS["attention_backward"].backend("cuda").why_not(*backward) == text


def launch(module, change):
    q = torch.zeros(1, 4, 2, 16, dtype=torch.bfloat16)
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k",
             "alibi_slopes", "sink", "out", "lse", "parts", "softmax_scale")  # fmt: skip
    lse, none = torch.zeros(1, 2, 4), torch.zeros(0)
    given = (q, q, q, None, None, 4, 4, None, None, q.clone(), lse, none, 1.0)
    module.attention_fwd(**{**dict(zip(names, given, strict=True)), **change})


def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype)


LAUNCH_ERRORS = {
    "q must be bfloat16 or float16, got float32": {"q": zeros(1, 4, 2, 16, dtype=torch.float32)},
    "v must have a head_dim divisible by 8, got 12": {"v": zeros(1, 4, 2, 16)[..., :12]},
    "k must have shape .*, got": {"k": zeros(1, 4, 2, 24)},
    "v must start at a multiple of 16 bytes": {"v": zeros(200)[4:132].view(1, 4, 2, 16)},
    "k must have strides divisible by 8, got 20 in dimension 2": {
        "k": zeros(1, 4, 2, 20)[..., :16]},
    "k must have a number of heads that divides q's 2, got 3": {"k": zeros(1, 4, 3, 16)},
    "out must have the shape of q .* with the head_dim of v 16": {"out": zeros(1, 4, 2, 8)},
    r"lse must have shape \(1, 2, 4\), got \(1, 4, 2\)": {"lse": torch.zeros(1, 4, 2)},
    "sink must be float32, got bfloat16": {"sink": zeros(2)},
    "softmax_scale must be finite, got inf": {"softmax_scale": float("inf")},
    "cu_seqlens_q and cu_seqlens_k must be given together": {
        "cu_seqlens_k": torch.zeros(2, dtype=torch.int32)},
}  # fmt: skip


@pytest.mark.parametrize("text", LAUNCH_ERRORS)
def test_what_the_launcher_refuses(module, text):
    with pytest.raises(ValueError, match=text):
        launch(module, LAUNCH_ERRORS[text])


def test_address_sanitizer_is_silent():
    code = (
        "from functools import partial\nimport torch\nfrom ceg_kernels import OPS, native\n"
        "for op in ('attention', 'attention_backward'):\n"
        "    run = partial(OPS[op].backend('cuda').run.func, launch=native.Cuda(sim))\n"
        "    for s in OPS[op].samples(torch.bfloat16, 'cpu'):\n"
        "        if s.name in ('gqa 4/2 D80', 'D256', 'varlen everything', 'packed qkv'):\n"
        "            run(*s.args); print('ran', s.name)\n"
    )
    done = cuda_sim.run_under_asan(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ran") == 8


# Index arithmetic.

SHAPES = {"a": (16, 16), "b": (16, 8), "c": (16, 8), "ldmatrix": (8, 8)}


@pytest.mark.parametrize("operand", SHAPES)
def test_a_warp_holds_each_item_of_an_operand_once(module, operand):
    held = [p for lane in range(32) for p in module.fragment(operand, lane)]
    rows, columns = SHAPES[operand]
    assert sorted(held) == list(itertools.product(range(rows), range(columns)))


def test_accumulators_are_the_next_operand(module):
    """Two 16 x 8 blocks of C beside each other are A, register by register."""
    for lane in range(32):
        c = module.fragment("c", lane)
        both = [c, [(row, column + 8) for row, column in c]]
        a = module.fragment("a", lane)
        for i in range(4):
            assert a[2 * i : 2 * i + 2] == both[i // 2][i % 2 * 2 : i % 2 * 2 + 2]


@pytest.mark.parametrize("operand", ["a", "b", "b transposed"])
def test_ldmatrix_brings_the_fragments(module, operand):
    """Addresses as product_of_rows() and product() take them, for two n blocks of B at once."""

    def address(lane):  # row and first column in the tile, as it lies in memory
        if operand == "b":
            return lane % 8 + lane // 16 * 8, lane // 8 % 2 * 8
        return lane % 16, lane // 16 * 8

    for lane in range(32):
        got = []
        for i, (row, column) in itertools.product(range(4), module.fragment("ldmatrix", lane)):
            if operand == "b transposed":
                row, column = column, row
            at = address(8 * i + row)
            got.append((at[0], at[1] + column))
        if operand == "a":
            assert got == module.fragment("a", lane)
            continue
        b = module.fragment("b", lane)  # (k, n); the second block has n + 8
        both = b + [(k, n + 8) for k, n in b]
        assert got == ([(n, k) for k, n in both] if operand == "b" else both)


def banks(address, size):
    return {address // 4 % 32 + i for i in range(size // 4)}


def conflict_free(addresses, size):
    used = [bank for a in addresses for bank in banks(a, size)]
    return len(used) == len(set(used)) == 32


@pytest.mark.parametrize("columns", TILES)
def test_tiles_have_no_bank_conflicts(module, columns):
    at = partial(module.swizzle_offset, columns)
    rows, chunks = range(64), range(columns // 8)
    assert sorted(at(r, c) for r in rows for c in chunks) == list(range(0, 64 * columns * 2, 16))
    for r in rows[::8]:
        for c in chunks:  # a matrix of ldmatrix; a block of accumulators on its way out
            assert conflict_free([at(r + i, c) for i in range(8)], 16)
            assert conflict_free([at(r + i, c) + 4 * j for i in range(8) for j in range(4)], 4)
    for r in rows:
        for c in chunks[::8]:  # eight lanes of cp.async
            assert conflict_free([at(r, c + i) for i in range(8)], 16)


@pytest.mark.parametrize("columns", TILES)
def test_a_moved_address_is_that_of_the_place(module, columns):
    at, moved = (partial(f, columns) for f in (module.swizzle_offset, module.swizzle_moved))
    last = columns // 8
    for row, rows in itertools.product(range(16), range(0, 64, 8)):
        for chunk in (0, 1):
            for chunks in range(0, last - chunk, 2 if chunk else 1):
                assert moved(at(row, chunk), rows, chunks) == at(row + rows, chunk + chunks)
        for chunk in range(8, last, 8):
            for chunks in range(last - chunk):
                assert moved(at(row, chunk), rows, chunks) == at(row + rows, chunk + chunks)


@pytest.mark.parametrize("before", [0, 1, 5, 16, 20, 2**29])
@pytest.mark.parametrize("after", [0, 3, 16, 33, 2**29])
def test_blocks_hold_every_pair_and_only_boundaries_are_masked(module, before, after):
    for first, rows, offset, count in itertools.product(
        (0, 7, 16, 40), (1, 16, 31), (-45, -16, -1, 0, 1, 20), (0, 1, 16, 50)
    ):
        start, whole, rest, stop = module.partners(
            first, first + rows - 1, offset, before, after, count
        )
        seen = [
            range(max(0, r + offset - before), min(count, r + offset + after + 1))
            for r in range(first, first + rows)
        ]
        assert start % 16 == 0
        assert start >= 0
        assert stop <= count
        for block in range(0, 64, 16):
            visited = start <= block < stop
            full = all(len(range(max(s.start, block), min(s.stop, block + 16))) == 16 for s in seen)
            some = any(len(range(max(s.start, block), min(s.stop, block + 16))) > 0 for s in seen)
            assert visited or not some
            if visited:
                assert (whole <= block < rest) == full


def test_a_section_has_as_many_heads_as_fit_in_l2_together(module):
    share = 3 << 20
    for heads, size in itertools.product(
        range(70), (0, 1, 999, share // 3, share - 1, share, 2**40)
    ):
        section = module.section_of(heads, size)
        assert 1 <= section <= max(heads, 1)
        assert section == 1 or section * size <= share
        assert section >= heads or (section + 1) * size > share


@pytest.mark.parametrize("last_tile_first", [False, True])
def test_each_tile_of_each_head_is_taken_once(module, last_tile_first):
    for tiles, heads, section in itertools.product((1, 2, 5), (1, 3, 8), (1, 2, 3, 8)):
        if section > heads:
            continue
        places = module.places(tiles, heads, section, last_tile_first)
        assert sorted(places) == list(itertools.product(range(tiles), range(heads)))
        # A section's heads together, most work first.
        for start in range(0, heads, section):
            width = min(section, heads - start)
            part = places[start * tiles : (start + width) * tiles]
            order = [tile for tile, _ in part]
            assert order == sorted(order, reverse=last_tile_first)
            assert {head for _, head in part} == set(range(start, start + width))

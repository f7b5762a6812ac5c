"""Every check of the native launchers has a call here that it refuses, with its text."""

import numpy as np
import pytest

_C = pytest.importorskip("ceg_kernels._C", reason="the native module is not built")


def rand(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def empty(*shape, dtype=np.float32):
    return np.zeros(shape, dtype=dtype)


class BrokenExporter:
    def __dlpack__(self, **_):
        raise BufferError("not today")


def fwd(x=None, weight=None, residual=None, y=None, residual_out=None, rstd=None, isa=""):
    _C.rms_norm_fwd(
        rand(3, 8) if x is None else x, weight, residual, empty(3, 8) if y is None else y,
        residual_out, empty(3) if rstd is None else rstd, 1e-6, isa=isa,
    )  # fmt: skip


def bwd(dy=None, dh=None, h=None, weight=None, rstd=None, dx=None, dweight=None):
    _C.rms_norm_bwd(
        rand(3, 8) if dy is None else dy, dh, rand(3, 8) if h is None else h, weight,
        rand(3) if rstd is None else rstd, empty(3, 8) if dx is None else dx, dweight,
    )  # fmt: skip


def turn(q=None, k=None, cos=None, sin=None, positions=None, q_out=None, k_out=None):
    q = rand(1, 4, 2, 8) if q is None else q
    cos = rand(4, 4) if cos is None else cos
    _C.rope(
        q, k, cos, rand(*cos.shape) if sin is None else sin, positions,
        empty(1, 4, 2, 8) if q_out is None else q_out, k_out,
    )  # fmt: skip


def route(logits=None, bias=None, top_k=2, score="softmax", ids=None, weights=None, counts=None):
    _C.moe_route(
        rand(5, 4) if logits is None else logits, bias,
        empty(5, top_k) if weights is None else weights,
        empty(5, top_k, dtype=np.int32) if ids is None else ids,
        empty(4, dtype=np.int32) if counts is None else counts, score, True,
    )  # fmt: skip


def route_bwd(dweights=None, logits=None, ids=None, dlogits=None, score="softmax"):
    _C.moe_route_bwd(
        rand(5, 2) if dweights is None else dweights, rand(5, 4) if logits is None else logits,
        np.zeros((5, 2), np.int32) if ids is None else ids,
        empty(5, 4) if dlogits is None else dlogits, score, True,
    )  # fmt: skip


def sort(ids=None, slots=None, sources=None, offsets=None, capacity=-1):
    _C.moe_index(
        np.zeros((5, 2), np.int32) if ids is None else ids,
        empty(5, 2, dtype=np.int32) if slots is None else slots,
        empty(10, dtype=np.int32) if sources is None else sources,
        empty(5, dtype=np.int32) if offsets is None else offsets, capacity,
    )  # fmt: skip


def dispatch(x=None, sources=None, top_k=2, out=None):
    _C.moe_dispatch(
        rand(5, 8) if x is None else x, np.zeros(10, np.int32) if sources is None else sources,
        top_k, empty(10, 8) if out is None else out,
    )  # fmt: skip


def combine(y=None, slots=None, weights=None, out=None):
    _C.moe_combine(
        rand(10, 8) if y is None else y, np.zeros((5, 2), np.int32) if slots is None else slots,
        weights, empty(5, 8) if out is None else out,
    )  # fmt: skip


def combine_bwd(dout=None, sources=None, slots=None, weights=None, dy=None, dweights=None):
    _C.moe_combine_bwd(
        rand(5, 8) if dout is None else dout, rand(10, 8),
        np.zeros(10, np.int32) if sources is None else sources,
        np.zeros((5, 2), np.int32) if slots is None else slots,
        rand(5, 2) if weights is None else weights, empty(10, 8) if dy is None else dy,
        empty(5, 2) if dweights is None else dweights,
    )  # fmt: skip


def read_only(array):
    array.flags.writeable = False
    return array


i32, f64 = np.int32, np.float64
expanded = np.lib.stride_tricks.as_strided(empty(8), (3, 8), (0, 4))

REFUSALS = [
    # What an argument has to be, through the first launcher.
    (lambda: fwd(x="text"), TypeError, "expected an array with __dlpack__.*got str"),
    (lambda: fwd(x=BrokenExporter()), BufferError, "not today"),
    (lambda: _C.rms_norm_fwd(None, *[None] * 5, 1e-6), TypeError, "expected an array, got None"),
    (lambda: fwd(x=rand(1, 1, 1, 1, 1, 1)), ValueError, "at most 5 dimensions, got 6"),
    (lambda: fwd(x=rand(3, 8, 1)), ValueError, r"x must have shape \(\*, \*\), got \(3, 8, 1\)"),
    (lambda: fwd(x=rand(3, 8).astype(i32)), ValueError, "x must be float32 or .*, got int32"),
    (lambda: fwd(x=rand(3, 8).astype(np.uint8)), ValueError, "got an unsupported dtype"),
    (lambda: fwd(x=rand(8, 3).T), ValueError, "x must have stride 1 .*, got 3"),
    (
        lambda: fwd(rstd=np.array(0, np.float32)),
        ValueError,
        r"rstd must have .*, got \(\)",
    ),
    (lambda: fwd(y=read_only(empty(3, 8))), ValueError, "y must be writable"),
    (lambda: fwd(y=expanded), ValueError, "y must not be expanded, got stride 0 in dimension 0"),
    (lambda: fwd(isa="mmx"), ValueError, "isa must be one of portable.*, got mmx"),
    # rms_norm
    (lambda: fwd(weight=rand(7)), ValueError, r"weight must have shape \(8,\), got \(7,\)"),
    (lambda: fwd(weight=rand(8, dtype=f64)), ValueError, "weight must be float32, got float64"),
    (lambda: fwd(residual=rand(3, 7)), ValueError, r"residual must have shape \(3, 8\)"),
    (lambda: fwd(residual_out=empty(3, 8)), ValueError, "residual_out needs residual"),
    (lambda: fwd(residual=rand(3, 8), residual_out=empty(2, 8)), ValueError, "residual_out must"),
    (
        lambda: fwd(residual=rand(3, 8), residual_out=read_only(empty(3, 8))),
        ValueError,
        "residual_out must be writable",
    ),
    (lambda: fwd(y=empty(3, 8, dtype=f64)), ValueError, "y must be float32, got float64"),
    (lambda: fwd(rstd=empty(4)), ValueError, r"rstd must have shape \(3,\), got \(4,\)"),
    (lambda: fwd(rstd=read_only(empty(3))), ValueError, "rstd must be writable"),
    (lambda: bwd(h=rand(3, 8, 1)), ValueError, "h must have shape"),
    (lambda: bwd(h=rand(3, 8).astype(i32)), ValueError, "h must be float32 or"),
    (lambda: bwd(h=rand(8, 3).T), ValueError, "h must have stride 1"),
    (lambda: bwd(dy=rand(3, 9)), ValueError, "dy must have shape"),
    (lambda: bwd(dh=rand(2, 8)), ValueError, "dh must have shape"),
    (lambda: bwd(weight=rand(9)), ValueError, "weight must have shape"),
    (lambda: bwd(rstd=rand(2)), ValueError, "rstd must have shape"),
    (lambda: bwd(dx=empty(4, 8)), ValueError, "dx must have shape"),
    (lambda: bwd(dx=read_only(empty(3, 8))), ValueError, "dx must be writable"),
    (lambda: bwd(dweight=empty(9)), ValueError, "dweight must have shape"),
    (lambda: bwd(dweight=read_only(empty(8))), ValueError, "dweight must be writable"),
    # rope
    (lambda: turn(q=rand(4, 2, 8)), ValueError, r"q must have shape \(\*, \*, \*, \*\)"),
    (lambda: turn(q=rand(1, 4, 2, 8).astype(i32)), ValueError, "q must be float32 or"),
    (lambda: turn(q=rand(1, 4, 8, 2).swapaxes(2, 3)), ValueError, "q must have stride 1"),
    (lambda: turn(q_out=empty(1, 4, 2, 6)), ValueError, "q_out must have shape"),
    (lambda: turn(q_out=read_only(empty(1, 4, 2, 8))), ValueError, "q_out must be writable"),
    (lambda: turn(k=rand(1, 4, 2, 8)), ValueError, "k_out must come with k, got k alone"),
    (lambda: turn(k_out=empty(1, 4, 2, 8)), ValueError, "got k_out alone"),
    (
        lambda: turn(k=rand(1, 5, 2, 8), k_out=empty(1, 5, 2, 8)),
        ValueError,
        r"k must have shape \(1, 4, \*, 8\), got \(1, 5, 2, 8\)",
    ),
    (
        lambda: turn(k=rand(1, 4, 1, 8, dtype=f64), k_out=empty(1, 4, 1, 8, dtype=f64)),
        ValueError,
        "k must be float32, got float64",
    ),
    (
        lambda: turn(k=rand(1, 4, 8, 1).swapaxes(2, 3)[..., ::2], k_out=empty(1, 4, 1, 4)),
        ValueError,
        "k must have shape",
    ),
    (lambda: turn(k=rand(1, 4, 1, 8), k_out=empty(1, 4, 2, 8)), ValueError, "k_out must have"),
    (
        lambda: turn(k=rand(1, 4, 1, 8), k_out=read_only(empty(1, 4, 1, 8))),
        ValueError,
        "k_out must be writable",
    ),
    (lambda: turn(cos=rand(4)), ValueError, "cos must have shape"),
    (lambda: turn(cos=rand(4, 4, dtype=f64)), ValueError, "cos must be float32, got float64"),
    (lambda: turn(sin=rand(4, 3)), ValueError, "sin must have shape"),
    (lambda: turn(cos=rand(4, 5)), ValueError, "at most head_dim / 2 = 4 columns, got 5"),
    (lambda: turn(cos=rand(3, 4)), ValueError, "a row for each of the 4 positions, got 3"),
    (lambda: turn(positions=np.zeros((1, 3), i32)), ValueError, "positions must have shape"),
    (lambda: turn(positions=rand(1, 4)), ValueError, "positions must be int32 or int64"),
    (lambda: turn(positions=np.array([[0, 1, 4, 2]])), ValueError, r"in \[0, 4\), got 4"),
    (lambda: turn(positions=np.array([[0, -1, 2, 2]], i32)), ValueError, r"in \[0, 4\), got -1"),
    # moe_route
    (lambda: route(logits=rand(5)), ValueError, "logits must have shape"),
    (lambda: route(logits=rand(5, 4).astype(i32)), ValueError, "logits must be float32 or"),
    (lambda: route(logits=rand(4, 5).T), ValueError, "logits must have stride 1"),
    (lambda: route(bias=rand(5)), ValueError, r"bias must have shape \(4,\)"),
    (lambda: route(bias=rand(4, dtype=f64)), ValueError, "bias must be float32"),
    (lambda: route(weights=empty(6, 2)), ValueError, "weights must have shape"),
    (lambda: route(weights=empty(5, 2, dtype=f64)), ValueError, "weights must be float32"),
    (lambda: route(weights=read_only(empty(5, 2))), ValueError, "weights must be writable"),
    (lambda: route(top_k=5), ValueError, r"top_k must be in \[1, 4\], got 5"),
    (lambda: route(top_k=0), ValueError, r"top_k must be in \[1, 4\], got 0"),
    (lambda: route(ids=empty(5, 3, dtype=i32)), ValueError, "expert_ids must have shape"),
    (lambda: route(ids=empty(5, 2, dtype=np.int64)), ValueError, "expert_ids must be int32"),
    (lambda: route(ids=read_only(empty(5, 2, dtype=i32))), ValueError, "expert_ids must be wri"),
    (lambda: route(counts=empty(5, dtype=i32)), ValueError, "tokens_per_expert must have shape"),
    (lambda: route(counts=empty(4)), ValueError, "tokens_per_expert must be int32"),
    (lambda: route(counts=read_only(empty(4, dtype=i32))), ValueError, "tokens_per_expert must"),
    (lambda: route(score="tanh"), ValueError, "score must be softmax or sigmoid, got tanh"),
    (lambda: route_bwd(dweights=rand(4, 2)), ValueError, "dweights must have shape"),
    (lambda: route_bwd(dweights=rand(5, 2, dtype=f64)), ValueError, "dweights must be float32"),
    (lambda: route_bwd(ids=np.zeros((5, 3), i32)), ValueError, "expert_ids must have shape"),
    (lambda: route_bwd(ids=np.zeros((5, 2))), ValueError, "expert_ids must be int32"),
    (lambda: route_bwd(ids=np.full((5, 2), 4, i32)), ValueError, r"in \[0, 4\), got 4"),
    (lambda: route_bwd(dlogits=empty(5, 3)), ValueError, "dlogits must have shape"),
    (lambda: route_bwd(dlogits=read_only(empty(5, 4))), ValueError, "dlogits must be writable"),
    (lambda: route_bwd(score="tanh"), ValueError, "score must be"),
    # moe_index
    (lambda: sort(ids=np.zeros(5, i32)), ValueError, "expert_ids must have shape"),
    (lambda: sort(ids=np.zeros((5, 2))), ValueError, "expert_ids must be int32, got float64"),
    (lambda: sort(ids=np.zeros((2, 5), i32).T), ValueError, "expert_ids must have stride 1"),
    (lambda: sort(ids=np.full((5, 2), 4, i32)), ValueError, r"in \[0, 4\), got 4"),
    (lambda: sort(ids=np.full((5, 2), -1, i32)), ValueError, r"in \[0, 4\), got -1"),
    (lambda: sort(slots=empty(5, 3, dtype=i32)), ValueError, "slots must have shape"),
    (lambda: sort(slots=read_only(empty(5, 2, dtype=i32))), ValueError, "slots must be writable"),
    (lambda: sort(sources=empty(9, dtype=i32)), ValueError, "sources must have shape"),
    (lambda: sort(sources=empty(10)), ValueError, "sources must be int32"),
    (lambda: sort(sources=read_only(empty(10, dtype=i32))), ValueError, "sources must be wri"),
    (lambda: sort(offsets=empty(5, 1, dtype=i32)), ValueError, "offsets must have shape"),
    (lambda: sort(offsets=empty(5)), ValueError, "offsets must be int32"),
    (lambda: sort(offsets=read_only(empty(5, dtype=i32))), ValueError, "offsets must be wri"),
    (lambda: sort(offsets=empty(0, dtype=i32)), ValueError, r"\(E \+ 1,\), got \(0,\)"),
    (lambda: sort(capacity=-2), ValueError, "capacity must be >= 0, or -1 for none, got -2"),
    # moe_dispatch, moe_combine
    (lambda: dispatch(x=rand(5)), ValueError, "x must have shape"),
    (lambda: dispatch(x=rand(5, 8).astype(i32)), ValueError, "x must be float32 or"),
    (lambda: dispatch(x=rand(8, 5).T), ValueError, "x must have stride 1"),
    (lambda: dispatch(top_k=0), ValueError, "top_k must be positive, got 0"),
    (lambda: dispatch(sources=np.zeros((10, 1), i32)), ValueError, "sources must have shape"),
    (lambda: dispatch(sources=np.zeros(10)), ValueError, "sources must be int32"),
    (lambda: dispatch(sources=np.full(10, 10, i32)), ValueError, r"in \[-1, 10\), got 10"),
    (lambda: dispatch(out=empty(9, 8)), ValueError, "out must have shape"),
    (lambda: dispatch(out=empty(10, 8, dtype=f64)), ValueError, "out must be float32"),
    (lambda: dispatch(out=read_only(empty(10, 8))), ValueError, "out must be writable"),
    (lambda: combine(y=rand(10)), ValueError, "y must have shape"),
    (lambda: combine(slots=np.zeros(10, i32)), ValueError, "slots must have shape"),
    (lambda: combine(slots=np.full((5, 2), 10, i32)), ValueError, r"in \[-1, 10\), got 10"),
    (lambda: combine(slots=np.full((5, 2), -2, i32)), ValueError, r"in \[-1, 10\), got -2"),
    (lambda: combine(weights=rand(5, 3)), ValueError, "weights must have shape"),
    (lambda: combine(weights=rand(5, 2, dtype=f64)), ValueError, "weights must be float32"),
    (lambda: combine(out=empty(4, 8)), ValueError, "out must have shape"),
    (lambda: combine(out=empty(5, 8, dtype=f64)), ValueError, "out must be float32"),
    (lambda: combine(out=read_only(empty(5, 8))), ValueError, "out must be writable"),
    (lambda: combine_bwd(slots=np.full((5, 2), 10, i32)), ValueError, "slots must be in"),
    (lambda: combine_bwd(sources=np.full(10, 10, i32)), ValueError, "sources must be in"),
    (lambda: combine_bwd(dout=rand(4, 8)), ValueError, "dout must have shape"),
    (lambda: combine_bwd(dout=rand(5, 8, dtype=f64)), ValueError, "dout must be float32"),
    (lambda: combine_bwd(dout=rand(8, 5).T), ValueError, "dout must have stride 1"),
    (lambda: combine_bwd(weights=rand(5, 3)), ValueError, "weights must have shape"),
    (lambda: combine_bwd(dy=empty(9, 8)), ValueError, "dy must have shape"),
    (lambda: combine_bwd(dy=read_only(empty(10, 8))), ValueError, "dy must be writable"),
    (lambda: combine_bwd(dweights=empty(5, 3)), ValueError, "dweights must have shape"),
    (lambda: combine_bwd(dweights=read_only(empty(5, 2))), ValueError, "dweights must be wri"),
    # roofs
    (lambda: _C.fma_flops("int8"), ValueError, "dtype must be float32, .*, got int8"),
    (lambda: _C.fma_flops("float32", isa="mmx"), ValueError, "isa must be one of"),
    (lambda: _C.copy_bandwidth(0), ValueError, "bytes must be positive, got 0"),
]


@pytest.mark.parametrize(("call", "error", "text"), REFUSALS, ids=[r[2] for r in REFUSALS])
def test_refusals_say_name_expected_got(call, error, text):
    with pytest.raises(error, match=text):
        call()

"""Planted faults: each wrong result must be caught by the accuracy rule, in fp32 and in bf16.

A fault takes the arguments of an op and returns what a subtly broken kernel would: the right
outputs of the fp32 reference, rounded to the op's dtypes, with one thing wrong.
"""

import sys

import pytest
import torch
from devices import on_each_device
from numerics import compare, compare_eager

from ceg_kernels import OPS
from ceg_kernels.measure.accuracy import _expected, as_tuple, promote
from ceg_kernels.ops import moe_index, rms_norm

FAULTS = []


def fault(op, sample):
    """Register a fault of `op`, planted in its sample of that name."""

    def register(plant):
        FAULTS.append(pytest.param(op, sample, plant, id=f"{op}: {plant.__name__}"))
        return plant

    return register


def right(op, args):
    """What a correct kernel returns: fp32 maths, rounded once. Or what a kernel does: see below."""
    outs = as_tuple(OPS[op].reference(*promote(args, torch.float32)))
    return [o.to(e.dtype).clone() for o, e in zip(outs, _expected(OPS[op], args), strict=True)]


@fault("rms_norm", "x[300, 128]")
def one_row_scaled_by_1_01(args):
    y, *rest = right("rms_norm", args)
    y[7] *= 1.01
    return y, *rest


@fault("rms_norm", "small")
def eps_1e_2_for_1e_6(args):
    x, weight, residual, _, offset = args
    return right("rms_norm", (x, weight, residual, 1e-2, offset))


@fault("rms_norm", "x[300, 128]")
def mean_over_n_minus_8(args):
    x, weight, *_ = promote(args, torch.float32)
    y, summed, _ = right("rms_norm", args)
    n = x.shape[-1]
    rstd = torch.rsqrt(x.square().sum(-1) / (n - 8) + 1e-6)
    return (x * rstd[:, None] * weight).to(y.dtype), summed, rstd


@fault("rms_norm", "offset")
def weight_offset_forgotten(args):
    return right("rms_norm", (*args[:4], 0.0))


@fault("rms_norm", "residual")
def residual_added_after_the_norm(args):
    x, weight, residual, eps, offset = args
    y, _, rstd = right("rms_norm", (x, weight, None, eps, offset))
    return y, (x + residual), rstd


@fault("rms_norm_backward", "x[300, 128]")
def dweight_loses_the_last_row(args):
    dy, dh, h, weight, rstd, offset = args
    dx, _ = right("rms_norm_backward", args)
    _, dweight = rms_norm.reference_backward(dy[:-1], dh, h[:-1], weight, rstd[:-1], offset)
    return dx, dweight.to(weight.dtype)


@fault("rms_norm_backward", "x[300, 128]")
def projection_on_h_forgotten(args):
    dy, _, _, weight, rstd, _ = promote(args, torch.float32)
    dx, dweight = right("rms_norm_backward", args)
    return (dy * weight * rstd[:, None]).to(dx.dtype), dweight


@fault("rms_norm_backward", "residual")
def gradient_of_the_sum_forgotten(args):
    return right("rms_norm_backward", (args[0], None, *args[2:]))


@fault("attention", "causal 257")
def last_row_loses_one_key(args):
    q, k, v, *tail = args
    out, lse = right("attention", args)
    short = (q[:, -1:], k[:, :-1], v[:, :-1], *tail)
    out[:, -1:], lse[:, :, -1:] = right("attention", short)
    return out, lse


@fault("attention", "causal 257")
def mask_off_by_one(args):
    causal, left, _, softcap = args[-4:]
    assert causal
    return right("attention", (*args[:-4], False, left, 1, softcap))


@fault("attention", "window left")
def window_one_key_too_narrow(args):
    return right("attention", (*args[:-3], args[-3] - 1, *args[-2:]))


@fault("attention", "Tq < Tk causal")
def mask_aligned_top_left(args):
    q, k, v, *tail = args
    t = q.shape[1]
    return right("attention", (q, k[:, :t], v[:, :t], *tail))


@fault("attention", "gqa 4/2 D80")
def query_heads_on_the_wrong_key_head(args):
    q, k, v, *tail = args
    return right("attention", (q, k.flip(2), v, *tail))


@fault("attention", "sink")
def sink_not_in_the_lse(args):
    out, _ = right("attention", args)
    _, lse = right("attention", (*args[:8], None, *args[9:]))
    return out, lse


@fault("attention", "alibi")
def alibi_of_the_next_head(args):
    return right("attention", (*args[:7], args[7].roll(1), *args[8:]))


@fault("attention", "varlen causal=True")
def one_sequence_sees_its_neighbour(args):
    cu_k = args[4].clone()
    cu_k[1] += 1
    return right("attention", (*args[:4], cu_k, *args[5:]))


@fault("attention_backward", "causal 257")
def scale_forgotten_in_dq(args):
    dq, *rest = right("attention_backward", args)
    return dq / args[-5], *rest


@fault("attention_backward", "gqa 4/2 D80")
def dk_of_one_head_of_the_group_only(args):
    dq, dk, dv, dsink = right("attention_backward", args)
    return dq, dk / 2, dv, dsink


@fault("attention_backward", "gqa 4/2 D80 dlse")
def gradient_of_lse_ignored(args):
    return right("attention_backward", (args[0], None, *args[2:]))


@fault("attention_backward", "softcap")
def derivative_of_softcap_forgotten(args):
    dout, _, q, k, v, *rest = args
    out, lse, *tail = rest
    # The scores that softcap leaves, without the factor that it puts on their gradient.
    return right("attention_backward", (*args[:-1], 0.0))


@fault("rope", "positions")
def one_row_s_position_off_by_one(args):
    positions = args[4].clone()
    positions[0, 3] += 1
    return right("rope", (*args[:4], positions, *args[5:]))


@fault("rope", "inverse")
def inverse_ignored(args):
    return right("rope", (*args[:-1], False))


@fault("rope", "B2 T5 H4/2 D80 R16 interleaved=True")
def halves_for_interleaved(args):
    return right("rope", (*args[:-2], False, False))


@fault("moe_index", "N63 E8 K2 D40")
def two_experts_swapped(args):
    ids, experts, capacity = args
    swapped = torch.where(ids == 0, 1, torch.where(ids == 1, 0, ids))
    return moe_index.reference(swapped, experts, capacity)


@fault("moe_index", "capacity 5")
def capacity_one_too_large(args):
    return moe_index.reference(args[0], args[1], args[2] + 1)


@fault("moe_route", "bias softmax")
def bias_ignored(args):
    return right("moe_route", (args[0], None, *args[2:]))


@fault("moe_route", "ties")
def ties_to_the_higher_index(args):
    weights, ids, counts = right("moe_route", (args[0].flip(-1), *args[1:]))
    return weights, args[0].shape[1] - 1 - ids, counts.flip(0)


@fault("moe_route_backward", "N63 E8 K2 softmax renormalize=True")
def renormalising_not_differentiated(args):
    return right("moe_route_backward", (*args[:-1], False))


@fault("moe_combine", "N63 E8 K2 D40")
def two_tokens_swapped(args):
    (out,) = right("moe_combine", args)
    out[[4, 5]] = out[[5, 4]]
    return (out,)


@fault("moe_combine", "N63 E8 K2 D40")
def weights_of_the_other_choice(args):
    return right("moe_combine", (*args[:3], args[3].flip(-1)))


@fault("moe_dispatch", "capacity 5")
def empty_rows_not_zeroed(args):
    (out,) = right("moe_dispatch", args)
    out[-1] = 1
    return (out,)


@fault("moe_combine_backward", "N63 E8 K2 D40")
def dweights_of_one_token_lose_a_column(args):
    dy, dweights = right("moe_combine_backward", args)
    dout, y, slots, *rest = promote(args, torch.float32)
    dweights[3] -= dout[3, -1] * y[slots[3].long(), -1]
    return dy, dweights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "sample", "plant"), FAULTS)
def test_planted_fault_is_caught(op, sample, plant, dtype):
    samples = {s.name: s.args for s in OPS[op].samples(dtype, "cpu")}
    args = samples[sample]
    assert compare(OPS[op], tuple(right(op, args)), args) <= 0.7, "the right result must pass"
    assert compare(OPS[op], as_tuple(tuple(plant(args))), args) > 1, "the fault went unseen"


@on_each_device
@pytest.mark.parametrize(("op", "sample", "plant"), FAULTS)
def test_planted_fault_in_what_a_kernel_returns_is_caught(
    op, sample, plant, device, backend, monkeypatch
):
    """The same faults on the kernel's own results: it gets the wrong arguments, and its right
    results pass."""

    def by_the_kernel(name, args):
        return [out.clone() for out in as_tuple(OPS[name].backend(backend).run(*args))]

    attention = backend == "cuda" and "attention" in op
    dtype = torch.bfloat16 if attention else torch.float32
    args = {s.name: s.args for s in OPS[op].samples(dtype, device)}[sample]
    if (reason := OPS[op].backend(backend).why_not(*args)) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(sys.modules[__name__], "right", by_the_kernel)
    assert compare(OPS[op], tuple(by_the_kernel(op, args)), args) <= 1, "the right result must pass"
    assert compare(OPS[op], as_tuple(tuple(plant(args))), args) > 1, "the fault went unseen"


# In bf16 they are no larger than what rounding the scores or x to 16 bits may do.
WITHIN_EAGER_ROUNDING = ("one_row_scaled_by_1_01", "last_row_loses_one_key")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("op", "sample", "plant"),
    [p for p in FAULTS if p.values[0] in ("attention", "attention_backward", "rms_norm")],
)
def test_planted_fault_is_caught_in_eager_code_too(op, sample, plant, dtype):
    """The faults of the ops whose stock backends are held to `compare_eager`, by that rule."""
    if dtype == torch.bfloat16 and plant.__name__ in WITHIN_EAGER_ROUNDING:
        pytest.skip("within eager code's own rounding")
    args = {s.name: s.args for s in OPS[op].samples(dtype, "cpu")}[sample]
    assert compare_eager(OPS[op], as_tuple(tuple(plant(args))), args) > 1, "the fault went unseen"


def test_a_shifted_causal_mask_in_eager_code_is_caught():
    """As the study's baseline would have it: the stock formula itself, run in bf16."""
    op = OPS["attention"]
    args = {s.name: s.args for s in op.samples(torch.bfloat16, "cpu")}["causal 257"]
    *head, causal, left, _, softcap = args
    assert causal
    assert compare_eager(op, op.reference(*args), args) <= 0.7
    assert compare_eager(op, op.reference(*head, False, left, 1, softcap), args) > 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_or_an_infinity_in_an_output_is_caught(value):
    args = next(iter(OPS["rms_norm"].samples(torch.float32, "cpu"))).args
    y, *rest = right("rms_norm", args)
    y.view(-1)[0] = value
    assert compare(OPS["rms_norm"], (y, *rest), args) > 1


def test_every_op_has_a_planted_fault():
    assert {p.values[0] for p in FAULTS} == set(OPS)

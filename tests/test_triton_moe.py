"""Triton's MoE kernels where the op grid of test_ops.py does not reach.

Long rows, many chunks of choices, the order of special numbers, offsets beyond 2^31, and that no
result depends on which program runs first. Left out: sorted buffers of more than 2^31 numbers,
which the kernels write densely and nobody has the memory for.
"""

import pytest
import torch
from numerics import as_tuple, compare, error_over_slack

import ceg_kernels
from ceg_kernels import OPS, Routing, explain, triton, use_backend
from ceg_kernels.ops import arguments, moe_index

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NAN, INF = float("nan"), float("inf")

pytestmark = pytest.mark.skipif(triton.MISSING is not None, reason=str(triton.MISSING))


def _plan(n, experts, top_k, capacity=-1):
    """slots, sources of random choices."""
    ids = moe_index.random_ids(n, experts, top_k, DEVICE)
    return moe_index.reference(ids, experts, capacity)[:2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_several_blocks(dtype):
    make = arguments.maker(dtype, DEVICE)
    slots, sources = _plan(7, 3, 2, capacity=3)  # 14 choices for 9 places: some are dropped
    assert (slots < 0).any()
    x, y, weights = make(7, 2057), make(14, 2057), make(7, 2).float()
    assert error_over_slack(OPS["moe_dispatch"], "triton", (x, sources, slots)) <= 1
    assert error_over_slack(OPS["moe_combine"], "triton", (y, slots, sources, weights)) <= 1
    args = (x, y, slots, sources, weights)
    assert error_over_slack(OPS["moe_combine_backward"], "triton", args) <= 1


@pytest.mark.parametrize("capacity", [-1, 3000])
def test_many_chunks_of_several_steps(capacity):
    ids = moe_index.random_ids(16500, 5, 1, DEVICE)  # beyond 256 chunks of one step
    assert error_over_slack(OPS["moe_index"], "triton", (ids, 5, capacity)) == 0


def test_order_of_special_numbers():
    """NaN above infinity, zeros equal, the lower index of equal ones first: that of torch.sort."""
    logits = torch.tensor(
        [
            [1.0, NAN, INF, -INF, -0.0, 0.0, -NAN, INF],
            [-INF, -INF, 3.0, -INF, -1.0, -2.0, -1.0, -INF],
            [0.0, -0.0, 1e-45, -1e-45, 0.0, -0.0, 3e38, -3e38],
            [5.0] * 8,
        ],
        device=DEVICE,
    )
    args = (logits, None, 8, "sigmoid", False)
    (weights, ids, counts), expected = (
        OPS["moe_route"].backend(name).run(*args) for name in ("triton", "reference")
    )
    assert torch.equal(ids, expected[1])
    assert torch.equal(counts, expected[2])
    torch.testing.assert_close(weights, expected[0], equal_nan=True)


def test_ids_of_no_expert_are_dropped_and_write_nowhere():
    ids = torch.tensor([[0, 7], [-1, 1], [1, 0], [2**30, 1]], dtype=torch.int32, device=DEVICE)
    slots, sources, offsets = triton.launcher("moe_index", "moe_index")(ids, 2, -1)
    assert slots.tolist() == [[0, -1], [-1, 2], [3, 1], [-1, 4]]
    assert sources.tolist() == [0, 5, 3, 4, 7, -1, -1, -1]
    assert offsets.tolist() == [0, 2, 5]
    if not CUDA:
        with (
            use_backend("triton"),
            pytest.raises(ValueError, match=r"expert_ids must be in \[0, 2"),
        ):
            OPS["moe_index"](ids, 2, -1)


def test_a_dropped_choice_adds_nothing_whatever_its_weight_or_row():
    slots = torch.tensor([[0, -1], [-1, -1]], dtype=torch.int32, device=DEVICE)
    sources = torch.tensor([0, -1, -1, -1], dtype=torch.int32, device=DEVICE)
    y = torch.full((4, 3), NAN, device=DEVICE)
    y[0] = 2.0
    weights = torch.tensor([[3.0, INF], [NAN, 1.0]], device=DEVICE)
    out = OPS["moe_combine"].backend("triton").run(y, slots, sources, weights)
    assert out.tolist() == [[6.0] * 3, [0.0] * 3]
    dout = torch.tensor([[1.0] * 3, [INF] * 3], device=DEVICE)
    args = (dout, y, slots, sources, weights)
    dy, dweights = OPS["moe_combine_backward"].backend("triton").run(*args)
    assert dy.tolist() == [[3.0] * 3, *[[0.0] * 3] * 3]
    assert dweights.tolist() == [[6.0, 0.0], [0.0, 0.0]]


def test_offsets_beyond_32_bits(far):
    make = arguments.maker(torch.bfloat16, DEVICE)
    # A stride that fits 32 bits, so that nothing but the kernel's own care widens an offset.
    rows = far.as_strided((4, 64), (2**30, 1), 2**31)
    rows.copy_(make(4, 64))
    slots, sources = _plan(4, 4, 1)
    weights = torch.tensor([[0.5], [-2.0], [1.0], [3.0]], device=DEVICE)
    upstream = make(4, 4).float()
    ids = OPS["moe_route"].reference(rows.clone(), None, 4, "softmax", True)[1]
    for op, args in {
        "moe_route": lambda x: (x, None, 4, "softmax", True),
        "moe_route_backward": lambda x: (upstream, x, ids, "softmax", False),
        "moe_dispatch": lambda x: (x, sources, slots),
        "moe_combine": lambda x: (x, slots, sources, weights),
        "moe_combine_backward": lambda x: (x, x, slots, sources, weights),
    }.items():
        outs = as_tuple(OPS[op].backend("triton").run(*args(rows)))
        assert compare(OPS[op], outs, args(rows.clone())) <= 1, op


def test_the_gradient_goes_through_the_kernels():
    """Router, dispatch and combine, forward and backward, against the formulas."""
    make = arguments.maker(torch.float32, DEVICE)
    x, logits = make(30, 24).requires_grad_(), make(30, 6).requires_grad_()
    upstream, grads = make(30, 24), {}
    for backend in ("triton", "reference"):
        with use_backend(backend):
            routing = ceg_kernels.moe_route(logits, 2)
            rows, plan = ceg_kernels.moe_dispatch(x, routing, capacity=8)
            out = ceg_kernels.moe_combine(rows.tanh(), plan, routing.weights)
        assert (plan.slots < 0).any()
        grads[backend] = torch.autograd.grad(out, (x, logits), upstream)
    for ours, theirs in zip(grads["triton"], grads["reference"], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(CUDA, reason="a GPU runs programs in an order of its own")
def test_no_result_depends_on_the_order_of_programs(monkeypatch):
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    forwards, made = builder.set_grid_idx, arguments.maker(torch.float32, "cpu")
    slots, sources = _plan(40, 4, 2, capacity=15)
    x, y, weights = made(40, 1100), made(80, 1100), made(40, 2)
    calls = {  # several programs each
        "moe_route": (made(300, 8), None, 2, "softmax", True),
        "moe_index": (moe_index.random_ids(300, 4, 2, "cpu"), 4, 100),
        "moe_dispatch": (x, sources, slots),
        "moe_combine": (y, slots, sources, weights),
        "moe_combine_backward": (x, y, slots, sources, weights),
    }

    def backwards(*position):
        last = (size - 1 for size in builder.grid_dim)
        forwards(*(end - at for end, at in zip(last, position, strict=True)))

    for op, args in calls.items():
        run = OPS[op].backend("triton").run
        first = as_tuple(run(*args))
        with monkeypatch.context() as patch:
            patch.setattr(builder, "set_grid_idx", backwards)
            again = as_tuple(run(*args))
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b), op


def test_refusals_say_why():
    logits = torch.zeros(2, 8193, device=DEVICE)
    many = r"triton: needs at most 8192 experts, got 8193"
    assert many in explain("moe_route", logits, None, 1, "softmax", True)
    weights, ids = torch.zeros(2, 1, device=DEVICE), torch.zeros(2, 1, device=DEVICE).int()
    assert many in explain("moe_route_backward", weights, logits, ids, "softmax", True)
    assert many in explain("moe_index", ids, 8193, -1)
    double = "triton: needs dtype in {float32, bfloat16, float16}, got float64"
    assert double in explain("moe_dispatch", weights.double(), ids.view(-1), ids)
    routed = (logits[:, :4].double(), None, 1, "softmax", True)
    assert double in explain("moe_route", *routed)
    with use_backend("triton"):
        assert isinstance(ceg_kernels.moe_route(logits[:, :8192], 1), Routing)


def test_what_the_launchers_refuse():
    ids = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"must have at most 2\^31 - 1 elements, got 2147483648"):
        triton.launcher("moe_index", "moe_index")(ids.expand(2**30, 2), 1, -1)
    x, short = torch.zeros(1, 4, device=DEVICE), ids.view(-1)[:0]
    for name, args in {
        "dispatch": (x, short, ids),
        "combine": (x, ids, short, None),
        "combine_backward": (x, x, ids, short, torch.ones(1, 1, device=DEVICE)),
    }.items():
        with pytest.raises(ValueError, match="slots, sources and sorted rows must be as many, got"):
            triton.launcher("moe", name)(*args)

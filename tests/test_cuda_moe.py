"""The CUDA kernels of the mixture of experts beyond the op grid: many blocks, many experts, and
inputs that no router of ours makes. In the simulator, see test_cuda.py."""

import cuda_sim
import pytest
import torch
from numerics import compare, error_over_slack

from ceg_kernels import OPS
from ceg_kernels.ops import arguments, moe_index, moe_route

pytestmark = cuda_sim.needed
INT32 = {"dtype": torch.int32}


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "capacity"),
    [
        (4096, 16, 2, -1),  # the most that one block sorts
        (4097, 16, 2, 400),
        (9001, 100, 3, -1),  # blocks and experts that nothing divides
        (
            70,
            4096,
            150,
            -1,
        ),  # as many experts as there may be, whose counts leave room for two warps
        (20000, 1, 7, 17),  # more choices than 64 blocks take in their first size
    ],
)
def test_sorting_with_one_block_and_with_many(sim, module, tokens, experts, top_k, capacity, order):
    ids = torch.randint(0, experts, (tokens, top_k), generator=torch.Generator().manual_seed(1))
    args = (ids.int(), experts, capacity)
    module.set_device(order=order)
    module.launched()
    for ours, theirs in zip(sim("moe_index").run(*args), moe_index.reference(*args), strict=True):
        assert torch.equal(ours, theirs)
    kernels = ["moe_index_count_kernel", "moe_index_place_kernel"]
    assert module.launched() == kernels[tokens * top_k <= 8192 :]


def test_ids_that_are_no_expert_s_are_dropped(sim):
    ids = torch.tensor([[0, 7], [2, -1], [1, 2]], **INT32)
    slots, sources, offsets = sim("moe_index").run(ids, 3, -1)
    assert slots.tolist() == [[0, -1], [2, -1], [1, 3]]
    assert sources.tolist() == [0, 4, 2, 5, -1, -1]
    assert offsets.tolist() == [0, 1, 2, 4]


def test_rows_that_point_nowhere_count_as_empty(sim):
    make = arguments.maker(torch.float32, "cpu")
    x, y, weights = make(2, 8), make(4, 8), make(2, 2)
    sources = torch.tensor([3, 4, -7, 0], **INT32)
    slots = torch.tensor([[0, 4], [-9, 2]], **INT32)
    out = sim("moe_dispatch").run(x, sources, slots)
    assert torch.equal(out, torch.stack([x[1], 0 * x[0], 0 * x[0], x[0]]))
    out = sim("moe_combine").run(y, slots, sources, weights)
    torch.testing.assert_close(out, torch.stack([weights[0, 0] * y[0], weights[1, 1] * y[2]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("score", "renormalize"), [("softmax", False), ("sigmoid", True)])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(9, 4096, 3), (17, 257, 70)])
def test_routing_among_many(sim, tokens, experts, top_k, score, renormalize, dtype):
    make = arguments.maker(dtype, "cpu")
    logits, bias = make(tokens, experts), make(experts).float()
    args = (logits, bias, top_k, score, renormalize)
    assert error_over_slack(OPS["moe_route"], sim("moe_route"), args) <= 1
    weights, ids, _ = moe_route.reference(*args)
    args = (make(*weights.shape).float(), logits, ids, score, renormalize)
    grads = sim("moe_route_backward").run(*args)
    assert compare(OPS["moe_route_backward"], (grads,), args) <= 1


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
@pytest.mark.parametrize(
    ("tokens", "experts", "few"),
    [(1, 8, True), (32, 128, True), (33, 128, False), (32, 372, True), (32, 373, False)],
)
def test_few_tokens_are_one_launch(sim, module, tokens, experts, few, order):
    logits = arguments.maker(torch.bfloat16, "cpu")(tokens, experts)
    args = (logits, None, 4, "softmax", True)
    module.set_device(order=order)
    module.launched()
    weights, ids, counts = sim("moe_route").run(*args)
    kernels = ["moe_route_few_kernel"] if few else ["memset", "moe_route_kernel"]
    assert module.launched() == kernels
    assert torch.equal(ids, moe_route.reference(*args)[1])
    assert torch.equal(counts, torch.bincount(ids.flatten(), minlength=experts))
    assert error_over_slack(OPS["moe_route"], sim("moe_route"), args) <= 1


def test_infinities_and_nan_are_chosen_as_on_the_cpu(sim):
    inf = float("inf")
    rows = [
        [-inf, 0.0, -inf, -inf],
        [-inf] * 4,
        [1.0, float("nan"), inf, 2.0],
        [0.0, -0.0, 0.0, -0.0],
    ]
    for score in moe_route.SCORES:
        args = (torch.tensor(rows), None, 3, score, False)
        ours, theirs = sim("moe_route").run(*args), OPS["moe_route"].backend("cpu").run(*args)
        assert torch.equal(ours[1], theirs[1])
        assert torch.equal(ours[2], theirs[2])
        torch.testing.assert_close(ours[0], theirs[0], equal_nan=True)


def test_copies_keep_every_bit(sim):
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(256, 256)
    x = bits.view(torch.bfloat16)  # NaNs with every payload
    sources = torch.randperm(256, generator=torch.Generator().manual_seed(0)).int()
    for rows in (x, x[:, 1:]):  # in vectors, and element by element
        out = sim("moe_dispatch").run(rows, sources, sources.view(256, 1))
        assert torch.equal(out.view(torch.int16), rows[sources.long()].view(torch.int16))


@pytest.mark.parametrize("op", ["moe_route", "moe_route_backward", "moe_index"])
def test_too_many_experts_are_refused(op, monkeypatch):
    monkeypatch.setattr("ceg_kernels.native.cuda_why_not", lambda *args: None)
    logits, ids = torch.zeros(2, 4097), torch.zeros(2, 1, **INT32)
    args = {
        "moe_route": (logits, None, 1, "softmax", True),
        "moe_route_backward": (torch.zeros(2, 1), logits, ids, "softmax", True),
        "moe_index": (ids, 4097, -1),
    }[op]
    assert OPS[op].backend("cuda").why_not(*args) == "needs at most 4096 experts, got 4097"


def test_the_launchers_refuse_what_they_cannot_do(module):
    ids, slots = torch.zeros(2, 1, **INT32), torch.zeros(2, 1, **INT32)
    sources, wide = torch.zeros(2, **INT32), torch.zeros(1, 4097, **INT32)
    with pytest.raises(
        ValueError, match=r"offsets must have shape \(E \+ 1,\) with E in \[0, 4096"
    ):
        module.moe_index(ids, slots, sources, torch.zeros(4098, **INT32), wide)
    with pytest.raises(ValueError, match=r"counts must have shape \(1, 3\), got \(1, 4097\)"):
        module.moe_index(ids, slots, sources, torch.zeros(4, **INT32), wide)
    with pytest.raises(ValueError, match="at most 4096 experts, got"):
        module.moe_route(torch.zeros(2, 4097), None, *(torch.zeros(0),) * 3, "softmax", True)
    with pytest.raises(ValueError, match="score must be softmax or sigmoid, got tanh"):
        module.moe_route(torch.zeros(2, 4), None, torch.zeros(2, 1), ids, torch.zeros(4, **INT32),
                         "tanh", True)  # fmt: skip
    with pytest.raises(ValueError, match="x must be float32 or bfloat16 or float16, got float64"):
        module.moe_dispatch(torch.zeros(2, 4).double(), sources, 1, torch.zeros(2, 4).double())

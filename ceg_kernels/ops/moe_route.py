"""The router of a mixture of experts: scores, top-k and the number of tokens per expert.

score softmax: s = softmax(logits); sigmoid: s = 1 / (1 + exp(-logits)). The k experts with the
largest s + bias are chosen (ties: the lower index), in falling order; `bias` steers the choice only
and never enters a weight (loss-free balancing, arXiv 2408.15664). weights = s of the chosen,
divided by their sum if `renormalize`.

Backward, with w the weights, S their sum before renormalising and dw the upstream gradient:
ds_j = (dw_j - sum(dw * w)) / S for a chosen j if `renormalize`, else dw_j; then softmax's
dlogits = s * (ds - sum(ds * s)) or sigmoid's dlogits = ds * s * (1 - s).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ceg_kernels import native, triton
from ceg_kernels.op import Backend, Cost, ErrorInput, Op, Sample, Shape
from ceg_kernels.ops import arguments

# logits: (N, E), bias: (E,) or None, weights: (N, K), expert_ids: (N, K), tokens_per_expert: (E,)
SCORES = ("softmax", "sigmoid")


def _scores(logits, score):
    wide = logits.to(native.math_dtype(logits.dtype))
    return wide.softmax(-1) if score == "softmax" else wide.sigmoid()


def reference(logits, bias, top_k, score, renormalize):
    scores = _scores(logits, score)
    # Without a bias the logits decide: the same order, without the ties that rounding makes.
    ranked = logits if bias is None else scores + bias
    ids = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(-1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids.int(), count_tokens(ids, logits.shape[1])


def count_tokens(expert_ids: Tensor, num_experts: int) -> Tensor:
    """How many choices fall on each expert: (E,) int32, without a host sync."""
    flat = expert_ids.reshape(-1).long()
    counts = torch.zeros(num_experts, dtype=torch.int32, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))


def check_expert_ids(expert_ids: Tensor, num_experts: int) -> None:
    """On CPU only: on a GPU looking at the values would wait for it."""
    if expert_ids.device.type == "cpu" and expert_ids.numel():
        low, high = int(expert_ids.min()), int(expert_ids.max())
        if low < 0 or high >= num_experts:
            bad = low if low < 0 else high
            raise ValueError(f"expert_ids must be in [0, {num_experts}), got {bad}")


def reference_backward(dweights, logits, expert_ids, score, renormalize):
    scores, ids = _scores(logits, score), expert_ids.long()
    chosen, dchosen = scores.gather(-1, ids), dweights.to(scores.dtype)
    if renormalize:
        total = chosen.sum(-1, keepdim=True)
        dchosen = (dchosen - (dchosen * chosen / total).sum(-1, keepdim=True)) / total
    ds = torch.zeros_like(scores).scatter_(-1, ids, dchosen)
    if score == "softmax":
        return (scores * (ds - (ds * scores).sum(-1, keepdim=True))).to(logits.dtype)
    return (ds * scores * (1 - scores)).to(logits.dtype)


def cost(logits, bias, top_k, score, renormalize):
    """softmax: max, difference, exp, sum, quotient; sigmoid: exp, sum, quotient; 2 per weight."""
    n, e = logits.shape
    per_logit = (5 if score == "softmax" else 3) + (bias is not None)
    size = native.math_dtype(logits.dtype).itemsize
    chosen = n * top_k * (size + 4) + 4 * e
    flops = per_logit * n * e + (2 * n * top_k if renormalize else 0)
    return Cost(flops, logits.nbytes + (0 if bias is None else bias.nbytes) + chosen)


def cost_backward(dweights, logits, expert_ids, score, renormalize):
    """The scores again are executed, not counted; softmax 4, sigmoid 3; 5 to renormalise."""
    per_logit = 4 if score == "softmax" else 3
    flops = per_logit * logits.numel() + (5 * dweights.numel() if renormalize else 0)
    return Cost(flops, 2 * logits.nbytes + dweights.nbytes + expert_ids.nbytes)


def samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = arguments.maker(dtype, device)
    wide = native.math_dtype(dtype)
    # Left out: fewer than some fifty numbers. With N5 E4 K4 the rule refuses one seed in 30, whose
    # base is exact to 0.2 ulp, though kernels and base both err by 0.7 in the median, 1.8 at most.
    for n, e, k in [
        (1, 1, 1), (63, 8, 2), (257, 128, 8), (50, 60, 4), (16, 3, 3), (160, 3, 3), (0, 4, 2),
    ]:  # fmt: skip
        for score in SCORES:
            for renormalize in (True, False):
                name = f"N{n} E{e} K{k} {score} renormalize={renormalize}"
                yield Sample(name, (make(n, e), None, k, score, renormalize))
    logits, bias = make(256, 16), (make(16) * 0.1).to(wide)
    yield Sample("bias softmax", (logits, bias, 4, "softmax", True))
    yield Sample("bias sigmoid", (logits, bias, 4, "sigmoid", False))
    yield Sample("ties", ((logits * 2).round() / 2, None, 4, "softmax", True))
    # A naive exp overflows; 1e4 leaves one expert, 40 several.
    yield Sample("large logits", (logits * 40, None, 2, "softmax", True))
    yield Sample("huge logits", (logits * 1e4, None, 2, "softmax", True))
    yield Sample("strided", (make(64, 40)[:, ::2], None, 3, "sigmoid", True))


def samples_backward(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    make = arguments.maker(dtype, device)
    for sample in samples(dtype, device):
        logits, bias, top_k, score, renormalize = sample.args
        weights, ids, _ = reference(*sample.args)
        dweights = make(*weights.shape).to(weights.dtype)
        yield Sample(sample.name, (dweights, logits, ids, score, renormalize))


def _shape(group: str, n: int, e: int, k: int) -> Shape:
    def args(dtype, device):
        return arguments.maker(dtype, device)(n, e), None, k, "softmax", True

    return Shape(group, args)


def _shape_backward(forward: Shape) -> Shape:
    def args(dtype, device):
        logits, bias, top_k, score, renormalize = forward.make(dtype, device)
        weights, ids, _ = reference(logits, bias, top_k, score, renormalize)
        dweights = arguments.maker(dtype, device)(*weights.shape).to(weights.dtype)
        return dweights, logits, ids, score, renormalize

    return Shape(forward.group, args)


SHAPES = {
    "quick-n2048-e16-k2": _shape("quick", 2048, 16, 2),
    "moe-n4096-e128-k8": _shape("moe", 4096, 128, 8),
}


def run_native(logits, bias, top_k, score, renormalize, *, launch):
    logits = native.unit_stride(logits)
    (n, e), wide = logits.shape, native.math_dtype(logits.dtype)
    weights = logits.new_empty((n, top_k), dtype=wide)
    ids = logits.new_empty((n, top_k), dtype=torch.int32)
    counts = logits.new_empty(e, dtype=torch.int32)
    bias = native.as_math(bias, logits.dtype)
    launch("moe_route", logits, bias, weights, ids, counts, score, renormalize)
    return weights, ids, counts


def run_native_backward(dweights, logits, expert_ids, score, renormalize, *, launch):
    logits = native.unit_stride(logits)
    dlogits = native.empty_like(logits)
    dweights, ids = native.as_math(dweights, logits.dtype), native.dense(expert_ids)
    launch("moe_route_bwd", dweights, logits, ids, dlogits, score, renormalize)
    return dlogits


def too_many_experts(experts: int) -> str | None:
    """Why the CUDA kernels, which keep a row of experts in shared memory, refuse so many."""
    most = 4096  # kMostExperts in csrc/cuda/moe.h
    return f"needs at most {most} experts, got {experts}" if experts > most else None


def cuda_why_not(logits, *rest):
    return native.cuda_why_not(logits, *rest) or too_many_experts(logits.shape[1])


def cuda_why_not_backward(dweights, logits, *rest):
    return cuda_why_not(logits, dweights, *rest)


def why_not_triton(logits, *rest):
    return triton.why_not_experts(logits.shape[1], logits, *rest)


def why_not_triton_backward(dweights, logits, *rest):
    return triton.why_not_experts(logits.shape[1], logits, dweights, *rest)


def fake(logits, bias, top_k, score, renormalize):
    n, e = logits.shape
    weights = logits.new_empty((n, top_k), dtype=native.math_dtype(logits.dtype))
    return (
        weights,
        weights.new_empty((n, top_k), dtype=torch.int32),
        logits.new_empty(e, dtype=torch.int32),
    )


def fake_backward(dweights, logits, expert_ids, score, renormalize):
    return logits.new_empty(logits.shape)


def error_inputs() -> Iterator[ErrorInput]:
    logits = torch.zeros(4, 3)
    yield ErrorInput(lambda: moe_route(logits, 4), r"top_k must be in \[1, 3\].*, got 4")
    yield ErrorInput(lambda: moe_route(logits, 0), r"top_k must be in \[1, 3\].*, got 0")
    yield ErrorInput(lambda: moe_route(logits[0], 1), r"logits must be \(N, E\), got \(3,\)")
    yield ErrorInput(lambda: moe_route(logits.int(), 1), "logits must have dtype", TypeError)
    yield ErrorInput(
        lambda: moe_route(logits, 1, score="tanh"), "score must be softmax or sigmoid, got 'tanh'"
    )
    yield ErrorInput(
        lambda: moe_route(logits, 1, bias=torch.zeros(4)), r"bias must have shape \(3,\), got \(4,"
    )
    ids = torch.zeros(4, 3, dtype=torch.int32)
    yield ErrorInput(
        lambda: Routing.of(torch.zeros(4, 2), ids, 3),
        r"expert_ids must have shape \(4, 2\), got \(4, 3\)",
    )
    yield ErrorInput(
        lambda: Routing.of(torch.zeros(4, 3), ids + 3, 3), r"expert_ids must be in \[0"
    )


def save(ctx, inputs, output):
    logits, _, _, ctx.score, ctx.renormalize = inputs
    _, ids, counts = output
    ctx.mark_non_differentiable(ids, counts)
    ctx.save_for_backward(logits, ids)


def backward(ctx, dweights, dids, dcounts):
    logits, ids = ctx.saved_tensors
    if dweights is None:
        return None, None, None, None, None
    dlogits = MOE_ROUTE_BACKWARD(dweights, logits, ids, ctx.score, ctx.renormalize)
    return dlogits, None, None, None, None


MOE_ROUTE = Op(
    name="moe_route",
    schema="(Tensor logits, Tensor? bias, int top_k, str score, bool renormalize)"
    " -> (Tensor weights, Tensor expert_ids, Tensor tokens_per_expert)",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    shapes=SHAPES,
    # torch.topk breaks ties as it likes, so stock torch's honest equivalent is the stable sort.
    backends=(
        *native.native_backends("moe_route", run_native, cuda_refuses=cuda_why_not),
        Backend("triton", triton.launcher("moe_route", "forward"), why_not_triton, automatic=False),
        Backend("torch", reference),
        Backend("reference", reference),
    ),
    error_inputs=error_inputs,
    save=save,
    backward=backward,
)

MOE_ROUTE_BACKWARD = Op(
    name="moe_route_backward",
    schema="(Tensor dweights, Tensor logits, Tensor expert_ids, str score, bool renormalize)"
    " -> Tensor",
    reference=reference_backward,
    fake=fake_backward,
    cost=cost_backward,
    samples=samples_backward,
    shapes={name: _shape_backward(shape) for name, shape in SHAPES.items()},
    backends=(
        *native.native_backends(
            "moe_route_backward", run_native_backward, cuda_refuses=cuda_why_not_backward
        ),
        Backend(
            "triton",
            triton.launcher("moe_route", "backward"),
            why_not_triton_backward,
            automatic=False,
        ),
        Backend("torch", reference_backward),
        Backend("reference", reference_backward),
    ),
)


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to, and with what weight."""

    weights: Tensor  # (N, K) fp32 (fp64 for fp64 logits)
    expert_ids: Tensor  # (N, K) int32, in [0, E)
    tokens_per_expert: Tensor  # (E,) int32, before any capacity

    @classmethod
    def of(cls, weights: Tensor, expert_ids: Tensor, num_experts: int) -> Routing:
        """For models that bring their own router: weights (N, K), expert_ids (N, K) integers.

        Raises ValueError for shapes that differ and (on CPU) for an id outside [0, num_experts).
        """
        integers = (torch.int32, torch.int64)
        arguments.check_like("expert_ids", expert_ids, weights, weights.shape, dtypes=integers)
        if not torch.compiler.is_compiling():
            check_expert_ids(expert_ids, num_experts)
        return cls(weights, expert_ids.int(), count_tokens(expert_ids, num_experts))


def moe_route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    bias: Tensor | None = None,
    renormalize: bool = True,
) -> Routing:
    """Choose top_k experts a token and their weights.

    logits: (N, E), fp32, bf16, fp16 or fp64. score: "softmax" or "sigmoid". bias: (E,), added to
    the scores for the choice only. renormalize: weights of a token sum to 1. Ties go to the lower
    index; experts come in falling order. Differentiable in logits through the weights. Raises
    TypeError for a dtype and ValueError for a shape, score or top_k that does not fit.
    """
    arguments.check_float("logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits must be (N, E), got {tuple(logits.shape)}")
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k must be in [1, {logits.shape[1]}] (experts), got {top_k}")
    if score not in SCORES:
        raise ValueError(f"score must be {' or '.join(SCORES)}, got {score!r}")
    if bias is not None:
        wide = (native.math_dtype(logits.dtype), logits.dtype, torch.float32)
        arguments.check_like("bias", bias, logits, (logits.shape[1],), dtypes=wide)
    return Routing(*MOE_ROUTE(logits, bias, top_k, score, renormalize))

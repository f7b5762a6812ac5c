"""The accuracy rule: the only tolerance of the project, used by the tests and before any timing.

    gold = reference in fp64;  base = reference in fp32, rounded once to the output's dtype
    max|out - gold|  <=  slack * max|base - gold|  +  half an ulp of the largest output

base is the best rounding that fp32 maths can give, so the rule asks for "as good as the formula in
fp32, within a factor" and needs no number per op, size or dtype. The half ulp is for outputs where
base happens to be exact. fp64 outputs, which exist for gradcheck, have no better gold than the same
formula in the same precision. With e = max|base - gold| scaled from fp32's epsilon to fp64's, an
output may err by slack * e + ulp / 2 and gold itself by what a slack of 1 allows, so together

    max|out - gold|  <=  (slack + 1) * e  +  an ulp of the largest output

The rule compares two draws of rounding error, so it is fair where many elements have a say in the
largest error. A sample with a few numbers, or one whose terms cancel to nothing, fails or passes by
luck; such samples are larger than they would have to be, or say beside them what they leave out.
Integer outputs must be equal; NaN and infinities must stand where gold has them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ceg_kernels.op import Backend, Op

FP32_REDUCTION_SLACK = 4.0  # long sums kept in fp32: the order of summation differs
EAGER_SLACK = 4.0  # see compare_eager


def promote(args: tuple, dtype: torch.dtype) -> tuple:
    """The arguments with every floating tensor in `dtype`."""
    return tuple(
        a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
    )


def as_tuple(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def error_over_slack(op: Op, backend: Backend | str, args: tuple) -> float:
    """The worst error of any output as a fraction of what the rule allows: at most 1 passes.

    inf where a shape, a dtype, an integer, or the place of a NaN or infinity is wrong.
    """
    chosen = op.backend(backend) if isinstance(backend, str) else backend
    return compare(op, as_tuple(chosen.run(*args)), args)


def compare(op: Op, outs: tuple[Tensor, ...], args: tuple) -> float:
    """`error_over_slack` of outputs that are already there."""
    summed = [
        i in op.fp32_reductions and out.dtype in (torch.float32, torch.float64)
        for i, out in enumerate(outs)
    ]
    slacks = [FP32_REDUCTION_SLACK if s else op.slack for s in summed]
    return _worst(op, outs, args, promote(args, torch.float32), slacks)


def with_remembered_reference(op: Op) -> Op:
    """The op for checking several backends on the same arguments: gold and base computed once."""
    known: dict[torch.dtype | None, Any] = {}

    def reference(*args: Any) -> Any:
        floats = (a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point())
        dtype = next(floats, None)
        if dtype not in known:
            known[dtype] = op.reference(*args)
        return known[dtype]

    checked = copy.copy(op)  # shallow, so that nothing is registered again
    checked.reference = reference
    return checked


def compare_eager(op: Op, outs: tuple[Tensor, ...], args: tuple) -> float:
    """The same for code that rounds scores, probabilities or sums to 16 bits on its way.

    No slack on fp32 maths can hold it. It may err as if the inputs had been off by half an ulp
    each, which is what rounding inside does to the result, four times over (q * scale, the score,
    its softcap and bias, the probability).
    """
    return _worst(op, outs, args, _off_by_half_an_ulp(args), [EAGER_SLACK] * len(outs))


def _worst(op: Op, outs: tuple, args: tuple, base_args: tuple, slacks: list[float]) -> float:
    golds = as_tuple(op.reference(*promote(args, torch.float64)))
    bases = as_tuple(op.reference(*base_args))
    worst = 0.0
    for out, gold, base, fake, slack in zip(
        outs, golds, bases, _expected(op, args), slacks, strict=True
    ):
        if out.shape != gold.shape or out.dtype != fake.dtype:
            return float("inf")
        worst = max(worst, error_fraction(out, gold, base, slack))
    return worst


def _off_by_half_an_ulp(args: tuple) -> tuple:
    """The arguments in fp64, the 16-bit ones times 1 + u, u uniform within their rounding error."""
    generator = torch.Generator().manual_seed(0)

    def off(a: Any) -> Any:
        if not isinstance(a, Tensor) or not a.is_floating_point() or a.dtype.itemsize != 2:
            return a
        u = torch.rand(a.shape, generator=generator, dtype=torch.float64).to(a.device) - 0.5
        return a.double() * (1 + torch.finfo(a.dtype).eps * u)

    return promote(tuple(map(off, args)), torch.float64)


def _expected(op: Op, args: tuple) -> tuple[Tensor, ...]:
    meta = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args)
    return as_tuple(op.fake(*meta))


def error_fraction(out: Tensor, gold: Tensor, base: Tensor, slack: float) -> float:
    """The error of one output as a fraction of what the rule allows.

    gold: the formula in fp64; base: in fp32, rounded to out's dtype here; both of out's shape.
    """
    if out.numel() == 0:
        return 0.0
    if not out.is_floating_point():
        return 0.0 if torch.equal(out.long(), gold.long()) else float("inf")
    wide, finite = out.double(), gold.isfinite()
    if not torch.equal(wide[~finite].nan_to_num(7.0), gold[~finite].nan_to_num(7.0)):
        return float("inf")
    if not finite.any():
        return 0.0
    gold, wide, base = gold[finite], wide[finite], base[finite].to(out.dtype).double()
    error = (wide - gold).abs().max().item()
    if error != error:  # NaN where gold has none
        return float("inf")
    largest = gold.abs().max().to(out.dtype)
    ulp = torch.nextafter(largest, torch.full_like(largest, torch.inf)).double() - largest.double()
    if out.dtype == torch.float64:
        eps = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        allowed = (slack + 1) * eps * (base - gold).abs().max() + ulp
    else:
        allowed = slack * (base - gold).abs().max() + 0.5 * ulp
    return error / max(allowed.item(), torch.finfo(torch.float64).tiny)

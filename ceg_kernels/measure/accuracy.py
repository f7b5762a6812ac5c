"""The accuracy rule: the only tolerance of the project, used by the tests and before any timing.

    gold = reference in fp64;  base = reference in fp32, rounded once to the output's dtype
    max|out - gold|  <=  slack * max|base - gold|  +  half an ulp of the largest output

base is the best rounding that fp32 maths can give, so the rule asks for "as good as the formula in
fp32, within a factor" and needs no number per op, size or dtype. The half ulp is for outputs where
base happens to be exact. fp64 outputs exist for gradcheck, which sees 1e-7; they are held to the
same rule with the error of base scaled from fp32's precision to fp64's, and a slack of their own,
since that scaling is an estimate and the kernels' fp64 exponentials are good to some ulp only.
Integer outputs must be equal; NaN and infinities must stand where gold has them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ceg_kernels.op import Backend, Op

FP32_REDUCTION_SLACK = 4.0  # long sums kept in fp32: the order of summation differs
FP64_SLACK = 16.0


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
    golds = as_tuple(op.reference(*promote(args, torch.float64)))
    bases = as_tuple(op.reference(*promote(args, torch.float32)))
    fakes = _expected(op, args)
    worst = 0.0
    for i, (out, gold, base, fake) in enumerate(zip(outs, golds, bases, fakes, strict=True)):
        if out.shape != gold.shape or out.dtype != fake.dtype:
            return float("inf")
        slack = op.slack
        if out.dtype == torch.float64:
            slack = FP64_SLACK
        elif i in op.fp32_reductions and out.dtype == torch.float32:
            slack = FP32_REDUCTION_SLACK
        worst = max(worst, _fraction(out, gold, base, slack))
    return worst


def _expected(op: Op, args: tuple) -> tuple[Tensor, ...]:
    meta = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args)
    return as_tuple(op.fake(*meta))


def _fraction(out: Tensor, gold: Tensor, base: Tensor, slack: float) -> float:
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
    allowed = slack * (base - gold).abs().max().item()
    if out.dtype == torch.float64:
        allowed = slack * (base.float().double() - gold).abs().max().item()
        allowed *= torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    largest = gold.abs().max().to(out.dtype)
    ulp = torch.nextafter(largest, torch.full_like(largest, torch.inf)).double() - largest.double()
    return error / max(allowed + 0.5 * ulp.item(), torch.finfo(torch.float64).tiny)

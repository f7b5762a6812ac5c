"""CUDA attention without a GPU: the op's samples in the simulator, and the index arithmetic whole.

Left out: fp32 (refused), head_dims that are no multiple of 8 (refused), anything about speed.
"""

import cuda_sim
import pytest
import torch
from numerics import as_tuple, compare
from test_cuda import bits, module, needs_simulator, sim  # noqa: F401

from ceg_kernels import OPS

pytestmark = needs_simulator

DTYPES = (torch.bfloat16, torch.float16)
ON_CUDA = ["attention"]


def fits(sample):
    q = next(a for a in sample.args if isinstance(a, torch.Tensor))
    return q.shape[-1] % 8 == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ON_CUDA)
def test_accuracy_and_the_same_bits_in_any_order_of_threads(sim, module, op, dtype):
    ran = 0
    for sample in OPS[op].samples(dtype, "cpu"):
        if not fits(sample):
            continue
        ran += 1
        outs = as_tuple(sim(op).run(*sample.args))
        worst = compare(OPS[op], outs, sample.args)
        assert worst <= 1, f"{sample.name}: error is {worst:.2f} times what the rule allows"
        module.set_device(order="reverse")
        for a, b in zip(outs, as_tuple(sim(op).run(*sample.args)), strict=True):
            assert torch.equal(bits(a), bits(b)), f"{sample.name}: depends on the order of threads"
        module.set_device()
    assert ran > 25

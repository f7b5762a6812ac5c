"""The simulator itself: right kernels run, wrong ones are caught, and how it says so."""

import cuda_sim
import numpy as np
import pytest
import torch

pytestmark = cuda_sim.needed
ORDERS = ("forward", "reverse", "shuffled")


def run(module, kernel, **options):
    out = np.zeros(96, np.float32)
    module.selftest(kernel, out, **options)
    return out


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles_shared_memory_and_barriers(module, order):
    module.set_device(order=order)
    assert (run(module, "block_sum") == sum(range(96))).all()


def test_a_missing_barrier_shows(module):
    wrong = {}
    for order in ORDERS:
        module.set_device(order=order)
        wrong[order] = np.isnan(run(module, "missing_barrier"))
    assert all(found.any() for found in wrong.values())
    assert (wrong["forward"] != wrong["reverse"]).all()  # a half of the threads each


def test_shared_memory_that_nobody_wrote_is_nan_in_every_block(module):
    assert np.isnan(run(module, "unwritten_shared")).all()


@pytest.mark.parametrize(
    ("kernel", "text"),
    [
        ("divergent_barrier",
         r"divergent_barrier, block \(0, 0, 0\): .*: 1 have exited \(first: .*5.*, 95 wait in __"),
        ("too_few_at_a_barrier", r"64 have exited .*, 32 wait in bar.sync 1"),
        ("nobody_waits", r"block \(0, 0, 0\): ends with 96 threads counted at barrier 2"),
        ("two_collectives", "lanes of a warp meet in __shfl_sync and in __ballot_sync"),
        ("misaligned", r"block \(0, 0, 0\), thread \(0, 0, 0\): misaligned access of 16 bytes"),
        ("beyond_dynamic_shared", "the launch asked for no dynamic shared memory"),
    ],
)  # fmt: skip
def test_what_would_hang_or_trap_is_an_exception(module, kernel, text):
    with pytest.raises(RuntimeError, match=text):
        run(module, kernel)
    assert (run(module, "block_sum") == sum(range(96))).all()  # nothing of it stays


def test_a_launch_beyond_the_limits_of_the_gpu_is_refused(module):
    module.set_device(shared_limit=1000)
    with pytest.raises(RuntimeError, match="block_sum: needs 1001 bytes of shared memory a block"):
        run(module, "block_sum", shared_bytes=1001)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_to_16_bits_round_as_torch_does(module, dtype):
    special = [0.0, 1e-8, 2.98e-8, 2.99e-8, 6.1e-5, 6.0975e-5, 65504, 65519.9, 65520, 1e38, 3.39e38]
    special += [float("inf"), 1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-11, 1 + 3 * 2**-11]
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (3000,), generator=generator, dtype=torch.int32)
    values = torch.cat([torch.tensor(special), -torch.tensor(special), bits.view(torch.float32)])
    values = torch.cat([values, torch.randn(1000, generator=generator)])
    ours = torch.tensor([module.through_16_bits(v, str(dtype)[6:]) for v in values.tolist()])
    assert torch.equal(ours.nan_to_num(7e37), values.to(dtype).float().nan_to_num(7e37))


@pytest.mark.parametrize("kernel", ["beyond_shared", "beyond_dynamic_shared", "beyond_the_output"])
def test_address_sanitizer_sees_what_lies_beyond_the_end(kernel):
    code = (
        "import numpy as np; out = np.zeros(96, np.float32)\n"
        "sim.selftest('block_sum', out, 384); print('block_sum', out[0])\n"
        f"sim.selftest({kernel!r}, out, 384)\n"
    )
    done = cuda_sim.run_under_asan(code)
    assert done.stdout == "block_sum 4560.0\n", done.stderr
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "selftest.cpp" in done.stderr

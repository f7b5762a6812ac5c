"""Options of the benchmarks, here at the root so that they hold wherever pytest is started.

`--benchmark` turns `pytest bench/` from a smoke test (every body runs once) into benchmarks.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter. It is asked for before anything of
# ours is imported, because a kernel is compiled or interpreted for good.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHAPE_GROUPS = ("quick", "gpt2", "llama", "moe", "all")
DTYPES = ("float32", "bfloat16", "float16", "float64")
PEERS = (
    "torch", "reference", "eager", "compile", "liger", "flash-attn", "cudnn", "flash", "loop",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ceg", "benchmarks of ceg_kernels")
    group.addoption(
        "--benchmark", action="store_true", default=False,
        help="time the benchmarks in bench/ (and run nothing else); without it each runs once",
    )  # fmt: skip
    group.addoption(
        "--shapes", choices=SHAPE_GROUPS, default="quick",
        help="which named shapes to bench (default: %(default)s)",
    )  # fmt: skip
    group.addoption(
        "--dtypes", default="float32,bfloat16", help="dtypes to bench (default: %(default)s)"
    )
    group.addoption(
        "--device", default=None, help="cpu or cuda (default: cuda where torch can use a GPU)"
    )
    group.addoption(
        "--peers", metavar="NAMES", default="torch,reference",
        help=f"what to time beside ours: all, or some of {','.join(PEERS)} (default: %(default)s)",
    )  # fmt: skip
    group.addoption(
        "--no-peers", action="store_const", const="", dest="peers",
        help="time only our own backends",
    )  # fmt: skip
    group.addoption(
        "--results", metavar="PATH", default=None,
        help="append the rows to this .jsonl file; a folder gets <machine>.jsonl in it",
    )  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its own options
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    for name, known in (("dtypes", DTYPES), ("peers", (*PEERS, "all", ""))):
        for value in config.getoption(name).split(","):
            if value not in known:
                expected = ", ".join(filter(None, known))
                raise pytest.UsageError(f"--{name} must be some of {expected}, got {value!r}")
    device = config.getoption("--device") or "cpu"
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device must be cpu or cuda, got {device!r}")
    if device != "cpu" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {device} must be a GPU that torch can use, got none")
    if "all" in config.option.peers.split(","):
        config.option.peers = ",".join(PEERS)
    wanted = config.getoption("--benchmark")
    if importlib.util.find_spec("pytest_benchmark") is None:
        if wanted:
            raise pytest.UsageError("--benchmark needs pytest-benchmark: pip install -e .[bench]")
        return
    option = config.option
    if not wanted:
        option.benchmark_disable = not option.benchmark_enable
        return
    option.benchmark_only = True
    # Its table of seconds is left out where ours says the same; whoever asks for a comparison, a
    # histogram or more words gets it.
    asked = (option.benchmark_compare, option.benchmark_histogram, option.benchmark_verbose)
    option.benchmark_quiet = not any(asked)

"""The CUDA kernels compiled for the architectures that the default build leaves to others.

The build at hand has machine code for its own (`test_cuda_build.py`); here nvcc makes that of every
other one that the project names, which takes two minutes on two cores.
"""

import concurrent.futures
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from test_cuda_build import SOURCES, Usage, archs, declared, native, usages

SUPPORTED = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH"),
    pytest.mark.skipif(
        not hasattr(native._C, "cuda"), reason="the extension was built without CUDA"
    ),
]


def machine_code_for(source: Path, others: list[str], folder: Path) -> list[Usage]:
    """What nvcc makes of one file, with the flags of the build."""
    target = folder / f"{source.stem}.o"
    wanted = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in others]
    command = ["nvcc", "-std=c++20", "-O3", "-DNDEBUG", "-c", *wanted, "-o", target, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return usages(target)


def test_every_kernel_compiles_for_every_architecture_without_spills(tmp_path):
    others = [arch for arch in SUPPORTED if arch not in archs()]
    if not others:
        pytest.skip("the build has them all: test_cuda_build.py reads those")
    # The longest first, so that none is left alone at the end.
    sources = sorted(SOURCES.glob("*.cu"), key=lambda s: "attention_sm80" not in s.stem)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda source: machine_code_for(source, others, tmp_path), sources)
        usage = [one for file in found for one in file]
    wrong = [f"{u.arch} {u.symbol}: {u.wrong}" for u in usage if u.wrong]
    assert not wrong, "\n".join(wrong)
    for arch in others:
        symbols = " ".join(u.symbol for u in usage if u.arch == arch)
        missing = [name for name in declared() if name not in symbols]
        assert not missing, f"{arch} lacks {missing}"

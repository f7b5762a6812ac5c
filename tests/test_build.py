"""How the native module is built, and how a build that is out of date is noticed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ceg_kernels import build

ROOT = Path(__file__).resolve().parent.parent
INPUTS = ("CMakeLists.txt", "cmake", "csrc")


def copy_sources(to):
    for name in INPUTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, to / name)
    return to


def test_hash_follows_every_input_of_the_build(tmp_path):
    root = copy_sources(tmp_path)
    before = build.hash_sources(root)
    assert before == build.hash_sources(ROOT)
    seen = {before}
    for edited in ("CMakeLists.txt", "cmake/cuda.cmake", "csrc/tensor.h", "csrc/cuda/device.cu"):
        with (root / edited).open("a") as file:
            file.write("\n")
        seen.add(build.hash_sources(root))
    (root / "csrc/cpu/isa.h").rename(root / "csrc/cpu/levels.h")
    seen.add(build.hash_sources(root))
    assert len(seen) == 6


def test_import_warns_of_a_stale_build(tmp_path, monkeypatch):
    pytest.importorskip("ceg_kernels._C")
    monkeypatch.setattr(build, "_ROOT", copy_sources(tmp_path))
    (tmp_path / "csrc/tensor.h").write_text("edited")
    assert build.build_info()["stale"]
    with pytest.warns(RuntimeWarning, match=r"run `pip install -e \.` again"):
        build.warn_if_stale()
    monkeypatch.setattr(build, "_ROOT", tmp_path / "installed without sources")
    assert not build.stale()


def test_build_info_without_the_module(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ceg_kernels._C", None)
    monkeypatch.delattr("ceg_kernels._C", raising=False)
    info = build.build_info()
    assert info["native"] is None
    assert "_C" in info["why_not"]


@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("ninja"), reason="needs cmake")
@pytest.mark.parametrize(
    ("cuda", "cudacxx", "status", "text"),
    [
        ("0", None, 0, "CPU kernels only (CUDA skipped: CEG_CUDA=0"),
        ("1", "/nonexistent/nvcc", 1, "CUDACXX must be an nvcc that runs, got /nonexistent/nvcc"),
    ],
)
def test_configuring_says_in_one_line_what_becomes_of_cuda(tmp_path, cuda, cudacxx, status, text):
    environment = {**os.environ, "CEG_CUDA": cuda}
    if cudacxx:
        environment["CUDACXX"] = cudacxx
    done = subprocess.run(
        ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", "-DCEG_SITE_PACKAGES=/nonexistent"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    output = " ".join((done.stdout + done.stderr).split())  # CMake wraps its errors
    assert (done.returncode != 0) == bool(status), output
    assert text in output

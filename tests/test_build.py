"""How the native module is built, and how a build that is out of date is noticed."""

import os
import runpy
import shutil
import subprocess
import sysconfig
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


@pytest.fixture
def backend(monkeypatch, tmp_path):
    """pip's build backend, in an environment that has no tools of its own."""
    pytest.importorskip("setuptools")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    return runpy.run_path(str(ROOT / "cmake/build_backend.py"))


def program(folder, name, says, status=0):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\necho {says}\nexit {status}\n")
    (folder / name).chmod(0o755)
    return str(folder / name)


def test_a_build_asks_for_the_tools_that_are_missing(backend, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert backend["_missing"]() == ["cmake>=3.24", "ninja>=1.5"]
    program(tmp_path / "old", "cmake", "cmake version 3.9.9")
    program(tmp_path / "broken", "cmake", "cmake version 9.0.0", status=1)
    monkeypatch.setenv("PATH", f"{tmp_path}/old:{tmp_path}/broken")
    assert backend["find"]("cmake") is None
    good = program(tmp_path / "good", "cmake", "cmake version 3.24.0")
    monkeypatch.setenv("PATH", f"{tmp_path}/old:{tmp_path}/broken:{tmp_path}/good")
    assert backend["find"]("cmake") == good
    assert backend["_missing"]() == ["ninja>=1.5"]


def test_the_tools_of_the_environment_come_first(backend, tmp_path, monkeypatch):
    """So that builds with and without isolation use the same ones: others compile anew."""
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    for name, says in (("cmake", "cmake version 4.0.0"), ("ninja", "1.12.0")):
        program(tmp_path / "path", name, says)
    own = program(tmp_path / "scripts", "ninja", "1.11.1.git")
    binaries = tmp_path / "platlib/cmake/data/bin"
    binaries.mkdir(parents=True)
    binary = program(binaries, "cmake", "cmake version 3.30.1")
    assert (backend["find"]("cmake"), backend["find"]("ninja")) == (binary, own)

"""What a validation is of: the hash that a build knows of the sources of each family's kernels.

A project without a language configures cmake/kernel_hashes.cmake on a copy of the sources, in a
tenth of a second; that the extension holds the same is checked beside it.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ceg_kernels import OPS, build, native

ROOT = Path(__file__).resolve().parent.parent
PROJECT = """
cmake_minimum_required(VERSION 3.24)
project(hashes LANGUAGES NONE)
include(cmake/kernel_hashes.cmake)
file(WRITE ${CMAKE_BINARY_DIR}/hashes "${KERNEL_HASHES}")
"""

pytestmark = pytest.mark.skipif(native._C is None, reason=str(native.MISSING))
needs_cmake = pytest.mark.skipif(
    not shutil.which("cmake") or not shutil.which("ninja"), reason="needs cmake and ninja"
)


def parsed(text):
    return dict(pair.split("=") for pair in text.split())


class Copy:
    """The sources in a folder of their own, built by CMake alone."""

    def __init__(self, root):
        self.root = root
        shutil.copytree(ROOT / "cmake", root / "cmake")
        shutil.copytree(ROOT / "csrc", root / "csrc")
        (root / "CMakeLists.txt").write_text(PROJECT)
        self._run("-S", root, "-B", root / "build", "-G", "Ninja")

    def edit(self, name):
        with (self.root / name).open("a") as file:
            file.write("\n")

    def hashes(self):
        self._run("--build", self.root / "build")
        return parsed((self.root / "build" / "hashes").read_text())

    def _run(self, *arguments):
        subprocess.run(["cmake", *arguments], check=True, capture_output=True)


@needs_cmake
def test_an_edit_changes_the_hashes_of_the_kernels_that_it_reaches(tmp_path):
    copy = Copy(tmp_path)
    seen = copy.hashes()
    if not build.stale():
        assert seen == parsed(native._C.kernel_hashes())
    every = set(seen)
    assert len(set(seen.values())) == len(every)
    for name, reached in (
        ("csrc/cuda/rope.cu", {"rope"}),
        ("csrc/cuda/rms_norm_weight.h", {"rms_norm"}),
        ("csrc/attention_inputs.cpp", {"attention"}),
        ("csrc/cuda/moe_that_is_new.h", {"moe"}),
        ("csrc/cuda/vector.h", every),
        ("csrc/cuda/that_is_new.h", every),
        ("csrc/tensor.h", every),
        ("cmake/cuda.cmake", every),
        ("csrc/cpu/rope.cpp", set()),
        ("csrc/bindings.cpp", set()),
    ):
        copy.edit(name)
        now = copy.hashes()
        assert {family for family in every if now[family] != seen[family]} == reached, name
        seen = now


def test_no_kernel_includes_what_its_hash_leaves_out():
    families = parsed(native._C.kernel_hashes())

    def family(path):
        return next((f for f in families if re.match(rf"{f}[_.]", path.name)), None)

    files = [p for s in ("*.h", "*.cu", "../*.h") for p in (ROOT / "csrc/cuda").glob(s)]
    for path in files:
        if path.name in ("bindings.h", "build_info.h"):  # see all of them, and are seen by none
            continue
        for name in re.findall(r'#include "(.*?)"', path.read_text()):
            included = (path.parent / name).resolve()
            if included.parent.name == "sim":  # which nvcc does not see
                continue
            assert included in [p.resolve() for p in files], f"{path.name} includes {name}"
            assert family(included) in (None, family(path)), f"{path.name} includes {name}"


def test_every_cuda_backend_has_a_hash_of_one_family():
    families = parsed(native._C.kernel_hashes())
    for op in OPS.values():
        if "cuda" in [b.name for b in op.backends]:
            (family,) = [f for f in families if op.name.startswith(f)]
            assert native.kernel_hash(op.name) == families[family]
    assert native.kernel_hash("softmax") is None

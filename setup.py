"""Hands CMakeLists.txt, the only list of sources, to setuptools as `ceg_kernels._C`."""

import os
import runpy
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
from build_backend import find  # of cmake/, which pyproject.toml puts on the path
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def jobs() -> int:
    """As many compilers as there are cores, but no more than one per 4 GiB of free memory."""
    free_kib = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    return max(1, min(len(os.sched_getaffinity(0)), free_kib // (4 << 20)))


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        build = ROOT / "build" / sysconfig.get_config_var("SOABI")
        # Build isolation has another path each time; headers at a stable one keep a rebuild
        # without changes a matter of seconds.
        headers = build / f"pybind11-{pybind11.__version__}"
        if not headers.exists():
            shutil.copytree(pybind11.get_include(), headers)
        cmake, ninja = (find(tool) or tool for tool in ("cmake", "ninja"))
        hash_sources = runpy.run_path(str(ROOT / "ceg_kernels/build.py"))["hash_sources"]
        options = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "CEG_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "CEG_PYBIND11_INCLUDE": headers,
            "CEG_EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "CEG_SITE_PACKAGES": sysconfig.get_path("purelib"),
            "CEG_SOURCE_HASH": hash_sources(ROOT),
        }
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *definitions], check=True)
        subprocess.run([cmake, "--build", build, "-j", str(jobs())], check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a running process keeps the module that it has mapped.
        shutil.copy2(build / target.name, target.with_suffix(".new"))
        target.with_suffix(".new").replace(target)


setup(ext_modules=[Extension("ceg_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})

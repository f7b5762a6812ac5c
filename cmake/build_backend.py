"""setuptools' build backend; cmake and ninja are asked for only where none is found that runs.

An isolated build has a new environment each time, and unpacking cmake's wheel (86 MB) into it took
longer than all else in a rebuild without changes.
"""

import os
import re
import shutil
import subprocess
import sysconfig

from setuptools.build_meta import *  # noqa: F403

OLDEST = {"cmake": (3, 24), "ninja": (1, 5)}


def find(tool: str) -> str | None:
    """The first that runs and is new enough, in the environment that is installed to, then on PATH.

    tool: "cmake" or "ninja". None where there is none.
    """
    # The script that cmake's wheel installs cannot import its package from an isolated build.
    binaries = os.path.join(sysconfig.get_path("platlib"), "cmake", "data", "bin")
    path = [binaries, sysconfig.get_path("scripts"), *os.environ["PATH"].split(os.pathsep)]
    found = (shutil.which(tool, path=folder) for folder in path)
    return next((program for program in found if program and _runs(program, OLDEST[tool])), None)


def _runs(program: str, oldest: tuple[int, ...]) -> bool:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"\d+(\.\d+)+", done.stdout) if done.returncode == 0 else None
    return version is not None and tuple(map(int, version[0].split("."))) >= oldest


def _missing(config_settings: dict | None = None) -> list[str]:
    oldest = {tool: ".".join(map(str, version)) for tool, version in OLDEST.items()}
    return [f"{tool}>={version}" for tool, version in oldest.items() if find(tool) is None]


# setup.py has no requirements of its own for setuptools to find, which would take it a second run.
get_requires_for_build_wheel = get_requires_for_build_editable = _missing

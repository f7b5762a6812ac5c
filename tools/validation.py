"""Which CUDA kernels passed their tests on a GPU, written into ceg_kernels/validated.json.

    python tools/validation.py FOLDER      # where tools/gpu.py left its reports

An op is recorded for the family of the GPU if its accuracy was tested there and passed, none of its
tests failed or ran out of time, and no sanitizer that ran to its end found anything. The folder may
come from another machine: a run without a git checkout takes its commit from this one, if the
sources are the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "ceg_kernels" / "validated.json"
SHARED = ("gradients", "models")  # tests of several kernels
PROPERTY = "cuda_kernel"  # that tests/conftest.py gives to the tests of a kernel on a GPU


def about(gpu: str, family: str) -> dict[str, str | None]:
    """What a validation is of. `commit` is None outside of a checkout."""
    return {"gpu": gpu, "family": family, "sources": sources(), "commit": commit()}


def sources(root: Path = ROOT) -> str:
    """Hash of the kernels, of what calls them, and of their tests."""
    digest = hashlib.sha256((root / "CMakeLists.txt").read_bytes())
    for folder in ("cmake", "csrc", "ceg_kernels", "tests"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".cmake", ".cpp", ".cu", ".cuh", ".h", ".py"):
                digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def commit(root: Path = ROOT) -> str | None:
    """The checkout's commit, with "-dirty" where what is tested differs from it."""
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    # Rows and validations are what a run writes.
    written = (":!bench/results", ":!ceg_kernels/validated.json")
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except subprocess.CalledProcessError:  # another user's, or half of one
        return None


def verdicts(folder: Path) -> dict[str, str | None]:
    """For each kernel that a report of the folder names: None, or why it is not validated."""
    passed: dict[str, set[str]] = {}
    failed: dict[str, str] = {}
    for path in sorted(folder.glob("*.xml")):
        for case in ElementTree.parse(path).getroot().iter("testcase"):
            found = [p.get("value") for p in case.iter("property") if p.get("name") == PROPERTY]
            for op in found:
                assert op is not None
                passed.setdefault(op, set())
                if case.find("failure") is not None or case.find("error") is not None:
                    failed[op] = f"{case.get('name')} failed"
                elif case.find("skipped") is None:
                    passed[op].add(str(case.get("name")).partition("[")[0])
    return {
        op: failed.get(op) or (None if "test_accuracy" in names else "no accuracy test ran")
        for op, names in passed.items()
    }


def sanitized(op: str, stages: dict[str, dict[str, str]]) -> tuple[list[str], str | None]:
    """The tools that passed over it, and why one did not; one that ran out of time is not named."""
    done = stages.get("sanitize", {})
    mine = {name: how for name, how in done.items() if op.startswith(name.partition("-")[2])}
    wrong = [f"{name} {how}" for name, how in mine.items() if how not in ("ok", "timed out")]
    passed = sorted(name.partition("-")[0] for name, how in mine.items() if how == "ok")
    return passed, wrong[0] if wrong else None


def unfinished(op: str, stages: dict[str, dict[str, str]]) -> str | None:
    """Which tests of its CUDA kernels ran out of time: their report has only some of them."""
    for name, how in stages.get("test", {}).items():
        backend, _, of = name.partition("-")
        if backend == "cuda" and how == "timed out" and (op.startswith(of) or of in SHARED):
            return f"{name} timed out"
    return None


def record(folder: Path, target: Path = TARGET) -> int:
    """Updates the entries of the GPU's family; prints what is recorded, and why the rest is not.

    Raises ValueError where the folder does not say which commit was tested.
    """
    path = folder / "results.json"
    if not path.exists():
        raise ValueError(f"FOLDER must hold results.json, got {folder}")
    results = json.loads(path.read_text())
    of, stages = results["about"], results["stages"]
    tested = of["commit"]
    if tested is None and of["sources"] == sources():
        tested = commit()
        if tested is None:
            print(
                f"no checkout here: in one of these sources, tools/validation.py {folder} records"
            )
            return 0
    if tested is None or tested.endswith("-dirty"):
        raise ValueError(
            f"the run must be of a commit, got {tested or 'sources that are not here'}"
        )
    if (fresh := stages.get("test", {}).get("fresh")) != "ok":
        raise ValueError(
            f"the tests must be of a build of these sources, got {fresh or 'no tests'}"
        )
    kernels = json.loads((folder / "kernels.json").read_text())
    table = json.loads(target.read_text())
    # A process that dies leaves no report.
    unseen = {op: "no report" for op, families in table.items() if of["family"] in families}
    for name, how in stages.get("sanitize", {}).items():
        if how == "timed out":
            print(f"{name} timed out: it does not count")
    for op, why in sorted((unseen | verdicts(folder)).items()):
        tools, wrong = sanitized(op, stages)
        why = why or unfinished(op, stages) or wrong
        print(f"{op}: {why or 'validated on ' + of['family']}")
        # What failed now is not what passed earlier.
        table.setdefault(op, {}).pop(of["family"], None)
        if why is None:
            table[op][of["family"]] = {
                "gpu": of["gpu"], "commit": tested, "kernel": kernels[op],
                "sanitized": " ".join(tools),
            }  # fmt: skip
    table = {op: families for op, families in sorted(table.items()) if families}
    target.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        sys.exit(record(Path(sys.argv[1])))
    except ValueError as error:
        sys.exit(f"validation: {error}")

"""What the native module was built from and for, and whether it is still that."""

import contextlib
import hashlib
import importlib
import warnings
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent


def hash_sources(root: Path) -> str:
    """Hash of everything the native module is compiled from; setup.py uses this function too."""
    files = sorted(
        p for p in (root / "csrc").rglob("*") if p.suffix in {".cpp", ".cu", ".cuh", ".h"}
    )
    digest = hashlib.sha256()
    for path in [root / "CMakeLists.txt", *sorted((root / "cmake").glob("*.cmake")), *files]:
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build_info() -> dict[str, Any]:
    """How the native module was built: compiler, ISA levels, CUDA architectures or why there are
    none, hash of the sources. `{"native": None, "why_not": reason}` where it cannot be loaded."""
    try:
        _C = _extension()
    except ImportError as error:
        return {"native": None, "why_not": str(error)}
    return {"native": _C.__file__, **_C.build_info(), "isa": _C.isa_levels(), "stale": stale()}


def _extension() -> Any:
    """torch goes first where there is one: native.py tells why."""
    with contextlib.suppress(ImportError):
        importlib.import_module("torch")
    return importlib.import_module("ceg_kernels._C")


def stale() -> bool:
    """True if csrc/ has changed since the native module was built (editable installs only)."""
    if not (_ROOT / "csrc").is_dir() or not (_ROOT / "CMakeLists.txt").is_file():
        return False
    return hash_sources(_ROOT) != _extension().build_info()["source_hash"]


def warn_if_stale() -> None:
    """Called on import: numbers from a module that is not the source in front of you mislead."""
    if stale():
        warnings.warn(
            "csrc/ has changed since ceg_kernels._C was built: run `pip install -e .` again",
            RuntimeWarning,
            stacklevel=3,
        )

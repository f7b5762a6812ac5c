"""Whether the extension is a build, with CUDA, of the sources here, and what its kernels are.

    python tools/fresh.py FILE        # gets the hash of each op's kernels, as the build knows it

Reports on another build than the sources beside it would say nothing: the exit status is then 1.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ceg_kernels import OPS, build_info, native


def main(target: Path) -> int:
    """Writes {op: hash} to `target`; 0, or 1 where there is nothing to write about."""
    found = build_info()
    print(found)
    if found["native"] is None or found["stale"] or not found["cuda_archs"]:
        return 1
    target.write_text(json.dumps({op: native.kernel_hash(op) for op in OPS}))
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))

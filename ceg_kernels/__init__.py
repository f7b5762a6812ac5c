"""Hand-written kernels for a GPT: flash attention, RoPE, RMSNorm and MoE token dispatch.

Where torch is loaded already the ops are registered at once, else when one of these names is first
asked for: a study's report needs `ceg_kernels.measure.svg` and none of them. Without torch only
`build_info` and the launchers in `ceg_kernels._C`, which take NumPy arrays, are there.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ceg_kernels.build import build_info, warn_if_stale

if TYPE_CHECKING:
    from ceg_kernels.api import (
        OPS,
        DispatchPlan,
        Routing,
        backends,
        explain,
        flash_attention,
        flash_attention_varlen,
        moe_combine,
        moe_dispatch,
        moe_route,
        rms_norm,
        rope,
        rope_table,
        use_backend,
    )

__all__ = [
    "OPS",
    "DispatchPlan",
    "Routing",
    "backends",
    "build_info",
    "explain",
    "flash_attention",
    "flash_attention_varlen",
    "moe_combine",
    "moe_dispatch",
    "moe_route",
    "rms_norm",
    "rope",
    "rope_table",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name == "_C" and find_spec("torch") is not None:
        import_module("torch")  # before the extension, as native.py tells
    if name not in __all__:
        raise AttributeError(f"module 'ceg_kernels' has no attribute {name!r}")
    if find_spec("torch") is None:
        raise ImportError(f"ceg_kernels.{name} needs torch >= 2.10, which is not installed")
    found = globals()[name] = getattr(import_module("ceg_kernels.api"), name)
    return found


if sys.modules.get("torch") is not None:
    import_module("ceg_kernels.api")
elif find_spec("torch") is None:  # else api.py does
    warn_if_stale()

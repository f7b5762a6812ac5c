"""Hand-written kernels for a GPT: flash attention, RoPE, RMSNorm and MoE token dispatch.

torch and the ops are loaded when one of their names is first asked for: a study's report needs
`ceg_kernels.measure.svg` and none of them. Without torch only `build_info` and the launchers in
`ceg_kernels._C`, which take NumPy arrays, are there.
"""

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
    if name not in __all__:
        raise AttributeError(f"module 'ceg_kernels' has no attribute {name!r}")
    if find_spec("torch") is None:
        raise ImportError(f"ceg_kernels.{name} needs torch >= 2.10, which is not installed")
    found = globals()[name] = getattr(import_module("ceg_kernels.api"), name)
    return found


if find_spec("torch") is None:  # else api.py does: native.py tells why torch comes first
    warn_if_stale()

"""Hand-written kernels for a GPT: flash attention, RoPE, RMSNorm and MoE token dispatch.

Without torch only `build_info` and the launchers in `ceg_kernels._C`, which take NumPy arrays, are
there.
"""

from importlib.util import find_spec

from ceg_kernels.build import build_info, warn_if_stale

if find_spec("torch") is not None:
    from ceg_kernels.op import OPS, backends, explain, use_backend
    from ceg_kernels.ops.attention import flash_attention, flash_attention_varlen
    from ceg_kernels.ops.moe import DispatchPlan, moe_combine, moe_dispatch
    from ceg_kernels.ops.moe_route import Routing, moe_route
    from ceg_kernels.ops.rms_norm import rms_norm
    from ceg_kernels.ops.rope import rope, rope_table

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

warn_if_stale()


def __getattr__(name: str) -> object:
    if name in __all__:
        raise ImportError(f"ceg_kernels.{name} needs torch >= 2.10, which is not installed")
    raise AttributeError(f"module 'ceg_kernels' has no attribute {name!r}")

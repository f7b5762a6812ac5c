"""The names of `ceg_kernels` that need torch; importing them fills `OPS`."""

# ruff: noqa: F401 - `ceg_kernels` hands them out

from ceg_kernels.build import warn_if_stale
from ceg_kernels.op import OPS, backends, explain, use_backend
from ceg_kernels.ops.attention import flash_attention, flash_attention_varlen
from ceg_kernels.ops.moe import DispatchPlan, moe_combine, moe_dispatch
from ceg_kernels.ops.moe_route import Routing, moe_route
from ceg_kernels.ops.rms_norm import rms_norm
from ceg_kernels.ops.rope import rope, rope_table

warn_if_stale()

"""Clock, roofs and rows: how the project measures. See docs of each module."""

from ceg_kernels.measure.ceilings import Roofs, measure
from ceg_kernels.measure.clock import Timing, call_seconds, time_interleaved
from ceg_kernels.measure.roofline import ROW_KEYS, attainable, bench_row
from ceg_kernels.measure.suite import Case, Result, cases, quick_bench, run_case

__all__ = [
    "ROW_KEYS", "Case", "Result", "Roofs", "Timing", "attainable", "bench_row", "call_seconds",
    "cases", "measure", "quick_bench", "run_case", "time_interleaved",
]  # fmt: skip

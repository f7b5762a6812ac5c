"""The project's only tolerance, as the tests use it: see ceg_kernels/measure/accuracy.py."""

from ceg_kernels.measure.accuracy import compare, error_over_slack

__all__ = ["compare", "error_over_slack"]

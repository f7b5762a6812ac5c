"""The project's only tolerance, as the tests use it: see ceg_kernels/measure/accuracy.py."""

from ceg_kernels.measure.accuracy import as_tuple, compare, compare_eager, error_over_slack

__all__ = ["as_tuple", "compare", "compare_eager", "error_over_slack"]

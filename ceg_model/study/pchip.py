"""Monotone cubic interpolation (PCHIP) over many sets of knots at once.

scipy.interpolate.PchipInterpolator builds one set at a time, 0.2 ms each; a gain's interval needs
one for each budget of each arm at each loss. Same formula: Fritsch and Butland 1984, a weighted
harmonic mean of the neighbouring slopes, three points at the ends. There the slope is held within
a factor 3 of the last piece's own, where scipy's may be 0: a loss that moves no compute would have
an interval of no width. The values must be strictly monotone.
"""

from __future__ import annotations

import numpy as np

from ceg_model.study.stats import Array


def pchip(x: Array, y: Array, at: Array) -> tuple[Array, Array]:
    """Values and slopes at `at` (m,), each (..., m); x: (..., n) growing, y: (n,) monotone.

    The pieces are chosen by the first set of knots and go on beyond their ends.
    """
    h = np.diff(x)
    slope = np.diff(y) / h
    d = np.empty_like(x)
    if x.shape[-1] == 2:
        d[...] = slope
    else:
        left, right = 2 * h[..., 1:] + h[..., :-1], h[..., 1:] + 2 * h[..., :-1]
        d[..., 1:-1] = (left + right) / (left / slope[..., :-1] + right / slope[..., 1:])
        for end, (i, j) in ((0, (0, 1)), (-1, (-1, -2))):
            there = (2 * h[..., i] + h[..., j]) * slope[..., i] - h[..., i] * slope[..., j]
            there = there / (h[..., i] + h[..., j])
            d[..., end] = slope[..., i] * np.clip(there / slope[..., i], 1 / 3, 3.0)
    knots = x.reshape(-1, x.shape[-1])[0]
    k = np.clip(np.searchsorted(knots, at, side="right") - 1, 0, knots.size - 2)
    h, slope, d0, d1 = h[..., k], slope[..., k], d[..., k], d[..., k + 1]
    t = (at - x[..., k]) / h
    square, cube = (3 * slope - 2 * d0 - d1), (d0 + d1 - 2 * slope)
    value = y[k] + h * t * (d0 + t * (square + t * cube))
    return value, d0 + t * (2 * square + 3 * t * cube)

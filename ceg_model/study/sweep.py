"""The learning-rate sweep: which rates an arm tries at a scale, and which one it gets.

A grid around the scale's own rate, a factor of FACTOR apart, each tried at one budget with the
plan's first `seeds` seeds; the mean of their last losses counts. One seed is not enough: without
norms, the rate that is best for one may leave the next one stuck. Where the best lies on the
grid's edge, the grid grows on that side until it does not, or until `extensions` rates were added:
then the arm keeps the edge's rate and is flagged `untuned`. A rate at which a run failed (its loss
is no number) counts as worse than any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FACTOR = 2.0


@dataclass(frozen=True)
class Sweep:
    """How every arm of a plan is tuned. `budget` is one of the plan's budgets."""

    factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    budget: float = 1.0
    extensions: int = 3
    seeds: int = 2

    def __post_init__(self) -> None:
        if len(self.factors) < 3 or list(self.factors) != sorted(set(self.factors)):
            raise ValueError(f"factors must be three or more, rising, got {self.factors}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")


@dataclass(frozen=True)
class Choice:
    """What a sweep has come to: `best` is None while the rates in `missing` are to be tried."""

    best: float | None
    missing: tuple[float, ...] = ()
    inside: bool = False
    reason: str = ""


def choose(rates: Sequence[float], tried: Mapping[float, float], extensions: int) -> Choice:
    """rates: the grid to begin with. tried: rate -> final loss, inf where the run failed."""
    missing = tuple(rate for rate in rates if rate not in tried)
    if missing:
        return Choice(None, missing)
    order = sorted(tried)
    best = min(order, key=lambda rate: tried[rate])
    if math.isinf(tried[best]):
        # every rate failed, so all that is known is to go lower
        return _extend(order, order[0], order[0] / FACTOR, rates, extensions)
    if best == order[0]:
        return _extend(order, best, best / FACTOR, rates, extensions)
    if best == order[-1]:
        return _extend(order, best, best * FACTOR, rates, extensions)
    return Choice(best, inside=True, reason="the best rate lies inside the sweep")


def _extend(
    order: Sequence[float], best: float, further: float, rates: Sequence[float], extensions: int
) -> Choice:
    if len(order) - len(rates) < extensions:
        return Choice(None, (further,))
    side = "lowest" if best == order[0] else "highest"
    return Choice(best, reason=f"the best rate, {best:.3g}, is the {side} of the sweep")

"""A ladder: one arm's training budgets, the last loss of each, and the compute at any loss between.

The mean over seeds at each budget makes the points; those that no cheaper point undercuts make the
monotone lower envelope; PCHIP from L to ln C goes through it. Straight lines would do, but a loss
curve is convex and its chord reads too much compute: with budgets a factor 2 apart and
L - E = A C^-a, a gain comes out 0.4% (a = 0.065), 0.8% (0.14) or 1.7% (0.3) too small between two
budgets. PCHIP's error is a tenth of that, its noise 3% larger.

How a seed moves ln C at a loss is worked out to first order (the infinitesimal jackknife): the
derivative of the interpolation by each budget's loss, times the seed's deviations there. So each
seed is one value whatever its runs share, and the values' mean is the estimate itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ceg_model.study.curves import Curve
from ceg_model.study.pchip import pchip
from ceg_model.study.stats import Array

MIN_BUDGETS = 3
STEP = 1e-4  # of the smallest gap between two points: the step of the derivative

Point = tuple[str, str]  # scale and budget
Runs = Mapping[Point, Mapping[str, Curve]]  # point -> seed -> run


@dataclass(frozen=True)
class Ladder:
    """loss: (seeds, points), log_flops: (points,) and never falling, log_rate: ln(C / T) as loss.

    Of two points at the same FLOPs the one with the lower mean loss comes first.
    """

    log_flops: Array
    loss: Array
    log_rate: Array | None = None
    seeds: tuple[str, ...] = ()
    vertices: Array = field(init=False)

    def __post_init__(self) -> None:
        mean = self.mean
        below = np.concatenate([[True], mean[1:] < np.minimum.accumulate(mean)[:-1]])
        object.__setattr__(self, "vertices", np.flatnonzero(below))

    @property
    def mean(self) -> Array:
        return self.loss.mean(axis=0)

    @property
    def top(self) -> float:
        """The loss of the cheapest budget."""
        return float(self.mean[0])

    @property
    def bottom(self) -> float:
        """The lowest loss that this arm reaches."""
        return float(self.mean[self.vertices[-1]])

    def envelope(self, losses: Array) -> Array:
        """ln C at each loss within [bottom, top]."""
        return pchip(self._knots, self._log_flops, losses)[0]

    @property
    def _knots(self) -> Array:
        return self.mean[self.vertices][::-1]

    @property
    def _log_flops(self) -> Array:
        return self.log_flops[self.vertices][::-1]

    def derivatives(self, losses: Array) -> tuple[Array, Array, Array]:
        """ln C, and its derivative by the loss asked for, (m,), and by each seed, (seeds, m)."""
        knots = self._knots
        step = STEP * float(np.min(np.diff(knots)))
        moved = np.vstack([knots, knots + step * np.eye(knots.size)])
        log_c, slope = pchip(moved, self._log_flops, losses)
        deviation = (self.loss - self.mean)[:, self.vertices[::-1]]
        return log_c[0], slope[0], deviation @ ((log_c[1:] - log_c[0]) / step)

    def values(self, losses: Array, moves: Array) -> Array:
        """ln C of each seed, (seeds, m), where `moves` is how each seed moves the losses."""
        log_c, slope, own = self.derivatives(losses)
        return log_c + own + slope * moves

    def loss_at(self, log_flops: float) -> float:
        """The loss at a compute between the first and the last vertex."""
        if log_flops <= self.log_flops[0]:
            return self.top
        if log_flops >= self.log_flops[self.vertices[-1]]:
            return self.bottom
        from scipy.optimize import brentq  # a third of a second, in endpoint mode only

        return float(
            brentq(lambda at: self.envelope(np.array([at]))[0] - log_flops, self.bottom, self.top)
        )

    def pinned(self, loss: float) -> Array:
        """How each seed moves a target that is this arm's own loss at some compute, (seeds,)."""
        _, slope, moves = self.derivatives(np.array([loss]))
        return -moves[:, 0] / slope[0]

    def rate_at(self, log_flops: Array) -> Array | None:
        """ln(C / T) of each seed, (seeds, m), between the budgets' own."""
        if self.log_rate is None:
            return None
        return np.array([np.interp(log_flops, self.log_flops, row) for row in self.log_rate])


@dataclass(frozen=True)
class Target:
    """Losses (m,), and how the seeds of each arm move them, (seeds, m)."""

    losses: Array
    by_base: Array
    by_variant: Array


def fixed(losses: Array, base: Ladder, variant: Ladder) -> Target:
    """Losses that were named beforehand."""
    m = losses.size
    return Target(losses, np.zeros((len(base.loss), m)), np.zeros((len(variant.loss), m)))


def lowest(base: Ladder, variant: Ladder) -> Target:
    """The lowest loss that both reach: the last one of whichever arm ends higher."""
    return _end(base, variant, max(base.bottom, variant.bottom), base.bottom >= variant.bottom)


def highest(base: Ladder, variant: Ladder) -> Target:
    return _end(base, variant, min(base.top, variant.top), base.top <= variant.top)


def _end(base: Ladder, variant: Ladder, loss: float, of_base: bool) -> Target:
    target = fixed(np.array([loss]), base, variant)
    owner, moves = (base, target.by_base) if of_base else (variant, target.by_variant)
    moves[:, 0] = owner.pinned(loss)
    return target


def between(high: Target, low: Target, points: int) -> Target:
    """Losses from high to low, both included, evenly spaced; they move as their ends do."""
    part = np.linspace(0, 1, points)
    mix = [
        (1 - part) * a + part * b
        for a, b in zip(vars(high).values(), vars(low).values(), strict=True)
    ]
    return Target(*mix)


def seed_values(base: Ladder, variant: Ladder, target: Target) -> tuple[Array, Array]:
    """ln C_b and ln C_v of each seed, (seeds, m) each; ln G is their difference.

    Where the target is an arm's own, that arm's seeds move the other's ln C through it. With
    unshared seeds all that a seed moves must stand on its own side, so both effects of a moved
    target are booked with the arm whose seed moved it; the difference is the same.
    """
    log_b, slope_b, moves_b = base.derivatives(target.losses)
    log_v, slope_v, moves_v = variant.derivatives(target.losses)
    tilt = slope_b - slope_v
    return (
        log_b + moves_b + tilt * target.by_base,
        log_v + moves_v - tilt * target.by_variant,
    )


def make_ladder(runs: Runs, seeds: Sequence[str]) -> Ladder | None:
    """The budgets that all of `seeds` have; None where the envelope has no two points."""
    labels = [p for p, by_seed in runs.items() if all(s in by_seed for s in seeds)]
    if not seeds or not labels:
        return None
    ends = [[runs[p][s] for p in labels] for s in seeds]
    log_flops = np.log([[c.flops[-1] for c in row] for row in ends]).mean(axis=0)
    loss = np.array([[c.loss[-1] for c in row] for row in ends])
    order = np.lexsort((loss.mean(axis=0), log_flops))
    loss = loss[:, order]
    rate = None
    if all(c.seconds is not None and c.seconds[-1] > 0 for row in ends for c in row):
        rate = np.array(
            [[np.log(c.flops[-1] / c.seconds[-1]) for c in row if c.seconds is not None]
             for row in ends]
        )[:, order]  # fmt: skip
    ladder = Ladder(log_flops[order], loss, rate, tuple(seeds))
    return ladder if ladder.vertices.size > 1 else None


def whole_seeds(arms: Sequence[Runs]) -> tuple[str, ...]:
    """The seeds to use: those that give the most runs when only their common budgets count.

    A seed that lacks a budget costs either itself or that budget to all others; at least
    MIN_BUDGETS of each arm must stay.
    """
    shared = [
        s
        for s in dict.fromkeys(s for runs in arms for by_seed in runs.values() for s in by_seed)
        if all(any(s in by_seed for by_seed in runs.values()) for runs in arms)
    ]

    def budgets(seeds: Sequence[str]) -> int:
        return min(sum(all(s in b for s in seeds) for b in runs.values()) for runs in arms)

    ranked = sorted(shared, key=lambda s: -budgets([s]))
    best: tuple[int, tuple[str, ...]] = (0, ())
    for k in range(1, len(ranked) + 1):
        few = budgets(ranked[:k])
        if few >= MIN_BUDGETS and few * k >= best[0]:
            best = (few * k, tuple(s for s in shared if s in ranked[:k]))
    return best[1]


def best_ladder(runs: Runs) -> Ladder | None:
    """An arm's own ladder, whatever the others have."""
    return make_ladder(runs, whole_seeds([runs]))

"""Power laws L = E + A C^-a through an arm's budgets, for plots. No gain is ever taken from them.

E is shared by all arms, least squares on ln L with Huber's loss (delta 1e-3) as in Hoffmann et al.
2022 (arXiv 2203.15556, approach 3). E and a are nearly degenerate: a higher floor with a steeper
fall fits almost as well. So the fit is repeated over resampled seeds and without each budget in
turn, and says `degenerate` where E then moves. What lies beyond the budgets is `extrapolated`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import factorial, prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ceg_model.study.ladder import Ladder
from ceg_model.study.stats import LEVEL, Array

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

HUBER_DELTA = 1e-3
STARTS = 30
EXACT_UP_TO = 5  # seeds: all resamples there are, by their weight; beyond, RESAMPLES random ones
RESAMPLES = 200
DEGENERATE = 0.1  # of E
DRAWN_POINTS, BEYOND = 48, 10.0
TOP = 0.999  # of the lowest loss, the largest floor

Points = Mapping[str, tuple[Array, Array]]  # arm -> ln C, L


@dataclass(frozen=True)
class Law:
    """e: the shared floor; arm -> ln A, a, and the first and last FLOPs it was fitted on."""

    e: float
    log_a: Mapping[str, float]
    a: Mapping[str, float]
    spans: Mapping[str, tuple[float, float]]
    cost: float

    def loss(self, arm: str, flops: Array) -> Array:
        return self.e + np.exp(self.log_a[arm] - self.a[arm] * np.log(flops))

    def flops(self, arm: str, loss: Array) -> Array:
        """C at which the arm reaches `loss`; infinite at or below the floor."""
        with np.errstate(divide="ignore", invalid="ignore"):
            log = (self.log_a[arm] - np.log(loss - self.e)) / self.a[arm]
        return np.where(loss > self.e, np.exp(log), np.inf)

    def gain(self, baseline: str, arm: str, flops: Array) -> tuple[Array, NDArray[np.bool_]]:
        """C_b / C_v at the loss that the arm has at C_v = flops; and where it is extrapolated."""
        reached = self.flops(baseline, self.loss(arm, flops))
        return reached / flops, self.outside(arm, flops) | self.outside(baseline, reached)

    def outside(self, arm: str, flops: Array) -> NDArray[np.bool_]:
        low, high = self.spans[arm]
        return (flops < low * (1 - 1e-9)) | (flops > high * (1 + 1e-9))


def fit(points: Points, *, starts: int = STARTS, near: float | None = None) -> Law:
    """The law with the least Huber cost over `starts` floors to start from.

    near: a floor to start from beside them. Raises ValueError with fewer points than parameters.
    """
    arms = list(points)
    x = np.concatenate([points[arm][0] for arm in arms])
    y = np.log(np.concatenate([points[arm][1] for arm in arms]))
    arm_of = np.repeat(np.arange(len(arms)), [points[arm][0].size for arm in arms])
    if x.size < 1 + 2 * len(arms):
        raise ValueError(
            f"points must be at least {1 + 2 * len(arms)} for {len(arms)} arms, got {x.size}"
        )
    middle, ceiling = float(x.mean()), TOP * float(np.exp(y.min()))
    centred, rows = x - middle, np.arange(x.size)

    def predict(p: Array) -> tuple[Array, Array]:
        part = np.exp(p[1 + 2 * arm_of] - p[2 + 2 * arm_of] * centred)
        return part, p[0] + part

    def residual(p: Array) -> Array:
        return np.log(predict(p)[1]) - y

    def jacobian(p: Array) -> Array:
        part, whole = predict(p)
        out = np.zeros((x.size, p.size))
        out[:, 0] = 1 / whole
        out[rows, 1 + 2 * arm_of] = part / whole
        out[rows, 2 + 2 * arm_of] = -part * centred / whole
        return out

    # ln of what is above the floor at the middle compute, and a: wide, and exp stays finite.
    low = np.concatenate([[0.0], np.tile([-50.0, 1e-4], len(arms))])
    high = np.concatenate([[ceiling], np.tile([10.0, 5.0], len(arms))])

    from scipy.optimize import least_squares  # as in ladder.py: not for a report in crossing mode

    def solve(start: Array, tolerance: float, evaluations: int) -> OptimizeResult:
        return least_squares(
            residual, start, jacobian, bounds=(low, high), loss="huber", f_scale=HUBER_DELTA,
            x_scale="jac", ftol=tolerance, xtol=tolerance, gtol=1e-14, max_nfev=evaluations,
        )  # fmt: skip

    found = []
    for floor in [*(ceiling * np.linspace(0.01, 0.99, starts)), *([] if near is None else [near])]:
        start = [min(max(floor, 1e-9 * ceiling), ceiling * (1 - 1e-9))]
        for i in range(len(arms)):
            own = arm_of == i
            a, b = np.polyfit(centred[own], np.log(np.exp(y[own]) - start[0]), 1)
            start += [float(b), float(np.clip(-a, 2e-4, 4.9))]
        found.append(solve(np.array(start), 1e-5, 25))
    rough = min(found, key=lambda one: one.cost)
    best = solve(rough.x, 1e-12, 400)
    exponents = {arm: float(best.x[2 + 2 * i]) for i, arm in enumerate(arms)}
    return Law(
        e=float(best.x[0]),
        log_a={
            arm: float(best.x[1 + 2 * i]) + exponents[arm] * middle for i, arm in enumerate(arms)
        },
        a=exponents,
        spans={arm: (_exp(points[arm][0].min()), _exp(points[arm][0].max())) for arm in arms},
        cost=float(best.cost),
    )


def _exp(log: float) -> float:
    return float(np.exp(log))


def describe(ladders: Mapping[str, Ladder], *, envelope: bool = False) -> dict[str, Any]:
    """The fit with its intervals and curves to draw, or the reason why there is none.

    envelope: only the points that no cheaper one undercuts, where several scales are one curve.
    """
    kept = {arm: one.vertices if envelope else slice(None) for arm, one in ladders.items()}

    def means(pick: Mapping[str, Array] | None = None, without: int | None = None) -> Points:
        out = {}
        for arm, one in ladders.items():
            loss = one.loss if pick is None else one.loss[pick[arm]]
            x, y = one.log_flops[kept[arm]], loss.mean(axis=0)[kept[arm]]
            if without is not None and without < x.size:
                x, y = np.delete(x, without), np.delete(y, without)
            out[arm] = (x, y)
        return out

    try:
        law = fit(means())
    except ValueError as error:
        return {"reason": str(error)}
    resampled, weights = [], []
    for pick, weight in _resamples(ladders):
        resampled.append(fit(means(pick), starts=2, near=law.e))
        weights.append(weight)
    dropped = [
        fit(means(without=i), starts=4, near=law.e).e
        for i in range(max(x.size for x, _ in means().values()))
        if all(x.size > 2 for x, _ in means(without=i).values())
        and sum(x.size for x, _ in means(without=i).values()) > 2 * len(ladders) + 1
    ]
    e_ci = _percentiles([r.e for r in resampled], weights)
    return {
        "e": law.e,
        "e_ci": e_ci,
        "arms": {
            arm: {
                "a": law.a[arm],
                "a_ci": _percentiles([r.a[arm] for r in resampled], weights),
                "log_a0": law.log_a[arm],
            }
            | _curve(law, arm)
            for arm in ladders
        },
        "huber_delta": HUBER_DELTA,
        "starts": STARTS,
        "resamples": len(resampled),
        "seeds": min(len(one.loss) for one in ladders.values()),
        "e_drop_one": [min(dropped), max(dropped)] if dropped else None,
        "degenerate": _degenerate(law.e, [*(e_ci or []), *dropped]),
    }


def _resamples(ladders: Mapping[str, Ladder]) -> Iterator[tuple[dict[str, Array], float]]:
    """Whole seeds with replacement, the same ones for all arms; none where they share but one."""
    shared = [
        s for s in next(iter(ladders.values())).seeds
        if all(s in one.seeds for one in ladders.values())
    ]  # fmt: skip
    n = len(shared)
    if n < 2:
        return

    def rows(draw: Iterable[int]) -> dict[str, Array]:
        names = [shared[i] for i in draw]
        return {arm: np.array([one.seeds.index(s) for s in names]) for arm, one in ladders.items()}

    if n <= EXACT_UP_TO:
        for draw in combinations_with_replacement(range(n), n):
            ways = factorial(n) / prod(factorial(draw.count(i)) for i in range(n))
            yield rows(draw), ways / n**n
        return
    rng = np.random.default_rng(0)
    for _ in range(RESAMPLES):
        yield rows(rng.integers(0, n, n)), 1 / RESAMPLES


def _percentiles(values: list[float], weights: list[float]) -> list[float] | None:
    if not values:
        return None
    order = np.argsort(values)
    share = np.cumsum(np.array(weights)[order])
    tail = (1 - LEVEL) / 2
    at = np.searchsorted(share, [tail, 1 - tail - 1e-12])
    return [float(np.array(values)[order[min(i, len(values) - 1)]]) for i in at]


def _degenerate(e: float, others: list[float]) -> str | None:
    low, high = min([e, *others]), max([e, *others])
    if high - low <= DEGENERATE * e:
        return None
    return (
        f"E moves between {low:.2f} and {high:.2f} with the seeds drawn and without single "
        "budgets: E and a are not known apart, and nothing may be read off beyond the budgets"
    )


def _curve(law: Law, arm: str) -> dict[str, list[Any]]:
    low, high = law.spans[arm]
    flops = np.geomspace(low, high * BEYOND, DRAWN_POINTS)
    return {
        "flops": flops.tolist(),
        "loss": law.loss(arm, flops).tolist(),
        "extrapolated": law.outside(arm, flops).tolist(),
    }

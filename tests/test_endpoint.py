"""Endpoint mode against arms whose gain is known, and the power laws that only plots show.

Left out: budgets so noisy that the loss does not fall from one to the next.
"""

import json

import numpy as np
import pytest

from ceg_model.study.curves import Key, make_curve
from ceg_model.study.estimate import estimate
from ceg_model.study.ladder import Ladder, lowest, seed_values
from ceg_model.study.stats import paired_interval, welch_interval

BUDGETS = ("1", "2", "4", "8")


def law(c, e=1.9, a=36.3, alpha=0.14):
    return e + a * np.asarray(c, float) ** -alpha


def run(arm, loss, flops, *, scale="S", seed="0", budget="1", rate=1e12, lr=(1, 0.5, 0.1), **more):
    """A run with a whole decay: three evaluations, the last of which counts."""
    c = np.array([0.3, 0.6, 1.0]) * flops
    return make_curve(
        Key(arm, scale, seed, budget), c, [loss + 0.4, loss + 0.2, loss], seconds=c / rate,
        lr=None if lr is None else np.array(lr) * 1e-3, **more,
    )  # fmt: skip


def study(gains, *, scales=(1.0, 4.0, 16.0), seeds=3, budgets=BUDGETS, loss=law, wobble=0.01):
    """Every arm reaches every loss with gains[arm] times less compute than the baseline."""
    names = "SML"
    return [
        run(arm, float(loss(k * size * 1e15 * float(b) * (1 + wobble * s))), size * 1e15 * float(b),
            scale=names[i], seed=str(s), budget=b, rate=1.3e12 if arm != "baseline" else 1e12)
        for i, size in enumerate(scales)
        for arm, k in {"baseline": 1.0, **gains}.items()
        for s in range(seeds)
        for b in budgets
    ]  # fmt: skip


@pytest.mark.parametrize("k", [0.7, 1.0, 1.5, 3.0])
def test_known_gain_is_found_at_the_lowest_common_loss(k):
    out = estimate(study({"arm": k}))
    assert out["mode"] == "endpoint"
    arm = out["arms"]["arm"]
    assert arm["status"] == "ok"
    assert arm["scale"] == "L"
    assert arm["flags"] == []
    # PCHIP between budgets a factor two apart; where the arms end level it is exact.
    assert arm["g_alg"] == pytest.approx(k, rel=1.5e-3)
    assert arm["g_alg_overlap_mean"]["g_alg"] == pytest.approx(k, rel=3e-3)
    ends = [float(np.mean([law(g * 128e15 * (1 + 0.01 * s)) for s in range(3)])) for g in (1, k)]
    assert arm["target_loss"] == pytest.approx(max(ends))
    assert arm["overlap"][0] == pytest.approx(max(ends))
    assert arm["g_hw"] == pytest.approx(1.3)
    assert arm["g_time"] == pytest.approx(1.3 * k, rel=1.5e-3)
    assert arm["scales"]["S"]["range"]["g_alg"] == pytest.approx([k] * 33, rel=8e-3)
    json.dumps(out, allow_nan=False)


def test_seeds_that_move_both_arms_alike_cost_no_width():
    """Each seed is worth 1 + s percent of compute in both arms: G is the same in each."""
    arm = estimate(study({"arm": 1.5}, wobble=0.05))["arms"]["arm"]
    assert np.ptp(np.log(arm["ci"])) < 5e-3
    lone = [c for c in study({"arm": 1.5}, wobble=0.05) if c.key.arm == "baseline"]
    lone += [
        make_curve(Key(c.key.arm, c.key.scale, "x" + c.key.seed, c.key.budget), c.flops, c.loss)
        for c in study({"arm": 1.5}, wobble=0.05)
        if c.key.arm == "arm"
    ]
    apart = estimate(lone)["arms"]["arm"]
    assert apart["ci_method"] == "Welch t over seeds"
    assert {"unpaired", "schedule_unknown"} <= set(apart["flags"])
    assert apart["g_alg"] == pytest.approx(1.5, rel=1.5e-3)
    assert np.ptp(np.log(apart["ci"])) > 0.1


def draws(k, seeds, rng, *, sd=0.004, trunk=0.8):
    """Two ladders of four budgets; a seed's budgets share their trunk, and with it their luck."""
    x = np.log(1e15) + np.log(2.0) * np.arange(4)
    ladders = []
    shared = rng.normal(0, 2 * sd, (seeds, 1))  # initialisation and data order, the same for both
    for gain in (1.0, k):
        own = rng.normal(0, sd * np.sqrt(trunk), (seeds, 1))
        tip = rng.normal(0, sd * np.sqrt(1 - trunk), (seeds, 4))
        ladders.append(Ladder(x, law(gain * np.exp(x)) + shared + own + tip))
    return ladders


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("k", [1.0, 1.3])
def test_intervals_cover_a_known_gain(k, seeds):
    """2,000 studies of one scale; the target is the lowest loss that both reached that time."""
    rng = np.random.default_rng(seeds)
    paired = unpaired = 0
    for _ in range(2000):
        base, variant = draws(k, seeds, rng)
        at_b, at_v = (side[:, 0] for side in seed_values(base, variant, lowest(base, variant)))
        interval = paired_interval(at_b - at_v)
        paired += interval.low <= np.log(k) <= interval.high
        # The same values as if no seed were shared: too wide here, never too narrow.
        apart = welch_interval(at_b, at_v)
        unpaired += apart.low <= np.log(k) <= apart.high
    assert paired / 2000 == pytest.approx(0.95, abs=0.015)
    assert unpaired / 2000 > 0.935

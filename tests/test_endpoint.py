"""Endpoint mode against arms whose gain is known, and the power laws that only plots show.

Left out: budgets so noisy that the loss does not fall from one to the next.
"""

import json

import numpy as np
import pytest
from scipy.interpolate import PchipInterpolator

from ceg_model.study import powerlaw
from ceg_model.study.cells import Options
from ceg_model.study.curves import Key, make_curve, read_csv
from ceg_model.study.estimate import estimate
from ceg_model.study.ladder import Ladder, lowest, seed_values
from ceg_model.study.pchip import pchip
from ceg_model.study.stats import paired_interval, welch_interval

NO_FIT = Options(fit=False)
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
    out = estimate(study({"arm": k}), NO_FIT)
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
    arm = estimate(study({"arm": 1.5}, wobble=0.05), NO_FIT)["arms"]["arm"]
    assert np.ptp(np.log(arm["ci"])) < 5e-3
    lone = [c for c in study({"arm": 1.5}, wobble=0.05) if c.key.arm == "baseline"]
    lone += [
        make_curve(Key(c.key.arm, c.key.scale, "x" + c.key.seed, c.key.budget), c.flops, c.loss)
        for c in study({"arm": 1.5}, wobble=0.05)
        if c.key.arm == "arm"
    ]
    apart = estimate(lone, NO_FIT)["arms"]["arm"]
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


@pytest.mark.parametrize(("k", "seeds"), [(1.0, 3), (1.3, 3), (1.3, 5)])
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


def test_pchip_is_scipys():
    rng = np.random.default_rng(0)
    for n in (2, 3, 6):
        x, y = np.cumsum(rng.random((3, n)) + 0.1, axis=1), -np.cumsum(rng.random(n) + 0.5)
        at = np.linspace(x[0, 0], x[0, -1], 50)
        value, slope = pchip(x[:1], y, at)
        theirs = PchipInterpolator(x[0], y)
        assert value[0] == pytest.approx(theirs(at), abs=1e-12)
        assert slope[0] == pytest.approx(theirs(at, 1), abs=1e-10)
        assert pchip(x, y, at)[0].shape == (3, 50)


def only(out, arm="arm"):
    return out["arms"][arm]["scales"]["S"]


def small(gains, **more):
    return study(gains, scales=(1.0,), **more)


def test_without_overlap_there_is_a_bound_on_the_right_side():
    worse = only(estimate(small({"arm": 1 / 20}), NO_FIT))
    assert (worse["status"], worse["bound_side"]) == ("censored", "upper")
    assert worse["bound"] == pytest.approx(1 / 8)  # the smallest budget against the largest
    assert worse["g_alg"] is None
    assert worse["ci"] is None
    assert worse["overlap"] is None
    assert worse["g_hw"] == pytest.approx(1.3)
    assert worse["bound"] > 1 / 20
    beside = estimate(small({"arm": 1 / 20, "good": 1.5}), NO_FIT)
    assert beside["target_losses"]["S"] == only(beside, "good")["target_loss"]
    assert beside["cells"]["S"]["overlap"] == only(beside, "good")["overlap"]
    better = only(estimate(small({"arm": 20.0}), NO_FIT))
    assert (better["status"], better["bound_side"]) == ("censored", "lower")
    assert better["bound"] == pytest.approx(8.0)


def test_a_given_target_is_reached_or_bounds_or_is_refused():
    runs = small({"arm": 1.5}, wobble=0.0)

    def at(c, **more):
        return only(estimate(runs, Options(target=float(law(c)), fit=False, **more)))

    inside = at(6e15)
    assert (inside["status"], inside["target_loss"]) == ("ok", pytest.approx(float(law(6e15))))
    assert inside["c_baseline"] == pytest.approx(6e15, rel=2e-3)
    assert inside["g_alg"] == pytest.approx(1.5, rel=2e-3)
    deep = at(10e15)  # the arm ends at 12, the baseline at 8
    assert (deep["status"], deep["bound_side"]) == ("censored", "lower")
    assert 1.0 < deep["bound"] < 1.5
    assert deep["bound"] == pytest.approx(8 / (10 / 1.5), rel=2e-3)
    nobody = at(20e15)
    assert nobody["status"] == "refused"
    assert "reached by neither arm" in nobody["reasons"][0]
    early = at(1.2e15)  # the arm's smallest budget is worth 1.5
    assert early["status"] == "refused"
    assert "train at smaller budgets" in early["reasons"][0]
    flops = only(estimate(runs, Options(target_at_flops=4e15, fit=False)))
    assert flops["c_baseline"] == pytest.approx(4e15, rel=1e-6)
    far = only(estimate(runs, Options(target_at_flops=9e15, fit=False)))
    assert "extrapolation" in far["reasons"][0]


def test_one_cell_over_all_scales_where_no_scale_has_three_budgets():
    """A ladder with one budget a scale: the trend is along its own points."""
    size = (1.0, 4.0, 16.0, 64.0)
    runs = [
        run(arm, float(law(k * c * (1 + 0.01 * s), alpha=alpha)), c, scale=f"s{i}", seed=str(s),
            budget="chinchilla")
        for i, c in enumerate(1e15 * np.array(size))
        for s in range(3)
        for arm, k, alpha in (("baseline", 1, 0.065), ("arm", 2, 0.065), ("steep", 1, 0.08))
    ]  # fmt: skip
    steep = 36.3 * (1.05e15) ** -0.065 * 1e15**0.08  # level with the baseline at the start
    for i, c in enumerate(runs):
        if c.key.arm == "steep":
            loss = law(c.flops[-1] * (1 + 0.01 * int(c.key.seed)), a=steep, alpha=0.08)
            runs[i] = run("steep", float(loss), c.flops[-1], scale=c.key.scale, seed=c.key.seed,
                          budget=c.key.budget)  # fmt: skip
    out = estimate(runs, NO_FIT)
    assert list(out["target_losses"]) == ["all scales"]
    assert out["arms"]["arm"]["g_alg"] == pytest.approx(2, rel=2e-3)
    trend = out["class"]["arm"]
    assert trend["slope"] == pytest.approx(0, abs=2e-3)
    assert trend["class"] == "compute-independent"
    assert "they share runs" in trend["reason"]
    trend = out["class"]["steep"]
    assert trend["slope"] == pytest.approx(1 - 0.065 / 0.08, abs=5e-3)
    assert trend["slope_c_v"] == pytest.approx(0.08 / 0.065 - 1, abs=8e-3)
    assert trend["class"] == "compute-dependent"


def test_classes_of_both_gains():
    runs = study({"arm": 2.0}, scales=(1.0, 4.0, 16.0))
    faster = [
        c if c.key.arm == "baseline" else
        make_curve(c.key, c.flops, c.loss, lr=c.lr, seconds=c.flops / 1e12 / (c.flops[-1] / 1e15)
                   ** 0.2 * (1 + 0.01 * int(c.key.seed)))
        for c in runs
    ]  # fmt: skip
    out = estimate(faster, NO_FIT)
    assert out["class"]["arm"]["class"] == "compute-independent"
    assert out["class"]["arm"]["lowest"] == pytest.approx(2.0, rel=0.01)
    hardware = out["class_hw"]["arm"]
    assert hardware["class"] == "compute-dependent"
    assert hardware["slope"] == pytest.approx(0.2, abs=0.01)
    assert hardware["axis"] == "ln C_b"
    rated = estimate(runs, Options(hardware={s: {"arm": 1.3} for s in "SML"}, fit=False))
    assert rated["arms"]["arm"]["residual"] == pytest.approx(0, abs=1e-9)
    bench = [make_curve(c.key, c.flops, c.loss, lr=c.lr) for c in runs]
    rated = estimate(bench, Options(hardware={s: {"arm": 1.3} for s in "SML"}, fit=False))
    assert rated["class_hw"]["arm"]["class"] == "inconclusive"  # one value a scale


def test_three_seeds_at_three_scales_give_a_gate():
    rng = np.random.default_rng(4)
    noisy = [
        run("baseline", float(law(size * 1e15 * int(b)) + 0.003 * luck), size * 1e15 * int(b),
            scale=scale, seed=str(s), budget=b)
        for scale, size in (("S", 1.0), ("M", 4.0), ("L", 16.0))
        for s, luck in enumerate(rng.normal(size=3))
        for b in BUDGETS
    ]  # fmt: skip
    noisy += [make_curve(Key("arm", *list(vars(c.key).values())[1:]), c.flops, c.loss, lr=c.lr)
              for c in noisy]  # fmt: skip
    out = estimate(noisy, Options(same_maths=frozenset({"arm"}), fit=False))
    gate = out["aa"]
    assert gate["passed"] is True
    assert (gate["seeds"], gate["df"], gate["pairs"]) == (3, 6, 9)
    assert len(gate["ratios"]) == 9
    # sd of ln C = sd(L) / s: t of 6 degrees of freedom, sqrt(2 / 3).
    assert np.log1p(gate["detection_limit"]) == pytest.approx(
        2.447 * gate["sd"] * np.sqrt(2 / 3), rel=1e-3
    )
    assert gate["sd"] == pytest.approx(0.003 / (0.14 * (law(64e15) - 1.9)), rel=0.7)
    assert out["arms"]["arm"]["equivalence"]["passed"] is True
    biased = [c if c.key.seed != "1" or c.key.arm == "arm" else
              make_curve(c.key, c.flops, c.loss + 0.05, lr=c.lr) for c in noisy]  # fmt: skip
    failed = estimate(biased, NO_FIT)
    assert failed["aa"]["passed"] is False
    assert "aa_failed" in failed["arms"]["arm"]["flags"]


def test_untuned_sits_on_single_arms_and_scales():
    runs = study({"arm": 1.5, "other": 1.2})
    where = {("M", "arm"): "the best rate lay on the sweep's edge"}
    out = estimate(runs, Options(untuned=where, fit=False))["arms"]
    assert [("untuned" in out["arm"]["scales"][s]["flags"]) for s in "SML"] == [False, True, False]
    assert (
        "arm at scale M: the best rate lay on the sweep's edge"
        in (out["arm"]["scales"]["M"]["reasons"])
    )
    assert "untuned" not in out["other"]["scales"]["M"]["flags"]
    base = {("M", "baseline"): "swept, the arms were not"}
    out = estimate(runs, Options(untuned=base, fit=False))["arms"]
    assert all("untuned" in out[arm]["scales"]["M"]["flags"] for arm in ("arm", "other"))
    assert "untuned" in estimate(runs, Options(untuned=True, fit=False))["arms"]["other"]["flags"]


def test_shapley_shares_the_bundle_out():
    gains = {"a": 2.0, "b": 1.5, "c": 1.2, "ab": 2.4, "ac": 2.6, "bc": 1.7, "abc": 2.9}
    bundles = {"ab": ("a", "b"), "ac": ("a", "c"), "bc": ("b", "c"), "abc": ("a", "b", "c", "k")}
    options = Options(bundles=bundles, same_maths=frozenset({"k"}), fit=False)
    runs = small(gains, budgets=("1", "2", "4", "8", "16"))
    out = estimate(runs, options)
    cell = out["shapley"]["abc"]["scales"]["S"]
    log = {name: np.log(value) for name, value in gains.items()}
    by_hand = (
        log["a"] / 3 + (log["ab"] - log["b"]) / 6 + (log["ac"] - log["c"]) / 6
        + (log["abc"] - log["bc"]) / 3
    )  # fmt: skip
    assert cell["parts"]["a"]["log"] == pytest.approx(by_hand, abs=2e-3)
    assert sum(p["log"] for p in cell["parts"].values()) == pytest.approx(cell["total"]["log"])
    assert cell["parts"]["k"] == {"log": 0.0, "ratio": 1.0, "ci": None}
    assert cell["parts"]["a"]["ci"][0] < cell["parts"]["a"]["ratio"] < cell["parts"]["a"]["ci"][1]
    assert out["interaction"]["ab"]["scales"]["S"]["ratio"] == pytest.approx(2.4 / 3, rel=4e-3)
    lacking = [c for c in runs if c.key.arm != "bc"]
    out = estimate(lacking, options)
    assert "abc" not in out["shapley"]
    assert out["interaction"]["abc"]["scales"]["S"]["ratio"] == pytest.approx(2.9 / 3.6, rel=4e-3)


def test_refusals_and_flags_of_budgets():
    runs = small({"arm": 1.5})

    def changed(change, **options):
        more = Options(mode="endpoint", fit=False, **options)
        out = estimate([change(c) for c in runs], more)
        json.dumps(out, allow_nan=False)
        return only(out)

    def arm_only(change):
        return lambda c: change(c) if c.key.arm == "arm" and c.key.budget == "4" else c

    def with_(c, **more):
        values = {"flops": c.flops, "loss": c.loss, "seconds": c.seconds, "lr": c.lr, **more}
        return make_curve(c.key, **values)

    broken = changed(arm_only(lambda c: with_(c, loss=c.loss * [1, 1, np.nan])))
    assert (broken["status"], "loss is nan" in broken["reasons"][0]) == ("refused", True)
    assert broken["range"] is None
    empty = changed(arm_only(lambda c: make_curve(c.key, [0.0], [9.0])))
    assert "arm has a run without an evaluation" in empty["reasons"]
    other = changed(lambda c: with_(c, identity={"eval_set": c.key.arm}))
    assert other["status"] == "refused"
    assert "eval_set must be the same for both arms" in other["reasons"][0]
    fast = changed(lambda c: c, peak_flops=1.2e12)
    assert "MFU 1.08 > 1" in fast["reasons"][0]
    cut = changed(arm_only(lambda c: with_(c, lr=np.array([1, 0.9, 0.7]))))
    assert "schedule_confounded" in cut["flags"]
    rng = np.random.default_rng(0)
    flat = changed(lambda c: with_(c, loss=[3, 3, 2 - np.log2(float(c.key.budget)) / 100
                                            + rng.normal(0, 0.01)]))  # fmt: skip
    assert flat["status"] == "refused" or "plateau" in flat["flags"]
    alone = only(estimate([c for c in runs if c.key.seed == "0"], NO_FIT))
    assert (alone["ci"], "no_ci" in alone["flags"]) == (None, True)
    few = estimate([c for c in runs if c.key.arm == "baseline" or c.key.budget in "12"],
                   Options(mode="endpoint", fit=False))["arms"]["arm"]  # fmt: skip
    assert few["status"] == "refused"
    assert "arm needs 3 budgets with one seed, got 2" in few["reasons"]
    gone = [c for c in runs if (c.key.arm, c.key.seed, c.key.budget) != ("arm", "2", "8")]
    less = only(estimate(gone, NO_FIT))
    assert less["seeds"] == ["0", "1", "2"]  # three seeds of three budgets beat two of four
    assert less["c_variant"] < 8e15 / 1.4


def test_risen_baseline_is_no_target_and_no_point():
    flops = np.arange(1, 41) / 40

    def long(arm, k, budget, seed):
        c = flops * float(budget) * 1e15
        loss = law(k * c * (1 + 0.01 * seed), a=80.0, alpha=0.16)
        if arm == "baseline" and budget == "16":
            loss[-5:] += np.linspace(0.01, 0.05, 5)
        return make_curve(Key(arm, "S", str(seed), budget), c, loss, lr=np.ones(40))

    runs = [
        long(arm, k, b, s)
        for arm, k in (("baseline", 1.0), ("arm", 1.4))
        for b in (*BUDGETS, "16")
        for s in range(3)
    ]
    out = estimate(runs, NO_FIT)
    arm = only(out)
    assert (arm["status"], "rising_baseline" in arm["flags"]) == ("ok", True)
    assert arm["c_baseline"] == pytest.approx(8e15, rel=1e-6)
    assert arm["g_alg"] == pytest.approx(1.4, rel=2e-3)
    asked = estimate(runs, Options(target_at_flops=16e15, fit=False))
    assert only(asked)["status"] == "refused"
    assert "a risen loss is no target" in only(asked)["reasons"][0]
    assert asked["offered_targets"]["S"] == pytest.approx(arm["target_loss"])
    final = float(np.mean([c.loss[-1] for c in runs[12:15]]))
    assert only(estimate(runs, Options(target=final, fit=False)))["status"] == "refused"


def test_mode_is_chosen_by_what_the_curves_allow(tmp_path):
    runs = small({"arm": 1.5})
    assert estimate([c for c in runs if c.key.budget != "8"], NO_FIT)["mode"] == "endpoint"
    assert estimate([c for c in runs if c.key.budget in "12"])["mode"] == "crossing"
    assert estimate(runs, Options(mode="crossing"))["mode"] == "crossing"
    cuts = [
        make_curve(c.key, c.flops, c.loss, lr=[1, 0.9, 1 - 0.1 * float(c.key.budget)]) for c in runs
    ]
    assert estimate(cuts)["mode"] == "crossing"  # one long schedule, stopped at four places
    rows = ["arm,scale,budget,seed,flops,loss"]
    rows += [f"{c.key.arm},S,{c.key.budget},{c.key.seed},{c.flops[-1]},{c.loss[-1]}" for c in runs]
    path = tmp_path / "ends.csv"
    path.write_text("\n".join(rows) + "\n")
    out = estimate(read_csv(path), NO_FIT)
    assert out["mode"] == "endpoint"
    assert out["arms"]["arm"]["g_alg"] == pytest.approx(1.5, rel=2e-3)
    assert out["cells"]["S"]["points"]["arm"][0]["n"] == 3


PUBLISHED = {"lstm": (36.3, 0.065), "transformer": (81.7, 0.091), "modern": (88.0, 0.094)}


def test_published_laws_are_recovered_and_their_gains():
    """Gundlach et al. 2025, from noiseless points; gains far outside of them are flagged."""
    x = np.log(np.geomspace(1e15, 1e18, 7))
    points = {arm: (x, law(np.exp(x), a=a, alpha=alpha)) for arm, (a, alpha) in PUBLISHED.items()}
    found = powerlaw.fit(points)
    assert found.e == pytest.approx(1.9, abs=1e-4)
    for arm, (a, alpha) in PUBLISHED.items():
        assert found.a[arm] == pytest.approx(alpha, rel=1e-4)
        assert np.exp(found.log_a[arm]) == pytest.approx(a, rel=1e-2)
    at = np.array([1e15, 1e16, 1e17, 1e18])
    gain, extrapolated = found.gain("lstm", "modern", at)
    assert gain == pytest.approx([5.97, 16.67, 46.57, 130.1], rel=1e-3)
    assert extrapolated.tolist() == [False, False, True, True]
    slope = np.polyfit(np.log(at), np.log(gain), 1)[0]
    assert slope == pytest.approx(0.4462, abs=1e-4)


def test_fit_gives_intervals_and_says_when_it_is_degenerate():
    out = estimate(small({"arm": 2.0}))["fit"]["S"]
    assert out["e"] == pytest.approx(1.9, abs=2e-3)
    assert out["degenerate"] is None
    assert out["resamples"] == 10  # all there are of three seeds
    assert out["e_ci"][0] <= out["e"] <= out["e_ci"][1]
    low, high = out["arms"]["arm"]["a_ci"]
    assert low - 1e-9 <= out["arms"]["arm"]["a"] <= high + 1e-9
    assert out["starts"] >= 30
    beyond = np.array(out["arms"]["arm"]["flops"]) > 8e15 * (1 + 1e-6)
    assert out["arms"]["arm"]["extrapolated"] == beyond.tolist()
    assert beyond.any()
    rng = np.random.default_rng(2)
    noisy = [
        make_curve(c.key, c.flops, c.loss + np.array([0, 0, rng.normal(0, 0.02)]), lr=c.lr)
        for c in small({"arm": 2.0})
    ]
    answer = estimate(noisy)
    assert "E moves between" in answer["fit"]["S"]["degenerate"]
    # A plot's fit is no gain: the headline stays within the budgets.
    assert answer["arms"]["arm"]["c_baseline"] <= 8e15 * (1 + 1e-9)
    lone = [c for c in small({"arm": 2.0}) if c.key.seed == "0"]
    assert estimate(lone)["fit"]["S"]["e_ci"] is None

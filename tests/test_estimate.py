"""The estimator within runs, against curves whose answer is known.

Left out: curves so noisy that no rule would find a crossing. Endpoint mode: test_endpoint.py.
"""

import dataclasses
import json

import numpy as np
import pytest

from ceg_model.study import stats
from ceg_model.study.cells import OptionError, Options
from ceg_model.study.crossing import cross, log_flops_at, noise_sd
from ceg_model.study.curves import CurveError, Key, make_curve, read_csv
from ceg_model.study.estimate import estimate
from ceg_model.study.trend import classify, slope_of


def law(c, e=1.9, a=36.3, alpha=0.065):
    return e + a * c**-alpha


def curve(arm, loss, flops, *, seed="0", scale="", rate=1e12, lr=1e-3, **more):
    """A run at constant rate and learning rate."""
    flops = np.asarray(flops, float)
    return make_curve(
        Key(arm, scale, seed),
        flops,
        loss,
        seconds=flops / rate,
        lr=np.full(flops.shape, lr),
        **more,
    )


STEPS = np.arange(1, 41) * 1e15


def shifted(k, *, seeds=2, scale="", size=1.0, rate=1.3e12, loss=law):
    """Baseline and an arm that reaches every loss with k times less compute."""
    c = STEPS * size
    wobble = [1 + 0.01 * s for s in range(seeds)]
    runs = [
        curve("baseline", loss(c * w), c, seed=str(s), scale=scale) for s, w in enumerate(wobble)
    ]
    runs += [
        curve("arm", loss(k * c * w), c, seed=str(s), scale=scale, rate=rate)
        for s, w in enumerate(wobble)
    ]
    return runs


def test_an_equal_arm_reaches_the_default_target_however_far_apart_the_seeds_end():
    runs = []
    for seed, worse in (("0", 0.0), ("1", 0.3)):
        loss = law(STEPS) + worse
        runs.append(curve("baseline", loss, STEPS, seed=seed))
        runs.append(curve("arm", loss + 1e-7, STEPS, seed=seed))  # a kernel's rounding
    out = estimate(runs)["arms"]["arm"]
    assert out["status"] == "ok"
    assert out["g_alg"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("k", [0.9, 1.0, 1.5, 2.5, 4.0])
def test_known_shift_is_found(k):
    out = estimate(shifted(k))["arms"]["arm"]
    assert out["status"] == "ok"
    # Linear in (ln C, L) between evaluations: the law's curvature costs at most a few 1e-4.
    assert out["g_alg"] == pytest.approx(k, rel=2e-3)
    assert out["g_hw"] == pytest.approx(1.3)
    assert out["g_time"] == pytest.approx(out["g_alg"] * out["g_hw"], rel=1e-9)
    assert out["residual"] == pytest.approx(0, abs=1e-9)


def test_known_shift_has_slope_zero_and_its_class():
    runs = [
        r
        for i, size in enumerate((1, 4, 16))
        for r in shifted(2.0, scale=str(i), size=size, seeds=3)
    ]
    trend = estimate(runs)["class"]["arm"]
    assert trend["slope"] == pytest.approx(0, abs=1e-3)
    assert trend["class"] == "compute-independent"


@pytest.mark.parametrize(
    ("alpha", "start", "label"),
    [(0.08, 1.2, "compute-dependent"), (0.055, 3.0, "diminishing")],
)
def test_different_exponents_give_the_analytic_slope(alpha, start, label):
    a = 36.3 * (start * 1e16) ** -0.065 * 1e16**alpha  # G = start where C_v = 1e16
    runs = []
    for i, size in enumerate((1, 10, 100)):
        c = STEPS * size
        for s in range(3):
            runs.append(curve("baseline", law(c), c, seed=str(s), scale=str(i)))
            runs.append(curve("arm", law(c, a=a, alpha=alpha), c, seed=str(s), scale=str(i)))
    trend = estimate(runs)["class"]["arm"]
    assert trend["slope"] == pytest.approx(1 - 0.065 / alpha, abs=3e-3)
    assert trend["class"] == label


def test_two_seeds_give_a_slope_but_no_class():
    runs = [r for i, size in enumerate((1, 4, 16)) for r in shifted(2.0, scale=str(i), size=size)]
    trend = estimate(runs)["class"]["arm"]
    assert (trend["class"], trend["scales"]) == ("inconclusive", 3)
    assert trend["reason"].startswith("2 seeds at a scale, 3 needed")
    assert trend["ci"] is not None


def test_diminishing_is_a_class():
    x = [np.full(3, v) for v in np.log([1e15, 1e16, 1e17])]
    y = [np.log(3.0) - 0.3 * (v - x[0]) + np.array([-0.01, 0, 0.01]) for v in x]
    trend = classify(list(zip(x, y, strict=True)))
    assert trend.label == "diminishing"
    assert trend.slope == pytest.approx(-0.3)


def test_gundlach_laws():
    c = np.logspace(12, 21, 2000)
    lstm = curve("baseline", law(c), c)
    modern = curve("arm", law(c, a=88.0, alpha=0.094), c)
    at = np.array([1e15, 1e16, 1e17, 1e18])
    targets = law(at, a=88.0, alpha=0.094)
    wide = curve("baseline", law(np.logspace(12, 24, 4000)), np.logspace(12, 24, 4000))
    gain = np.exp(log_flops_at(wide, targets) - log_flops_at(modern, targets))
    assert gain == pytest.approx([5.97, 16.67, 46.57, 130.1], rel=1e-3)
    assert slope_of(np.log(at), np.log(gain)) == pytest.approx(0.4462, abs=1e-4)
    assert lstm.problems == ()


def test_null_intervals_cover_what_they_say():
    """2,000 A/A draws through the crossing and the interval in use, with autocorrelated noise."""
    rng = np.random.default_rng(20260101)
    c = np.arange(1, 31) * 1e15
    smooth = law(c)
    covered, draws, seeds = 0, 2000, 3
    for _ in range(draws):
        logs = []
        for seed in range(seeds):
            pair = []
            for arm in ("baseline", "arm"):
                noise = rng.normal(0, 0.002, c.size)
                for i in range(1, c.size):
                    noise[i] += 0.6 * noise[i - 1]
                level = rng.normal(0, 0.01)
                pair.append(curve(arm, smooth + level + noise, c, seed=str(seed)))
            at = [log_flops_at(p, np.array([smooth[20]]))[0] for p in pair]
            logs.append(at[0] - at[1])
        interval = stats.paired_interval(logs)
        covered += interval.low <= 0 <= interval.high
    assert covered / draws == pytest.approx(0.95, abs=0.015)


def test_pooled_and_slope_intervals_cover_what_they_say():
    """2 seeds at 3 scales, as in the nano study; normal noise, equal at all scales."""
    rng = np.random.default_rng(7)
    x = [np.full(2, v) for v in np.log([1e12, 4e12, 1.3e13])]
    pooled = slopes = 0
    for _ in range(2000):
        groups = [rng.normal(0.3, 0.05, 2) for _ in x]
        interval = stats.pooled_interval(groups)
        pooled += interval.low <= 0.3 <= interval.high
        trend = classify(list(zip(x, groups, strict=True)))
        slopes += trend.low <= 0 <= trend.high
    assert pooled / 2000 == pytest.approx(0.95, abs=0.015)
    assert slopes / 2000 == pytest.approx(0.95, abs=0.015)


def test_aa_gate_states_the_detection_limit():
    runs = [
        r
        for i, size in enumerate((1, 4, 16))
        for r in shifted(1.0, scale=str(i), size=size, seeds=4)
    ]
    gate = estimate(runs)["aa"]
    # Seeds at 1, 1.01, 1.02 and 1.03 times the compute: sd 1.3%, t of 9 df 2.26, sqrt(2 / 4).
    assert gate["pairs"] == 18
    assert gate["detection_limit"] == pytest.approx(0.0206, abs=5e-4)
    assert gate["detection_limit_mean"] == pytest.approx(0.0119, abs=5e-4)
    assert estimate(shifted(1.0))["aa"]["passed"] is None


def test_aa_gate_fails_on_a_baseline_that_is_not_itself():
    runs = []
    for i, size in enumerate((1, 4, 16)):
        c = STEPS * size
        for seed, k in enumerate((1.0, 1.3)):
            runs.append(curve("baseline", law(c * k), c, seed=str(seed), scale=str(i)))
            runs.append(curve("arm", law(c * k * 2), c, seed=str(seed), scale=str(i)))
    out = estimate(runs)
    assert out["aa"]["passed"] is False
    assert "aa_failed" in out["arms"]["arm"]["scales"]["0"]["flags"]


def risen():
    loss = law(STEPS)
    loss[-6:] += np.linspace(0.1, 0.6, 6)
    return [
        curve(arm, loss if arm == "baseline" else law(2 * STEPS), STEPS, seed=s)
        for arm in ("baseline", "arm")
        for s in "01"
    ]


def test_risen_loss_is_refused_as_a_target():
    out = estimate(risen(), Options(target_at_flops=STEPS[-1]))
    arm = out["arms"]["arm"]
    assert arm["status"] == "refused"
    assert "rising_baseline" in arm["flags"]
    assert out["offered_targets"][""] == pytest.approx(law(STEPS)[-7])
    given = estimate(risen(), Options(target=float(risen()[0].loss[-1])))["arms"]["arm"]
    assert given["status"] == "refused"


def test_minimum_of_a_rising_baseline_is_offered_with_its_flag():
    out = estimate(risen())["arms"]["arm"]
    assert out["status"] == "ok"
    assert "rising_baseline" in out["flags"]


def test_variant_that_never_arrives_is_bounded_above():
    out = estimate(shifted(0.5), Options(target=float(law(STEPS[-1]))))["arms"]["arm"]
    assert (out["status"], out["bound_side"]) == ("censored", "upper")
    assert out["g_alg"] is None
    assert out["ci"] is None
    assert 0.5 <= out["bound"] <= 1.0
    assert out["g_hw"] == pytest.approx(1.3)


def test_baseline_that_never_arrives_bounds_below():
    out = estimate(shifted(2.0), Options(target=float(law(1.8 * STEPS[-1]))))["arms"]["arm"]
    assert (out["status"], out["bound_side"]) == ("censored", "lower")
    assert 1.0 <= out["bound"] <= 2.0


def test_target_that_neither_reaches_is_refused():
    assert estimate(shifted(2.0), Options(target=1.0))["arms"]["arm"]["status"] == "refused"


@pytest.mark.parametrize(
    ("evals", "words"), [(0, "first eval interval"), (3, "after 3 evaluations")]
)
def test_crossing_too_early_is_refused(evals, words):
    out = estimate(shifted(1.0), Options(target=float(law(STEPS[evals] * 0.999))))["arms"]["arm"]
    assert out["status"] == "refused"
    assert words in out["reasons"][0]


def test_plateau_and_noise():
    rng = np.random.default_rng(1)
    flat = law(STEPS) + rng.normal(0, 0.05, STEPS.size)
    run = curve("baseline", flat, STEPS)
    assert noise_sd(run) == pytest.approx(0.05, rel=0.5)
    assert "plateau" in cross(run, float(np.sort(flat)[3])).flags
    assert "plateau" not in cross(curve("baseline", law(STEPS), STEPS), float(law(2e16))).flags


def test_schedule_flags():
    runs = shifted(2.0)
    decayed = curve("arm", runs[2].loss, STEPS, seed="0")
    lr = np.linspace(1, 0.1, 40) * 1e-3
    decayed = make_curve(decayed.key, STEPS, decayed.loss, seconds=decayed.seconds, lr=lr)
    out = estimate([*runs[:2], decayed, runs[3]])["arms"]["arm"]
    assert "schedule_confounded" in out["flags"]
    bare = [make_curve(r.key, r.flops, r.loss) for r in runs]
    assert "schedule_unknown" in estimate(bare)["arms"]["arm"]["flags"]
    assert estimate(bare)["arms"]["arm"]["g_hw"] is None


def test_one_seed_is_a_point_without_interval_or_class():
    runs = [
        r
        for i, size in enumerate((1, 4, 16))
        for r in shifted(2.0, scale=str(i), size=size, seeds=1)
    ]
    out = estimate(runs)
    assert out["arms"]["arm"]["ci"] is None
    assert "no_ci" in out["arms"]["arm"]["flags"]
    assert (out["class"]["arm"]["class"], out["class"]["arm"]["reason"]) == (
        "inconclusive",
        "one seed",
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda loss, c: (np.where(np.arange(40) == 7, np.nan, loss), c), "loss is nan"),
        (lambda loss, c: (np.where(np.arange(40) == 7, -1.0, loss), c), "loss is negative"),
        (lambda loss, c: (loss, np.where(np.arange(40) == 7, 1e14, c)), "flops must grow"),
    ],
)
def test_untrustworthy_curves_are_refused(change, words):
    runs = shifted(2.0)
    loss, c = change(runs[2].loss, STEPS)
    bad = make_curve(runs[2].key, c, loss)
    out = estimate([*runs[:2], bad, runs[3]])["arms"]["arm"]
    assert out["status"] == "refused"
    assert words in out["reasons"][0]


@pytest.mark.parametrize("what", ["data", "eval_set", "tokenizer", "flop_convention"])
def test_arms_on_other_data_are_refused(what):
    runs = [curve("baseline", law(STEPS), STEPS, identity={what: "a"})]
    runs.append(curve("arm", law(2 * STEPS), STEPS, identity={what: "b"}))
    out = estimate(runs)["arms"]["arm"]
    assert out["status"] == "refused"
    assert f"{what} must be the same for both arms, got a and b" in out["reasons"]


def test_mfu_above_one_is_refused():
    out = estimate(shifted(2.0), Options(peak_flops=1.2e12))["arms"]["arm"]
    assert out["status"] == "refused"
    assert "MFU 1.08 > 1" in out["reasons"][0]
    executed = [
        make_curve(r.key, r.flops, r.loss, seconds=r.seconds, executed_flops=1.5 * r.flops)
        for r in shifted(2.0)
    ]
    assert estimate(executed)["arms"]["arm"]["executed_over_model"] == pytest.approx(1.5)
    out = estimate(executed, Options(peak_flops=1.8e12))["arms"]["arm"]
    assert out["status"] == "refused"
    with pytest.raises(ValueError, match=r"H100 SXM and H200 with sparsity; dense is 9\.895e"):
        estimate(shifted(2.0), Options(peak_flops=1979e12))


def test_identity_fails_where_the_benchmark_disagrees_with_the_clock():
    agree = estimate(shifted(2.0), Options(hardware={"": {"arm": 1.305}}))["arms"]["arm"]
    assert agree["residual"] == pytest.approx(np.log(1.3 / 1.305), abs=1e-9)
    assert "identity_failed" not in agree["flags"]
    differ = estimate(shifted(2.0), Options(hardware={"": {"arm": 1.35}}))["arms"]["arm"]
    assert "identity_failed" in differ["flags"]


def test_kernel_arm_must_be_equivalent():
    same = frozenset({"arm"})
    good = estimate(shifted(1.001), Options(same_maths=same))["arms"]["arm"]
    assert good["equivalence"]["passed"] is True
    bad = estimate(shifted(1.05), Options(same_maths=same))["arms"]["arm"]
    assert bad["equivalence"]["passed"] is False
    assert "not_equivalent" in bad["flags"]
    assert "never a gain" in bad["reasons"][-1]
    one = estimate(shifted(1.0, seeds=1), Options(same_maths=same))["arms"]["arm"]
    assert one["equivalence"]["passed"] is None


def test_a_kernel_on_top_of_an_algorithm_is_held_against_its_twin():
    options = Options(twins={"fused": "arm"})

    def verdict(k):
        fused = [
            dataclasses.replace(c, key=dataclasses.replace(c.key, arm="fused"))
            for c in shifted(k)
            if c.key.arm == "arm"
        ]
        return estimate([*shifted(2.0), *fused], options)["arms"]["fused"]

    assert verdict(2.002)["equivalence"]["passed"] is True
    assert verdict(2.002)["g_alg"] == pytest.approx(2.002, rel=1e-3)
    assert verdict(2.1)["equivalence"]["passed"] is False


def test_interaction_of_a_bundle():
    runs = shifted(2.0)
    for arm, k in (("b", 1.5), ("both", 2.4), ("kernel", 1.0)):
        for s in range(2):
            loss = law(k * STEPS * (1 + 0.01 * s))
            runs.append(curve(arm, loss, STEPS, seed=str(s)))
    options = Options(bundles={"both": ("arm", "b", "kernel")}, same_maths=frozenset({"kernel"}))
    out = estimate(runs, options)["interaction"]["both"]["scales"][""]
    assert out["ratio"] == pytest.approx(2.4 / (2.0 * 1.5), rel=2e-3)


def test_unshared_seeds_are_compared_by_welch_and_flagged():
    runs = shifted(2.0, seeds=3)
    moved = [
        make_curve(Key("arm", "", f"x{r.key.seed}"), r.flops, r.loss, lr=r.lr) for r in runs[3:]
    ]
    out = estimate([*runs[:3], *moved])["arms"]["arm"]
    assert out["g_alg"] == pytest.approx(2.0, rel=2e-3)
    assert out["seeds"] == ["0/x0", "1/x1", "2/x2"]
    assert "unpaired" in out["flags"]
    # Both sides spread by 1% a seed, which pairing would cancel: t of 4 df, sd 1%, sqrt(2 / 3).
    assert out["ci_method"] == "Welch t over seeds"
    assert np.ptp(np.log(out["ci"])) == pytest.approx(2 * 2.776 * 0.01 * np.sqrt(2 / 3), rel=0.02)
    fewer = estimate([*runs[:3], *moved[:2]])["arms"]["arm"]  # every run counts, also unmatched
    assert fewer["g_alg"] == pytest.approx(2.0 / np.sqrt(1.01), rel=2e-3)
    lone = estimate([*runs[:3], moved[0]])["arms"]["arm"]
    assert (lone["ci"], "no_ci" in lone["flags"]) == (None, True)


def test_slope_mode():
    out = estimate(shifted(1.1), Options(mode="slope"))["arms"]["arm"]
    assert out["g_alg"] == pytest.approx(1.1, rel=5e-3)
    far = estimate(shifted(2.0), Options(mode="slope"))["arms"]["arm"]
    assert far["status"] == "refused"


def test_slope_mode_of_runs_that_share_no_seed():
    """All runs of either side count, in whatever order, and the interval is Welch's."""
    curves = shifted(1.1, seeds=4)
    base = [c for c in curves if c.key.arm == "baseline"]
    arm = [
        dataclasses.replace(c, key=Key("arm", seed=f"x{i}"), loss=c.loss + 1e-3 * i)
        for i, c in enumerate([c for c in curves if c.key.arm == "arm"][:3])
    ]
    out, other = (
        estimate([*base, *runs], Options(mode="slope"))["arms"]["arm"] for runs in (arm, arm[::-1])
    )
    assert out["g_alg"] == pytest.approx(1.1, rel=2e-2)
    assert [out["g_alg"], *out["ci"]] == pytest.approx([other["g_alg"], *other["ci"]])
    assert out["ci_method"] == "Welch t over seeds"
    assert "unpaired" in out["flags"]


@pytest.mark.parametrize(
    ("steps", "ms", "g_alg", "g_hw"),
    [((5100, 5100), (783059, 721882), 1.0, 1.0847), ((1490, 1390), (1490, 1390), 1.0719, 1.0)],
)
def test_published_speedruns(steps, ms, g_alg, g_hw):
    """A pure systems change and a pure algorithm change: equal loss at the end of each run."""
    runs = []
    for arm, n, t in zip(("baseline", "arm"), steps, ms, strict=True):
        part = np.arange(1, 21) / 20
        runs.append(
            make_curve(Key(arm), part * n, 10 - 6.72 * part, seconds=part * t, lr=np.ones(20))
        )
    out = estimate(runs, Options(target=3.4))["arms"]["arm"]
    assert out["g_alg"] == pytest.approx(g_alg, abs=1e-4)
    assert out["g_hw"] == pytest.approx(g_hw, abs=1e-4)


def write(tmp_path, text):
    path = tmp_path / "c.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1, column 'arm'"),
        ("arm,flops\na,1\n", "line 1, column 'loss'"),
        ("arm,loss\na,1\n", "line 1, column 'flops'"),
        ("arm,loss,step\na,1,1\n", "--flops-per-step"),
        ("arm,loss,flops\n", "expected rows"),
        ("arm,loss,flops\na,1,5\na,x,6\n", "line 3, column 'loss': expected a number, got 'x'"),
        ("arm,loss,flops\na,1,5\na,1\n", "line 3: expected 3 columns"),
        ("arm,loss,flops\n,1,5\n", "line 2, column 'arm'"),
        ("arm,loss,loss,flops\na,1,1,5\n", "column 'loss': expected once"),
        ("arm,loss,flops,lr\na,1,5,0.1\na,1,6,\n", "line 3, column 'lr'"),
    ],
)
def test_bad_csv_names_line_and_column(tmp_path, text, words):
    with pytest.raises(CurveError) as error:
        read_csv(write(tmp_path, text))
    assert words in str(error.value)


def test_csv_round_trip(tmp_path):
    rows = ["arm,step,loss,seconds,lr,seed"]
    for run in shifted(2.0):
        for c, loss, t in zip(run.flops, run.loss, run.seconds, strict=True):
            rows.append(f"{run.key.arm},{c / 1e15},{loss},{t},1e-3,{run.key.seed}")
    curves = read_csv(write(tmp_path, "\n".join(rows) + "\n"), flops_per_step=1e15)
    out = estimate(curves)
    assert out["arms"]["arm"]["g_alg"] == pytest.approx(2.0, rel=2e-3)
    json.dumps(out, allow_nan=False)


def test_csv_with_nan_names_the_line(tmp_path):
    text = "arm,loss,flops\nbaseline,2,5\nbaseline,nan,6\narm,2,5\n"
    out = estimate(read_csv(write(tmp_path, text)))["arms"]["arm"]
    assert out["status"] == "refused"
    assert out["reasons"] == ["baseline seed 0: loss is nan at line 3"]


def test_smoothed_losses_are_refused(tmp_path):
    text = "arm,loss,flops,smoothed\nbaseline,2,5,yes\nbaseline,1,6,yes\narm,2,5,no\narm,1,6,no\n"
    out = estimate(read_csv(write(tmp_path, text)))["arms"]["arm"]
    assert "smoothed" in out["reasons"][0]


def test_options_are_checked():
    with pytest.raises(OptionError, match="mode must be one of endpoint, crossing, slope, got 'x'"):
        estimate(shifted(2.0), Options(mode="x"))
    with pytest.raises(OptionError, match="--baseline must be one of baseline, arm, got 'x'"):
        estimate(shifted(2.0), Options(baseline="x"))
    with pytest.raises(CurveError, match="got two"):
        estimate([*shifted(2.0), shifted(2.0)[0]])
    out = estimate(shifted(2.0), Options(target_at_flops=1e18))["arms"]["arm"]
    assert out["status"] == "refused"
    assert "extrapolation" in out["reasons"][0]

"""The report renders from results.json alone, needs nothing from elsewhere, and says what it must.

Left out: how it looks in a browser, which is test_report_browser.py's.
"""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ceg_kernels.measure import svg
from ceg_model.study import plots, plots_gain, plots_loss, plots_sweep, verdicts, words
from ceg_model.study.cells import Options
from ceg_model.study.curves import Key, make_curve
from ceg_model.study.estimate import estimate
from ceg_model.study.plan import Plan
from ceg_model.study.plans import PLANS
from ceg_model.study.plots_parts import interaction_steps, pieces, shapley_steps, time_gain
from ceg_model.study.plots_style import spread
from ceg_model.study.report import render, write_report
from tests.report_data import ARMS, MORE_ARMS, endpoints, within_runs


class Page(HTMLParser):
    """Collects ids and everything that would be loaded."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.loads, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "srcset", "data") or (name.endswith("href") and tag != "a"):
                self.loads.append(value)


@pytest.fixture(scope="module")
def page():
    return render(within_runs())


def test_page_is_self_contained(page):
    found = Page(page)
    assert all(load.startswith("#") for load in found.loads)
    assert not {"script", "link", "img", "iframe", "object"} & set(found.tags)
    assert not re.search(r"https?://|@import|url\((?!#)", page)


def test_ids_are_unique_and_references_resolve(page):
    found = Page(page)
    assert len(found.ids) == len(set(found.ids))
    used = re.findall(r"url\(#([^)]+)\)", page) + [u[1:] for u in found.loads]
    assert set(used) <= set(found.ids)


def test_every_plot_is_there_and_follows_the_theme(page):
    found = Page(page)
    # By scale: loss twice, range, bars, bundle; a trend an arm; A/A, roofline, shares.
    assert page.count('role="img"') == 3 * 5 + 6 + 3
    assert found.tags.count("figure") == page.count('role="img"')
    assert "var(--ink)" in page
    assert not re.search("#0[0-9a-f]0|#1[0-9a-f]1", re.sub(r"--[a-z0-9]+: #\w+", "", page))


def test_numbers_and_words_are_in_the_page(page):
    assert re.search(r"LN \+ RoPE \+ FA: worth 3\.\d\d× the compute \(3\.\d\d to", page)
    assert "1 by construction, and measured so" in page
    assert "≤" in page  # MQA never reaches the target
    assert "LayerNorm &lt;b&gt;" in page
    assert words.FLAGS["untuned"] in page.replace("&#39;", "'")
    assert "No learning rate was swept, so there is no sweep to show." in page


def test_flags_all_have_words():
    for flag in ("censored", "untuned", "plateau", "no_ci", "identity_failed", "aa_failed",
                 "peak_unknown", "mfu_above_1", "unexplained"):  # fmt: skip
        assert flag in words.FLAGS


FEW = {"baseline": (1.0, 1.0), "rope": (1.002, 1.0)}


def test_json_twin_of_one_seed(tmp_path):
    results = within_runs(seeds=1, arms=FEW, scales={"S": 1.0})
    path = write_report(results, tmp_path / "report")
    assert path.read_text().startswith("<!doctype html>")
    twin = json.loads((tmp_path / "report" / "results.json").read_text())
    assert twin["estimate"]["arms"]["rope"]["g_alg"] == results["estimate"]["arms"]["rope"]["g_alg"]
    assert render(twin) == path.read_text()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_json_has_not_is_refused(value, tmp_path):
    results = within_runs(seeds=1, arms=FEW, scales={"S": 1.0})
    results["curves"][1]["loss"][2] = value
    with pytest.raises(ValueError, match=r"curves must hold finite numbers, got loss of .* S 0"):
        write_report(results, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_host_that_took_processor_time_is_named():
    results = within_runs(seeds=1, arms=FEW, scales={"S": 1.0})
    assert "The host took" not in render(results)
    results["throughput"] = {"S": {"stolen_share": 0.413, "arms": {}}}
    assert "The host took 41% of this virtual machine" in render(results)


def test_incomplete_and_refused_study_renders():
    results = within_runs(arms=FEW)
    results["complete"] = {
        "planned": 42, "done": 41,
        "failed": [{"arm": "moe", "scale": "L", "seed": 0, "reason": "loss is nan"}],
    }  # fmt: skip
    options = Options(target=0.1)
    curves = [
        make_curve(Key(c["arm"], c["scale"], c["seed"]), c["flops"], c["loss"])
        for c in results["curves"]
    ]
    results["estimate"] = estimate(curves, options)
    results["bench"], results["roofs"], results["throughput"] = [], None, {}
    results["left_out"], results["plan"] = [{"scale": "M", "seed": 1}], {"fast_curves": True}
    for c in results["curves"]:
        c["seconds"] = None
    page = render(results)
    assert "This study is not complete" in page
    assert "loss is nan" in page
    assert "what is there of scale M seed 1 is not in the numbers yet" in page
    assert "at the rate at which each arm’s step was timed" in page
    assert "no number for its worth in compute" in page
    assert "What RoPE is worth: target 0.1000 is reached by neither arm" in page


def test_a_plot_without_its_input_says_so_in_one_sentence():
    results = endpoints(seeds=1, arms={a: ARMS[a] for a in ("baseline", "rope")}, budgets=3)
    for key in ("sweeps", "bench", "roofs", "hardware"):
        results.pop(key)
    for key in ("shapley", "fit", "class_hw"):
        results["estimate"].pop(key)
    for curve in results["curves"]:
        del curve["seconds"], curve["lr"]
    results["estimate"]["aa"] = {"passed": None, "reason": "1 seed, 2 needed"}
    drawn = plots.draw(results)
    missing = {name for name, plot in drawn.items() if not plot.panels}
    assert missing == {"seconds", "bundles", "roofline", "kernels", "mfu", "aa", "sweeps"}
    assert all(drawn[name].why.count(".") == 1 for name in missing)
    assert not any(plot.why for name, plot in drawn.items() if name not in missing)
    assert "1 seed, 2 needed" in drawn["aa"].why


def test_pieces_of_a_bar_add_up_to_the_time_gain():
    results = endpoints(seeds=1, budgets=3)
    for arm, answer in results["estimate"]["arms"].items():
        for scale, cell in answer["scales"].items():
            found = pieces(results, arm, scale)
            if cell["g_time"]:
                assert sum(found.values()) == pytest.approx(np.log(cell["g_time"]))
                assert found["residual"] == pytest.approx(np.log(1.004))
    split = pieces(results, "bf16", "S")
    assert split["peak"] == pytest.approx(np.log(1.25))
    assert split["MFU"] == pytest.approx(np.log(1.6 / 1.25))
    assert "hardware" not in split
    del results["hardware"]
    assert pieces(results, "bf16", "S")["hardware"] == pytest.approx(np.log(1.6))
    cell = results["estimate"]["arms"]["bf16"]["scales"]["S"]
    assert time_gain(cell, pieces(results, "bf16", "S")) == (cell["g_time"], True)
    cell["g_time"] = None
    assert time_gain(cell, pieces(results, "bf16", "S")) == (pytest.approx(0.99 * 1.6), False)
    cell["g_hw"] = None
    assert time_gain(cell, pieces(results, "bf16", "S")) == (None, False)


def test_waterfalls_end_at_the_bundle():
    shares = shapley_steps(endpoints(seeds=1, budgets=3), "ln_rope_fa", "M")
    assert [step.kind for step in shares] == ["share"] * 3 + ["whole"]
    assert sum(step.log for step in shares[:-1]) == pytest.approx(shares[-1].log)
    results = within_runs()
    steps = interaction_steps(results, "ln_rope_fa", "L")
    assert [step.kind for step in steps] == ["single"] * 3 + ["interaction", "whole"]
    assert sum(step.log for step in steps[:-1]) == pytest.approx(steps[-1].log, abs=1e-6)
    whole = results["estimate"]["arms"]["ln_rope_fa"]["scales"]["L"]["g_alg"]
    assert steps[-1].log == pytest.approx(np.log(whole))
    # Read at another target, the bundle's gain is not what its parts and the interaction make.
    results["estimate"]["arms"]["ln_rope_fa"]["scales"]["L"]["g_alg"] = 2 * whole
    assert interaction_steps(results, "ln_rope_fa", "L") == []


def test_what_was_not_decided_stands_apart_from_what_was_found():
    results = endpoints(seeds=1, budgets=3)
    answers = results["estimate"]["arms"]
    answers["swiglu"]["mean_over_scales"] |= {"g_alg": 1.02, "ci": [0.97, 1.07]}
    results["estimate"]["aa"]["passed"] = False
    found, still_open = verdicts.found(results), verdicts.undecided(results)
    text = "\n".join(found)
    assert "RoPE: worth 1.35× the compute (1.30 to 1.40) as the mean of 3 scales; 0.93×" in text
    assert "LayerNorm <b>: worth 1.90×" in text
    assert "its gain in compute grows with compute, from 1.10× to 1.30×" in text
    assert "FlashAttention: the same loss for the same FLOPs, measured; 1.32×" in text
    assert "Multi-query attention: worth at most 0.90× in compute at scale L" in text
    assert "SwiGLU: no gain or loss in compute shown" in text
    assert "of its 3.10× at scale L come from LayerNorm <b> 1.86×, RoPE 1.67×" in text
    starts = ["Whether any gain here is real", "How much exactly Multi-query attention is worth",
              "Whether SwiGLU is worth any compute as the mean of 3 scales: 1.02× was measured",
              "Whether bf16 is worth any compute as the mean of 3 scales: 0.99× was measured",
              "What qk_norm is worth: loss of seed 1 is not finite",
              "Whether the gain of Multi-query attention grows with compute",
              "The best learning rate of Mixture of experts at scale L",
              "The loss that more compute would lead to (L)",
              "Where more than 5% of the time comes from in one step (most, 8%: "]  # fmt: skip
    for start in starts:
        assert sum(line.startswith(start) for line in still_open) == 1, start
    assert len(still_open) == len(starts)


def test_an_interval_that_holds_1_is_no_gain():
    curves = within_runs(arms=FEW, noise=0.004)
    answer = curves["estimate"]["arms"]["rope"]
    sentence = verdicts.verdict("RoPE", answer)
    assert "no gain or loss in compute shown as the mean of 3 scales" in sentence
    assert "as many model FLOPs a second at scale L" in sentence
    single = answer | {"ci": None, "mean_over_scales": None}
    assert "(one seed, no interval) at scale L" in verdicts.verdict("RoPE", single)
    curves["estimate"]["arms"] |= {"rope": single, "mqa": single}
    curves["estimate"]["class"]["mqa"] = curves["estimate"]["class"]["rope"]
    sure = "How sure the gains of RoPE and Multi-query attention can be: one seed, no interval."
    assert sure in verdicts.undecided(curves)


def test_a_rate_on_the_edge_is_shown_as_such():
    results = endpoints(seeds=1, budgets=3)
    sweeps = plots_sweep.sweeps(results)
    marked = [arm for arm, svg in zip(sweeps.arms, sweeps.panels, strict=True) if ">edge<" in svg]
    assert marked == ["moe"]
    assert ">S<" in sweeps.panels[0]
    first = results["sweeps"][0]
    two = plots_sweep.sweeps(results | {"sweeps": [first, first | {"budget": "2"}]})
    assert ">S/1<" in two.panels[0]
    assert ">S/2<" in two.panels[0]
    results["sweeps"] = [s | {"points": s["points"][-1:]} for s in results["sweeps"]]
    assert plots_sweep.sweeps(results).why  # a single rate is no sweep


def test_power_laws_are_dashed_and_bounds_hollow():
    results = endpoints(seeds=1, arms={a: MORE_ARMS[a] for a in ("baseline", "mqa")}, budgets=3)
    dashed = "stroke-dasharray: 5,3"
    assert plots_loss.losses(results, "flops").panels[0].count(dashed) == 2
    results["estimate"]["fit"] = {"S": {"reason": "3 budgets are needed"}}
    assert dashed not in plots_loss.losses(results, "flops").panels[0]
    hollow = "fill: var(--paper); stroke: var(--c0)"
    assert hollow in plots_gain.trends(results).panels[0]
    results["estimate"]["arms"]["mqa"]["scales"].pop("L")
    assert hollow not in plots_gain.trends(results).panels[0]


def test_labels_are_moved_apart_and_no_further():
    wanted = np.array([0.5, 0.9, 0.51, 0.1, 0.52])
    places = spread(wanted, 0.1)
    assert (np.argsort(places) == np.argsort(wanted)).all()
    assert np.diff(np.sort(places)).min() == pytest.approx(0.1)
    assert places[[1, 3]].tolist() == [0.9, 0.1]
    assert places.mean() == pytest.approx(wanted.mean())
    assert spread(np.array([-0.2, 0.03, 1.5, 0.99]), 0.1).tolist() == pytest.approx(
        [0, 0.1, 1, 0.9]
    )


def test_colours_of_the_series_stand_out_on_both_papers():
    css = (Path(svg.__file__).parent / "templates" / "page.css").read_text()
    values = re.findall(r"--(paper|c\d): (#\w{6})", css)
    half = len(values) // 2
    for theme in (values[:half], values[half:]):
        paper, *series = [luminance(value) for _, value in theme]
        assert len(series) == len(svg.SERIES)
        for other in series:
            low, high = sorted((paper, other))
            assert (high + 0.05) / (low + 0.05) >= 3  # WCAG 2.2, 1.4.11


def luminance(colour):
    """WCAG's relative luminance of #rrggbb."""
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_number_words():
    assert (words.gain(None), words.gain(1.234), words.gain(130.1)) == ("–", "1.23×", "130×")
    assert words.si(2.5e10, "FLOP") == "25 GFLOP"
    assert (words.seconds(0.0021), words.seconds(-0.0021)) == ("2.1 ms", "-2.1 ms")
    assert words.interval([0.95, 1.1]) == "0.95 to 1.10"
    assert (words.percent(None), words.percent(0.3149)) == ("–", "31.5%")
    assert (words.off(0.0302), words.off(-0.0004), words.off(-0.02)) == ("+3.0%", "0.0%", "−2.0%")
    assert words.joined(["a", "b", "c"]) == "a, b and c"


def test_the_committed_study_is_of_the_plan_that_is_there_and_renders():
    folder = Path(__file__).parents[1] / "examples" / "studies" / "cpu-ladder"
    results = json.loads((folder / "results.json").read_text())
    assert Plan.from_dict(results["plan"]) == PLANS["cpu-ladder"]
    assert results["complete"]["planned"] == results["complete"]["done"]
    page = render(results)
    for sentence in verdicts.found(results):
        assert sentence.split(":")[0] in page

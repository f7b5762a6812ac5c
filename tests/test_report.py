"""The report renders from results.json alone, needs nothing from elsewhere, and says what it must.

Left out: how it looks in a browser, which is test_report_browser.py's.
"""

import json
import re
from html.parser import HTMLParser

import pytest

from ceg_model.study import words
from ceg_model.study.cells import Options
from ceg_model.study.curves import Key, make_curve
from ceg_model.study.estimate import estimate
from ceg_model.study.report import render, write_report
from tests.report_data import within_runs


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
    assert page.count("<svg") == 3 * 4 + 2 + 1  # flops, seconds, bars, range; scales, aa; roofline
    assert page.count('role="img"') == page.count("<svg")
    assert "var(--ink)" in page
    assert "#010203" not in page


def test_numbers_and_words_are_in_the_page(page):
    assert re.search(r"LN \+ RoPE \+ FA: worth 3\.\d\d× the compute \(3\.\d\d to", page)
    assert "1 by construction, and measured so" in page
    assert "≤" in page  # MQA never reaches the target
    assert "LayerNorm &lt;b&gt;" in page
    assert words.FLAGS["untuned"] in page.replace("&#39;", "'")


def test_flags_all_have_words():
    for flag in ("censored", "untuned", "plateau", "no_ci", "identity_failed", "aa_failed"):
        assert flag in words.FLAGS


@pytest.mark.parametrize("seeds", [1, 2])
def test_json_twin(tmp_path, seeds):
    results = within_runs(seeds)
    path = write_report(results, tmp_path / "report")
    assert path.read_text().startswith("<!doctype html>")
    twin = json.loads((tmp_path / "report" / "results.json").read_text())
    assert twin["estimate"]["arms"]["rope"]["g_alg"] == results["estimate"]["arms"]["rope"]["g_alg"]
    assert render(twin) == path.read_text()


def test_incomplete_and_refused_study_renders():
    results = within_runs()
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
    for c in results["curves"]:
        c["seconds"] = None
    page = render(results)
    assert "This study is not complete" in page
    assert "loss is nan" in page
    assert "no number, because" in page


def test_an_interval_that_holds_1_is_no_gain():
    curves = within_runs(arms={"baseline": (1.0, 1.0), "rope": (1.002, 1.0)}, noise=0.004)
    sentence = words.verdict("RoPE", curves["estimate"]["arms"]["rope"])
    assert "no gain or loss in compute shown: 1.0" in sentence
    assert "as many model FLOPs a second at scale L" in sentence


def test_number_words():
    assert (words.gain(None), words.gain(1.234), words.gain(130.1)) == ("–", "1.23×", "130×")
    assert words.si(2.5e10, "FLOP") == "25 GFLOP"
    assert words.seconds(0.0021) == "2.1 ms"
    assert words.interval([0.95, 1.1]) == "0.95 to 1.10"

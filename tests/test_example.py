"""The study in examples/: the figures that docs/study.md quotes are those of its results.json."""

import json
from pathlib import Path

import pytest

from ceg_model.study.innovations import is_same_maths

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "studies" / "cpu-ladder"
TREND = {
    "compute-dependent": "grows",
    "compute-independent": "does not",
    "diminishing": "falls",
    "inconclusive": "undecided",
}


@pytest.fixture(scope="module")
def results():
    return json.loads((EXAMPLE / "results.json").read_text())


def rows(results):
    """The table of docs/study.md, a line an arm."""
    for arm, answer in results["estimate"]["arms"].items():
        digits = 3 if is_same_maths(arm) else 2
        over = answer["mean_over_scales"]
        gains = [answer["scales"][s]["g_alg"] for s in "SML"]
        *gains, mean, low, high = (f"{x:.{digits}f}" for x in (*gains, over["g_alg"], *over["ci"]))
        trend = TREND[results["estimate"]["class"][arm]["class"]]
        own = results["hardware"]["L"][arm]
        hw = f"{own['against_reference']:.2f}, {own['against_torch']:.2f}"
        yield f"{', '.join(gains)} | {mean} ({low}-{high}) | {trend} | {hw} |"


def test_the_page_quotes_the_study(results):
    page = (ROOT / "docs" / "study.md").read_text()
    for row in rows(results):
        assert row in page
    assert f"this plan's first run: {results['complete']['done']} runs" in page


def test_the_study_is_whole_and_its_page_has_no_machine_in_it(results):
    assert results["complete"]["done"] == results["complete"]["planned"]
    assert not results["complete"]["failed"]
    assert not results["left_out"]
    for name in ("results.json", "report.html"):
        assert "/tmp/" not in (EXAMPLE / name).read_text()

"""The published gains taken apart, and the page that shows them."""

import json
import re
from pathlib import Path

import pytest

from ceg_model import cli
from ceg_model.study import paper, paper_page
from ceg_model.study.innovations import INNOVATIONS

PAGE = Path(__file__).parents[1] / "docs/paper.md"


@pytest.fixture(scope="module")
def found():
    return paper.taken_apart()


@pytest.mark.parametrize(
    ("arm", "at", "g_alg", "g_hw", "g_time"),
    [
        ("flash_attention", "25k", 1.00, 1.32, 1.32),
        ("flash_attention", "50k", 1.00, 1.32, 1.32),
        ("layer_norm", "50k", 2.17, 0.97, 2.10),
        ("rope", "50k", 1.43, 0.93, 1.33),
        ("ln_rope_fa", "50k", 3.45, 1.14, 3.94),
    ],
)
def test_gains_of_version_1(arm, at, g_alg, g_hw, g_time, found):
    got = found["v1"]["rows"][arm][at]
    assert [round(got[k], 2) for k in ("g_alg", "g_hw", "g_time")] == [g_alg, g_hw, g_time]
    assert got["g_time"] == pytest.approx(got["g_alg"] * got["g_hw"], rel=1e-12)


def test_by_hand():
    """An arm that takes half the steps, each twice as fast at 3/4 of the FLOPs."""
    # The paper's rule: half the steps at the double rate of steps is no gain at all.
    got = paper.take_apart(1.0, 100, 50, work=0.75)
    assert got == {"g_alg": 2 / 0.75, "g_hw": 1.5, "g_time": 4.0, "implied": 2 / 0.75}


def test_a_kernel_is_1_and_its_distance_from_1_is_the_error(found):
    row = found["v1"]["rows"]["flash_attention"]
    assert row["25k"]["implied"] == pytest.approx(0.71 * 330.01 / 250.34)
    assert row["50k"]["implied"] == pytest.approx(0.81 * 330.01 / 250.34)
    assert [found["v2"]["rows"]["flash_attention"][m]["g_alg"] for m in ("compact", "full")] == [
        1
    ] * 2


def test_what_was_not_reached_or_not_published_is_a_bound_or_none(found):
    mqa = found["v1"]["rows"]["mqa"]
    assert (mqa["50k"]["ceg"], mqa["50k"]["g_alg"], mqa["50k"]["g_time"]) == (None, None, None)
    # K and V of one head for eight: 2 x 448 x 512 weights a layer, 6 FLOPs a token each.
    saved = 8 * 2 * 448 * 512 * 6
    work = 1 - saved / found["flops"]["v1"]["per_token"]
    assert mqa["work"] == pytest.approx(work, rel=1e-9)
    assert (mqa["50k"]["bound"], mqa["50k"]["bound_side"]) == (pytest.approx(1 / work), "upper")
    assert mqa["25k"]["g_alg"] == pytest.approx(0.91 * 330.01 / 329.17 / work)
    rows = found["v2"]["rows"]
    assert {row[m]["g_hw"] for row in rows.values() for m in ("compact", "full")} == {None}
    assert rows["native_sparse"]["compact"]["g_alg"] is None
    assert rows["rope"]["full"]["g_alg"] == pytest.approx(1.350, rel=2e-3)


def test_flops_of_the_papers_models(found):
    v1, compact, full = (found["flops"][name] for name in ("v1", "v2 compact", "v2 full"))
    assert (v1["n_params"], v1["palm_per_token"]) == (50_921_984, 330_697_728)
    assert v1["palm_total"] == pytest.approx(4.3345e18, rel=1e-5)
    assert (compact["palm_per_token"], full["palm_per_token"]) == (193_759_488, 750_850_560)
    # Ours leaves out half of the pairs but for the diagonal, and LayerNorm's 6 N.
    pairs = 12 * 8 * 512 * 512 - 12 * 8 * 512 * (512 + 1) // 2
    assert v1["palm_per_token"] - v1["per_token"] == pairs + 6 * 512


def test_minutes_stand_for_mfu_and_give_back_the_sparse_peak(found):
    same = found["v1"]["mfu_times_minutes"]
    assert same["spread"] < 0.005  # MFU is printed with three digits
    assert same["implied_peak"] == pytest.approx(paper.SPARSE_PEAK, rel=0.03)
    assert found["v1"]["baseline"]["mfu_dense"] == pytest.approx(11.3 * 1979 / 989)


def test_the_slope_is_not_a_class(found):
    slope = found["v2"]["slope"]
    assert slope["compute_ratio"] == pytest.approx(7.75, abs=5e-3)
    assert slope["slope"] == pytest.approx(-0.32, abs=5e-3)
    assert slope["slope"] < -slope["margin"]
    assert slope["class"] == "inconclusive"


def test_the_published_numbers_are_those_of_the_innovations():
    for arm, row in paper.TABLE_III.items():
        if row.ceg_50k is not None:
            assert f"{row.ceg_50k}" in [p.value for p in INNOVATIONS[arm].published]
    for arm, (compact, full) in paper.V2.items():
        if arm in INNOVATIONS:
            assert f"{compact} / {full}" in [p.value for p in INNOVATIONS[arm].published]


def test_every_remark_stands_at_its_number(found):
    tables = {title: rows for title, _, rows in paper_page.tables()}
    text = str(paper_page.tables()[:-1])
    for i, wrong in enumerate(found["wrong"], 1):
        assert tables["What is wrong"][i - 1] == [f"[{i}]", wrong["number"], wrong["what"]]
        assert text.count(f"[{i}]") >= 1
        assert wrong["what"].endswith(".")
    for number in ("0.81", "1.064", "11.3%", "1.54"):
        i = [w["number"] for w in found["wrong"]].index(number) + 1
        assert f"{number} [{i}]" in text
    assert len(found["wrong"]) == 7


def test_the_page_holds_what_the_command_prints(capsys):
    assert cli.main(["paper", "--markdown"]) == 0
    printed = capsys.readouterr().out
    page = PAGE.read_text()
    for _, header, rows in paper_page.tables():
        table = paper_page.table_markdown(header, rows)
        assert table in page, "run `ceg paper --markdown` and put its tables into docs/paper.md"
        assert table in printed
    assert cli.main(["paper"]) == 0
    words = re.sub(r"\s+", " ", capsys.readouterr().out)
    for _, _, rows in paper_page.tables()[:-1]:
        for cells in rows:
            assert " ".join(cell for cell in cells if cell) in words


def test_json_is_what_was_found(capsys, found):
    assert cli.main(["paper", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))

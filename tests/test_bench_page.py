"""The page and the figures of `ceg roofline`: from rows alone, and nothing from elsewhere.

Left out: how they look, which is checked by eye in a browser at desktop and phone width.
"""

from __future__ import annotations

import importlib.util
import json
import re
from html.parser import HTMLParser

import pytest

from ceg_kernels import OPS
from ceg_kernels.measure import page
from ceg_kernels.measure.clock import Timing
from ceg_kernels.measure.plot import (
    MARKERS,
    SYMBOLS,
    backends_of,
    bandwidth,
    peak,
    recovered,
    roofline_figure,
)
from ceg_kernels.measure.suite import PEERS
from ceg_kernels.op import Cost
from tests.test_bench import _row, ceg
from tests.test_report import Page


class Tables(HTMLParser):
    """The text of every body cell, row by row, and of every heading."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.headings, self.text = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th", "h2", "h3"):
            self.text = ""

    def handle_data(self, data):
        if self.text is not None:
            self.text += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append(self.text)
        elif tag in ("h2", "h3"):
            self.headings.append(self.text)
        self.text = None if tag in ("td", "th", "h2", "h3") else self.text


def rows_of(name, seed=1.0):
    """Every op, two directions and dtypes, ours beside three peers; one row without a time."""
    shared = {"versions": {"machine": name, "threads": "2", "torch": "0", "roofs": "copy native"}}
    rows = []
    for i, op in enumerate(OPS):
        cost = Cost(0 if "dispatch" in op else 1000 * 30**i, 1000)
        for direction in ("fwd", "bwd"):
            for dtype in ("float32", "bfloat16"):
                for backend in ("cpu", "torch", "eager", "cpu:avx2"):
                    known = backend if backend in PEERS else None
                    rows.append(_row(
                        dtype, seed * 1e-6, op=op, direction=direction, backend=backend,
                        peer=known, shape=f"quick-{len(rows)}", cost=cost,
                    ) | shared)  # fmt: skip
    broken = _row(status="not timed: error is 7 times", timing=None, shape="<i>wrong</i>")
    return [*rows, broken | shared]


NAMES = "Machine <b>one</b> & co", "another"


@pytest.fixture(scope="module")
def machines():
    return {name: rows_of(name, seed) for name, seed in zip(NAMES, (1.0, 2.0), strict=True)}


@pytest.fixture(scope="module")
def text(machines):
    return page.render(machines, "my <rows>.jsonl")


def test_the_page_holds_every_machine_and_every_row(text, machines):
    found = Tables(text)
    assert [name for name in NAMES if name in found.headings] == list(NAMES)
    assert len(OPS) * 2 == sum(heading in OPS for heading in found.headings)
    shown = sorted(tuple(row[:4]) for row in found.rows if row[0] != "shape")
    want = sorted(
        (row["shape"], row["direction"], row["dtype"], row["backend"])
        for rows in machines.values() for row in rows
    )  # fmt: skip
    assert shown == want


def test_the_page_is_self_contained(text):
    found = Page(text)
    assert all(load.startswith("#") for load in found.loads)
    assert not {"script", "link", "img", "iframe", "object"} & set(found.tags)
    assert not re.search(r"https?:|\bsrc=|@import|url\((?!#)", text)
    assert len(found.ids) == len(set(found.ids))
    used = re.findall(r"url\(#([^)]+)\)", text) + re.findall(r'href="#([^"]+)"', text)
    assert set(used) <= set(found.ids)
    assert found.tags.count("svg") == 2 * 2  # a panel for each dtype of each machine
    assert "#010203" not in text  # the theme's ink took its place


def test_names_are_escaped(text):
    assert "<b>one" not in text
    assert "Machine &lt;b&gt;one&lt;/b&gt; &amp; co" in text
    assert "my &lt;rows&gt;.jsonl" in text
    assert "&lt;i&gt;wrong&lt;/i&gt;" in text


def test_a_row_says_what_was_measured():
    ours = _row(seconds=2e-6, error_over_slack=0.5)
    peer = _row(seconds=5e-6, backend="eager", peer="eager")
    broken = _row(backend="compile", peer="compile", timing=None, status="not timed: why")
    [_, first, second, third] = Tables(page.render({"m": [broken, peer, ours]})).rows
    assert first == ["s", "fwd", "float32", "cpu", "2 us", "+0% +0%", "50.0 GF/s", "12%",
                     "compute", "0.50", "ok", "eager 2.50×"]  # fmt: skip
    assert {tuple(second[-2:]), tuple(third[-2:])} == {("ok", "2.50× cpu"), ("not timed: why", "")}
    hot = page.render({"m": [ours | {"hot_s": 1e-6}]})
    assert "hot 1 us" in hot


def test_roofs_stand_with_how_they_were_measured(text):
    [row] = [_row()]
    assert row["versions"]["roofs"] == "float32 fma, copy native"
    plain = page.render({"m": [row, _row(cost=Cost(0, 10))]})
    assert re.search(r"400 GF/s\s*<small>multiply-adds in registers</small>", plain)
    assert re.search(r"40 GB/s\s*<small>a copy by the native core</small>", plain)
    faster = row | {"roof_fraction": row["roof_fraction"] / 2}
    assert "computed with 400 to 800" in page.render({"m": [row, faster]})
    silent = row | {"versions": {"machine": "m"}}
    assert "how, the rows do not say" in page.render({"m": [silent]})


def test_rows_without_a_place_in_the_figure_have_one_in_the_table():
    text = page.render({"m": [_row(cost=Cost(0, 10)), _row(cost=Cost(10, 0))]})
    assert "<svg" not in text
    assert len(Tables(text).rows) == 3
    assert "were not timed: rms_norm." in text


def test_the_figure_has_every_row_and_no_label_on_another(machines):
    [rows, _] = machines.values()
    figure = roofline_figure(rows)
    drawn = [row for row in rows if row["flops"] and row["median_s"]]
    assert [panel.get_title() for panel in figure.axes] == ["float32", "bfloat16"]
    points = [
        (line.get_xdata()[0], line.get_ydata()[0])
        for panel in figure.axes for line in panel.lines if len(line.get_xdata()) == 1
    ]  # fmt: skip
    assert sorted(points) == sorted((row["intensity"], row["gflops"]) for row in drawn)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for panel in figure.axes for text in panel.texts]
    boxes += [text.get_window_extent() for text in figure.legends[0].get_texts()]
    assert len(boxes) >= 3
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown[-5:] == ["cpu (ours)", "cpu:avx2 (ours)", "torch", "eager", "hollow: backward"]
    assert "moe_dispatch" in figure.get_supxlabel()


def test_ours_come_first_and_every_peer_has_a_marker():
    assert set(PEERS) <= set(MARKERS)
    assert len({MARKERS[name] for name in PEERS}) == len(PEERS)
    assert set(MARKERS.values()) < set(SYMBOLS)
    rows = [_row(backend=n, peer=n if n in PEERS else None) for n in ("eager", "new", "torch")]
    assert backends_of(rows) == ["new", "torch", "eager"]


def test_each_row_recovers_its_own_roofs():
    rows = [_row(), _row(cost=Cost(10, 1000), dtype="bfloat16"), _row(timing=None)]
    assert recovered(rows, "float32") == [pytest.approx(400)]
    assert recovered(rows) == []  # bfloat16's compute roof is unknown, so no bound is
    assert (peak(rows, "bfloat16"), bandwidth(rows)) == (None, None)
    assert bandwidth([_row(cost=Cost(0, 1000))]) == pytest.approx(40)


@pytest.mark.parametrize(
    ("out", "files"),
    [((), {"r.svg", "r.html"}), (("x.html",), {"x.html"}), (("x.svg",), {"x.svg"})],
)
def test_what_the_command_writes(tmp_path, capsys, out, files):
    results = tmp_path / "r.jsonl"
    results.write_text(json.dumps(_row(timing=Timing((1e-6,) * 3))) + "\n")
    assert ceg("roofline", str(results), *[f"--out={tmp_path / name}" for name in out]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"r.jsonl", *files}
    for name in files:
        assert str(tmp_path / name) in capsys.readouterr().out or len(files) == 2
        head = (tmp_path / name).read_text()[:100]
        assert head.startswith("<!doctype html>" if name.endswith("html") else "<?xml")


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_missing_library_is_named(tmp_path, monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    with pytest.raises(ModuleNotFoundError, match=rf"needs {missing}: pip install -e .\[study\]"):
        ceg("roofline", str(tmp_path / "rows.jsonl"))

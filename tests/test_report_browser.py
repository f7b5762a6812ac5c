"""The report in a real browser: nothing is loaded, hidden, cut off, too small or on top of another.

A made-up study that has every plot, at desktop and phone width, with the network off. The
measuring scripts are run by the test; the page has none. Left out: whether it is beautiful.
"""

from __future__ import annotations

import pytest

from ceg_model.study.report import render
from tests import browser, report_data

WIDTHS = {"desktop": 1280, "phone": 390}
SMALLEST_TEXT = 9.0  # CSS pixels
MAX_BYTES = 5 * 1024 * 1024

# Boxes that scroll by themselves, so what is inside may be wider than the screen.
SCROLLS = ".scroll, .picker, .grid.small"

OVERFLOW = f"""(() => {{
  const width = document.documentElement.clientWidth;
  const outside = [...document.querySelectorAll('body *')].filter(e => {{
    const box = e.getBoundingClientRect();
    const own = e.closest('{SCROLLS}');
    return box.width > 0 && box.right > width + 1 && (own === null || own === e);
  }});
  return {{scroll: document.documentElement.scrollWidth - width,
           outside: outside.map(e => e.outerHTML.slice(0, 80))}};
}})()"""

FIGURES = """[...document.querySelectorAll('figure svg')].map(svg => {
  const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
  const texts = [...svg.querySelectorAll('text')].map(t => {
    const b = t.getBoundingClientRect();
    return {text: t.textContent, left: b.left, right: b.right, top: b.top, bottom: b.bottom,
            size: Math.min(...[t, ...t.querySelectorAll('tspan')].map(
              e => parseFloat(getComputedStyle(e).fontSize))) * box.width / view.width};
  });
  return {name: svg.getAttribute('aria-label'), width: box.width, height: box.height,
          left: box.left, right: box.right, top: box.top, bottom: box.bottom,
          shown: svg.checkVisibility({opacityProperty: true, visibilityProperty: true}), texts};
})"""


@pytest.fixture(scope="module")
def study():
    return report_data.endpoints()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    path = browser.find()
    if path is None:
        pytest.skip(f"none of {', '.join(browser.NAMES)} is on the PATH")
    with browser.browser(path, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def file(study, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(study))
    return path


@pytest.fixture(scope="module", params=WIDTHS)
def page(request, chromium, file):
    chromium.show(file, WIDTHS[request.param])
    return chromium


def test_the_page_is_light_and_asks_for_nothing(page, file):
    assert file.stat().st_size < MAX_BYTES
    told = [event["method"] for event in page.events]
    wrong = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded",
             "Network.loadingFailed"}  # fmt: skip
    assert wrong.isdisjoint(told)
    asked = [e["params"]["request"]["url"] for e in page.events
             if e["method"] == "Network.requestWillBeSent"]  # fmt: skip
    assert asked == [file.as_uri()]


def test_nothing_is_wider_than_the_screen(page):
    assert page.run(OVERFLOW) == {"scroll": 0, "outside": []}


def test_the_name_of_an_arm_is_not_broken(page):
    """Row headers are as wide as the longest word of theirs, which none may leave or split."""
    lines = """[...document.querySelectorAll('th[scope=row]')].filter(e => e.checkVisibility())
      .map(e => [e.firstChild.textContent.trim(), e.scrollWidth - e.clientWidth,
                 (r => (r.selectNodeContents(e.firstChild), r.getClientRects().length))
                 (document.createRange())])"""
    found = page.run(lines)
    assert len(found) > 20
    for name, beyond, rows in found:
        assert beyond <= 0, name
        assert rows <= max(1, len(name.replace("+ ", "").split())), name


def test_every_figure_is_seen_and_can_be_read(page, study):
    figures = page.run(FIGURES)
    arms = len(study["estimate"]["arms"])
    # By scale: two of loss, range, bars, bundle, MFU; trends and sweeps by arm; roofline, shares.
    assert len(figures) == 3 * 6 + arms + (arms + 1) + 2 + 1
    for figure in figures:
        assert figure["shown"], figure["name"]
        assert figure["width"] > 200, figure["name"]
        assert figure["height"] > 100, figure["name"]
        for text in figure["texts"]:
            assert text["size"] >= SMALLEST_TEXT, (figure["name"], text)


def test_no_text_is_cut_off_or_on_another(page):
    cut, hidden = [], []
    for figure in page.run(FIGURES):
        for text in figure["texts"]:
            if (
                text["left"] < figure["left"] - 1
                or text["right"] > figure["right"] + 1
                or text["top"] < figure["top"] - 1
                or text["bottom"] > figure["bottom"] + 1
            ):
                cut.append((figure["name"], text["text"]))  # fmt: skip
        for i, one in enumerate(figure["texts"]):
            hidden += [(figure["name"], one["text"], two["text"]) for two in figure["texts"][:i]
                       if overlap(one, two)]  # fmt: skip
    assert cut == []
    assert hidden == []


def overlap(one, two):
    """Whether two boxes share more than the empty rim that a line of text has."""
    wide = min(one["right"], two["right"]) - max(one["left"], two["left"])
    high = min(one["bottom"], two["bottom"]) - max(one["top"], two["top"])
    least = min(one["bottom"] - one["top"], two["bottom"] - two["top"])
    return wide > 1 and high > 0.35 * least


def test_an_arm_can_be_picked_and_the_theme_follows(chromium, file):
    dim = "getComputedStyle(document.querySelector('figure g.arm-2')).opacity"
    ink = "getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()"
    inks = []
    for dark in (False, True):
        chromium.show(file, 1280, dark=dark)
        inks.append(chromium.run(ink))
    assert inks[0] != inks[1]
    assert chromium.run(dim) == "1"
    still = "document.head.append(Object.assign(document.createElement('style'), "
    still += "{textContent: '* { transition: none !important }'}))"
    chromium.run(still + "; document.getElementById('pick-arm-1').click()")
    assert chromium.run(dim) == "0.1"
    assert chromium.run(dim.replace("arm-2", "arm-1")) == "1"
    assert chromium.run(dim.replace("arm-2", "arm-0")) == "1"

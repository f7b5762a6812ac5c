"""Progress: plain lines now and then, a bar on a terminal, always on stderr."""

import io

import pytest

from ceg_model.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (59.4, "59s"), (60, "1m00s"), (125, "2m05s"), (4020, "1h07m")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_file_gets_a_line_now_and_then(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0])
    monkeypatch.setattr("ceg_model.progress.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    with Progress("train", stream=stream, line_interval_s=10) as progress:
        for done in (10, 11, 20, 21, 30):
            progress(done, 30, f"loss {done}")
        progress.note("something happened")
    assert stream.getvalue().splitlines() == [
        "train: 10/30  loss 10",
        "train: 20/30, 10s left  loss 20",
        "train: 30/30  loss 30",
        "something happened",
    ]


def test_an_unknown_total(monkeypatch):
    stream = io.StringIO()
    with Progress("prepare", stream=stream) as progress:
        progress(3, 0, "MiB read")
        progress(4, 0, "MiB read")
    assert stream.getvalue() == "prepare: 3 MiB read\n"


def test_a_terminal_gets_a_bar():
    pytest.importorskip("rich")
    stream = Terminal()
    with Progress("train", stream=stream) as progress:
        progress(5, 10, "loss 2.5")
        progress.note("a [note] that stays")
    assert "5/10" in stream.getvalue()
    assert "loss 2.5" in stream.getvalue()
    assert "a [note] that stays" in stream.getvalue()


def test_quiet_says_nothing():
    stream = Terminal()
    with Progress("train", stream=stream, quiet=True) as progress:
        progress(1, 1, "")
        progress.note("text")
    assert stream.getvalue() == ""

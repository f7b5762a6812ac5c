"""Processes forked beside a report: the same answer as without, and errors that come back.

Left out: platforms without fork, where the work is done in this process.
"""

import dataclasses
import os
import signal
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest

from ceg_model.study.curves import Key
from ceg_model.study.estimate import estimate
from ceg_model.study.forked import forked
from tests.test_estimate import shifted

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only"),
    pytest.mark.skipif(
        sys.platform == "linux" and len(os.sched_getaffinity(0)) < 2,
        reason="one core needs no other process",
    ),
]


def test_arms_that_are_compared_side_by_side_get_the_same_answer(monkeypatch):
    more = [dataclasses.replace(c, key=Key("other", seed=c.key.seed)) for c in shifted(3.0)[2:]]
    curves = [*shifted(2.0), *more]
    alone = estimate(curves)
    monkeypatch.setattr(sys.modules[estimate.__module__], "MANY", 1)
    assert estimate(curves) == alone

    def fails(*_):
        raise RuntimeError(f"in process {os.getpid()}")

    monkeypatch.setattr("ceg_model.study.within.over_range", fails)
    with pytest.raises(RuntimeError, match="in process") as error:
        estimate(curves)
    assert str(os.getpid()) not in str(error.value)


def test_a_process_that_was_killed_is_an_error_and_no_wait_without_end():
    with (
        pytest.raises(BrokenProcessPool),
        forked(lambda i: os.kill(os.getpid(), signal.SIGKILL) if i else i, [0, 1]) as found,
    ):
        found()

"""Every op, direction, named shape and dtype, on every backend that can run it.

    pytest bench/ --benchmark          the quick shapes, ours beside stock torch and the reference
    pytest bench/ --benchmark --shapes gpt2 -k attention --peers torch,eager,compile
    pytest bench/                      every body once: a smoke test

The samples come from `ceg_kernels.measure.clock`, which interleaves the backends of a case on the
same inputs. pytest-benchmark is handed those samples by a clock that only advances by them, so that
its statistics, comparisons and histograms are about the same seconds as our rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest


class ReplayClock:
    """A clock that moves only by samples that were taken before."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.pending: Iterator[float] = iter(())

    def now(self) -> float:
        return self.seconds

    def advance(self) -> None:
        self.seconds += next(self.pending)


CLOCK = ReplayClock()


@pytest.mark.benchmark(timer=CLOCK.now)
def test_op(case, backend, benchmark, measured):
    benchmark.group = str(case)
    if benchmark.disabled:
        args = measured.arguments(case)
        if (reason := case.why_not(backend, args)) is not None:
            pytest.skip(reason)
        benchmark.pedantic(case.call(backend, args))
        return
    result = measured.result(case, backend)
    if result is None:
        pytest.skip(str(case.why_not(backend, case.args())))
    benchmark.extra_info.update(result.row)
    if result.timing is None and result.row["max_error_over_slack"] is None:
        pytest.skip(result.row["status"])  # a peer that does not run here, say without a compiler
    if result.timing is None:
        pytest.fail(f"{case} on {backend}: {result.row['status']}")
    CLOCK.pending = iter(result.timing.samples)
    benchmark.pedantic(CLOCK.advance, rounds=result.timing.rounds)

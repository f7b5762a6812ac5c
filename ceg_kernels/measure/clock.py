"""The only timer of the project.

Several callables are timed in one process, in rounds: every round takes one sample of each of
them, in rotating order, so that a slow spell of the machine falls on all alike and ratios of
medians can be trusted. A sample is the mean over an inner loop that is long enough for the clock;
median, p20 and p80 are over samples.

A callable may come as a sequence of *variants*: the same work on different memory. The inner loop
rotates through them, so that inputs that together exceed the last-level cache are read from memory,
as they are in training. On CUDA the L2 cache is flushed before each sample instead.

CPU samples are wall-clock seconds with torch's current number of threads. CUDA samples are device
seconds, by events around the replay of a captured graph; what the host pays for a call is another
number, see `call_seconds`.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Call = Callable[[], Any]

# One sample lasts at least this long: the clock reads in ~50 ns, a scheduler tick costs ~10 us.
MIN_SAMPLE_S = 1e-3


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one sample per round, in the order in which they were taken."""

    samples: tuple[float, ...]
    call_s: float | None = None  # what the Python caller waits for one call, where measured
    hot_s: float | None = None  # median without the flush, or on one variant; None if there is one

    @property
    def rounds(self) -> int:
        return len(self.samples)

    @property
    def median_s(self) -> float:
        return quantile(self.samples, 0.5)

    @property
    def p20_s(self) -> float:
        return quantile(self.samples, 0.2)

    @property
    def p80_s(self) -> float:
        return quantile(self.samples, 0.8)


def quantile(samples: Sequence[float], q: float) -> float:
    """Linear interpolation between the order statistics, as `numpy.quantile` does by default."""
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def time_interleaved(
    calls: Mapping[str, Call | Sequence[Call]],
    *,
    device: str = "cpu",
    min_time_s: float = 0.2,
    min_rounds: int = 5,
    max_time_s: float = 5.0,
) -> dict[str, Timing]:
    """Time each callable for about `min_time_s` in `min_rounds` or more rounds.

    `max_time_s` bounds the time given to one callable: where `min_rounds` calls take longer than
    that, there are fewer rounds, but never fewer than 3. So it is when other processes slow them
    down to less than half of their speed.
    """
    if not calls:
        return {}
    if min_rounds < 3:
        raise ValueError(f"min_rounds must be at least 3 for p20 and p80, got {min_rounds}")
    variants = {name: _as_variants(name, call) for name, call in calls.items()}
    sampler = _sampler(device)
    with _garbage_collector_off():
        samplers = {name: sampler(calls) for name, calls in variants.items()}
        rounds = _rounds(samplers, min_time_s, min_rounds, max_time_s)
        for one in samplers.values():
            one.lengthen(min_time_s / rounds)
        samples: dict[str, list[float]] = {name: [] for name in samplers}
        names = list(samplers)
        # Calibration may have met a fast moment of a busy machine: twice the planned time ends it.
        planned = sum(max(min_time_s, rounds * one.call_s) for one in samplers.values())
        deadline = time.perf_counter() + 2 * planned
        for round_ in range(rounds):
            if round_ >= 3 and time.perf_counter() > deadline:
                break
            start = round_ % len(names)
            for name in names[start:] + names[:start]:
                samples[name].append(samplers[name].sample())
        return {name: Timing(tuple(samples[name]), hot_s=samplers[name].hot()) for name in samplers}


def call_seconds(call: Call, *, min_time_s: float = 0.02) -> float:
    """Median seconds that the caller waits until `call` returns.

    On CUDA this is the host's share only: work is queued, and the device is not waited for.
    """
    call()
    samples: list[float] = []
    spent = 0.0
    while spent < min_time_s or len(samples) < 3:
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
        spent += samples[-1]
    return quantile(samples, 0.5)


class _CpuSampler:
    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        for call in calls:  # warm-up: first touch of the memory, lazy initialisation
            call()
        self.next = 0
        self.inner = 1
        self.call_s = self._elapsed()  # a single call says how long a round may be
        self.inner = max(1, math.ceil(MIN_SAMPLE_S / max(self.call_s, 1e-9)))
        if self.inner > 1:
            self.call_s = self.sample()

    def lengthen(self, sample_s: float) -> None:
        wanted = max(sample_s, MIN_SAMPLE_S) / max(self.call_s, 1e-9)
        self.inner = max(1, round(wanted))

    def sample(self) -> float:
        return self._elapsed() / self.inner

    def hot(self) -> float | None:
        if len(self.calls) == 1:
            return None
        return quantile([self._elapsed(self.calls[:1]) / self.inner for _ in range(3)], 0.5)

    def _elapsed(self, calls: Sequence[Call] | None = None) -> float:
        # The variants go on turning from sample to sample: a call that fills one by itself would
        # else always meet the first.
        calls = self.calls if calls is None else calls
        first, self.next = self.next, (self.next + self.inner) % len(calls)
        schedule = [calls[(first + i) % len(calls)] for i in range(self.inner)]
        start = time.perf_counter()
        for call in schedule:
            call()
        return time.perf_counter() - start


class _CudaSampler:
    """Device seconds of one captured graph per variant, cold (L2 flushed) and hot."""

    def __init__(self, calls: Sequence[Call]) -> None:
        import torch

        self.torch = torch
        self.replays = [self._capture(call) for call in calls]
        l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device="cuda")
        self.next = 0
        self.inner = 1
        self.call_s = self.sample()

    def lengthen(self, sample_s: float) -> None:
        # Each cold call is timed by itself, since the flush stands between two of them.
        self.inner = max(1, min(50, round(sample_s / max(self.call_s, 1e-9))))

    def sample(self) -> float:
        torch = self.torch
        pairs = []
        for _ in range(self.inner):
            replay = self.replays[self.next % len(self.replays)]
            self.next += 1
            self.flush.zero_()
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            replay()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) * 1e-3 / self.inner

    def hot(self, repeats: int = 20) -> float:
        torch = self.torch
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        self.replays[0]()
        start.record()
        for _ in range(repeats):
            self.replays[0]()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats

    def _capture(self, call: Call) -> Call:
        torch = self.torch
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm-up off the capture: autotuning, workspaces
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:
            # Baselines that synchronise with the host cannot be captured; they are timed as the
            # stream runs them, gaps included, since their users pay for those too.
            torch.cuda.synchronize()
            return call
        return graph.replay


def _sampler(device: str) -> type[_CpuSampler] | type[_CudaSampler]:
    kind = device.split(":")[0]
    if kind == "cpu":
        return _CpuSampler
    if kind != "cuda":
        raise ValueError(f"device must be cpu or cuda, got {device}")
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(f"device {device} must be a CUDA GPU that torch can use, got none")
    return _CudaSampler


def _as_variants(name: str, call: Call | Sequence[Call]) -> Sequence[Call]:
    variants = [call] if callable(call) else list(call)
    if not variants:
        raise ValueError(f"calls[{name!r}] must hold at least one callable, got none")
    return variants


def _rounds(
    samplers: Mapping[str, Any], min_time_s: float, min_rounds: int, max_time_s: float
) -> int:
    slowest = max(max(one.call_s for one in samplers.values()), MIN_SAMPLE_S)
    wanted = max(min_rounds, min(30, int(min_time_s / slowest)))
    return max(3, min(wanted, int(max_time_s / slowest)))


@contextmanager
def _garbage_collector_off() -> Iterator[None]:
    # A collection of a process with torch in it takes ~100 ms and would land in some sample.
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()

"""Flags and numbers in plain words, for people who have not read the specification."""

from __future__ import annotations

import math
from collections.abc import Iterable

FLAGS = {
    "aa_failed": "The baseline compared with itself does not give 1: no gain here is safe.",
    "censored": "One of the two never reached the target loss; only a bound can be given.",
    "extrapolated": "Read beyond the compute that was run, so it is a guess.",
    "identity_failed": "Measured time gain and G_alg × G_hw differ by more than 1%: the machine "
    "was not quiet enough, or an arm's speed changed during its run.",
    "mfu_above_1": "More FLOP/s than the peak came out, so no MFU is given: the peak is too low or "
    "the seconds are too short.",
    "no_ci": "One seed only: a point without an interval.",
    "not_equivalent": "Same maths, but the loss curves were not shown to be equal within 2%: "
    "a numerics bug or too much noise, and never a gain.",
    "not_our_kernel": "Our kernel is not built here; stock torch's fused kernel ran instead.",
    "peak_unknown": "The dense peak of this machine in the runs' dtype is not known: no MFU.",
    "plateau": "The loss falls so slowly at the target that noise moves the crossing.",
    "rising_baseline": "The baseline's loss rose at its end; its minimum is used instead.",
    "schedule_confounded": "The learning rate was not constant at the crossing, which moves it.",
    "schedule_unknown": "The learning rate was not given, so a decaying one cannot be excluded.",
    "time_inferred": "The time gain is computed from G_alg and G_hw, not measured.",
    "unexplained": "The kernels' own times leave more than 5% of the step's time unexplained.",
    "unpaired": "The arms share no seed: the interval is wider than with shared seeds.",
    "untuned": "The learning rate was not swept here, or the best lies on the sweep's edge: an arm "
    "that wants another rate is misjudged.",
}

SHORT = {
    "aa_failed": "A/A failed",
    "identity_failed": "clock off by > 1%",
    "mfu_above_1": "MFU above 1",
    "no_ci": "one seed",
    "not_equivalent": "not equivalent",
    "not_our_kernel": "not our kernel",
    "rising_baseline": "rising baseline",
    "schedule_confounded": "schedule confounded",
    "schedule_unknown": "schedule unknown",
    "time_inferred": "time inferred",
}


def gain(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.2f}×" if value < 10 else f"{value:.3g}×"


def interval(pair: list[float] | None) -> str:
    if not pair:
        return "no interval"
    low, high = pair
    return f"{low:.2g} to {high:.2g}" if high >= 10 or low < 0.1 else f"{low:.2f} to {high:.2f}"


def si(value: float | None, unit: str = "") -> str:
    if value is None:
        return "–"
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}".strip()


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def flag(name: str) -> str:
    return SHORT.get(name, name.replace("_", " "))


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3g}%"


def off(value: float | None, digits: int = 1) -> str:
    """A deviation as a signed percentage; what rounds to nothing has no sign."""
    if value is None:
        return "–"
    rounded = round(100 * value, digits)
    return f"{rounded:+.{digits}f}%".replace("-", "−") if rounded else f"{0:.{digits}f}%"


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def joined(names: Iterable[str]) -> str:
    """ "a, b and c"."""
    *head, last = list(names) or [""]
    return f"{', '.join(head)} and {last}" if head else last

"""Flags, statuses and numbers in plain words, for people who have not read the specification."""

from __future__ import annotations

import math
from typing import Any

FLAGS = {
    "aa_failed": "The baseline compared with itself does not give 1: no gain here is safe.",
    "censored": "One of the two never reached the target loss; only a bound can be given.",
    "identity_failed": "Measured time gain and G_alg × G_hw differ by more than 1%: the machine "
    "was not quiet enough, or an arm's speed changed during its run.",
    "no_ci": "One seed only: a point without an interval.",
    "not_equivalent": "Same maths, but the loss curves were not shown to be equal within 2%: "
    "a numerics bug or too much noise, and never a gain.",
    "not_our_kernel": "Our kernel is not built here; stock torch's fused kernel ran instead.",
    "plateau": "The loss falls so slowly at the target that noise moves the crossing.",
    "rising_baseline": "The baseline's loss rose at its end; its minimum is used instead.",
    "schedule_confounded": "The learning rate was not constant at the crossing, which moves it.",
    "schedule_unknown": "The learning rate was not given, so a decaying one cannot be excluded.",
    "time_inferred": "The time gain is computed from G_alg and G_hw, not measured.",
    "unpaired": "The arms share no seed: the interval is wider than with shared seeds.",
    "untuned": "One learning rate for every arm and scale: an arm that wants another is misjudged.",
}

SHORT = {
    "aa_failed": "A/A failed",
    "identity_failed": "clock off by > 1%",
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
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def flag(name: str) -> str:
    return SHORT.get(name, name.replace("_", " "))


def verdict(title: str, answer: dict[str, Any]) -> str:
    """One sentence on one arm: algorithm first, then hardware; an interval that holds 1 says so."""
    hardware = _hardware(answer.get("g_hw"), answer.get("scale"))
    same = answer.get("equivalence")
    if same is not None:
        if same["passed"]:
            return f"{title}: the same loss for the same FLOPs, measured; {hardware}."
        if same["passed"] is None:
            return f"{title}: the same maths (not tested: one seed); {hardware}."
        return f"{title}: the same maths, but its curves were not shown to be equal; {hardware}."
    if answer["status"] == "refused":
        return f"{title}: no number, because {'; '.join(answer['reasons'])}."
    where = f" at scale {answer['scale']}" if answer.get("scale") else ""
    if answer["status"] == "censored":
        side = "at most" if answer["bound_side"] == "upper" else "at least"
        return f"{title}: worth {side} {gain(answer['bound'])} in compute{where}; {hardware}."
    value, pair = answer["g_alg"], answer["ci"]
    mean = answer.get("mean_over_scales")
    if mean and mean["scales"] > 1:
        value, pair, where = mean["g_alg"], mean["ci"], f" as the mean of {mean['scales']} scales"
    spread = f" ({interval(pair)})" if pair else " (one seed, no interval)"
    worth = f"worth {gain(value)} the compute{spread}{where}"
    if pair and pair[0] <= 1 <= pair[1]:
        worth = f"no gain or loss in compute shown: {gain(value)}{spread}{where}"
    return f"{title}: {worth}; {hardware}."


def _hardware(g_hw: float | None, scale: str | None) -> str:
    if g_hw is None:
        return "its speed is not known"
    where = f" at scale {scale}" if scale else ""
    if 0.99 < g_hw < 1.01:
        return f"as many model FLOPs a second{where}"
    return f"{gain(g_hw)} the model FLOPs a second{where}"

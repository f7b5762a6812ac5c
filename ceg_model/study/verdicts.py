"""What a study found and what it could not decide, one sentence each, from results.json alone."""

from __future__ import annotations

from typing import Any

from ceg_model.study.words import gain, interval, joined

Results = dict[str, Any]

TREND = {
    "compute-independent": "does not depend on compute",
    "compute-dependent": "grows with compute",
    "diminishing": "shrinks as compute grows",
}
MAX_DRIFT = 0.05  # of a step's time that the kernels' own times do not explain


def found(results: Results) -> list[str]:
    """The sentences on what is decided: gains, speeds, trends, bundles."""
    arms = results["estimate"]["arms"]
    lines = [verdict(_title(results, a), arms[a], *_trends(results, a)) for a in arms]
    return lines + _bundles(results)


def verdict(title: str, answer: dict[str, Any], *more: str) -> str:
    """One sentence on one arm: algorithm first, then hardware, then `more`.

    Of an arm whose worth is open only the speed is found; `undecided` says the rest.
    """
    hardware = _hardware(answer.get("g_hw"), answer.get("scale"))
    return f"{title}: {'; '.join([*_worth(answer), hardware, *more])}."


def _worth(answer: dict[str, Any]) -> list[str]:
    same = answer.get("equivalence")
    if same is not None:
        return {
            True: ["the same loss for the same FLOPs, measured"],
            None: ["the same maths (not tested: one seed)"],
            False: ["the same maths, but its curves were not shown to be equal"],
        }[same["passed"]]
    if answer["status"] == "refused":
        return ["no number for its worth in compute"]
    if answer["status"] == "censored":
        side = "at most" if answer["bound_side"] == "upper" else "at least"
        return [f"worth {side} {gain(answer['bound'])} in compute{_at(answer.get('scale'))}"]
    value, pair, where = _headline(answer)
    if pair and pair[0] <= 1 <= pair[1]:
        return [f"no gain or loss in compute shown{where}"]
    spread = f" ({interval(pair)})" if pair else " (one seed, no interval)"
    return [f"worth {gain(value)} the compute{spread}{where}"]


def _headline(answer: dict[str, Any]) -> tuple[float, list[float] | None, str]:
    """The firmest number: the mean over scales where there are several."""
    mean = answer.get("mean_over_scales")
    if mean and mean["scales"] > 1:
        return mean["g_alg"], mean["ci"], f" as the mean of {mean['scales']} scales"
    where = _at(answer.get("scale"))
    if "overlap" in answer:
        where += ", at the deepest loss that both reach"
    return answer["g_alg"], answer["ci"], where


def _at(scale: str | None) -> str:
    if not scale:
        return ""
    return " over all scales" if scale == "all scales" else f" at scale {scale}"


def _hardware(g_hw: float | None, scale: str | None) -> str:
    if g_hw is None:
        return "its speed is not known"
    if 0.99 < g_hw < 1.01:
        return f"as many model FLOPs a second{_at(scale)}"
    return f"{gain(g_hw)} the model FLOPs a second{_at(scale)}"


def _trends(results: Results, arm: str) -> list[str]:
    """Where the slope's interval decides: of G_alg, but not where it is 1, and of G_hw.

    That a speed-up does not depend on compute is what one expects, so it is not said.
    """
    estimate = results["estimate"]
    shown = {"class": set(TREND), "class_hw": set(TREND) - {"compute-independent"}}
    if "equivalence" in estimate["arms"][arm]:
        del shown["class"]
    lines = []
    for key, labels in shown.items():
        trend = (estimate.get(key) or {}).get(arm)
        if trend and trend["class"] in labels:
            ends = trend.get("ends")
            flat = trend["class"] == "compute-independent"
            span = f", from {gain(ends[0])} to {gain(ends[1])}" if ends and not flat else ""
            what = "its gain in compute" if key == "class" else "its gain in speed"
            lines.append(f"{what} {TREND[trend['class']]}{span}")
    return lines


def _bundles(results: Results) -> list[str]:
    estimate = results["estimate"]
    lines = []
    shapley = estimate.get("shapley") or {}
    for bundle, entry in shapley.items():
        scale, cell = _last_known(entry["scales"], "parts")
        if cell is not None:
            shares = [f"{_title(results, p)} {gain(v['ratio'])}" for p, v in cell["parts"].items()]
            lines.append(
                f"{_title(results, bundle)}: of its {gain(cell['total']['ratio'])}{_at(scale)} "
                f"come from {joined(shares)} (Shapley shares; their product is the whole)."
            )
    for bundle, entry in (estimate.get("interaction") or {}).items():
        scale, cell = _last_known(entry["scales"], "ci")
        if bundle in shapley or cell is None or cell["ci"][0] <= 1 <= cell["ci"][1]:
            continue
        word = "more" if cell["ratio"] > 1 else "less"
        lines.append(
            f"{_title(results, bundle)}: together worth {word} than the product of its parts, by "
            f"{gain(cell['ratio'])} ({interval(cell['ci'])}){_at(scale)}."
        )
    return lines


def _last_known(scales: dict[str, Any], key: str) -> tuple[str, dict[str, Any] | None]:
    """The largest scale whose entry has `key`."""
    known = [(name, cell) for name, cell in scales.items() if cell and cell.get(key)]
    return known[-1] if known else ("", None)


def undecided(results: Results) -> list[str]:
    """What the study could not decide, and why; the heaviest doubts first."""
    return [*_gate(results), *_open_gains(results), *_open_trends(results), *_tuning(results),
            *_open_bundles(results), *_open_fits(results), *_open_speeds(results)]  # fmt: skip


def _gate(results: Results) -> list[str]:
    gate = results["estimate"]["aa"]
    if gate["passed"]:
        return []
    if gate["passed"] is None:
        why = f"the baseline was not compared with itself ({gate['reason']})"
        return [f"How large a gain chance alone makes: {why}."]
    value = f"{gain(gate['g_alg'])} ({interval(gate['ci'])}), not 1"
    return [f"Whether any gain here is real: the baseline against itself gives {value}."]


def _open_gains(results: Results) -> list[str]:
    """Arm by arm; those of which nothing is wrong but that they have one seed share a sentence."""
    lines, single = [], []
    for arm, answer in results["estimate"]["arms"].items():
        title, same = _title(results, arm), answer.get("equivalence")
        if same is not None:
            if same["passed"] is not True:
                lines.append(
                    f"Whether {title} leaves the loss alone, as it must: {same['reason']}."
                )
        elif answer["status"] == "ok" and _headline(answer)[1] is None:
            single.append(title)
        else:
            lines += _open_gain(title, answer)
    if single:
        plural = "gains" if len(single) > 1 else "gain"
        lines.insert(0, f"How sure the {plural} of {joined(single)} can be: one seed, no interval.")
    return lines


def _open_gain(title: str, answer: dict[str, Any]) -> list[str]:
    if answer["status"] == "refused":
        return [f"What {title} is worth: {'; '.join(answer['reasons'])}."]
    if answer["status"] == "censored":
        who = title if answer["bound_side"] == "upper" else "the baseline"
        what = f"How much exactly {title} is worth{_at(answer.get('scale'))}"
        return [f"{what}: {who} never reached the target loss, so only a bound is known."]
    value, pair, where = _headline(answer)
    if pair and pair[0] <= 1 <= pair[1]:
        what = f"Whether {title} is worth any compute{where}"
        fits = f"{gain(value)} was measured, and anything in {interval(pair)} would fit"
        return [f"{what}: {fits}; 1× is no gain."]
    return []


def _open_trends(results: Results) -> list[str]:
    """Arms with the same reason share a sentence."""
    reasons: dict[str, list[str]] = {}
    for arm, trend in results["estimate"]["class"].items():
        same = "equivalence" in results["estimate"]["arms"][arm]
        if trend["class"] == "inconclusive" and not same:
            # The slope's own interval differs for each arm and stands in the table.
            reason = trend["reason"].split("; slope")[0]
            if "allows more than one class" in reason:
                reason = "the slopes’ intervals allow more than one answer"
            reasons.setdefault(reason, []).append(_title(results, arm))
    return [
        f"Whether the gain of {joined(names)} grows with compute: {reason}."
        for reason, names in reasons.items()
    ]


def _tuning(results: Results) -> list[str]:
    arms = results["estimate"]["arms"]
    flagged = [a for a, answer in arms.items() if "untuned" in answer["flags"]]
    edges = [s for s in results.get("sweeps") or [] if s.get("best_lr") and not s["inside"]]
    lines = []
    if flagged:
        who = (
            "every arm"
            if len(flagged) == len(arms)
            else joined(_title(results, a) for a in flagged)
        )
        lines.append(f"What {who} would be worth at a learning rate of its own: it was not found.")
    if edges:
        where = dict.fromkeys(f"{_title(results, s['arm'])} at scale {s['scale']}" for s in edges)
        lines.append(
            f"The best learning rate of {joined(where)}: the lowest loss lies on the sweep’s edge, "
            "and a rate beyond it may be better."
        )
    return lines


def _open_bundles(results: Results) -> list[str]:
    lines = []
    for bundle, entry in (results["estimate"].get("interaction") or {}).items():
        if (results["estimate"].get("shapley") or {}).get(bundle):
            continue
        scale, cell = _last_known(entry["scales"], "ci")
        if cell is None:
            lines.append(f"Whether the parts of {_title(results, bundle)} help or hinder each "
                         "other: not all were measured alike.")  # fmt: skip
        elif cell["ci"][0] <= 1 <= cell["ci"][1]:
            lines.append(
                f"Whether the parts of {_title(results, bundle)} help or hinder each other"
                f"{_at(scale)}: beyond their product it is worth {gain(cell['ratio'])} "
                f"({interval(cell['ci'])})."
            )
    return lines


def _open_fits(results: Results) -> list[str]:
    fits = results["estimate"].get("fit") or {}
    weak = [cell for cell, fit in fits.items() if fit.get("degenerate")]
    if not weak:
        return []
    reason = fits[weak[-1]]["degenerate"]
    return [f"The loss that more compute would lead to ({joined(weak)}): {reason}."]


def _open_speeds(results: Results) -> list[str]:
    """Steps whose time the kernels' own times do not explain: in one sentence, or it drowns all."""
    shares = [
        (abs(share), f"{_title(results, arm)} at scale {scale}")
        for scale, arms in (results.get("hardware") or {}).items()
        for arm, own in arms.items()
        if (share := (own.get("amdahl") or {}).get("unexplained")) is not None
    ]
    odd = [pair for pair in shares if pair[0] > MAX_DRIFT]
    if not odd:
        return []
    most, where = max(odd)
    count = f"in {len(odd)} of {len(shares)} steps" if len(odd) > 1 else "in one step"
    text = f"Where more than {MAX_DRIFT:.0%} of the time comes from {count}"
    return [f"{text} (most, {most:.0%}: {where}): the kernels’ own times do not explain it."]


def _title(results: Results, arm: str) -> str:
    return results["titles"].get(arm, arm)

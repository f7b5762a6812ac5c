"""What a gain is made of: the time gain by algorithm and hardware, a bundle's gain by its parts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from ceg_kernels.measure.svg import ALG, FAINT, HW, INK, PAPER, SOFT, panel
from ceg_model.study.plots_style import (
    LABEL,
    Plot,
    Results,
    gain_axis,
    scale_title,
    short,
    title,
)

# What a bar is made of, in this order: colour and hatch.
PIECES = {
    "algorithm": (ALG, ""),
    "hardware": (HW, "///"),
    "MFU": (HW, "///"),
    "peak": (HW, ""),
    "devices": (HW, "..."),
    "residual": (FAINT, ""),
}

Bar = tuple[float, float, float]  # its place, and the logs at which it starts and ends

MAX_INTERVAL = 10.0  # wider ones would flatten the bars


class Step(NamedTuple):
    """A bar of a waterfall: the log of its factor, what it is, and its interval as a factor."""

    name: str
    log: float
    kind: str
    ci: list[float] | None


def pieces(results: Results, arm: str, cell_name: str) -> dict[str, float]:
    """The logs whose sum is ln G_time, those that are known.

    G_hw is split where MFU and peak of both are known. The residual is what the clock says beyond
    the product, so the sum is exact wherever the time gain was measured.
    """
    cell = results["estimate"]["arms"][arm]["scales"].get(cell_name) or {}
    own = (results.get("hardware") or {}).get(cell_name.split("/")[0], {}).get(arm, {})
    out: dict[str, float | None] = {"algorithm": cell.get("g_alg")}
    if own.get("mfu_ratio") and own.get("peak_ratio") and cell.get("g_hw"):
        out |= {"MFU": own["mfu_ratio"], "peak": own["peak_ratio"]}
        out["devices"] = own.get("device_ratio")
    else:
        out["hardware"] = cell.get("g_hw")
    logs = {name: float(np.log(value)) for name, value in out.items() if value}
    if cell.get("g_time") and "algorithm" in logs and len(logs) > 1:
        logs["residual"] = float(np.log(cell["g_time"])) - sum(logs.values())
    return logs


def used_pieces(results: Results) -> list[str]:
    """The pieces that some bar has, for the legend."""
    estimate = results["estimate"]
    found = {
        name
        for arm, answer in estimate["arms"].items()
        for cell in answer["scales"]
        for name, log in pieces(results, arm, cell).items()
        if abs(log) > 1e-9
    }
    return [name for name in PIECES if name in found]


def bars(results: Results) -> Plot:
    """ln G_time = ln G_alg + ln MFU ratio + ln peak ratio (+ residual), stacked, for each cell."""
    estimate = results["estimate"]
    panels = []
    for i, cell in enumerate(estimate["target_losses"]):
        here = [a for a, answer in estimate["arms"].items() if cell in answer["scales"]]
        if here:
            panels.append(
                panel(
                    f"bars-{i}",
                    scale_title(cell),
                    partial(_bars, results=results, cell_name=cell, here=here),
                    height=0.36 * len(here) + 1.05,
                    label=f"Time gain at scale {cell} as algorithmic times hardware gain",
                )
            )
    return Plot(panels, "" if panels else "No arm was compared with the baseline.")


def _bars(ax: Axes, results: Results, cell_name: str, here: list[str]) -> None:
    ends = [0.9, 1.1]
    drawn: dict[str, list[Bar]] = {}  # by piece: each call of barh takes its time
    for place, arm in enumerate(here[::-1]):
        cell = results["estimate"]["arms"][arm]["scales"][cell_name]
        edges = {1: 0.0, -1: 0.0}
        found = pieces(results, arm, cell_name)
        for name, log in found.items():
            sign = 1 if log >= 0 else -1
            start, edges[sign] = edges[sign], edges[sign] + log
            drawn.setdefault(name, []).append((place, start, edges[sign]))
        total, measured = time_gain(cell, found)
        if total is not None:
            ax.plot(
                total, place, "D", color=INK, zorder=5, markersize=6 if measured else 5,
                markerfacecolor=INK if measured else PAPER,
                markeredgecolor=PAPER if measured else INK,
            )  # fmt: skip
            edges[1] = max(edges[1], float(np.log(total)))
        ax.annotate(
            _said(cell, total), (float(np.exp(edges[1])), place), (7, 0), va="center",
            textcoords="offset points", fontsize=LABEL, weight="bold" if measured else "normal",
        )  # fmt: skip
        ends += [float(np.exp(edge)) for edge in edges.values()]
    for name, its in drawn.items():
        _draw_bars(ax, its, *PIECES[name])
    low, high = min(ends) / 1.06, max(ends) ** 1.25 * 1.12  # room for what stands at the right
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    gain_axis(ax.xaxis, low, high, most=5)
    ax.axvline(1, color=INK, linewidth=0.9, zorder=4)
    ax.set_yticks(range(len(here)), [short(results, arm) for arm in here[::-1]])
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.set_xlabel("gain over the baseline, log scale")


def time_gain(cell: dict[str, Any], logs: dict[str, float]) -> tuple[float | None, bool]:
    """G_time and whether it was measured; else the product of its pieces where all are known."""
    if cell.get("g_time"):
        return cell["g_time"], True
    if cell["status"] != "ok" or "algorithm" not in logs or len(logs) < 2:
        return None, False
    return float(np.exp(sum(logs.values()))), False


def _said(cell: dict[str, Any], total: float | None) -> str:
    if total is not None:
        return f"{total:.2f}×"
    if cell["status"] == "censored" and cell.get("bound"):
        return f"G_alg {'≤' if cell['bound_side'] == 'upper' else '≥'} {cell['bound']:.2f}×"
    return "no time" if cell["status"] == "ok" else cell["status"]


def _draw_bars(ax: Axes, bars: Sequence[Bar], colour: str, hatch: str) -> None:
    places, starts, ends = np.array(bars).T
    left, right = np.exp(starts), np.exp(ends)
    ax.barh(
        places, right - left, left=left, height=0.62, color=colour, hatch=hatch, edgecolor=PAPER,
        linewidth=0.7, zorder=3,
    )  # fmt: skip


def bundles(results: Results) -> Plot:
    """From the parts to the whole: Shapley shares, or else single gains and their interaction."""
    estimate = results["estimate"]
    panels = []
    for kind, make in (("shapley", shapley_steps), ("interaction", interaction_steps)):
        for bundle, entry in (estimate.get(kind) or {}).items():
            for i, cell in enumerate(entry["scales"]):
                done = kind == "interaction" and shapley_steps(results, bundle, cell)
                steps = [] if done else make(results, bundle, cell)
                if steps:
                    name = f"{title(results, bundle)}, {scale_title(cell)}"
                    height = 0.36 * len(steps) + 1.05
                    draw = partial(_waterfall, steps=steps)
                    panels.append(panel(f"{kind}-{bundle}-{i}", name, draw, height=height))
    why = "No bundle was run beside all of its parts at the same scale and seeds."
    return Plot(panels, "" if panels else why)


def shapley_steps(results: Results, bundle: str, cell: str) -> list[Step]:
    """Each part's share of the bundle's gain, and the whole; empty where it is not known."""
    bundles = results["estimate"].get("shapley") or {}
    found = (bundles.get(bundle) or {}).get("scales", {}).get(cell) or {}
    if "parts" not in found:
        return []
    steps = [Step(short(results, p), v["log"], "share", v["ci"]) for p, v in found["parts"].items()]
    return [*steps, Step("together", found["total"]["log"], "whole", found["total"]["ci"])]


def interaction_steps(results: Results, bundle: str, cell: str) -> list[Step]:
    """Each part alone, what is left, and the whole; empty where one is not known."""
    estimate = results["estimate"]
    entry = estimate["interaction"][bundle]
    left = (entry["scales"].get(cell) or {}).get("interaction")
    whole = _log_gain(estimate, bundle, cell)
    logs = {}
    for part in entry["parts"]:
        same = "equivalence" in (estimate["arms"].get(part) or {})
        logs[part] = 0.0 if same else _log_gain(estimate, part, cell)
    known = {part: log for part, log in logs.items() if log is not None}
    if left is None or whole is None or len(known) < len(logs):
        return []
    # Gains that were read at different targets do not add up, and a waterfall would pretend so.
    if abs(sum(known.values()) + left - whole) > 0.02:
        return []
    steps = [Step(short(results, part), log, "single", None) for part, log in known.items()]
    pair = entry["scales"][cell].get("ci")
    return [
        *steps,
        Step("interaction", left, "interaction", pair),
        Step("together", whole, "whole", None),
    ]


def _log_gain(estimate: dict[str, Any], arm: str, cell: str) -> float | None:
    found = (estimate["arms"].get(arm) or {}).get("scales", {}).get(cell) or {}
    return float(np.log(found["g_alg"])) if found.get("g_alg") else None


def _waterfall(ax: Axes, steps: list[Step]) -> None:
    kinds = {"single": (ALG, ""), "share": (ALG, ""), "interaction": (SOFT, "///"),
             "whole": (INK, "")}  # fmt: skip
    at, ends = 0.0, [0.9, 1.1]
    for i, step in enumerate(steps):
        place, whole = len(steps) - 1 - i, step.kind == "whole"
        start, end = (0.0, step.log) if whole else (at, at + step.log)
        _draw_bars(ax, [(place, start, end)], *kinds[step.kind])
        right = max(start, end)
        if step.ci and step.ci[1] / step.ci[0] < MAX_INTERVAL:
            low, high = (start + float(np.log(v)) for v in step.ci)
            ax.plot(
                np.exp([low, high]),
                [place] * 2,
                color=SOFT if whole else INK,
                linewidth=1.4,
                zorder=6,
            )
            right = max(right, high)
            ends += [float(np.exp(low)), float(np.exp(high))]
        ax.annotate(
            f"×{np.exp(step.log):.2f}", (float(np.exp(right)), place), (5, 0), va="center",
            textcoords="offset points", fontsize=LABEL, weight="bold" if whole else "normal",
        )  # fmt: skip
        if place:
            ax.plot([np.exp(end)] * 2, [place - 0.69, place + 0.31], color=SOFT, linewidth=0.8)
        at = end
        ends += [float(np.exp(start)), float(np.exp(end))]
    low, high = min(ends) / 1.06, max(ends) ** 1.15 * 1.14
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    gain_axis(ax.xaxis, low, high, most=5)
    ax.axvline(1, color=INK, linewidth=0.9, zorder=4)
    ax.set_yticks(range(len(steps)), [step.name for step in steps][::-1])
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.set_xlabel("G_alg, log scale")

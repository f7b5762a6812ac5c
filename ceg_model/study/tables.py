"""The rows of the report's tables, from results.json alone; what is not known is None."""

from __future__ import annotations

from typing import Any

from ceg_model.study.innovations import INNOVATIONS
from ceg_model.study.plots_style import ALL_SCALES

Results = dict[str, Any]


def arm_rows(results: Results) -> list[dict[str, Any]]:
    """What the headline table says of each arm."""
    rows = []
    hardware = results.get("hardware") or {}
    for arm, answer in results["estimate"]["arms"].items():
        entry = INNOVATIONS.get(arm)
        scale = answer["scale"]
        if scale == ALL_SCALES:  # an answer over all of them; the largest was timed last
            scale = next(reversed(hardware), scale)
        own = hardware.get(scale, {}).get(arm, {})
        rows.append(
            {
                "title": results["titles"].get(arm, arm),
                "kind": entry.kind if entry else "",
                "published": entry.published if entry else (),
                "paper_class": entry.paper_class if entry else None,
                "answer": answer,
                "trend": results["estimate"]["class"][arm],
                "against_reference": own.get("against_reference", answer["g_hw"]),
                "hardware_ci": own.get("against_reference_ci") or own.get("ci"),
                "against_torch": own.get("against_torch"),
                "torch_ci": own.get("against_torch_ci"),
            }
        )
    return rows


def hardware(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Scale -> a row for each arm, what is not known as None."""
    trends = results["estimate"].get("class_hw") or {}
    out: dict[str, list[dict[str, Any]]] = {}
    for scale, arms in (results.get("hardware") or {}).items():
        for arm, own in arms.items():
            step = own.get("amdahl") or {}
            row = {
                "title": results["titles"].get(arm, arm),
                "reference": own.get("against_reference"),
                "reference_ci": own.get("against_reference_ci") or own.get("ci"),
                "torch": own.get("against_torch"),
                "torch_ci": own.get("against_torch_ci"),
                "joules": own.get("joules_per_step"),
                "trend": trends.get(arm),
                "flags": own.get("flags") or [],
            }
            for key in ("mfu", "mfu_baseline", "mfu_ratio", "peak_ratio", "hfu_over_mfu"):
                row[key] = own.get(key)
            for key in ("predicted_s", "measured_s", "unexplained"):
                row[key] = step.get(key)
            out.setdefault(scale, []).append(row)
    return out


def trends(results: Results) -> list[dict[str, Any]]:
    """The trend of each arm's G_alg, and of its G_hw where the estimate has it."""
    estimate = results["estimate"]
    rows = []
    for arm in estimate["arms"]:
        for key, what in (("class", "G_alg"), ("class_hw", "G_hw")):
            trend = (estimate.get(key) or {}).get(arm)
            if trend:
                row = {"slope_c_v": None, "lowest": None} | trend
                row |= {"title": results["titles"].get(arm, arm), "gain": what}
                rows.append(row | {"ends": trend.get("ends") or (None, None)})
    return rows


def bundles(results: Results) -> list[dict[str, Any]]:
    """Interactions and Shapley shares, one row each; a reason where there is no number."""
    estimate, titles = results["estimate"], results["titles"]
    rows = []
    for bundle, entry in (estimate.get("interaction") or {}).items():
        for scale, cell in entry["scales"].items():
            row = {"title": titles.get(bundle, bundle), "scale": scale, "what": "interaction"}
            rows.append(row | {key: (cell or {}).get(key) for key in ("ratio", "ci")})
    for bundle, entry in (estimate.get("shapley") or {}).items():
        for scale, cell in entry["scales"].items():
            row = {"title": titles.get(bundle, bundle), "scale": scale}
            if "parts" not in cell:
                what = f"no Shapley shares: {cell['reason']}"
                rows.append(row | {"what": what, "ratio": None, "ci": None})
                continue
            for part, share in {**cell["parts"], "": cell["total"]}.items():
                what = f"share of {titles.get(part, part)}" if part else "together"
                rows.append(row | {"what": what, "ratio": share["ratio"], "ci": share["ci"]})
    return rows


def fits(results: Results) -> list[dict[str, Any]]:
    """The power laws: what the arms of a fit share stands in the first of its rows."""
    rows = []
    for cell, fit in (results["estimate"].get("fit") or {}).items():
        row = {key: fit.get(key) for key in ("e", "e_ci", "e_drop_one")}
        row |= {"cell": cell, "doubt": fit.get("degenerate") or fit.get("reason")}
        for i, (arm, law) in enumerate((fit.get("arms") or {"": {}}).items()):
            name = results["titles"].get(arm, arm)
            own = {"arm": name, "a": law.get("a"), "a_ci": law.get("a_ci"), "first": i == 0}
            rows.append(row | own)
    return rows


def amdahl(results: Results) -> list[dict[str, Any]]:
    """Every kernel's part in every step."""
    return [
        {"scale": scale, "title": results["titles"].get(arm, arm), **part,
         "saved_s": part["calls"] * (part["baseline_s"] - part["own_s"])}
        for scale, arms in (results.get("hardware") or {}).items()
        for arm, own in arms.items()
        for part in (own.get("amdahl") or {}).get("parts", [])
    ]  # fmt: skip


def used_flags(results: Results, hardware: dict[str, list[dict[str, Any]]]) -> list[str]:
    answers = results["estimate"]["arms"].values()
    cells = [c for answer in answers for c in (answer, *answer["scales"].values())]
    rows = [row for own in hardware.values() for row in own]
    return sorted({flag for holder in (*cells, *rows) for flag in holder["flags"]})


def bench_rows(results: Results) -> list[dict[str, Any]]:
    """Ours beside its peers: one line for each op, direction, shape and dtype."""
    peaks = (results.get("roofs") or {}).get("flops") or {}
    groups: dict[tuple, dict[str, Any]] = {}
    for row in results.get("bench") or []:
        key = tuple(row[k] for k in ("op", "direction", "shape", "dtype"))
        groups.setdefault(key, {})[row["peer"] or "ours"] = row
    lines = []
    for (op, direction, shape, dtype), group in groups.items():
        best = group.get("ours") or group.get("torch") or group["reference"]
        median = best.get("median_s")

        def against(peer: str, group: dict = group, median: float | None = median) -> float | None:
            other = (group.get(peer) or {}).get("median_s")
            return other / median if other and median and "ours" in group else None

        lines.append(
            {
                "op": op,
                "direction": direction,
                "shape": shape,
                "dtype": dtype,
                "backend": best["backend"],
                "median_s": median,
                "against_reference": against("reference"),
                "against_torch": against("torch"),
                "roof_fraction": best.get("roof_fraction"),
                "bound": best.get("bound"),
                "mfu": _mfu(best, peaks.get(dtype)),
                "error": best.get("max_error_over_slack"),
                "status": best.get("status", "ok"),
            }
        )
    return lines


def _mfu(row: dict[str, Any], peak: float | None) -> float | None:
    """Of a kernel: its model FLOP/s over the measured dense peak of its dtype."""
    return 1e9 * row["gflops"] / peak if peak and row.get("gflops") else None

"""Made-up studies in the shape of results.json, with gains that are known."""

from __future__ import annotations

from typing import Any

import numpy as np

from ceg_model.study.cells import Options
from ceg_model.study.curves import Key, make_curve
from ceg_model.study.estimate import estimate

ARMS = {
    "baseline": (1.0, 1.0),
    "layer_norm": (1.9, 0.97),
    "rope": (1.35, 0.93),
    "flash_attention": (1.0, 1.32),
    "ln_rope_fa": (3.3, 1.14),
    "mqa": (0.72, 1.02),
    "moe": (1.25, 0.6),
}
MORE_ARMS = ARMS | {"swiglu": (1.12, 0.95), "qk_norm": (1.05, 0.9), "bf16": (0.99, 1.6)}
TITLES = {
    "ln_rope_fa": "LN + RoPE + FA", "layer_norm": "LayerNorm <b>", "rope": "RoPE",
    "flash_attention": "FlashAttention", "mqa": "Multi-query attention",
    "moe": "Mixture of experts", "baseline": "Baseline", "swiglu": "SwiGLU",
}  # fmt: skip
SCALES = {"S": 1.0, "M": 3.3, "L": 10.0}
BUNDLE = {"ln_rope_fa": ("layer_norm", "rope", "flash_attention")}


def within_runs(
    seeds: int = 2, arms: dict[str, tuple[float, float]] = ARMS, noise: float = 0.002,
    scales: dict[str, float] = SCALES,
) -> dict[str, Any]:  # fmt: skip
    """Whole curves at a constant rate, and what the estimator makes of them."""
    rng = np.random.default_rng(3)
    curves = []
    for scale, size in scales.items():
        flops = np.arange(1, 41) * 4e10 * size
        for seed in range(seeds):
            for arm, (g_alg, g_hw) in arms.items():
                loss = 1.2 + 60 * (g_alg * flops * (1 + 0.01 * seed)) ** -0.14
                if arm != "flash_attention":
                    loss = loss + rng.normal(0, noise, flops.size)
                key, lr = Key(arm, scale, str(seed)), np.full(40, 2e-3)
                seconds = flops / (7e10 * g_hw)
                curves.append(make_curve(key, flops, loss, seconds=seconds, lr=lr))
    options = Options(
        same_maths=frozenset({"flash_attention"}),
        bundles={k: v for k, v in BUNDLE.items() if k in arms},
        untuned=True,
    )
    answer = estimate(curves, options)
    rows = [
        {
            "arm": c.key.arm, "scale": c.key.scale, "seed": c.key.seed,
            "flops": c.flops.tolist(), "loss": c.loss.tolist(), "seconds": c.seconds.tolist(),
        }
        for c in curves
    ]  # fmt: skip
    return _study(rows, answer) | {
        "hardware": {"L": {"rope": {"against_reference": 0.93, "against_torch": 0.8}}}
    }


def _study(curves: list[dict[str, Any]], answer: dict[str, Any]) -> dict[str, Any]:
    time = {"median_s": 0.01}
    return {
        "title": "Study nano",
        "subtitle": "A GPT without norm, and six changes to it.",
        "chips": ["CPU", "2 seeds"],
        "titles": TITLES,
        "complete": {"planned": len(curves), "done": len(curves), "failed": []},
        "curves": curves,
        "estimate": answer,
        "hardware": {},
        "throughput": {"L": {"arms": {"rope": {"study": time, "torch": time, "ours": time}}}},
        "bench": bench(),
        "roofs": {"flops": {"float32": 1.2e11}, "copy_bytes_per_s": 2e10, "threads": 2},
        "limits": ["Nothing is tuned."],
        "provenance": {"commit": "abc", "data": "def"},
    }


def bench() -> list[dict[str, Any]]:
    """Two ops, each ours and its peers, under roofs of 120 GFLOP/s and 20 GB/s."""
    rows = []
    for op, intensity, direction in (
        ("attention", 40.0, "fwd"), ("attention", 50.0, "bwd"), ("rms_norm", 0.9, "fwd"),
    ):  # fmt: skip
        roof = min(120.0, 20.0 * intensity)
        for backend, peer, share in (
            ("cpu", None, 0.8), ("torch", "torch", 0.4), ("reference", "reference", 0.15),
        ):  # fmt: skip
            rows.append({
                "op": op, "direction": direction, "dtype": "float32", "shape": "T256",
                "intensity": intensity, "gflops": roof * share, "roof_fraction": share,
                "gbytes_per_s": roof * share / intensity,
                "bound": "compute" if intensity > 6 else "memory", "max_error_over_slack": 0.3,
                "status": "ok", "flops": 10**6, "backend": backend, "peer": peer,
                "median_s": 1e-3 / share,
            })  # fmt: skip
    return rows


def endpoints(
    seeds: int = 3, arms: dict[str, tuple[float, float]] = MORE_ARMS, budgets: int = 4
) -> dict[str, Any]:
    """Ends of runs at several budgets, with every key that a complete study has."""
    rng = np.random.default_rng(5)
    curves, points, sweeps = [], {scale: {} for scale in SCALES}, []
    for scale, size in SCALES.items():
        for arm, gains in arms.items():
            for b in range(budgets):
                ends = []
                for seed in range(seeds):
                    flops = np.geomspace(0.1, 1, 12) * 4e11 * size * 1.6**b
                    loss = law(gains[0], flops, scale) + rng.normal(0, 0.004)
                    curves.append({
                        "arm": arm, "scale": scale, "seed": str(seed), "budget": str(b),
                        "lr": 2e-3, "flops": flops.tolist(), "loss": loss.tolist(),
                        "seconds": (flops / (7e10 * gains[1])).tolist(),
                    })  # fmt: skip
                    ends.append(float(loss[-1]))
                points[scale].setdefault(arm, []).append({
                    "scale": scale, "budget": str(b), "flops": float(flops[-1]), "n": seeds,
                    "loss": float(np.mean(ends)), "low": min(ends), "high": max(ends),
                })  # fmt: skip
            sweeps.append(_sweep(scale, arm, at_edge=(scale, arm) == ("L", "moe")))
    study = _study(curves, _answer(arms, points))
    return study | {"hardware": _hardware(arms), "sweeps": sweeps}


def law(g_alg: float, flops: Any, scale: str) -> Any:
    floor = {"S": 1.9, "M": 1.75, "L": 1.6}[scale]
    return floor + 60 * (g_alg * flops) ** -0.14


def _sweep(scale: str, arm: str, *, at_edge: bool) -> dict[str, Any]:
    rates = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
    best = 9e-3 if at_edge else {"S": 2.9e-3, "M": 2.2e-3, "L": 1.3e-3}[scale]
    losses = [2.5 + 0.12 * np.log(rate / best) ** 2 for rate in rates]
    points = [{"lr": r, "loss": x} for r, x in zip(rates, losses, strict=True)]
    points.append({"lr": 3.2e-2, "loss": None})
    chosen = min(points[:-1], key=lambda p: p["loss"])["lr"]
    reason = "8e-3 is the last rate before it diverges" if at_edge else ""
    return {"scale": scale, "arm": arm, "budget": "1", "seed": "0", "points": points,
            "best_lr": chosen, "inside": not at_edge, "reason": reason}  # fmt: skip


def _answer(arms: dict[str, tuple[float, float]], points: dict[str, Any]) -> dict[str, Any]:
    """What the estimator answers in endpoint mode: at L "mqa" is censored, "qk_norm" refused."""
    targets = {
        s: max(min(p["loss"] for p in own) for own in by.values()) for s, by in points.items()
    }
    others = [arm for arm in arms if arm != "baseline"]
    gate = {"passed": True, "g_alg": 1.004, "ci": [0.97, 1.04], "detection_limit": 0.05,
            "detection_limit_mean": 0.03, "pairs": 9, "sd": 0.02, "df": 6, "seeds": 3,
            "ratios": [0.95, 0.96, 0.99, 1.0, 1.001, 1.01, 1.02, 1.03, 1.06],
            "reason": "the interval holds 1"}  # fmt: skip
    return {
        "baseline": "baseline",
        "target_loss": None,
        "target_losses": targets,
        "offered_targets": {},
        "mode": "endpoint",
        "cells": {s: {"points": by, "envelope": {a: _envelope(own) for a, own in by.items()},
                      "overlap": [targets[s], targets[s] + 0.2]} for s, by in points.items()},
        "arms": {arm: _arm(arm, arms[arm], targets) for arm in others},
        "class": {arm: _class(arm) for arm in others},
        "class_hw": {arm: _class(arm) for arm in others},
        "interaction": {},
        "shapley": {"ln_rope_fa": {"parts": list(BUNDLE["ln_rope_fa"]),
                                   "scales": {s: _shapley(t) for s, t in targets.items()}}},
        "fit": {s: _fit(s, arms) for s in points},
        "aa": gate,
    }  # fmt: skip


def _envelope(points: list[dict[str, Any]]) -> dict[str, list[float]]:
    x, y = [p["flops"] for p in points], [p["loss"] for p in points]
    flops = np.geomspace(x[0], x[-1], 64)
    return {"flops": flops.tolist(), "loss": np.interp(np.log(flops), np.log(x), y).tolist()}


def _arm(arm: str, gains: tuple[float, float], targets: dict[str, float]) -> dict[str, Any]:
    cells = {}
    for i, (scale, target) in enumerate(targets.items()):
        g, compute = gains[0] * 1.06**i, 1e12 * SCALES[scale]
        losses = np.linspace(target, target + 0.2, 12)
        cell = {
            "status": "ok", "g_alg": g, "ci": [g / 1.07, g * 1.07], "ci_method": "Welch t",
            "g_hw": gains[1], "g_time": g * gains[1] * 1.004, "residual": 0.004,
            "c_baseline": compute, "c_variant": compute / g, "bound": None, "bound_side": None,
            "executed_over_model": 1.0, "seeds": ["0", "1", "2"], "flags": [], "reasons": [],
            "target_loss": target, "overlap": [target, target + 0.2],
            "g_alg_overlap_mean": {"g_alg": g, "ci": [g / 1.05, g * 1.05], "ci_method": "Welch t"},
            "range": {"loss": losses.tolist(), "g_alg": [g] * 12, "low": [g / 1.1] * 12,
                      "high": [g * 1.1] * 12},
        }  # fmt: skip
        if arm == "mqa" and scale == "L":
            cell |= {"status": "censored", "g_alg": None, "ci": None, "g_time": None,
                     "residual": None, "c_variant": None, "bound": 0.9, "bound_side": "upper",
                     "flags": ["censored"], "reasons": ["the variant never reaches the target"],
                     "range": None}  # fmt: skip
        if arm == "qk_norm" and scale == "L":
            cell |= {"status": "refused", "g_alg": None, "ci": None, "g_time": None,
                     "residual": None, "reasons": ["loss of seed 1 is not finite"],
                     "range": None}  # fmt: skip
        cells[scale] = cell
    top = {k: v for k, v in cells["L"].items() if k != "range"}
    mean = {"g_alg": gains[0], "ci": [gains[0] / 1.04, gains[0] * 1.04], "method": "", "scales": 3}
    top |= {"scale": "L", "scales": cells, "mean_over_scales": mean}
    if arm == "flash_attention":
        top["equivalence"] = {"passed": True, "ci90": [0.99, 1.01], "bounds": [0.98, 1.02],
                              "reason": ""}  # fmt: skip
    return top


def _class(arm: str) -> dict[str, Any]:
    label, slope = {
        "layer_norm": ("compute-dependent", 0.12),
        "rope": ("diminishing", -0.1),
        "mqa": ("inconclusive", 0.05),
    }.get(arm, ("compute-independent", 0.005))
    half = 0.2 if label == "inconclusive" else 0.02
    reason = f"slope interval [{slope - half:.3g}, {slope + half:.3g}] allows more than one class"
    return {"class": label, "slope": slope, "ci": [slope - half, slope + half], "axis": "ln C_b",
            "margin": 0.041, "scales": 3, "reason": reason, "ends": [1.1, 1.3],
            "below_one": arm == "mqa", "slope_c_v": slope, "lowest": 0.9,
            "weights": "equal"}  # fmt: skip


def _shapley(target: float) -> dict[str, Any]:
    shares = {"layer_norm": 0.62, "rope": 0.51, "flash_attention": 0.0}
    parts = {
        part: {"log": log, "ratio": float(np.exp(log)),
               "ci": [float(np.exp(log - 0.06)), float(np.exp(log + 0.06))] if log else None}
        for part, log in shares.items()
    }  # fmt: skip
    total = sum(shares.values())
    whole = {"log": total, "ratio": float(np.exp(total)), "ci": None}
    return {"target_loss": target, "parts": parts, "total": whole}


def _fit(scale: str, arms: dict[str, tuple[float, float]]) -> dict[str, Any]:
    flops = np.geomspace(3e11, 4e12, 24) * SCALES[scale]
    laws = {
        arm: {"a": 0.14, "a_ci": [0.12, 0.16], "log_a0": 4.1, "flops": flops.tolist(),
              "loss": np.asarray(law(gains[0], flops, scale)).tolist(),
              "extrapolated": (flops > 2e12 * SCALES[scale]).tolist()}
        for arm, gains in arms.items()
    }  # fmt: skip
    weak = "leaving one budget out moves the floor from 1.2 to 1.9" if scale == "L" else None
    return {"e": 1.8, "e_ci": [1.2, 2.0], "arms": laws, "huber_delta": 1e-3, "starts": 30,
            "resamples": 200, "seeds": 3, "e_drop_one": [1.2, 1.9], "degenerate": weak}  # fmt: skip


def _hardware(arms: dict[str, tuple[float, float]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for scale in SCALES:
        for arm, (_, g) in arms.items():
            peak = 1.25 if arm == "bf16" else 1.0
            off = 0.08 if (arm, scale) == ("moe", "L") else 0.01
            out.setdefault(scale, {})[arm] = {
                "against_reference": g, "ci": [g / 1.02, g * 1.02],
                "source": "runs in lockstep", "benchmark": g, "against_torch": g / 2,
                "against_reference_ci": [g / 1.02, g * 1.02],
                "against_torch_ci": [g / 2.1, g / 1.9],
                "mfu": 0.31 * g / peak, "mfu_baseline": 0.31, "mfu_ratio": g / peak,
                "peak_ratio": peak, "device_ratio": 1.0, "hfu_over_mfu": 1.02,
                "amdahl": {"predicted_s": 0.1 / g, "measured_s": 0.1 / g * (1 + off),
                           "unexplained": off,
                           "parts": [{"op": "attention", "calls": 4, "baseline_s": 0.01,
                                      "own_s": 0.01 / g}]},
                "joules_per_step": 12.5, "flags": ["unexplained"] if off > 0.05 else [],
            }  # fmt: skip
    return out

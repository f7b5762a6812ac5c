"""The report's nine plots, each from results.json alone; svg.py tells how they enter the page."""

from __future__ import annotations

from ceg_model.study import plots_gain, plots_loss, plots_parts, plots_speed, plots_sweep
from ceg_model.study.plots_style import Plot, Results


def draw(results: Results) -> dict[str, Plot]:
    """Every plot by name; one that a study has no data for says why instead."""
    return {
        "flops": plots_loss.losses(results, "flops"),
        "seconds": plots_loss.losses(results, "seconds"),
        "range": plots_gain.over_range(results),
        "trends": plots_gain.trends(results),
        "bars": plots_parts.bars(results),
        "bundles": plots_parts.bundles(results),
        "roofline": plots_speed.roofline(results),
        "kernels": plots_speed.kernels(results),
        "mfu": plots_speed.mfu(results),
        "aa": plots_gain.aa(results),
        "sweeps": plots_sweep.sweeps(results),
    }

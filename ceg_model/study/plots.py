"""The report's nine plots, each from results.json alone; svg.py tells how they enter the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from ceg_model.study import plots_gain, plots_loss, plots_parts, plots_speed, plots_sweep
from ceg_model.study.forked import forked
from ceg_model.study.plots_style import Plot, Results

# One that a study has no data for says why instead. Those that take longest come first, so that
# the processes that draw them end together.
PLOTS: dict[str, Callable[[Results], Plot]] = {
    "bars": plots_parts.bars,
    "range": plots_gain.over_range,
    "trends": plots_gain.trends,
    "flops": partial(plots_loss.losses, axis="flops"),
    "seconds": partial(plots_loss.losses, axis="seconds"),
    "bundles": plots_parts.bundles,
    "roofline": plots_speed.roofline,
    "kernels": plots_speed.kernels,
    "mfu": plots_speed.mfu,
    "aa": plots_gain.aa,
    "sweeps": plots_sweep.sweeps,
}


def draw(results: Results) -> dict[str, Plot]:
    """Every plot by name."""
    return {name: plot(results) for name, plot in PLOTS.items()}


@contextmanager
def drawing(results: Results) -> Iterator[Callable[[], dict[str, Plot]]]:
    """Draws in processes beside this one; what it yields waits for the plots."""
    with forked(lambda name: PLOTS[name](results), list(PLOTS)) as drawn:
        yield lambda: dict(zip(PLOTS, drawn(), strict=True))

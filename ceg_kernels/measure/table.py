"""Benchmark rows as a terminal table (needs rich, which the `bench` extra installs)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ceg_kernels.measure.ceilings import DTYPES, Roofs

if TYPE_CHECKING:
    from rich.table import Table


def rate(row: dict[str, Any]) -> str:
    """GB/s where memory is the bound or nothing is computed, GF/s otherwise."""
    if row["median_s"] is None:
        return ""
    if row["bound"] == "memory" or not row["flops"]:
        return f"{row['gbytes_per_s']:.1f} GB/s"
    return f"{row['gflops']:.1f} GF/s"


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def spread(row: dict[str, Any]) -> str:
    """p20 and p80 as percent off the median."""
    if row["median_s"] is None:
        return ""
    low, high = (row[key] / row["median_s"] - 1 for key in ("p20_s", "p80_s"))
    return f"{low:+.0%} {high:+.0%}"


def render(rows: Sequence[dict[str, Any]]) -> Table:
    """One line per row; rows of one case (same inputs) stay together."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1), header_style="bold", row_styles=("", "dim"))
    for name, right in (
        ("op", False), ("dir", False), ("shape", False), ("dtype", False), ("backend", False),
        ("median", True), ("p20 p80", True), ("rate", True), ("% of roof", True),
        ("bound", False), ("error", True), ("vs reference", True), ("vs torch", True),
        ("", False),
    ):  # fmt: skip
        table.add_column(name, justify="right" if right else "left", no_wrap=bool(name))
    stock = {case(row): row["median_s"] for row in rows if row["backend"] == "torch"}
    previous = None
    for row in rows:
        if previous is not None and case(row) != previous:
            table.add_section()
        previous = case(row)
        fraction = row["roof_fraction"]
        table.add_row(
            row["op"], row["direction"], row["shape"], row["dtype"], row["backend"],
            seconds(row["median_s"]), spread(row), rate(row),
            "" if fraction is None else f"{fraction:.0%}", row["bound"] or "unknown",
            _number(row["max_error_over_slack"]), _ratio(row["speedup_vs_reference"]),
            _ratio(_over(stock.get(case(row)), row["median_s"])),
            "" if row["status"] == "ok" else row["status"],
        )  # fmt: skip
    return table


def case(row: dict[str, Any]) -> tuple[str, ...]:
    """What rows must share to be compared: the same inputs on the same machine."""
    return tuple(row[key] for key in ("op", "direction", "shape", "dtype", "device"))


def roofs_lines(roofs: Roofs) -> list[str]:
    """The roofs as text, each with how it was measured."""
    threads = f", {roofs.threads} threads" if roofs.threads else ""
    lines = [f"{roofs.device_name}{threads}"]
    for name in DTYPES:
        peak, source = roofs.flops.get(name), roofs.flops_source.get(name)
        lines.append(
            f"  {name}: unknown" if peak is None else f"  {name}: {peak / 1e9:.0f} GF/s ({source})"
        )
    copy = roofs.copy_bytes_per_s
    lines.append(
        "  copy: unknown"
        if copy is None
        else f"  copy: {copy / 1e9:.1f} GB/s read + written ({roofs.copy_source})"
    )
    return lines


def _over(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or denominator is None else numerator / denominator


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"

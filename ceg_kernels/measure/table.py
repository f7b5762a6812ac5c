"""Benchmark rows as tables: for a terminal (needs rich, of the `bench` extra) and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ceg_kernels.measure.ceilings import DTYPES, Roofs
from ceg_kernels.measure.plot import bandwidth, peak

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
    """One line per row; rows of one case (same inputs) stay together.

    "vs torch" is how many times faster the row is than torch's row of its case; likewise for the
    other peers that are among the rows.
    """
    from rich.table import Table

    peers = _peers(rows)
    table = Table(box=None, padding=(0, 1), header_style="bold", row_styles=("", "dim"))
    for name, right in (
        ("op", False), ("dir", False), ("shape", False), ("dtype", False), ("backend", False),
        ("median", True), ("p20 p80", True), ("hot", True), ("rate", True), ("% of roof", True),
        ("bound", False), ("error", True), *((f"vs {peer}", True) for peer in peers), ("", False),
    ):  # fmt: skip
        table.add_column(name, justify="right" if right else "left", no_wrap=bool(name))
    times = _times(rows)
    previous = None
    for row in rows:
        if previous is not None and case(row) != previous:
            table.add_section()
        previous = case(row)
        fraction = row["roof_fraction"]
        table.add_row(
            row["op"], row["direction"], row["shape"], row["dtype"], row["backend"],
            seconds(row["median_s"]), spread(row), seconds(row.get("hot_s")), rate(row),
            "" if fraction is None else f"{fraction:.0%}", row["bound"] or "unknown",
            _number(row["max_error_over_slack"]),
            *(_ratio(times.get((*case(row), peer)), row["median_s"]) for peer in peers),
            "" if row["status"] == "ok" else row["status"],
        )  # fmt: skip
    return table


def markdown(rows: Sequence[dict[str, Any]], direction: str | None = None) -> str:
    """A table of our rows, with the time that each peer takes as a multiple of ours.

    rows: of one machine, at most one per case and backend. direction: fwd, bwd or fwd_bwd; None
    for forward and backward together where that was timed, else forward. Raises ValueError if no
    row of ours is left.
    """
    ours, peers, times = [], _peers(rows), _times(rows)
    cases = set(map(case, rows))
    for row in rows:
        op, _, *rest = case(row)
        wanted = direction or ("fwd_bwd" if (op, "fwd_bwd", *rest) in cases else "fwd")
        if row["peer"] is None and row["direction"] == wanted:
            ours.append(row)
    if not ours:
        raise ValueError(f"rows must hold ours of direction {direction or 'any'}, got none")
    header = ["op", "size", "dtype", "direction", "time", "of the roof"]
    lines = [_cells([*header, *(f"{peer} takes" for peer in peers)])]
    lines.append(_cells(["---"] * (len(header) + len(peers))))
    several = len({row["backend"] for row in ours}) > 1
    for row in ours:
        fraction, size = row["roof_fraction"], row["shape"].partition("-")[2]
        lines.append(_cells([
            f"{row['op']} ({row['backend']})" if several else row["op"],
            size, row["dtype"], row["direction"], seconds(row["median_s"]) or row["status"],
            "" if fraction is None else f"{fraction:.0%} {row['bound']}",
            *(_ratio(times.get((*case(row), peer)), row["median_s"]) for peer in peers),
        ]))  # fmt: skip
    return "\n".join(lines)


def conditions(rows: Sequence[dict[str, Any]]) -> str:
    """Where the rows of one machine were measured: device, versions, commits, roofs."""
    versions = rows[-1]["versions"]
    commits = ", ".join(dict.fromkeys(str(row["commit"]) for row in rows))
    peaks = ((dtype, peak(rows, dtype)) for dtype in DTYPES)
    roofs = [f"{value:.0f} GF/s {dtype}" for dtype, value in peaks if value is not None]
    copy = bandwidth(rows)
    roofs += [] if copy is None else [f"{copy:.1f} GB/s copy"]
    return (
        f"{versions['machine']}, {versions['threads']} threads, torch {versions.get('torch')}, "
        f"commit {commits}; roofs: {', '.join(roofs) or 'unknown'}"
    )


def case(row: dict[str, Any]) -> tuple[str, ...]:
    """What rows must share to be compared: the same inputs on the same machine."""
    return tuple(row[key] for key in ("op", "direction", "shape", "dtype", "device"))


def roofs_lines(roofs: Roofs) -> list[str]:
    """The roofs as text, each with how it was measured."""
    threads = f", {roofs.threads} threads" if roofs.threads else ""
    lines = [f"{roofs.device_name}{threads}"]
    for name in DTYPES:
        peak, source = roofs.flops.get(name), roofs.flops_source.get(name)
        how = str(source)
        if (own := roofs.fma_flops.get(name)) and source == "matmul":
            how += f"; from registers {own / 1e9:.0f}"
        lines.append(
            f"  {name}: unknown" if peak is None else f"  {name}: {peak / 1e9:.0f} GF/s ({how})"
        )
    copy = roofs.copy_bytes_per_s
    lines.append(
        "  copy: unknown"
        if copy is None
        else f"  copy: {copy / 1e9:.1f} GB/s read + written ({roofs.copy_source})"
    )
    return lines


def _peers(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["peer"] for row in rows if row["peer"] is not None))


def _times(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], float | None]:
    return {(*case(row), row["backend"]): row["median_s"] for row in rows}


def _cells(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _ratio(numerator: float | None, denominator: float | None) -> str:
    if numerator is None or denominator is None:
        return ""
    return f"{numerator / denominator:.2f}x"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"

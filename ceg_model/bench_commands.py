"""`ceg bench`: the benchmarks of bench/, through pytest; a figure and a table of their rows."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parents[1] / "bench"
HELP = "time every op on this machine: roofs, ours, stock torch and the reference"


def add_subcommands(subparsers: argparse._SubParsersAction) -> None:
    # No option starts with "+" here, so that all that follows `bench` reaches `_parser` untouched.
    bench = subparsers.add_parser("bench", help=HELP, add_help=False, prefix_chars="+")
    bench.add_argument("arguments", nargs=argparse.REMAINDER)
    bench.set_defaults(run=run_bench)
    roofline = subparsers.add_parser("roofline", help="draw the rows of `ceg bench --results`")
    roofline.add_argument("results", type=Path, help="the .jsonl file that --results wrote")
    roofline.add_argument(
        "--out", type=Path,
        help="what to write: a page (.html) or figures (.svg, .png, .pdf); default: a page and"
        " .svg beside the rows",
    )  # fmt: skip
    roofline.set_defaults(run=run_roofline)
    table = subparsers.add_parser("table", help="print the rows of `ceg bench --results`")
    table.add_argument("results", type=Path, help="the .jsonl file that --results wrote")
    table.add_argument("--shapes", metavar="GROUP", help="only shapes of that group, as for bench")
    table.add_argument(
        "--direction", choices=("fwd", "bwd", "fwd_bwd"),
        help="default: forward and backward together where they were timed so, else forward",
    )  # fmt: skip
    table.set_defaults(run=run_table)


def run_bench(parsed: argparse.Namespace) -> int:
    """Run the benchmarks in a process of their own; returns pytest's exit status."""
    if parsed.arguments[:1] == ["compare"]:
        return run_compare(_compare_parser().parse_args(parsed.arguments[1:]))
    known, rest = _parser().parse_known_args(parsed.arguments)
    if not BENCH.is_dir():
        raise FileNotFoundError(
            f"ceg bench must run from a checkout (an editable install), got no folder {BENCH}"
        )
    for module, package in (("pytest", "pytest"), ("pytest_benchmark", "pytest-benchmark")):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"ceg bench needs {package}: pip install -e .[bench]")
    command = [sys.executable, "-m", "pytest", str(BENCH), "--benchmark", *rest]
    if known.json:
        command.append(f"--benchmark-json={Path(known.json).resolve()}")
    if known.results:  # as seen from where the user stands
        command.append(f"--results={Path(known.results).resolve()}")
    return subprocess.run(command, cwd=BENCH.parent, check=False).returncode


def run_compare(parsed: argparse.Namespace) -> int:
    """Print what changed between two runs; with --fail, 1 where a row of ours became slower."""
    from ceg_kernels.measure import compare

    found = compare.compare(compare.read(parsed.before), compare.read(parsed.after))
    if parsed.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        print("\n".join(compare.lines(found)))
    return int(parsed.fail and any(change.verdict == "slower" for change in found.changes))


def run_roofline(parsed: argparse.Namespace) -> int:
    """Draw the newest row of each case and backend: a page, and one figure per machine."""
    for module in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"ceg roofline needs {module}: pip install -e .[study]")
    from ceg_kernels.measure import page
    from ceg_kernels.measure.plot import roofline_figure

    if parsed.out is not None and parsed.out.suffix not in (".html", ".svg", ".png", ".pdf"):
        raise ValueError(f"--out must end in .html, .svg, .png or .pdf, got {parsed.out}")
    machines = newest_rows(parsed.results)
    out = parsed.out or parsed.results.with_suffix(".svg")
    if out.suffix != ".html":
        for index, (machine, rows) in enumerate(machines.items()):
            path = out if len(machines) == 1 else out.with_stem(f"{out.stem}-{index + 1}")
            roofline_figure(rows).savefig(path, dpi=150)
            print(f"{machine}: {len(rows)} rows in {path}")
    if parsed.out is None or out.suffix == ".html":
        path = out.with_suffix(".html")
        path.write_text(page.render(machines, parsed.results.name), encoding="utf-8")
        print(f"all {sum(map(len, machines.values()))} rows in {path}")
    return 0


def run_table(parsed: argparse.Namespace) -> int:
    """Print the newest rows as Markdown, one table per machine."""
    from ceg_kernels.measure.table import conditions, markdown

    for rows in newest_rows(parsed.results).values():
        group = parsed.shapes
        chosen = [row for row in rows if group in (None, row["shape"].partition("-")[0])]
        print(f"{markdown(chosen, parsed.direction)}\n\n{conditions(chosen)}\n")
    return 0


def newest_rows(results: Path) -> dict[str, list[dict[str, Any]]]:
    """The last row written for each machine, case and backend. ValueError names a broken line."""
    from ceg_kernels.measure.table import case

    rows: dict[str, dict[tuple, dict[str, Any]]] = {}
    for number, line in enumerate(results.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            machine = row["versions"]["machine"]
            key = (*case(row), row["backend"], row["peer"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{results}:{number} must be a benchmark row, got {error!r}") from None
        rows.setdefault(machine, {})[key] = row
    if not rows:
        raise ValueError(f"{results} must hold benchmark rows, got none")
    return {machine: list(found.values()) for machine, found in rows.items()}


def _compare_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ceg bench compare",
        description="Ratios of two runs on one machine with 95 % intervals, and a verdict on each: "
        "what the peers' rows moved by is the machine's doing and is taken out.",
    )
    parser.add_argument("before", type=Path, help="JSON of --benchmark-json (or ceg bench --json)")
    parser.add_argument("after", type=Path, help="the same of another run; --results' rows will do")
    parser.add_argument("--fail", action="store_true", help="exit 1 where one became slower")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ceg bench",
        allow_abbrev=False,
        description="The same as `pytest bench/ --benchmark`; all other arguments go to pytest, "
        "for example --shapes gpt2, --dtypes bfloat16, --peers eager,compile, -k attention. "
        "`ceg bench compare A B` compares two runs.",
    )
    parser.add_argument("--json", metavar="PATH", help="write pytest-benchmark's JSON there")
    parser.add_argument(
        "--results", metavar="PATH", help="append the rows to this .jsonl file (or to a folder's)"
    )
    return parser

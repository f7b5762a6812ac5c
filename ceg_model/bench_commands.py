"""`ceg bench`: the benchmarks of bench/, through pytest."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[1] / "bench"
HELP = "time every op on this machine: roofs, ours, stock torch and the reference"


def add_subcommands(subparsers: argparse._SubParsersAction) -> None:
    # No option starts with "+" here, so that all that follows `bench` reaches `_parser` untouched.
    bench = subparsers.add_parser("bench", help=HELP, add_help=False, prefix_chars="+")
    bench.add_argument("arguments", nargs=argparse.REMAINDER)
    bench.set_defaults(run=run_bench)


def run_bench(parsed: argparse.Namespace) -> int:
    """Run the benchmarks in a process of their own; returns pytest's exit status."""
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ceg bench",
        allow_abbrev=False,
        description="The same as `pytest bench/ --benchmark`; all other arguments go to pytest, "
        "for example --shapes gpt2, --dtypes bfloat16, --no-peers, -k attention.",
    )
    parser.add_argument("--json", metavar="PATH", help="write pytest-benchmark's JSON there")
    parser.add_argument(
        "--results", metavar="PATH", help="append the rows to this .jsonl file (or to a folder's)"
    )
    return parser

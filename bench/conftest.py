"""What the benchmark run reports: a roofline table at the end, and rows on request."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ceg_kernels.measure import memory, peers
from ceg_kernels.measure.ceilings import Roofs, gpu_state, measure
from ceg_kernels.measure.clock import time_interleaved
from ceg_kernels.measure.host import Stolen, stolen_line
from ceg_kernels.measure.roofline import bench_row
from ceg_kernels.measure.run import Result, run_cases
from ceg_kernels.measure.steps import render as render_steps
from ceg_kernels.measure.suite import PEERS, Case, cases
from ceg_kernels.measure.table import render, roofs_lines
from ceg_kernels.op import Cost

# Every case is timed at so many moments (see measure/run.py), so long in all. A GPU is not shared.
PASSES = {"cpu": 5, "cuda": 1}
SECONDS = {"cpu": 0.4, "cuda": 0.2}
OURS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
ROWS = pytest.StashKey[list]()
ROOFS = pytest.StashKey[Roofs]()
STOLEN = pytest.StashKey[Stolen]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[STOLEN] = Stolen()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per case and backend; those of one case stay together, so that they interleave.

    What is no single op has one test for each of our backends (`ours`) on the device.
    """
    config = metafunc.config
    device = _device(config)
    if {"device", "ours"} <= set(metafunc.fixturenames):
        metafunc.parametrize(
            ("device", "ours"), [(device, n) for n in OURS[device]], ids=OURS[device]
        )
    if not {"case", "backend"} <= set(metafunc.fixturenames):
        return
    group, dtypes = config.getoption("--shapes"), config.getoption("--dtypes").split(",")
    wanted = {n for n in config.getoption("peers").split(",") if peers.absent(n, device) is None}
    found = [
        pytest.param(case, backend, id=f"{case}-{backend}")
        for case in cases(group, dtypes=dtypes, device=device)
        for backend in (*case.backends(), *case.formulas())
        if backend in wanted or backend not in PEERS
    ]
    metafunc.parametrize(("case", "backend"), found)


def roofs_of(config: pytest.Config) -> Roofs:
    """Measured once a session at most, also where the machine was too busy to keep them."""
    if ROOFS not in config.stash:
        config.stash[ROOFS] = measure(_device(config))
    return config.stash[ROOFS]


class Measured:
    """Runs each case once, for all of its backends that were selected, several cases at a time."""

    def __init__(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self.config = config
        self.kind = _device(config).partition(":")[0]
        self.backends: dict[Case, list[str]] = {}
        for item in items:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            if "case" in params and "backend" in params:
                self.backends.setdefault(params["case"], []).append(params["backend"])
        self.case: Case | None = None
        self.args: tuple = ()
        self.results: dict[Case, dict[str, Result] | Exception] = {}
        self.running: Iterator[tuple[Case, dict[str, Result] | Exception]] | None = None

    def arguments(self, case: Case) -> tuple:
        """Inputs of a case that runs but is not timed; the latest only are kept."""
        if case != self.case:
            self.case, self.args = case, case.args()
        return self.args

    def result(self, case: Case, backend: str) -> Result | None:
        if self.running is None:
            self.running = run_cases(
                self.backends, roofs=roofs_of(self.config), passes=PASSES[self.kind],
                min_time_s=SECONDS[self.kind], progress=self.say,
            )  # fmt: skip
        while case not in self.results:
            done, found = next(self.running)
            self.results[done] = found
            if not isinstance(found, Exception):
                self.config.stash[ROWS].extend(result.row for result in found.values())
        results = self.results[case]
        if isinstance(results, Exception):
            raise results
        return results.get(backend)

    def say(self, number: int, cases: int) -> None:
        plugin = self.config.pluginmanager.get_plugin
        reporter, capture = plugin("terminalreporter"), plugin("capturemanager")
        if reporter is None or capture is None or cases == 1:
            return
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(f"timing {cases} cases, pass {number + 1} of {PASSES[self.kind]}")


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Measured:
    return Measured(request.config, request.session.items)


@pytest.fixture
def report(request: pytest.FixtureRequest):
    """Times calls that are no single op, interleaved; their rows join the table and the results."""
    device = _device(request.config)

    def add(
        op: str, direction: str, shape: str, dtype: torch.dtype, calls, cost: Cost, max_s: float
    ) -> dict[str, dict]:
        memory.prepare()
        rows = {}
        timings = time_interleaved(calls, device=device, min_time_s=0.5, max_time_s=max_s)
        for name, timing in timings.items():
            row = bench_row(
                op=op, direction=direction, backend=name, peer=name if name in PEERS else None,
                shape=shape, dtype=str(dtype).removeprefix("torch."), device=device, cost=cost,
                roofs=roofs_of(request.config), timing=timing, reference=timings.get("reference"),
            )  # fmt: skip
            request.config.stash[ROWS].append(row)
            rows[name] = row
        return rows

    return add


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    roofs = roofs_of(config)
    machine_info["ceg"] = {
        "device": roofs.device_name, "threads": roofs.threads, "flops": roofs.flops,
        "copy_bytes_per_s": roofs.copy_bytes_per_s, "versions": roofs.versions,
        "gpu": gpu_state(),
    }  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark, which raises where speed has regressed
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    rows = config.stash[ROWS]
    absent = absent_peers(config, rows) if config.getoption("--benchmark") else ""
    if not rows:
        terminalreporter.write_line(absent)
        return
    from rich.console import Console

    console = Console(width=None if terminalreporter.isatty else 220)
    terminalreporter.section("roofs of this machine, measured")
    roofs = roofs_of(config)
    terminalreporter.write_line("\n".join(roofs_lines(roofs)))
    terminalreporter.section("benchmarks")
    console.print(render(rows))
    if said := stolen_line(config.stash[STOLEN].share(), "rows were timed"):
        terminalreporter.write_line(said)
    if (steps := render_steps(rows)) is not None:
        terminalreporter.section("training steps")
        console.print(steps)
    if (target := config.getoption("--results")) is not None:
        path = results_path(Path(target), roofs)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        terminalreporter.write_line(f"appended {len(rows)} rows to {path}")
    terminalreporter.write_line(absent)


def absent_peers(config: pytest.Config, rows: list) -> str:
    """Which of the peers that were asked for were not timed, and why; "" if none."""
    asked = [name for name in config.getoption("peers").split(",") if name in peers.NAMES]
    reasons = {name: peers.absent(name, _device(config)) for name in asked}
    for name in set(asked) - {row["peer"] for row in rows} if rows else ():
        reasons[name] = reasons[name] or "takes none of the cases that ran"
    found = [f"{name}: {why}" for name, why in reasons.items() if why is not None]
    return f"absent peers: {'; '.join(found)}" if found else ""


def results_path(target: Path, roofs: Roofs) -> Path:
    if target.suffix:
        return target
    return target / f"{re.sub(r'[^A-Za-z0-9.]+', '-', roofs.device_name).strip('-')}.jsonl"


def _device(config: pytest.Config) -> str:
    return config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")

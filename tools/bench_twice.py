"""Runs the same benchmark in two processes that take turns, and says how far their medians differ.

    python tools/bench_twice.py [--shapes quick] [--dtypes float32,bfloat16] [--rounds 1] [--json]

Two runs one after the other differ by what the machine did in between: other processes, clock
speed. Here each case is measured by one process and at once by the other, so what is left is the
own repeatability of the benchmark: where its memory lies, which core runs what, how many rounds.
`--rounds 2` lets each process measure twice, and its median is over all of its samples.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from multiprocessing.connection import Connection
from typing import Any

from ceg_kernels.measure.ceilings import measure
from ceg_kernels.measure.run import run_case
from ceg_kernels.measure.suite import PEERS, Case, cases

BOUND = 0.05


def measured(pipe: Connection) -> None:
    """A child: rows of the samples of each case that it is sent."""
    roofs = measure()
    while (case := pipe.recv()) is not None:
        ours = [name for name in case.backends() if name not in PEERS]
        results = run_case(case, ours, roofs=roofs)
        pipe.send({name: r.timing.samples for name, r in results.items() if r.timing is not None})


def twice(chosen: list[Case], rounds: int) -> list[dict[str, Any]]:
    """Case by case, the medians of both processes; who begins changes from case to case."""
    measure()  # for both: at the same time they would disturb each other
    context = multiprocessing.get_context("spawn")
    pipes, children = [], []
    for _ in range(2):
        ours, its = context.Pipe()
        children.append(context.Process(target=measured, args=(its,), daemon=True))
        children[-1].start()
        pipes.append(ours)
    rows = []
    for place, case in enumerate(chosen):
        samples: dict[str, tuple[list[float], list[float]]] = {}
        for turn in range(2 * rounds):
            which = (place + turn) % 2
            pipes[which].send(case)
            for name, found in pipes[which].recv().items():
                samples.setdefault(name, ([], []))[which].extend(found)
        for name, (first, second) in samples.items():
            medians = statistics.median(first), statistics.median(second)
            rows.append({"name": f"{case}-{name}", "median_s": medians,
                         "ratio": medians[1] / medians[0]})  # fmt: skip
    for pipe, child in zip(pipes, children, strict=True):
        pipe.send(None)
        child.join()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", default="quick")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    chosen = list(cases(arguments.shapes, dtypes=arguments.dtypes.split(",")))
    rows = twice(chosen, arguments.rounds)
    if arguments.json:
        print(json.dumps(rows))
        return
    for row in sorted(rows, key=lambda row: row["ratio"]):
        print(f"{row['name']:60} {row['median_s'][0]:10.3e} s {row['ratio']:8.3f}")
    near = sum(abs(row["ratio"] - 1) <= BOUND for row in rows)
    middle = statistics.median(row["ratio"] for row in rows)
    print(f"{near} of {len(rows)} within {BOUND:.0%}; median ratio {middle:.3f}")


if __name__ == "__main__":
    main()

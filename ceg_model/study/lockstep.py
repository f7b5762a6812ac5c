"""Several runs in one process, one row of each in turn, and the clock that this makes possible.

Why. A step's seconds vary by 10 to 20% on a shared machine, in bursts that last for seconds, so two
runs made one after the other compare two moments of the machine. Steps taken in turn meet the same
moments: the ratio of two arms' seconds scatters by 10% a step and 0.5% over 500 steps.

What is left is that arms reach a target at different steps, that is in different moments. In
each round the machine's speed is known, from how long all arms took against their own averages.
`common_clock` divides it out: seconds at the machine's mean speed. Raw seconds stay in
metrics.jsonl.
"""

from __future__ import annotations

import contextvars
import gc
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Key = TypeVar("Key")
Rows = Generator[int, None, dict[str, Any]]

ROUNDS_PER_COLLECTION = 64
BATCHES = 10
# What a run can die of; anything else is a bug, ends the process and is reported as such.
RUN_ERRORS = (ValueError, TypeError, RuntimeError, OSError, ArithmeticError, MemoryError)


@dataclass
class _Member:
    rows: Rows
    context: contextvars.Context  # of its own: the backend is a context variable
    step: int = -1


def in_turn(runs: Mapping[Key, Rows]) -> Iterator[tuple[Key, dict[str, Any] | Exception]]:
    """Advances the runs by a row each in turn; yields each one's result, or error, as it ends.

    Rounds begin at another run each. Only the runs at the lowest step move, so that one which
    resumed behind the others catches up first.
    """
    members = {key: _Member(rows, contextvars.copy_context()) for key, rows in runs.items()}
    turn = 0
    gc.disable()  # a collection takes as long as a small step and would land in some run's
    try:
        while members:
            if turn % ROUNDS_PER_COLLECTION == 0:
                gc.collect()
            behind = min(member.step for member in members.values())
            order = [key for key, member in members.items() if member.step == behind]
            first = turn % len(order)
            for key in order[first:] + order[:first]:
                member = members[key]
                try:
                    member.step = member.context.run(next, member.rows)
                except StopIteration as end:
                    del members[key]
                    yield key, end.value
                except RUN_ERRORS as error:
                    del members[key]
                    yield key, error
            turn += 1
    finally:
        gc.enable()


def common_clock(seconds: Array) -> Array:
    """Training seconds (runs, rounds), cumulative, at the machine's mean speed.

    A round's speed is the median over runs of (its seconds / the run's mean): a hiccup that meets
    one run stays that run's. Every run keeps its total up to the common drift.
    """
    taken = np.diff(seconds, axis=1, prepend=0.0)
    speed = np.median(taken / taken.mean(axis=1, keepdims=True), axis=0)
    return np.cumsum(taken / (speed / speed.mean()), axis=1)


def log_stretches(seconds: Array) -> Array:
    """ln of the seconds in each of BATCHES stretches of a run's rounds.

    seconds: cumulative (rounds,), on the common clock. Stretches are long against the machine's
    bursts, so that those of one run less those of another are a sample of ln of their ratio (the
    method of batch means) where rounds are not.
    """
    taken = seconds[_ends(seconds.size)]
    taken[1:] -= taken[:-1].copy()
    return np.log(taken)


@cache
def _ends(rounds: int) -> NDArray[np.int64]:
    """The last round of each stretch."""
    return np.linspace(0, rounds, min(BATCHES, rounds) + 1).astype(np.int64)[1:] - 1

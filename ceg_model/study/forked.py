"""Work of many items in processes beside this one, which see what this one has without sending it.

For a report of 10,000 runs: its plots are drawn while its JSON is written, its arms compared side
by side. What the processes find comes back by pickle, so it should be small.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
Found = TypeVar("Found")

_inherited: Callable[[Any], Any] | None = None


@contextmanager
def forked(
    function: Callable[[Item], Found], items: Sequence[Item], *, pays: bool = True
) -> Iterator[Callable[[], list[Found]]]:
    """Begins `function` on every item; what it yields waits for the results, in order.

    Only on Linux, where a fork of a process with threads is safe as long as the child leaves the
    libraries of those threads alone; elsewhere, on one core and where it does not pay, the work is
    done when it is asked for.
    """
    global _inherited
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if not pays or min(cores, len(items)) < 2:
        yield lambda: [function(item) for item in items]
        return
    before, _inherited = _inherited, function
    try:
        # An executor tells when a child was killed, where a Pool would wait for it.
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(min(cores, len(items)), mp_context=context) as pool:
            found = pool.map(_call, items)
            yield lambda: list(found)
    finally:
        _inherited = before


def _call(item: Any) -> Any:
    assert _inherited is not None
    return _inherited(item)

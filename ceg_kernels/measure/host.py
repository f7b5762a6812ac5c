"""What the host of a virtual machine took: time that its guest can neither see as load nor prevent.

The kernel counts it as "steal" in /proc/stat (proc_stat(5)): ticks in which a processor had work
and was not run. On a machine of its own it stays 0.
"""

from __future__ import annotations

from pathlib import Path

STAT = Path("/proc/stat")
SEEN = 0.02  # of the processors' time: what is below is not worth a word


class Stolen:
    """Counts from here on."""

    def __init__(self) -> None:
        self._before = _ticks()

    def share(self) -> float | None:
        """Stolen over wanted processor time since the beginning; None where no kernel says.

        Wanted is what ran and what was stolen: an idle processor has nothing to steal.
        """
        before, after = self._before, _ticks()
        if before is None or after is None:
            return None
        wanted, stolen = (now - then for now, then in zip(after, before, strict=True))
        return stolen / wanted if wanted > 0 else 0.0


def stolen_line(share: float | None, when: str) -> str:
    """A sentence for people; "" where nothing worth a word was taken, or nobody knows."""
    if share is None or share < SEEN:
        return ""
    return (
        f"The host took {share:.0%} of this virtual machine's processor time while {when}: "
        "seconds are longer and scatter more than those of a machine of its own."
    )


def _ticks() -> tuple[int, int] | None:
    """(wanted, stolen) of all processors since the machine began."""
    try:
        name, *counts = STAT.read_text().partition("\n")[0].split()
        user, nice, system, _, _, irq, softirq, steal = map(int, counts[:8])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal, steal) if name == "cpu" else None

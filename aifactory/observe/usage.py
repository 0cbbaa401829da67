"""What this process has used of the CPUs, and how long its threads were ready to run and had to wait for one.

Source   getrusage(2); Linux' /proc/self/task/*/schedstat, whose second number is nanoseconds on a run queue. Where there is none
         (other systems), nobody is said to have waited.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from pathlib import Path

_TASKS = Path("/proc/self/task")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Of a process, or of several together; seconds."""

    seconds: float = 0.0
    cpu_s: float = 0.0
    """On a CPU, all threads together."""
    starved_s: float = 0.0
    """Ready to run, and no CPU was free; all threads together. Of threads that have ended meanwhile it is not known."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            seconds=self.seconds + other.seconds,
            cpu_s=self.cpu_s + other.cpu_s,
            starved_s=self.starved_s + other.starved_s,
        )

    def __sub__(self, before: Usage) -> Usage:
        return Usage(
            seconds=max(0.0, self.seconds - before.seconds),
            cpu_s=max(0.0, self.cpu_s - before.cpu_s),
            starved_s=max(0.0, self.starved_s - before.starved_s),
        )


def usage() -> Usage:
    """Up to now; seconds are those of a clock without a meaning of its own: subtract two of them."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return Usage(seconds=time.perf_counter(), cpu_s=used.ru_utime + used.ru_stime, starved_s=_starved_s())


def _starved_s() -> float:
    total = 0
    try:
        for task in _TASKS.iterdir():
            try:
                total += int((task / "schedstat").read_text().split()[1])
            except (OSError, IndexError, ValueError):  # it has ended
                continue
    except OSError:
        return 0.0
    return total / 1e9

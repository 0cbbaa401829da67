"""One vocabulary of events for logs, timers and the journal: a verb of the loop in its past tense, then key=value.

Logs go to standard error; standard output is for results.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("aifactory")


def log_to_stderr(level: int = logging.INFO) -> None:
    """Send the factory's log to standard error; for programs, never called by the library itself."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(level)


def log_event(event: str, **values: object) -> None:
    """Log `event key=value …`."""
    logger.info("%s", " ".join([event, *(f"{key}={_form(value)}" for key, value in values.items())]))


def _form(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if text.split() == [text] else repr(text)  # one event, one line


class Timer:
    """Seconds of wall time of a block, also while it runs."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._end: float | None = None

    @property
    def seconds(self) -> float:
        return (self._end if self._end is not None else time.perf_counter()) - self._start

    def stop(self) -> None:
        self._end = time.perf_counter()


@contextmanager
def timed() -> Iterator[Timer]:
    """Time a block."""
    timer = Timer()
    try:
        yield timer
    finally:
        timer.stop()

"""One vocabulary of events (`vocabulary.py`) for logs and the journal: a verb of the loop in its past tense, then key=value.

Logs go to standard error; standard output is for results. With AIFACTORY_LOG=json each line is a JSON object: at, level, event,
the values, and trace_id where a span is open.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from aifactory.errors import ConfigError
from aifactory.observe.tracing import trace_id

FORMAT = "AIFACTORY_LOG"
"""Environment variable: text (the default) or json. Processes that Ray starts have it from the one that started Ray."""

_ENDLESS = (float("inf"), float("-inf"))

logger = logging.getLogger("aifactory")


def log_to_stderr(level: int = logging.INFO) -> None:
    """Send the factory's log to standard error; for programs, never called by the library itself.

    Raises   ConfigError where the environment asks for another form than text or json.
    """
    if not logger.handlers:
        form = os.environ.get(FORMAT, "text")
        if form not in ("text", "json"):
            raise ConfigError(f"expected text or json in the environment variable {FORMAT}, found {form!r}.")
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(
            JsonLines() if form == "json" else logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
        )
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(level)


def log_event(event: str, **values: object) -> None:
    """Log `event key=value …`."""
    text = " ".join([event, *(f"{key}={_form(value)}" for key, value in values.items())])
    logger.info("%s", text, extra={"event": event, "values": values})


class JsonLines(logging.Formatter):
    """A JSON object for each line of the log. What no event was logged with is the event `logged`, with its text."""

    def format(self, record: logging.LogRecord) -> str:
        event = getattr(record, "event", None)
        said: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": event or "logged",
        }
        if (trace := trace_id()) is not None:
            said["trace_id"] = trace
        values = getattr(record, "values", {}) if event else {"text": record.getMessage(), "of": record.name}
        # JSON has no form for numbers that are none.
        said["values"] = {
            name: repr(each) if each != each or each in _ENDLESS else each for name, each in values.items()
        }
        if record.exc_info:
            said["error"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)


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

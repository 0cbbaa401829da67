"""Watch: a worker that takes no step for too long is taken for hung, and ends itself. Pure Python.

Whoever placed the workers starts them again, and counts that as a failure. The clock runs in a thread of the interpreter
that needs no Python, so it also ends a worker that hangs in a library with the interpreter's lock in its hand; where each
of its threads stood is written to standard error first.
"""

from __future__ import annotations

import faulthandler
import time
from types import TracebackType
from typing import Self

_WIND_UP_EVERY_S = 0.5
_STDERR = 2


class HangWatch:
    """Ends this process if nobody calls it for `timeout_s`; as a context, from the first call on to its end."""

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._wound_up = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._wound_up:
            faulthandler.cancel_dump_traceback_later()

    def __call__(self) -> None:
        """Say that all is well."""
        now = time.monotonic()
        # A thread is begun each time: steps may be shorter than that is worth.
        if self._timeout_s is not None and now - self._wound_up > min(_WIND_UP_EVERY_S, self._timeout_s / 4):
            self._wound_up = now
            faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=_STDERR)

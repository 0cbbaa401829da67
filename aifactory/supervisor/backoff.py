"""Backoff: how long to wait before something that dies is started again. The clock is handed in."""

from __future__ import annotations

FIRST_S = 0.5
LONGEST_S = 60.0
WELL_AFTER_S = 120.0


class Backoff:
    """Of one part: at once, then after 0.5 s, 1 s, 2 s … up to a minute; from the beginning once it has run for two minutes."""

    def __init__(self) -> None:
        self._tries = 0
        self._last: float | None = None

    def started(self, now: float) -> None:
        """It is started now."""
        if self._last is not None and now - self._last >= WELL_AFTER_S:
            self._tries = 0
        self._tries += 1
        self._last = now

    def wait_s(self, now: float) -> float:
        """Seconds until it may be started again; 0: now."""
        if self._last is None or now - self._last >= WELL_AFTER_S or self._tries <= 1:
            return 0.0
        wait: float = min(LONGEST_S, FIRST_S * 2.0 ** (self._tries - 2))
        return max(0.0, self._last + wait - now)

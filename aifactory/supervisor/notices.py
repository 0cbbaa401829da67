"""Notices: what the supervisor says to people and writes into the books, in order, without ever waiting for either."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from typing import Any

from aifactory.errors import AIFactoryError
from aifactory.observe.events import log_event
from aifactory.records.books import Books
from aifactory.supervisor.watch import Notice

_TRIES = 20
_BETWEEN_S = 3.0


class Notices:
    """A thread that writes; books that are away for a minute get what happened meanwhile when they are back."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._waiting: queue.Queue[tuple[str, dict[str, Any]] | None] = queue.Queue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._write_all, name="notices", daemon=True)
        self._thread.start()

    def say(self, notice: Notice) -> None:
        """A part was lost or is back."""
        pids = [pid for pid in notice.pids if pid]
        told = {"pids": ",".join(map(str, pids))} if pids else {}
        log_event(notice.event, part=notice.part, **told, **_seconds(notice.seconds))
        self._event(notice.event, notice.part, {"pids": pids}, notice.seconds)

    def restarted(self, part: str, *, because: str) -> None:
        """The supervisor itself starts a part again."""
        log_event("part_restarted", part=part, because=because)
        self._event("part_restarted", part, {"because": because}, None)

    def problem(self, part: str, text: str) -> None:
        """Something is wrong with a part."""
        log_event("part_unwell", part=part, problem=text)
        self._event("part_unwell", part, {"problem": text[-1000:]}, None)

    def audit(self, action: str, detail: Mapping[str, Any]) -> None:
        """Somebody has the factory come up or go down."""
        log_event(action, factory=self._books.config.name, **detail)
        self._waiting.put(("audit", {"action": action, "detail": dict(detail)}))

    def close(self, *, timeout_s: float = 10.0) -> None:
        """Write what is waiting, if the books are there."""
        self._closing.set()
        self._waiting.put(None)
        self._thread.join(timeout_s)

    def _event(self, event: str, part: str, detail: dict[str, Any], seconds: float | None) -> None:
        detail["at"] = self._books.journal.clock()
        self._waiting.put(("event", {"event": event, "subject": part, "detail": detail, "seconds": seconds}))

    def _write_all(self) -> None:
        while (waiting := self._waiting.get()) is not None:
            kind, values = waiting
            for _ in range(_TRIES):
                try:
                    self._write(kind, values)
                    break
                except AIFactoryError as error:
                    log_event("warned", of=f"the supervisor can't write to the books: {error}")
                    if self._closing.wait(_BETWEEN_S):
                        break

    def _write(self, kind: str, values: Mapping[str, Any]) -> None:
        journal = self._books.journal
        if kind == "event":
            journal.write(values["event"], **{name: values[name] for name in ("subject", "detail", "seconds")})
            return
        with self._books.database.write(serialize=True) as connection:
            journal.audit_within(connection, values["action"], subject=self._books.config.name, detail=values["detail"])


def _seconds(seconds: float | None) -> dict[str, str]:
    return {} if seconds is None else {"after": f"{seconds:.1f} s"}


def clock() -> float:
    """Seconds from any beginning that never go back."""
    return time.monotonic()

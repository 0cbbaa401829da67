"""Requests for a retrain: asked for by somebody, taken up by the evaluation actor, each by one cycle.

A request is a line of the journal and one of the audit, in one transaction. The cycle that takes it up is bound to it when it
begins, in the transaction that begins it: so whatever is killed, a request that no cycle is bound to is open, and no other is.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aifactory.errors import ConfigError
from aifactory.records.identity import hash_text
from aifactory.records.journal import Event, Journal

REQUESTED, WITHDRAWN = "retrain_requested", "retrain_request_withdrawn"
"""Events; their subject is the request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrainRequest:
    """That somebody has asked for a retrain."""

    id: str
    at: float
    """Seconds since 1970, UTC."""
    reason: str
    despite_cooldown: bool
    """Whether it need not wait for a cool-down."""
    state: str = "open"
    """open, withdrawn, or the trigger of the cycle that took it up."""


class RetrainRequests:
    """The requests of one factory."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    def ask(
        self, *, reason: str, despite_cooldown: bool = False, key: str | None = None, key_id: str | None = None
    ) -> RetrainRequest:
        """Ask for a retrain; it is on disk when this returns.

        key      who repeats himself with the same key has asked once; none is another request each time
        key_id   the API key by which it was asked for, for the audit
        Raises   ConfigError where the same key has asked for something else.
        """
        name = secrets.token_hex(8) if key is None else hash_text(key)[:16]
        detail = {"reason": reason, "despite_cooldown": despite_cooldown}
        request_id = f"retrain-{name}"
        with self.journal.database.write(serialize=True) as connection:
            known = next((each for each in self.all() if each.id == request_id), None)
            if known is None:
                self.journal.write_within(connection, REQUESTED, subject=request_id, detail=detail, key_id=key_id)
                self.journal.audit_within(connection, "retrain", subject=request_id, detail=detail, key_id=key_id)
        if known is not None and (known.reason, known.despite_cooldown) != (reason, despite_cooldown):
            raise ConfigError(
                f"expected the request of the key {key!r} again, found another one: it was asked for with reason {known.reason!r} "
                f"and despite_cooldown {known.despite_cooldown}. Take another key for another request."
            )
        return self.named(request_id)

    def named(self, request_id: str) -> RetrainRequest:
        """The request as it stands."""
        return next(each for each in self.all() if each.id == request_id)

    def all(self) -> list[RetrainRequest]:
        """All requests, oldest first."""
        taken = {request: cycle.trigger for cycle in self.journal.cycles() for request in cycle.bound.requests}
        withdrawn = {str(event.subject): "withdrawn" for event in self.journal.events(event=WITHDRAWN)}
        return [_of(event, {**withdrawn, **taken}) for event in self.journal.events(event=REQUESTED)]

    def open(self) -> list[RetrainRequest]:
        """Those that no cycle has taken up and nobody has withdrawn, oldest first."""
        return [each for each in self.all() if each.state == "open"]

    def withdraw(self, *, reason: str) -> list[RetrainRequest]:
        """Withdraw all that are open, and return them. A cycle that has begun goes on."""
        with self.journal.database.write(serialize=True) as connection:
            gone = self.open()
            for each in gone:
                self.journal.write_within(connection, WITHDRAWN, subject=each.id, detail={"reason": reason})
                self.journal.audit_within(
                    connection, "withdraw_retrain_request", subject=each.id, detail={"reason": reason}
                )
        return [self.named(each.id) for each in gone]


def _of(event: Event, states: Mapping[str, str]) -> RetrainRequest:
    detail: Mapping[str, Any] = event.detail
    return RetrainRequest(
        id=str(event.subject),
        at=event.at,
        reason=detail["reason"],
        despite_cooldown=detail["despite_cooldown"],
        state=states.get(str(event.subject), "open"),
    )

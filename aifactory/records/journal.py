"""The journal: what the factory did, cycle by cycle, and the audit of who asked for it.

A cycle is identified by what triggered it and is bound, when it begins, to what it reads: the state of the sources, the
sealed feedback batches, the parent and the release it must beat. Whoever works on it takes a numbered attempt; a newer
attempt fences the older ones off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, RowMapping

from aifactory.errors import FencedError, StateError
from aifactory.records.audit import AuditChain, append_line, read_chain
from aifactory.records.database import Database, now
from aifactory.records.identity import canonical_json
from aifactory.records.tables import cycles, journal

CycleState = Literal["running", "trial", "promoted", "rejected", "failed"]
"""trial: the gate has let its model pass, which is on trial now; nobody turns it any more, and it has not ended."""
ANONYMOUS = "anonymous"
ERASED = "erased"
"""Event: the artifact `subject` is gone; the detail names the erasure and, as `successor`, what is left of it."""
TICK_FAILED = "tick_failed"
"""Event: what stops the evaluation actor for now, in the detail's `error`; its next tick tries again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What a cycle reads; fixed when it begins, so that what arrives later changes nothing."""

    kind: Literal["run", "drift", "request", "schedule", "forget"]
    """drift, request and schedule: a retrain, for what was found, because somebody asked for it, or since its time had come."""
    sources_digest: str
    """Digest of the names and contents of the sources' files."""
    batches: Sequence[str] = ()
    """Ids of the sealed feedback batches."""
    parent: str | None = None
    """Id of the model that training starts from; none for the configuration's base."""
    champion: int | None = None
    """Number of the release in production, which the candidate is compared with."""
    holdouts: Sequence[str] = ()
    """Ids of the corpora of earlier cycles: nothing that they hold out trains here."""
    restored: Sequence[tuple[str, str]] = ()
    """Corpus and rule: rows of that corpus' ledger which that rule must not reject again."""
    models: Sequence[tuple[str, str]] = ()
    """What the configuration calls a model that a step of ingest asks, and what that was when the cycle began: the id of a
    model of the registry, or the digest of a folder."""
    corpora: Sequence[str] = ()
    """Of a retrain without what was erased: ids of the corpora that are left, instead of sources that are read."""
    replaces: int | None = None
    """Of such a retrain: the release in production, which has seen what was erased. It is compared with another one."""
    max_steps: int | None = None
    """Of a retrain for which the budget has no more room: its optimiser steps, instead of those of the configuration."""
    requests: Sequence[str] = ()
    """Of a retrain: ids of the requests that it takes up (`records.retrain_requests`)."""

    @property
    def is_retrain(self) -> bool:
        """Whether the evaluation actor began it, and sees it through."""
        return self.kind in ("drift", "request", "schedule")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cycle:
    """One turn of the loop."""

    trigger: str
    number: int
    attempt: int
    state: CycleState
    recipe: Mapping[str, Any]
    bound: Bound
    decision: Mapping[str, Any] | None = None
    opened_at: float
    closed_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of the journal."""

    seq: int
    at: float
    event: str
    trigger: str | None
    attempt: int | None
    subject: str | None
    detail: Mapping[str, Any]
    seconds: float | None
    joules: float | None
    joules_source: str | None
    key_id: str


class Journal:
    """The journal of one factory."""

    def __init__(
        self, database: Database, factory: str, *, clock: Callable[[], float] = now, key_id: str = ANONYMOUS
    ) -> None:
        self.database = database
        self.factory = factory
        self.clock = clock
        self.key_id = key_id

    # ── cycles ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def open_cycle(self, trigger: str, *, recipe: Mapping[str, Any], bound: Bound) -> Cycle:
        """Begin the cycle that `trigger` names, or return it as it was begun."""
        with self.database.write(serialize=True) as connection:
            existing = self._cycle(connection, trigger)
            if existing is not None:
                return existing
            last = connection.scalar(sa.select(sa.func.max(cycles.c.number)).where(cycles.c.factory == self.factory))
            connection.execute(
                cycles.insert().values(
                    factory=self.factory,
                    trigger=trigger,
                    number=(last or 0) + 1,
                    attempt=0,
                    state="running",
                    recipe=canonical_json(recipe),
                    bound=canonical_json(asdict(bound)),
                    opened_at=self.clock(),
                )
            )
            self.write_within(connection, "cycle_begun", cycle=trigger, detail=asdict(bound))
            opened = self._cycle(connection, trigger)
            assert opened is not None
            return opened

    def claim(self, cycle: Cycle) -> Cycle:
        """Take the next attempt at a running cycle; every older attempt is fenced off from now on."""
        with self.database.write(serialize=True) as connection:
            connection.execute(
                cycles.update()
                .where(cycles.c.factory == self.factory, cycles.c.trigger == cycle.trigger)
                .where(cycles.c.state == "running")
                .values(attempt=cycles.c.attempt + 1)
            )
            claimed = self._cycle(connection, cycle.trigger)
            if claimed is None:
                raise StateError(f"expected the cycle {cycle.trigger}, found none in the factory {self.factory}.")
            return claimed

    def cycle(self, trigger: str) -> Cycle | None:
        """The cycle that `trigger` names, as it stands."""
        with self.database.read() as connection:
            return self._cycle(connection, trigger)

    def cycle_within(self, connection: Connection, trigger: str) -> Cycle | None:
        """The same, as a part of the caller's transaction."""
        return self._cycle(connection, trigger, lock=True)

    def cycles(self) -> list[Cycle]:
        """All cycles, oldest first."""
        with self.database.read() as connection:
            rows = connection.execute(
                sa.select(cycles).where(cycles.c.factory == self.factory).order_by(cycles.c.number)
            ).mappings()
            return [_to_cycle(row) for row in rows]

    def close_cycle(
        self,
        connection: Connection,
        cycle: Cycle,
        state: CycleState,
        *,
        decision: Mapping[str, Any],
        of: Literal["running", "trial"] = "running",
    ) -> None:
        """End a cycle, or the work on it (`trial`), within the caller's transaction; `of` is the state that it leaves.

        Raises   FencedError if a newer attempt has taken over or the cycle has ended already.
        """
        current = self._cycle(connection, cycle.trigger, lock=True)
        if current is None or current.attempt != cycle.attempt or current.state != of:
            found = "none" if current is None else f"attempt {current.attempt}, {current.state}"
            raise FencedError(
                f"expected attempt {cycle.attempt} at the {of} cycle {cycle.trigger}, found {found}. A "
                "newer attempt has taken over; nothing was changed."
            )
        on_trial = state == "trial"
        connection.execute(
            cycles.update()
            .where(cycles.c.factory == self.factory, cycles.c.trigger == cycle.trigger)
            .values(state=state, decision=canonical_json(decision), closed_at=None if on_trial else self.clock())
        )
        event = "cycle_on_trial" if on_trial else "cycle_ended"
        self.write_within(connection, event, cycle=cycle.trigger, attempt=cycle.attempt, detail={"state": state})

    # ── events ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def write(self, event: str, **values: Any) -> None:
        """Write one event in a transaction of its own; the values are those of `write_within`."""
        with self.database.write() as connection:
            self.write_within(connection, event, **values)

    def write_within(
        self,
        connection: Connection,
        event: str,
        *,
        cycle: str | None = None,
        attempt: int | None = None,
        subject: str | None = None,
        detail: Mapping[str, Any] | None = None,
        seconds: float | None = None,
        joules: float | None = None,
        joules_source: str | None = None,
        key_id: str | None = None,
    ) -> None:
        """Write one event as a part of the caller's transaction; by the journal's key where it names none."""
        connection.execute(
            journal.insert().values(
                factory=self.factory,
                at=self.clock(),
                event=event,
                trigger=cycle,
                attempt=attempt,
                subject=subject,
                detail=canonical_json(dict(detail or {})),
                seconds=seconds,
                joules=joules,
                joules_source=joules_source,
                key_id=key_id or self.key_id,
            )
        )

    def events(self, *, event: str | None = None, cycle: str | None = None) -> list[Event]:
        """Events in order, all or those of one kind or cycle."""
        query = sa.select(journal).where(journal.c.factory == self.factory).order_by(journal.c.seq)
        if event is not None:
            query = query.where(journal.c.event == event)
        if cycle is not None:
            query = query.where(journal.c.trigger == cycle)
        with self.database.read() as connection:
            return [_to_event(row) for row in connection.execute(query).mappings()]

    def corpora(self) -> list[str]:
        """Ids of the corpora that cycles have made, in order; of one of which rows were erased, what is left."""
        made = dict.fromkeys(event.subject for event in self.events(event="ingested") if event.subject is not None)
        erased = self.erased()
        return [corpus for corpus in made if corpus not in erased]

    def erased(self) -> dict[str, str | None]:
        """By id of an artifact that was erased the one that holds what is left of it; None where nothing is."""
        found = {str(e.subject): e.detail["successor"] for e in self.events(event=ERASED) if "successor" in e.detail}

        def last(successor: str | None) -> str | None:
            while successor in found:
                successor = found[successor]
            return successor

        return {artifact: last(successor) for artifact, successor in found.items()}

    def refused_batches(self) -> set[str]:
        """Ids of the feedback batches that the gate has named as bad; of one of which rows were erased, also what is left."""
        named = [batch for cycle in self.cycles() for batch in (cycle.decision or {}).get("refused", ())]
        return {*named, *self.left_of(named)}

    def left_of(self, ids: Iterable[str]) -> list[str]:
        """The same artifacts, and of those that were erased what is left."""
        erased = self.erased()
        left = (erased.get(each, each) for each in ids)
        return list(dict.fromkeys(each for each in left if each is not None))

    def audit_within(
        self,
        connection: Connection,
        action: str,
        *,
        subject: str,
        detail: Mapping[str, Any],
        key_id: str | None = None,
    ) -> None:
        """Write who did what, as a part of the transaction that does it; other writers of lines wait for that to end.

        key_id   the key by which it was asked for; none is the journal's
        """
        self.database.serialize(connection)
        append_line(
            connection,
            factory=self.factory,
            at=self.clock(),
            key_id=key_id or self.key_id,
            action=action,
            subject=subject,
            detail=detail,
        )

    def audited(self, *, expect: str | None = None) -> AuditChain:
        """The audit, oldest first, and whatever in it is not as it was written (see `records.audit`)."""
        with self.database.read() as connection:
            return read_chain(connection, self.factory, expect=expect)

    # ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _cycle(self, connection: Connection, trigger: str, *, lock: bool = False) -> Cycle | None:
        query = sa.select(cycles).where(cycles.c.factory == self.factory, cycles.c.trigger == trigger)
        row = connection.execute(query.with_for_update() if lock else query).mappings().one_or_none()
        return None if row is None else _to_cycle(row)


def _to_cycle(row: RowMapping) -> Cycle:
    return Cycle(
        trigger=row["trigger"],
        number=row["number"],
        attempt=row["attempt"],
        state=row["state"],
        recipe=json.loads(row["recipe"]),
        bound=Bound(**json.loads(row["bound"])),
        decision=None if row["decision"] is None else json.loads(row["decision"]),
        opened_at=row["opened_at"],
        closed_at=row["closed_at"],
    )


def _to_event(row: RowMapping) -> Event:
    values = {name: row[name] for name in Event.__dataclass_fields__ if name != "detail"}
    return Event(**values, detail=json.loads(row["detail"]))

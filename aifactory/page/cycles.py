"""Cycles: what each made, found, decided and spent, in a line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from aifactory.page.events import STAGES, of_cycles
from aifactory.records.books import Books
from aifactory.records.journal import Event
from aifactory.records.tables import cycles as cycle_table
from aifactory.records.tables import releases


@dataclass(frozen=True, slots=True, kw_only=True)
class CycleLine:
    """One turn of the loop."""

    number: int
    trigger: str
    state: str
    """running, trial, promoted, rejected, failed."""
    attempt: int
    opened_at: float
    closed_at: float | None
    heard_at: float
    """When the journal last said something of it."""
    made: Mapping[str, int]
    """By stage how many artifacts it made."""
    stage: str | None
    """While it runs: the stage that is at work, or would be; None afterwards."""
    rows_kept: int
    rows_rejected: int
    tokens: int
    change: Mapping[str, Any] | None
    """Candidate minus the release before on `change_on`, bits per byte: estimate, low, high."""
    change_on: str | None
    score: Mapping[str, Any] | None
    """Of the candidate on `holdout`, bits per byte."""
    release: int | None
    """That came of it."""
    reasons: Sequence[str]
    failed_attempts: Sequence[str]
    seconds: float
    joules: float
    joules_source: str


def cycles(books: Books, *, limit: int = 50, before: int | None = None, only: str | None = None) -> list[CycleLine]:
    """The newest cycles, newest first; those of lower numbers than `before`, or in the state `only`."""
    query = sa.select(
        *(
            cycle_table.c[name]
            for name in ("number", "trigger", "state", "attempt", "opened_at", "closed_at", "decision")
        )
    ).where(cycle_table.c.factory == books.config.name)
    if before is not None:
        query = query.where(cycle_table.c.number < before)
    if only is not None:
        query = query.where(cycle_table.c.state == only)
    with books.database.read() as connection:
        rows = connection.execute(query.order_by(cycle_table.c.number.desc()).limit(limit)).mappings().all()
        made = sa.select(releases.c.trigger, releases.c.number).where(
            releases.c.factory == books.config.name, releases.c.trigger.in_([row["trigger"] for row in rows])
        )
        released = {row.trigger: row.number for row in connection.execute(made)}
    events = of_cycles(books, (row["trigger"] for row in rows))
    return [_line(dict(row), events.get(row["trigger"], []), released.get(row["trigger"])) for row in rows]


def _line(row: Mapping[str, Any], events: Sequence[Event], release: int | None) -> CycleLine:
    made = {event.subject: event for event in events if event.event in STAGES and event.subject}
    by_stage = {stage: [e for e in made.values() if e.event == name] for name, stage in STAGES.items()}
    corpora = [event.detail for event in by_stage["ingest"]]
    found = by_stage["evaluate"][-1].detail if by_stage["evaluate"] else {}
    changes = [(name, found[name]["over_champion"]) for name in ("target", "holdout") if found.get(name)]
    on, change = next(((name, value) for name, value in changes if value), (None, None))
    sources = {event.joules_source or "estimate" for event in made.values()}
    return CycleLine(
        **{name: row[name] for name in ("number", "trigger", "state", "attempt", "opened_at", "closed_at")},
        heard_at=max([row["opened_at"], *(event.at for event in events)]),
        made={stage: len(each) for stage, each in by_stage.items()},
        stage=_stage(by_stage) if row["state"] == "running" else None,
        rows_kept=sum(figures["rows_kept"] for figures in corpora),
        rows_rejected=sum(figures["rows_rejected"] for figures in corpora),
        tokens=sum(event.detail.get("tokens", 0) for event in by_stage["tokenize"]),
        change=change,
        change_on=on,
        score=found["holdout"]["candidate"] if found.get("holdout") else None,
        release=release,
        reasons=[] if row["decision"] is None else list(json.loads(row["decision"]).get("reasons", ())),
        failed_attempts=[e.detail["error"] for e in events if e.event == "attempt_failed"],
        seconds=sum(event.seconds or 0.0 for event in made.values()),
        joules=sum(event.joules or 0.0 for event in made.values()),
        joules_source="+".join(sorted(sources)) or "estimate",
    )


def _stage(by_stage: Mapping[str, Sequence[Event]]) -> str:
    """What follows the last stage that has made something in it."""
    order = [*STAGES.values(), "promote"]
    reached = [at for at, stage in enumerate(order[:-1]) if by_stage[stage]]
    return order[max(reached, default=-1) + 1]

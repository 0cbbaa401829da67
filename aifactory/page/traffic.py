"""Live traffic: requests and tokens by release over time, the replicas that were heard of, and how a trial goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from aifactory.page.events import newest
from aifactory.records.books import Books
from aifactory.records.tables import completions, outcomes
from aifactory.serve.metering import EVENT as METERED

SPANS = {"15m": 900.0, "1h": 3600.0, "24h": 86_400.0, "7d": 604_800.0}
"""What may be looked at: from now back, seconds."""
COLUMNS = 30
"""Parts that a span is drawn in."""
_HEARD_WITHIN = 3.0
"""Times a replica's pace of telling: one that missed so many is gone, or has nothing to tell with."""
_MOST_TIMES = 2000
"""Requests of a trial whose times are looked at: the newest of each release."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseTraffic:
    """What one release answered in the span."""

    release: str
    requests: int
    prompt_tokens: int
    answer_tokens: int
    last_at: float
    by_column: Sequence[int]
    """Requests in each part of the span, oldest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """A process that serves, as it last told of itself."""

    name: str
    node: str
    at: float
    busy: float
    """The share of the time that it told of in which somebody was being answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialOutcome:
    """How requests went since the trial began."""

    release: str
    answered: int
    failed: int
    first_s: Sequence[float] | None
    """To the first token, seconds: the median, and what 95 % stay below; of the newest that have one."""
    seconds: Sequence[float] | None
    """The same to the last token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What was asked and answered in a span."""

    span: str
    since: float
    until: float
    by_release: Sequence[ReleaseTraffic]
    requests: int
    answer_tokens: int
    replicas: Sequence[Replica]
    outcomes: Sequence[TrialOutcome]

    @property
    def requests_per_s(self) -> float:
        return self.requests / (self.until - self.since)


def traffic(books: Books, span: str = "1h") -> Traffic:
    """The answers that were kept in the span until now. A span that is none of `SPANS` is an hour."""
    span = span if span in SPANS else "1h"
    until = books.journal.clock()
    since = until - SPANS[span]
    found = _by_release(books, since, until)
    return Traffic(
        span=span,
        since=since,
        until=until,
        by_release=found,
        requests=sum(each.requests for each in found),
        answer_tokens=sum(each.answer_tokens for each in found),
        replicas=replicas(books),
        outcomes=trial_outcomes(books),
    )


def _by_release(books: Books, since: float, until: float) -> list[ReleaseTraffic]:
    numbers = [release.number for release in books.registry.releases()]
    table, part = completions.c, (until - since) / COLUMNS
    at = (table.at - since) / part
    # Both cut down a number above 0; PostgreSQL's own cast would round it.
    column = sa.cast(at, sa.Integer) if books.database.is_sqlite else sa.cast(sa.func.floor(at), sa.Integer)
    query = (
        sa.select(
            table.release,
            column.label("part"),
            sa.func.count().label("requests"),
            sa.func.sum(table.prompt_tokens).label("prompt_tokens"),
            sa.func.sum(table.answer_tokens).label("answer_tokens"),
            sa.func.max(table.at).label("last_at"),
        )
        .where(table.factory == books.config.name, table.release.in_(numbers), table.at > since, table.at <= until)
        .group_by(table.release, sa.text("part"))
    )
    rows: dict[int, list[Mapping[str, Any]]] = {}
    with books.database.read() as connection:
        for row in connection.execute(query).mappings():
            rows.setdefault(row["release"], []).append(dict(row))
    found = []
    for number, parts in sorted(rows.items()):
        columns = [0] * COLUMNS
        for each in parts:
            columns[min(int(each["part"]), COLUMNS - 1)] += each["requests"]
        found.append(
            ReleaseTraffic(
                release=f"{books.config.name}-r{number}",
                requests=sum(columns),
                prompt_tokens=int(sum(each["prompt_tokens"] for each in parts)),
                answer_tokens=int(sum(each["answer_tokens"] for each in parts)),
                last_at=max(each["last_at"] for each in parts),
                by_column=columns,
            )
        )
    return found


def replicas(books: Books) -> list[Replica]:
    """Those that told of themselves lately, as they do at the pace of `runtime.endpoint.meter_s`."""
    since = books.journal.clock() - _HEARD_WITHIN * books.config.runtime.endpoint.meter_s
    last: dict[str, Replica] = {}
    for event in newest(books, of=[METERED], since=since, limit=1000):
        name = str(event.detail["replica"])
        busy = float(event.detail["busy_s"]) / event.seconds if event.seconds else 0.0
        last.setdefault(name, Replica(name=name, node=event.detail["node"], at=event.at, busy=min(1.0, busy)))
    return [last[name] for name in sorted(last)]


def trial_outcomes(books: Books) -> list[TrialOutcome]:
    """How the trial that is on goes, by release; nothing where none is on."""
    trial = books.registry.trial()
    if trial is None:
        return []
    table = outcomes.c
    mine = (table.factory == books.config.name, table.trial >= trial.begun)
    counts = sa.select(table.release, table.failed, sa.func.count().label("number")).where(*mine)
    found: dict[int, list[int]] = {}
    times: dict[int, list[sa.Row[Any]]] = {}
    with books.database.read() as connection:
        for row in connection.execute(counts.group_by(table.release, table.failed)):
            found.setdefault(row.release, [0, 0])[int(bool(row.failed))] += row.number
        for release in found:
            query = sa.select(table.first_s, table.seconds).where(*mine, table.release == release, table.failed == 0)
            times[release] = list(connection.execute(query.order_by(table.seq.desc()).limit(_MOST_TIMES)))
    return [
        TrialOutcome(
            release=f"{books.config.name}-r{release}",
            answered=answered,
            failed=failed,
            first_s=_spread([row.first_s for row in times[release] if row.first_s is not None]),
            seconds=_spread([row.seconds for row in times[release]]),
        )
        for release, (answered, failed) in sorted(found.items())
    ]


def _spread(values: Sequence[float]) -> tuple[float, float] | None:
    """The median, and the least value that 95 % do not exceed."""
    if not values:
        return None
    order = sorted(values)
    return order[(len(order) - 1) // 2], order[-(-95 * len(order) // 100) - 1]

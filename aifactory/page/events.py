"""Lines of the journal, by what a page asks for: the newest, a few kinds, a few cycles; never all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import sqlalchemy as sa

from aifactory.records.books import Books
from aifactory.records.journal import Event
from aifactory.records.tables import cycles, journal

STAGES = {"ingested": "ingest", "tokenized": "tokenize", "trained": "train", "evaluated": "evaluate"}
"""What the journal says when a stage has made something."""
_AT_ONCE = 500
"""Names in one query: SQLite takes 32,766 variables at most, and old ones 999."""


def newest(
    books: Books,
    *,
    of: Sequence[str] = (),
    without: Sequence[str] = (),
    since: float | None = None,
    limit: int,
) -> list[Event]:
    """The newest lines, newest first: of some events or of all but some, and from a time on."""
    query = sa.select(journal).where(journal.c.factory == books.config.name).order_by(journal.c.seq.desc()).limit(limit)
    if of:
        query = query.where(journal.c.event.in_(of))
    if without:
        query = query.where(journal.c.event.not_in(without))
    if since is not None:
        query = query.where(journal.c.at >= since)
    return _read(books, query)


def about(books: Books, event: str, subjects: Iterable[str]) -> dict[str, Event]:
    """The last line of one kind about each of some artifacts, by its id."""
    found: dict[str, Event] = {}
    for names in _parts(subjects):
        query = sa.select(journal).where(journal.c.factory == books.config.name, journal.c.event == event)
        for each in _read(books, query.where(journal.c.subject.in_(names)).order_by(journal.c.seq)):
            found[str(each.subject)] = each
    return found


def of_cycles(books: Books, triggers: Iterable[str]) -> dict[str, list[Event]]:
    """The lines of some cycles in order, by the cycle's trigger."""
    found: dict[str, list[Event]] = {}
    for names in _parts(triggers):
        query = sa.select(journal).where(journal.c.factory == books.config.name, journal.c.trigger.in_(names))
        for each in _read(books, query.order_by(journal.c.seq)):
            found.setdefault(str(each.trigger), []).append(each)
    return found


def last_number(books: Books) -> int:
    """Of the newest line; 0 where there is none. What follows from the journal alone changes with it."""
    with books.database.read() as connection:
        query = sa.select(sa.func.max(journal.c.seq)).where(journal.c.factory == books.config.name)
        return int(connection.scalar(query) or 0)


def cycle_numbers(books: Books) -> dict[str, int]:
    """The number of each cycle, by its trigger."""
    with books.database.read() as connection:
        query = sa.select(cycles.c.trigger, cycles.c.number).where(cycles.c.factory == books.config.name)
        return {row.trigger: row.number for row in connection.execute(query)}


def _parts(names: Iterable[str]) -> Iterable[list[str]]:
    every = list(dict.fromkeys(names))
    return (every[at : at + _AT_ONCE] for at in range(0, len(every), _AT_ONCE))


def _read(books: Books, query: sa.Select[tuple[object, ...]]) -> list[Event]:
    names = [name for name in Event.__dataclass_fields__ if name != "detail"]
    with books.database.read() as connection:
        rows = connection.execute(query).mappings()
        return [Event(**{name: row[name] for name in names}, detail=json.loads(row["detail"])) for row in rows]

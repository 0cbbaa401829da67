"""Every test that asks for `database_url` runs on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from postgres import postgres_server, postgres_url  # noqa: F401

from aifactory.records.database import Database
from aifactory.records.journal import Bound, Cycle, Journal


class Clock:
    """A clock that is set by hand."""

    def __init__(self, at: float = 1_000.0) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a fresh database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'state.db'}"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def open_database(database_url: str) -> Iterator[Callable[[], Database]]:
    """Opens the same database again and again, as so many processes would."""
    opened: list[Database] = []

    def open_one() -> Database:
        opened.append(Database(database_url))
        return opened[-1]

    yield open_one
    for database in opened:
        database.close()


@pytest.fixture
def database(open_database: Callable[[], Database]) -> Database:
    return open_database()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def journal(database: Database, clock: Clock) -> Journal:
    return Journal(database, "alpha", clock=clock, key_id="key-1")


@pytest.fixture
def begin(journal: Journal) -> Callable[..., Cycle]:
    """Begins a cycle and takes an attempt at it."""

    def begin_one(trigger: str, champion: int | None = None) -> Cycle:
        bound = Bound(kind="run", sources_digest="0" * 64, champion=champion)
        return journal.claim(journal.open_cycle(trigger, recipe={"seed": 1}, bound=bound))

    return begin_one

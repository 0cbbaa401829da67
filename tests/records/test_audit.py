"""python -m pytest tests/records/test_audit.py"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from aifactory.records import database as database_module
from aifactory.records.audit import CHAIN_BEGUN, GENESIS, AuditChain, hash_line
from aifactory.records.database import Database
from aifactory.records.journal import Cycle, Journal
from aifactory.records.registry import Registry
from aifactory.records.tables import audit

LINES = 6


def write_lines(journal: Journal, number: int = LINES) -> None:
    for i in range(number):
        with journal.database.write(serialize=True) as connection:
            journal.audit_within(connection, "tested", subject=f"thing-{i}", detail={"i": i, "text": "größer"})


@pytest.fixture
def written(journal: Journal) -> AuditChain:
    """A chain of some lines, between those of another factory."""
    other = Journal(journal.database, "beta")
    for i in range(LINES):
        with journal.database.write(serialize=True) as connection:
            journal.audit_within(connection, "tested", subject=f"thing-{i}", detail={"i": i})
        write_lines(other, 1)
    return journal.audited()


@pytest.fixture
def tamper(journal: Journal, written: AuditChain) -> Iterator[Callable[..., None]]:
    """Changes the table as somebody would who may."""

    def run(statement: str, **values: Any) -> None:
        with journal.database.write() as connection:
            connection.execute(sa.text(statement), values)

    yield run
    assert Journal(journal.database, "beta").audited().faults == []


def row(journal: Journal, number: int) -> dict[str, Any]:
    with journal.database.read() as connection:
        query = sa.select(audit).where(audit.c.factory == "alpha", audit.c.number == number)
        return dict(connection.execute(query).mappings().one())


def faults(journal: Journal, expect: str | None = None) -> list[tuple[str, int]]:
    return [(fault.kind, fault.number) for fault in journal.audited(expect=expect).faults]


def test_each_line_holds_the_hash_of_the_one_before_it(written: AuditChain) -> None:
    lines = written.lines

    assert [line.number for line in lines] == list(range(1, LINES + 1))
    assert [line.previous for line in lines] == [GENESIS, *(line.hash for line in lines[:-1])]
    assert len({line.hash for line in lines}) == LINES
    assert [line.detail for line in lines] == [{"i": i} for i in range(LINES)]
    assert (written.faults, written.head, written.begun_after) == ([], lines[-1].hash, 0)


def test_an_empty_chain_holds(journal: Journal) -> None:
    chain = journal.audited()
    assert (chain.lines, chain.faults, chain.head) == ([], [], GENESIS)


@pytest.mark.parametrize("number", [1, 3, LINES])
@pytest.mark.parametrize(
    "change",
    ["at = at + 1", "key_id = 'key-2'", "action = 'x'", "subject = 'x'", "detail = '{}'", "detail = 'no JSON'"],
)
def test_a_changed_line_is_named(journal: Journal, tamper: Callable[..., None], number: int, change: str) -> None:
    tamper(f"UPDATE audit SET {change} WHERE factory = 'alpha' AND number = {number}")

    assert faults(journal) == [("changed", number)]


@pytest.mark.parametrize("number", [1, 3, LINES])
def test_a_hash_that_was_changed_alone_is_named(journal: Journal, tamper: Callable[..., None], number: int) -> None:
    tamper("UPDATE audit SET hash = :hash WHERE factory = 'alpha' AND number = :number", hash="e" * 64, number=number)

    assert faults(journal) == [("changed", number)]


@pytest.mark.parametrize("number", [1, 3, LINES])
def test_a_link_that_was_changed_alone_is_named(journal: Journal, tamper: Callable[..., None], number: int) -> None:
    tamper(
        "UPDATE audit SET previous = :hash WHERE factory = 'alpha' AND number = :number", hash="e" * 64, number=number
    )

    assert faults(journal) == [("changed", number)]


@pytest.mark.parametrize("number", [1, 3, LINES - 1])
def test_a_line_that_was_changed_with_its_hash_is_named_by_the_next(
    journal: Journal, tamper: Callable[..., None], number: int
) -> None:
    new = row(journal, number) | {"subject": "another"}
    tamper(
        "UPDATE audit SET subject = 'another', hash = :hash WHERE factory = 'alpha' AND number = :number",
        hash=hash_line(new),
        number=number,
    )

    assert faults(journal) == [("replaced", number)]
    assert f"line {number + 1} was written after" in journal.audited().faults[0].what


@pytest.mark.parametrize(("gone", "said"), [([1], "line 1 is"), ([3], "line 3 is"), ([2, 3, 4], "lines 2 to 4 are")])
def test_removed_lines_are_named(journal: Journal, tamper: Callable[..., None], gone: list[int], said: str) -> None:
    for number in gone:
        tamper("DELETE FROM audit WHERE factory = 'alpha' AND number = :number", number=number)

    assert faults(journal) == [("removed", gone[0])]
    assert journal.audited().faults[0].what.startswith(said)


def test_a_swapped_pair_is_named(journal: Journal, tamper: Callable[..., None]) -> None:
    first, second = row(journal, 3)["seq"], row(journal, 4)["seq"]
    for old, new in ((first, -1), (second, first), (-1, second)):
        tamper("UPDATE audit SET seq = :new WHERE seq = :old", old=old, new=new)

    assert faults(journal) == [("moved", 4)]


def test_what_two_lines_say_swapped_is_two_changed_lines(journal: Journal, tamper: Callable[..., None]) -> None:
    for number, subject in ((3, "thing-3"), (4, "thing-2")):
        tamper("UPDATE audit SET subject = :subject WHERE factory = 'alpha' AND number = :n", subject=subject, n=number)

    assert faults(journal) == [("changed", 3), ("changed", 4)]


@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("number", [1, 4, LINES])
def test_a_line_that_was_put_in_is_named(
    journal: Journal, tamper: Callable[..., None], number: int, linked: bool
) -> None:
    tamper("DROP INDEX audit_number")
    line = row(journal, number) | {
        "subject": "planted",
        "previous": row(journal, number)["previous"] if linked else "f" * 64,
    }
    line = {name: value for name, value in line.items() if name != "seq"}
    line["hash"] = hash_line(line)
    with journal.database.write() as connection:
        connection.execute(audit.insert().values(**line))

    assert faults(journal) == [("inserted", number)]
    assert "planted" in journal.audited().faults[0].what
    assert [line.subject for line in journal.audited().lines] == [f"thing-{i}" for i in range(LINES)]


def test_a_line_that_knows_nothing_of_the_chain_is_named(journal: Journal, tamper: Callable[..., None]) -> None:
    tamper(
        "INSERT INTO audit (factory, at, key_id, action, subject, detail) VALUES ('alpha', 1, 'key-1', 'x', 'planted', '{}')"
    )

    assert faults(journal) == [("inserted", 0)]


def test_an_end_that_was_cut_off_is_found_by_a_hash_that_was_kept(
    journal: Journal, written: AuditChain, tamper: Callable[..., None]
) -> None:
    assert faults(journal, expect=written.head) == []
    tamper("DELETE FROM audit WHERE factory = 'alpha' AND number > 4")

    assert faults(journal) == []
    assert faults(journal, expect=written.lines[3].hash) == []
    assert faults(journal, expect=written.head) == [("removed", 5)]


def test_a_chain_that_was_written_anew_is_found_by_a_hash_that_was_kept(
    journal: Journal, written: AuditChain, tamper: Callable[..., None]
) -> None:
    previous = written.lines[1].hash
    for number in range(3, LINES + 1):
        line = row(journal, number) | {"previous": previous} | ({"detail": "{}"} if number == 3 else {})
        previous = hash_line(line)
        tamper(
            "UPDATE audit SET detail = :detail, previous = :previous, hash = :hash WHERE factory = 'alpha' AND number = :n",
            detail=line["detail"],
            previous=line["previous"],
            hash=previous,
            n=number,
        )

    assert faults(journal) == []
    assert faults(journal, expect=written.lines[1].hash) == []
    assert faults(journal, expect=written.lines[2].hash) == [("removed", LINES + 1)]


def test_a_kept_hash_is_still_there_when_lines_were_added(journal: Journal, written: AuditChain) -> None:
    write_lines(journal)

    assert faults(journal, expect=written.head) == []
    assert len(journal.audited().lines) == 2 * LINES


def test_a_promotion_whose_line_was_cut_off_is_missed_without_a_kept_hash(
    journal: Journal, begin: Callable[..., Cycle]
) -> None:
    registry = Registry(journal)
    for number in range(3):
        registry.promote(
            begin(f"t{number}", number or None), model=f"model/{number}", scorecard="scorecard/0", decision={}
        )
    registry.rollback(reason="bad")
    write_lines(journal, 1)
    assert faults(journal) == []

    with journal.database.write() as connection:
        connection.execute(audit.delete().where(audit.c.number > 2))

    assert faults(journal) == [("removed", 3), ("removed", 4)]
    whats = [fault.what for fault in journal.audited().faults]
    assert "the promote of alpha-r3" in whats[0]
    assert "the rollback of alpha-r2" in whats[1]


def test_writers_at_once_write_one_chain(open_database: Callable[[], Database]) -> None:
    journals = [Journal(open_database(), "alpha", key_id=f"key-{i}") for i in range(4)]
    _ = [journal.database.engine for journal in journals]
    start = threading.Barrier(len(journals))

    def work(journal: Journal) -> None:
        start.wait()
        for i in range(10):
            # Whoever forgets to ask for the order is put into it all the same.
            with journal.database.write(serialize=i % 2 == 0) as connection:
                journal.audit_within(connection, "tested", subject=f"thing-{i}", detail={})

    threads = [threading.Thread(target=work, args=(journal,)) for journal in journals]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    chain = journals[0].audited()
    assert chain.faults == []
    assert [line.number for line in chain.lines] == list(range(1, 41))
    for journal in journals:
        of_one = [line.subject for line in chain.lines if line.key_id == journal.key_id]
        assert of_one == [f"thing-{i}" for i in range(10)]


def test_a_transaction_that_fails_leaves_no_gap(journal: Journal) -> None:
    write_lines(journal, 2)

    def write_and_fail() -> None:
        with journal.database.write() as connection:
            journal.audit_within(connection, "tested", subject="never", detail={})
            raise KeyError("after the line")

    with pytest.raises(KeyError):
        write_and_fail()
    write_lines(journal, 2)

    assert [line.number for line in journal.audited().lines] == [1, 2, 3, 4]
    assert faults(journal) == []


def upgraded(engine: sa.Engine, to: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(database_module.__file__).with_name("migrations")))
    with engine.connect() as connection, connection.begin():
        config.attributes["connection"] = connection
        command.upgrade(config, to)


def test_lines_of_before_the_chain_are_chained_and_it_says_so(database_url: str) -> None:
    engine = sa.create_engine(database_url)
    upgraded(engine, "0004")
    insert = sa.text(
        "INSERT INTO audit (factory, at, key_id, action, subject, detail) VALUES (:factory, :at, 'k', 'tested', :subject, '{}')"
    )
    with engine.begin() as connection:
        for i in range(3):
            connection.execute(insert, {"factory": "alpha", "at": i + 0.1, "subject": f"thing-{i}"})
        connection.execute(insert, {"factory": "beta", "at": 0.5, "subject": "other"})
    engine.dispose()

    journal = Journal(Database(database_url), "alpha")
    chain = journal.audited()
    assert [(line.number, line.action) for line in chain.lines] == [
        *((i, "tested") for i in (1, 2, 3)),
        (4, CHAIN_BEGUN),
    ]
    assert (chain.faults, chain.begun_after, chain.lines[3].detail) == ([], 3, {"lines": 3})
    assert [line.at for line in chain.lines[:3]] == [0.1, 1.1, 2.1]
    write_lines(journal, 1)
    assert faults(journal) == []
    assert Journal(journal.database, "beta").audited().begun_after == 1
    assert Journal(journal.database, "gamma").audited().lines == []
    with journal.database.write() as connection:
        connection.execute(sa.text("UPDATE audit SET subject = 'x' WHERE factory = 'alpha' AND number = 2"))
    assert faults(journal) == [("changed", 2)]
    journal.database.close()

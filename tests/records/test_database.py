"""python -m pytest tests/records/test_database.py"""

from __future__ import annotations

import os
import pickle
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from postgres import PostgresServer

from aifactory.errors import ConfigError, StateError
from aifactory.records import database as module
from aifactory.records.database import SCHEMA_HEAD, Database
from aifactory.records.journal import Bound, Journal
from aifactory.records.tables import metadata


def test_a_fresh_migration_equals_the_tables(database: Database) -> None:
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        difference = compare_metadata(context, metadata)
        partial = [i for i in sa.inspect(connection).get_indexes("feedback") if i["name"] == "feedback_by_batch"]

    assert difference == []
    where = partial[0]["dialect_options"].values()
    assert len(partial) == 1
    assert any("correction IS NOT NULL" in str(condition) for condition in where)


def test_the_schema_head_is_the_newest_version_file() -> None:
    files = (Path(module.__file__).parent / "migrations" / "versions").glob("[0-9]*.py")

    assert max(file.name.partition("_")[0] for file in files) == SCHEMA_HEAD


def test_a_database_of_a_newer_version_is_refused(open_database: Callable[[], Database]) -> None:
    with open_database().write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))

    with pytest.raises(
        StateError, match=rf"expected a schema up to {SCHEMA_HEAD} .*found: .*9999.*newer version of aifactory"
    ):
        _ = open_database().engine

    with pytest.raises(StateError, match="9999"):
        _ = open_database().engine


OPEN_AT = """
import sys, time
from aifactory.records.database import Database
from aifactory.records.journal import Journal
database = Database(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
Journal(database, "alpha").write("opened")
"""


@pytest.mark.parametrize("round_", range(2))
def test_processes_that_migrate_a_fresh_database_at_once_all_succeed(database_url: str, round_: int) -> None:
    command = [sys.executable, "-c", OPEN_AT, database_url]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, text=True, **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"

    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=60)[1] for process in processes]

    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert len(Journal(Database(database_url), "alpha").events()) == 3


def test_threads_that_open_a_fresh_database_at_once_all_succeed(open_database: Callable[[], Database]) -> None:
    shared = open_database()
    databases = [shared, shared, open_database(), open_database()]
    engines: list[sa.Engine] = []
    threads = [threading.Thread(target=lambda d=d: engines.append(d.engine)) for d in databases]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(engines) == 4
    assert len(set(map(id, engines))) == 3


def test_an_existing_database_opens_without_alembic(database_url: str) -> None:
    Database(database_url).close()
    Journal(Database(database_url), "alpha").write("opened")
    code = """
import sys
from aifactory.records.database import Database
with Database(sys.argv[1]).read(): pass
print("alembic" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, database_url], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "False"


def test_a_block_that_fails_changes_nothing(journal: Journal) -> None:
    def write_and_fail() -> None:
        with journal.database.write() as connection:
            journal.write_within(connection, "tested")
            raise KeyError("after the write")

    with pytest.raises(KeyError):
        write_and_fail()

    assert journal.events() == []


def test_what_is_written_is_seen_through_other_connections(open_database: Callable[[], Database]) -> None:
    writer, reader = open_database(), open_database()

    Journal(writer, "alpha").write("tested")

    assert [event.event for event in Journal(reader, "alpha").events()] == ["tested"]


def test_serialized_transactions_do_not_overlap(open_database: Callable[[], Database]) -> None:
    inside, most = 0, 0
    _ = open_database().engine

    def work(database: Database) -> None:
        nonlocal inside, most
        for _ in range(5):
            with database.write(serialize=True):
                inside += 1
                most = max(most, inside)
                time.sleep(0.002)
                inside -= 1

    threads = [threading.Thread(target=work, args=(open_database(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert most == 1


def test_a_reader_does_not_wait_for_a_writer(open_database: Callable[[], Database]) -> None:
    writer, reader = open_database(), open_database()
    _ = writer.engine, reader.engine

    with writer.write(serialize=True) as connection:
        Journal(writer, "alpha").write_within(connection, "tested")
        began = time.monotonic()
        seen = Journal(reader, "alpha").events()

    assert seen == []
    assert time.monotonic() - began < 5


def test_a_database_is_pickled_by_its_url_with_its_password(database: Database) -> None:
    Journal(database, "alpha").write("tested")

    copy = pickle.loads(pickle.dumps(Journal(database, "alpha")))

    assert copy.database.url == database.url
    assert [event.event for event in copy.events()] == ["tested"]
    copy.database.close()


def test_a_relative_sqlite_path_means_the_folder_in_which_it_was_named(tmp_path: Path) -> None:
    before = Path.cwd()
    try:
        os.chdir(tmp_path)
        database = Database("sqlite:///state.db")
    finally:
        os.chdir(before)

    assert pickle.loads(pickle.dumps(database)).url.database == str(tmp_path / "state.db")


def test_sqlite_is_durable_and_has_one_writer(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'deep' / 'state.db'}")

    with database.read() as connection:
        pragmas = {n: connection.exec_driver_sql(f"PRAGMA {n}").scalar() for n in ("journal_mode", "synchronous")}
        keys = connection.exec_driver_sql("PRAGMA foreign_keys").scalar()

    assert pragmas == {"journal_mode": "wal", "synchronous": 2}
    assert keys == 1
    assert database.is_sqlite
    database.close()


def test_a_fresh_file_that_another_is_writing_is_waited_for(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "state.db", isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE other (x)")
    other.execute("BEGIN IMMEDIATE")
    other.execute("SELECT * FROM other").fetchall()
    release = threading.Timer(0.2, other.rollback)
    release.start()

    journal = Journal(Database(f"sqlite:///{tmp_path / 'state.db'}"), "alpha")
    journal.write("tested")

    release.join()
    other.close()
    assert len(journal.events()) == 1
    journal.database.close()


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        ("not a url", ConfigError, "expected a SQLAlchemy URL such as sqlite:///state.db"),
        ("mysql://localhost/x", ConfigError, "expected SQLite or PostgreSQL as the state database, found mysql"),
        (
            "postgresql+psycopg://nobody:secret@127.0.0.1:1/x",
            StateError,
            r"Is the server up, and do the user and the database",
        ),
        ("sqlite:////proc/nowhere/state.db", StateError, "expected a folder for sqlite:////proc/nowhere/state.db"),
    ],
)
def test_a_database_that_cannot_be_opened_is_explained(url: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as error:
        _ = Database(url).engine

    assert "secret" not in str(error.value)


def test_a_file_that_is_no_database_is_explained(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"not a database, but long enough to have a header" * 100)

    with pytest.raises(StateError, match="found: file is not a database"):
        _ = Database(f"sqlite:///{tmp_path / 'state.db'}").engine


def test_a_database_that_went_away_is_a_state_error(postgres_url: str, postgres_server: PostgresServer) -> None:
    journal = Journal(Database(postgres_url), "alpha")
    journal.write("before")
    name = journal.database.url.database
    kill = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"

    def write_and_lose_the_server() -> None:
        with journal.database.write() as connection:
            journal.write_within(connection, "during")
            postgres_server.execute(kill)
            journal.write_within(connection, "during")

    with pytest.raises(StateError, match="This transaction changed nothing"):
        write_and_lose_the_server()
    journal.write("after")

    assert [event.event for event in journal.events()] == ["before", "after"]
    journal.database.close()


def test_another_default_isolation_of_the_server_changes_nothing(
    postgres_url: str, postgres_server: PostgresServer
) -> None:
    database = Database(postgres_url)
    postgres_server.execute(
        f"ALTER DATABASE {database.url.database} SET default_transaction_isolation = 'repeatable read'"
    )
    journals = [Journal(Database(postgres_url), "alpha") for _ in range(4)]
    bound = Bound(kind="run", sources_digest="0")
    _ = database.engine

    def work(at: int) -> None:
        for turn in range(5):
            journals[at].open_cycle(f"cycle-{at}-{turn}", recipe={}, bound=bound)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [cycle.number for cycle in journals[0].cycles()] == list(range(1, 21))
    for journal in journals:
        journal.database.close()
    database.close()

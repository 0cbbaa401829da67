"""One SQL database for what must survive: SQLite (WAL) by default, PostgreSQL by URL.

Acknowledged means durable: SQLite runs with `synchronous=FULL`, so a commit is on disk when it returns.
Raises   StateError.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError

from aifactory.errors import ConfigError, StateError

SCHEMA_HEAD = "0010"
"""The newest migration; a test holds it against `migrations/versions`."""

# Any number that other programs are unlikely to lock by; PostgreSQL's advisory locks are per database.
_ADVISORY_LOCK = 0x61_69_66_61


_BUSY_TIMEOUT_S = 30.0
"""How long SQLite waits for another writer."""

_HOLD_TEXT = ("completions", "feedback", "choices", "scores", "batch_lines", "files", "batches", "journal", "cycles")
"""Tables of which rows are deleted or changed by an erasure."""

# One thread of a process migrates at a time: alembic keeps what it runs on in module globals.
_opening = threading.Lock()


class Database:
    """A lazily opened database. Pickled by its URL, so every process opens connections of its own."""

    def __init__(self, url: str) -> None:
        try:
            self.url: URL = make_url(url)
        except ArgumentError as error:
            raise ConfigError(
                f"expected a SQLAlchemy URL such as sqlite:///state.db or postgresql+psycopg://…, found {url!r}."
            ) from error
        if self.url.get_backend_name() not in ("sqlite", "postgresql"):
            raise ConfigError(
                f"expected SQLite or PostgreSQL as the state database, found {self.url.drivername}; name one of them."
            )
        if self.is_sqlite and self.url.database and not self.url.database.startswith((":memory:", "file:")):
            # Relative to the folder in which it was named: a worker that unpickles it runs in another.
            self.url = self.url.set(database=str(Path(self.url.database).expanduser().absolute()))
        self._engine: Engine | None = None

    def __reduce__(self) -> tuple[type[Database], tuple[str]]:
        return Database, (self.url.render_as_string(hide_password=False),)

    @property
    def is_sqlite(self) -> bool:
        """SQLite is a file of one machine: several nodes can't write to it."""
        return self.url.get_backend_name() == "sqlite"

    @property
    def engine(self) -> Engine:
        """The engine, with the schema at its newest version."""
        if self._engine is None:
            with _opening:
                if self._engine is None:
                    self._engine = self._open_migrated()
        return self._engine

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads."""
        with self._explained(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self, *, serialize: bool = False) -> Iterator[Connection]:
        """A transaction that is durable when the block ends.

        With `serialize` no other such transaction runs beside it: what counts numbers up needs it. SQLite has one
        writer anyway.
        """
        with self._explained(), self.engine.connect() as connection:
            connection = connection.execution_options(immediate=True)
            with connection.begin():
                if serialize:
                    self.serialize(connection)
                yield connection

    def serialize(self, connection: Connection) -> None:
        """From here on to the end of this transaction no other runs that asks for the same; it may be asked for again."""
        if not self.is_sqlite:
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})

    def version(self) -> str | None:
        """The version of the schema that is there; None where there is none. Nothing is migrated or made."""
        if self.is_sqlite and self.url.database and not Path(self.url.database).exists():
            return None
        engine = self._open()
        try:
            with self._explained():
                return _version(engine)
        finally:
            engine.dispose()

    @contextmanager
    def write_at(self, version: str) -> Iterator[Connection]:
        """A transaction on an empty database whose schema is made as it was at an older version; the next use migrates it.

        Raises   StateError where it has a schema of another version already.
        """
        self.close()
        engine = self._open()
        try:
            with self._explained(), engine.connect() as connection:
                connection = connection.execution_options(immediate=True)
                with connection.begin():
                    self.serialize(connection)
                    found = _version_of(connection)
                    if found is None:
                        self._upgrade(connection, version)
                    elif found != version:
                        raise StateError(
                            f"expected an empty database or one of the schema {version} at {self.url.render_as_string()}, found "
                            f"the schema {found}; name an empty one."
                        )
                    yield connection
        finally:
            engine.dispose()

    def shred(self) -> list[str]:
        """Leave nothing of rows that were deleted in the database's files; what was not reached, in words.

        SQLite: the file is written anew without free pages, and the write-ahead log is cut to nothing. PostgreSQL: each
        table is written anew, which locks it meanwhile.
        """
        if self.is_sqlite:
            return self._shred_sqlite()
        with self._explained(), self.engine.connect() as connection:
            connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            for name in _HOLD_TEXT:
                connection.exec_driver_sql(f"VACUUM FULL {name}")
        return ["PostgreSQL's write-ahead log, replicas and backups: the server recycles or expires them"]

    def _shred_sqlite(self) -> list[str]:
        raw = self.engine.raw_connection()
        try:
            plain: Any = raw.driver_connection
            deadline = time.monotonic() + _BUSY_TIMEOUT_S
            while True:
                try:
                    plain.execute("PRAGMA secure_delete=ON").close()
                    plain.execute("VACUUM").close()
                    busy = plain.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
                except sqlite3.OperationalError as error:
                    if "locked" not in str(error) and "busy" not in str(error):
                        raise StateError(f"expected to write {self.url.database} anew, found: {error}.") from error
                    busy = 1
                if not busy:
                    return []
                if time.monotonic() > deadline:
                    return [
                        f"the write-ahead log of {self.url.database}: somebody has read it all the while; run it again"
                    ]
                time.sleep(0.05)
        finally:
            raw.close()

    def close(self) -> None:
        """Close the connections; the next use opens new ones."""
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    # ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OperationalError as error:
            raise StateError(
                f"expected the database at {self.url.render_as_string()} to answer, found: {error.orig}. This "
                "transaction changed nothing, what was acknowledged before is intact: mend the database and try again."
            ) from error

    def _open_migrated(self) -> Engine:
        try:
            engine = self._open()
        except OSError as error:
            raise StateError(f"expected a folder for {self.url.render_as_string()}, found: {error}.") from error
        try:
            self._migrate(engine)
        except BaseException as error:
            engine.dispose()
            if not isinstance(error, DBAPIError):
                raise
            raise StateError(
                f"expected a database at {self.url.render_as_string()}, found: {error.orig}. Is the server up, and do "
                "the user and the database exist?"
            ) from error
        return engine

    def _open(self) -> Engine:
        if not self.is_sqlite:
            try:
                # What waits for the lock must see what its predecessor wrote, whatever the server's default is.
                return sa.create_engine(self.url, pool_pre_ping=True, isolation_level="READ COMMITTED")
            except (NoSuchModuleError, ImportError) as error:
                raise StateError(
                    f"expected a driver for {self.url.drivername}, found none: {error}. Install aifactory[postgres]."
                ) from error
        if self.url.database and self.url.database != ":memory:":
            Path(self.url.database).parent.mkdir(parents=True, exist_ok=True)
        engine = sa.create_engine(self.url, connect_args={"timeout": _BUSY_TIMEOUT_S})

        @sa.event.listens_for(engine, "connect")
        def configure(dbapi_connection: Any, _: Any) -> None:
            # The driver must not begin transactions by itself: which kind is begun is decided below.
            dbapi_connection.isolation_level = None
            _use_wal(dbapi_connection)
            for pragma in ("synchronous=FULL", "foreign_keys=ON"):
                dbapi_connection.execute(f"PRAGMA {pragma}").close()

        @sa.event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            # A deferred transaction that turns into a writer can fail at once where another has written meanwhile.
            immediate = connection.get_execution_options().get("immediate", False)
            connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

        return engine

    def _migrate(self, engine: Engine) -> None:
        if _version(engine) == SCHEMA_HEAD:
            return
        with engine.connect() as connection:
            connection = connection.execution_options(immediate=True)
            with connection.begin():
                self.serialize(connection)
                self._upgrade(connection, "head")

    def _upgrade(self, connection: Connection, version: str) -> None:
        from alembic import command
        from alembic.config import Config
        from alembic.util.exc import CommandError

        config = Config()
        folder = str(Path(__file__).with_name("migrations"))
        config.set_main_option("script_location", folder.replace("%", "%%"))
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, version)
        except CommandError as error:
            raise StateError(
                f"expected a schema up to {SCHEMA_HEAD} at {self.url.render_as_string()}, found: {error}. It "
                "was made by a newer version of aifactory; use that one."
            ) from error


def _use_wal(dbapi_connection: Any) -> None:
    # SQLite does not wait here: of two that turn a fresh file to WAL at once, one is told at once that it is locked.
    deadline = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            dbapi_connection.execute("PRAGMA journal_mode=WAL").close()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _version(engine: Engine) -> str | None:
    with engine.connect() as connection:
        return _version_of(connection)


def _version_of(connection: Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    version = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
    return None if version is None else str(version)


def now() -> float:
    """Seconds since 1970, UTC; the clock that is handed in where none is named."""
    return time.time()

"""Snapshot: all rows of one factory in the database, as one moment saw them; the same for SQLite and PostgreSQL, into either.

A table is a file of JSON lines, gzip: one object a row, by the names of the columns, in the order of the primary key. The schema's
version is kept beside it: rows are put into a schema of that version, which is then migrated.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aifactory.errors import StorageError
from aifactory.records.database import Database
from aifactory.records.tables import metadata

_AT_ONCE = 500
_REFERS_TO = {("choices", "feedback"): "feedback", ("scores", "feedback"): "feedback"}
"""Columns that hold the number of a row of another table."""
_NUMBERED = "seq"
"""The column by which a table counts its rows up, whichever factory they are of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFile:
    """One table of a snapshot."""

    table: str
    num_rows: int
    data: bytes

    @property
    def sha256(self) -> str:
        """Of the file."""
        return hashlib.sha256(self.data).hexdigest()


def take(database: Database, factory: str) -> Iterator[TableFile]:
    """Every table's rows of a factory, all as one moment saw them. The transaction lasts until the last was taken."""
    with database.engine.connect() as connection:
        if not database.is_sqlite:
            connection = connection.execution_options(isolation_level="REPEATABLE READ", stream_results=True)
        with connection.begin():
            if database.is_sqlite:
                # A deferred transaction sees from its first reading on.
                connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar()
            for table in metadata.sorted_tables:
                yield _read(connection, table, factory)


def _read(connection: Connection, table: sa.Table, factory: str) -> TableFile:
    query = sa.select(table).order_by(*table.primary_key.columns)
    if "factory" in table.c:
        query = query.where(table.c.factory == factory)
    sink, count = io.BytesIO(), 0
    # No time in the file: the same rows are the same bytes.
    with gzip.GzipFile(fileobj=sink, mode="wb", mtime=0) as packed:
        for row in connection.execute(query).mappings().yield_per(_AT_ONCE):
            packed.write(json.dumps(dict(row), ensure_ascii=False, sort_keys=True).encode() + b"\n")
            count += 1
    return TableFile(table=table.name, num_rows=count, data=sink.getvalue())


def rows_of(data: bytes) -> Iterator[dict[str, Any]]:
    """The rows of a table's file."""
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
        for line in packed:
            yield json.loads(line)


def holds_rows(database: Database, factory: str) -> bool:
    """Whether the database has anything of a factory."""
    with database.read() as connection:
        for table in metadata.sorted_tables:
            if "factory" in table.c:
                query = sa.select(sa.literal(1)).select_from(table).where(table.c.factory == factory).limit(1)
                if connection.scalar(query) is not None:
                    return True
    return False


def put(connection: Connection, tables: Mapping[str, bytes]) -> int:
    """Put all rows of a snapshot into the connected database, which has nothing of their factory, within the caller's transaction.

    The database's tables are as they were when the snapshot was taken. Numbers that several factories share begin after those
    that are taken. Returns the number of rows.

    Raises   StorageError for a table that the database does not have.
    """
    there = sa.MetaData()
    there.reflect(connection)
    unknown = sorted(name for name, data in tables.items() if name not in there.tables and any(rows_of(data)))
    if unknown:
        raise StorageError(
            f"expected tables that this version knows, found {', '.join(unknown)}; use the version that made them."
        )
    shift = {
        table.name: int(connection.scalar(sa.select(sa.func.max(table.c[_NUMBERED]))) or 0)
        for table in there.sorted_tables
        if _NUMBERED in table.c
    }
    count = 0
    for table in there.sorted_tables:
        if table.name not in tables:
            continue
        if "factory" not in table.c and connection.scalar(sa.select(sa.literal(1)).select_from(table).limit(1)):
            continue  # it is of all factories, and is there
        for some in _chunks(rows_of(tables[table.name])):
            shifted = [_shifted(table.name, row, shift) for row in some]
            connection.execute(table.insert(), shifted)
            count += len(shifted)
    if connection.dialect.name == "postgresql":
        _set_sequences(connection, there)
    return count


def _shifted(table: str, row: dict[str, Any], shift: Mapping[str, int]) -> dict[str, Any]:
    if table in shift and row.get(_NUMBERED) is not None:
        row[_NUMBERED] += shift[table]
    for (name, column), other in _REFERS_TO.items():
        if name == table and row.get(column) is not None:
            row[column] += shift[other]
    return row


def _set_sequences(connection: Connection, there: sa.MetaData) -> None:
    for table in there.sorted_tables:
        if _NUMBERED in table.c:
            connection.execute(
                sa.text(
                    f"SELECT setval(pg_get_serial_sequence('{table.name}', '{_NUMBERED}'), "
                    f"GREATEST((SELECT COALESCE(MAX({_NUMBERED}), 0) FROM {table.name}), 1))"
                )
            )


def _chunks(rows: Iterator[dict[str, Any]]) -> Iterator[Sequence[dict[str, Any]]]:
    some: list[dict[str, Any]] = []
    for row in rows:
        some.append(row)
        if len(some) == _AT_ONCE:
            yield some
            some = []
    if some:
        yield some

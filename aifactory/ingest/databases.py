"""Databases: rows from a table or a query, by SQLAlchemy; the log of a factory's answers and feedback is such a query.

What a database holds has no bytes to hash: its identity is that of the rows that are asked for, so a source is read once
when it is listed and once when it is ingested, each time as a stream in a read-only transaction.

With a `key` the rows come in its order and are cut into ranges of it, where the hash of a key's value decides; rows with
the same key stay together, in the order of their contents. Without one all rows are one piece, in memory, in the order of
their contents. A position counts rows in that order, so that it never depends on how the database happens to answer.
The log is only added to: its last range ends with the last row that was listed, so that traffic changes nothing that was.

A file of SQLite is opened read-only, must be a regular file, and may attach no other; the host of a server is checked
as every address is (see `reach`).
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import stat
import urllib.parse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from aifactory.config import expand_environment
from aifactory.config.sources import FeedbackSource, SqlSource
from aifactory.errors import ConfigError
from aifactory.ingest.blocks import BlockBuilder, Problem
from aifactory.ingest.cuts import FILE_WEIGHT, MAX_BYTES, MIN_BYTES, Cut, ends_group
from aifactory.ingest.reach import check_address
from aifactory.ingest.shapes import BrokenText, Shape
from aifactory.ingest.tables import ChangedError
from aifactory.records.identity import canonical_json
from aifactory.records.journal import ANONYMOUS

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine

_ROWS_AT_ONCE = 2000
_ROW_BYTES = 32
_KEY = "key_id"
"""Of feedback, where it came by a key: no column of the rows, but what they are judged by, so that it identifies them too."""
_ALLOWED = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
    sqlite3.SQLITE_TRANSACTION,
}

Values = dict[str, object]
DatabaseSource = SqlSource | FeedbackSource


def origin_of(section: DatabaseSource) -> str:
    """What the rows say they come from."""
    if isinstance(section, FeedbackSource):
        return section.of
    return section.table or "query"


def cut_database(section: DatabaseSource) -> list[Cut]:
    """The ranges of keys of a table or query.

    Raises   ConfigError if it can't be read.
    """
    with _connection(section) as connection:
        if section.key is None:
            rows = sorted(_plain_json(row) for row in _rows(connection, section, "", ""))
            return [Cut("", "", 0, sum(map(len, rows)), _digest(rows))]
        return list(_cut_by_key(section, _groups(section, _rows(connection, section, "", ""))))


def read_database(
    section: DatabaseSource, start: str, stop: str, sha256: str, origin: str, builder: BlockBuilder
) -> Iterator[None]:
    """Add the rows of a range of keys.

    Raises   ChangedError if they are not what `sha256` says; ConfigError if they can't be read.
    """
    shape = Shape(section.columns)
    state = hashlib.sha256()
    position = 0
    with _connection(section) as connection:
        rows = _rows(connection, section, start, stop)
        groups: Iterator[list[Values]]
        groups = iter([sorted(rows, key=_plain_json)]) if section.key is None else map(_second, _groups(section, rows))
        for group in groups:
            for values in group:
                _update(state, _plain_json(values))
                row = shape.row(values)
                if isinstance(row, Problem):
                    broken = next((value for value in values.values() if isinstance(value, BrokenText)), None)
                    text = str(values) if broken is None else broken.decode("utf-8", "backslashreplace")
                    builder.reject(origin, position, row, text)
                else:
                    builder.add_row(origin, position, row)
                position += 1
            yield
    if state.hexdigest() != sha256:
        raise ChangedError


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _rows(connection: Connection, section: DatabaseSource, start: str, stop: str) -> Iterator[Values]:
    """The rows whose keys lie in a range, in the order of their keys."""
    import sqlalchemy as sa

    names = dict.fromkeys([*section.columns.asked, *([section.key] if section.key is not None else [])])
    relation: Any
    if isinstance(section, FeedbackSource):
        names["messages"] = None
        if section.of != "completions":
            names[_KEY] = None
        relation = _log(section).subquery("asked")
    elif section.table is not None:
        schema, _, table = section.table.rpartition(".")
        relation = sa.table(table, *(sa.column(name) for name in names), schema=schema or None)
    else:
        query = sa.text((section.query or "").strip().rstrip(";"))
        relation = query.columns(*(sa.column(name) for name in names)).subquery("asked")
    columns = [relation.c[name] for name in names]
    statement = sa.select(*columns)
    if section.key is not None:
        key = relation.c[section.key]
        statement = statement.order_by(key)
        if start:
            statement = statement.where(key > json.loads(start))
        if stop:
            statement = statement.where(key <= json.loads(stop))
    streamed = {"stream_results": True, "yield_per": _ROWS_AT_ONCE}
    for row in connection.execute(statement, execution_options=streamed):
        values = dict(zip(names, row, strict=True))
        if isinstance(section, FeedbackSource):
            if turns := values.pop("messages"):
                values["prompt"] = json.loads(turns)
            if values.get(_KEY) == ANONYMOUS:
                del values[_KEY]
        yield values


def keys_of_log(section: FeedbackSource, stops: Iterable[str]) -> dict[str, str]:
    """By completion the key by which the first feedback on it came, in the ranges that end at `stops`; without those on which it
    came by none, and none where all of it came by one.

    Raises   ConfigError if the log can't be read.
    """
    import sqlalchemy as sa

    from aifactory.records.tables import feedback

    query = sa.select(feedback.c.completion, feedback.c.key_id).where(
        feedback.c.factory == section.factory, feedback.c.seq <= max(map(int, stops))
    )
    keys: dict[str, str] = {}
    with _connection(section) as connection:
        for row in connection.execute(query.order_by(feedback.c.seq)):
            keys.setdefault(row.completion, row.key_id)
    several = len(set(keys.values())) > 1
    return {completion: key for completion, key in keys.items() if several and key != ANONYMOUS}


def _log(section: FeedbackSource) -> Any:
    """The query of a factory's answers, of the corrections or the scores of them, or of pairs of answers."""
    import sqlalchemy as sa

    from aifactory.records.tables import choices, completions, feedback

    asked = [completions.c.id.label("completion"), completions.c.prompt, completions.c.messages, completions.c.answer]
    mine = completions.c.factory == section.factory
    if section.of == "completions":
        users = sa.func.coalesce(completions.c.user, completions.c.id).label("user")
        return sa.select(*asked, completions.c.answer.label("text"), users, completions.c.at).where(mine)
    users = sa.func.coalesce(feedback.c.user, completions.c.user, completions.c.id).label("user")
    of_it = sa.and_(completions.c.factory == feedback.c.factory, completions.c.id == feedback.c.completion)
    told: sa.ColumnElement[Any] = feedback.c.correction
    said: list[sa.ColumnElement[Any]] = [told.label("text")]
    if section.of == "scores":
        told = feedback.c.score
        liked = sa.case((told >= section.liked_from, sa.literal("true")), else_=sa.literal("false"))
        said = [completions.c.answer.label("text"), liked.label("label")]
    said += [users, feedback.c.at, feedback.c.seq, feedback.c.key_id.label(_KEY)]
    told_of = sa.select(*asked, *said).join_from(feedback, completions, of_it).where(mine, told.is_not(None))
    if section.of != "preferences":
        return told_of
    other = completions.alias("other")
    chosen = [
        completions.c.id.label("completion"),
        completions.c.prompt,
        completions.c.messages,
        other.c.answer,
        completions.c.answer.label("text"),
    ]
    of_choice = sa.and_(choices.c.factory == feedback.c.factory, choices.c.feedback == feedback.c.seq)
    not_chosen = sa.and_(other.c.factory == choices.c.factory, other.c.id == choices.c.rejected)
    pairs = (
        sa.select(*chosen, *said[1:])
        .join_from(feedback, completions, of_it)
        .join(choices, of_choice)
        .join(other, not_chosen)
        .where(mine)
    )
    return sa.union_all(told_of, pairs)


def _groups(section: DatabaseSource, rows: Iterator[Values]) -> Iterator[tuple[str, list[Values]]]:
    """Rows with the same key, in the order of their contents, and the key as JSON."""
    assert section.key is not None
    before = ""
    group: list[Values] = []
    for values in rows:
        key = values[section.key]
        if not isinstance(key, int | float if isinstance(section, FeedbackSource) else int | str):
            raise ConfigError(
                f"expected whole numbers or texts in the key {section.key!r} of ingest source {section.name!r}, found "
                f"{type(key).__name__}; name another column, or none."
            )
        text = json.dumps(key)
        if group and text != before:
            yield before, sorted(group, key=_plain_json)
            group = []
        before = text
        group.append(values)
    if group:
        yield before, sorted(group, key=_plain_json)


def _cut_by_key(section: DatabaseSource, groups: Iterator[tuple[str, list[Values]]]) -> Iterator[Cut]:
    start, first, position, size, last = "", 0, 0, 0, ""
    state = hashlib.sha256()
    open_cut = False
    for key, group in groups:
        rows = [_plain_json(values) for values in group]
        weight = sum(map(len, rows)) + _ROW_BYTES * len(rows)
        for row in rows:
            _update(state, row)
        position += len(rows)
        size += weight
        last, open_cut = key, True
        if size >= MAX_BYTES or (size >= MIN_BYTES and ends_group(key, weight)):
            yield Cut(start, key, first, size, state.hexdigest())
            start, first, size, state, open_cut = key, position, 0, hashlib.sha256(), False
    if open_cut or not last:
        # The last range has no end: a row that is added behind it makes it another one. That of a log ends where it ends
        # now: 0 comes before every row.
        stop = (last or "0") if isinstance(section, FeedbackSource) else ""
        yield Cut(start, stop, first, size + FILE_WEIGHT, state.hexdigest())


def _second(group: tuple[str, list[Values]]) -> list[Values]:
    return group[1]


def _plain_json(values: Values) -> str:
    """A row as canonical JSON; what JSON has no form for is written as Python prints it, beside its type."""
    return canonical_json({name: _plain(value) for name, value in values.items()})


def _plain(value: object) -> object:
    if value is None or isinstance(value, str | bool | int):
        return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return [type(value).__name__, repr(value)]


def _digest(rows: list[str]) -> str:
    state = hashlib.sha256()
    for row in rows:
        _update(state, row)
    return state.hexdigest()


def _update(state: Any, row: str) -> None:
    data = row.encode()
    state.update(f"{len(data)}:".encode())
    state.update(data)


# ── connections ───────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _connection(section: DatabaseSource) -> Iterator[Connection]:
    """A connection that can only read."""
    import sqlalchemy as sa

    engine = _engine(section)
    try:
        with engine.connect() as connection:
            is_postgres = engine.dialect.name == "postgresql"
            if is_postgres:
                connection = connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            with connection.begin():
                if is_postgres:  # times come in the time zone of the session
                    connection.exec_driver_sql("SET LOCAL TIME ZONE 'UTC'")
                yield connection
    except (sa.exc.SQLAlchemyError, sqlite3.Error) as error:
        reason = getattr(error, "orig", None) or error
        raise ConfigError(
            f"expected to read {origin_of(section)!r} of ingest source {section.name!r}, found {type(reason).__name__}: "
            f"{str(reason).strip()}; correct its url, its table or query, its key or its columns."
        ) from None  # the chain would show the parameters of the connection
    finally:
        engine.dispose()


def _engine(section: DatabaseSource) -> Engine:
    import sqlalchemy as sa

    try:
        assert section.url is not None, "the log of a factory has the factory's own, where it names none"
        url = sa.make_url(expand_environment(section.url))
    except ValueError as error:
        raise ConfigError(f"ingest source {section.name!r}: {error}.") from None
    except sa.exc.ArgumentError:
        raise ConfigError(
            f"expected a URL such as postgresql+psycopg://user:${{PASSWORD}}@host/database at ingest source "
            f"{section.name!r}, found none; correct its url."
        ) from None
    if url.get_backend_name() == "sqlite":
        path = _sqlite_file(url.database or "", section.name)
        return sa.create_engine("sqlite+pysqlite://", creator=lambda: _open_sqlite(path), poolclass=sa.NullPool)
    hosts = [host for host in (url.host, *_as_list(url.query.get("host"))) if host]
    for host in hosts:
        if host.startswith("/"):
            if not section.allow_private:
                raise ConfigError(
                    f"expected a public address at ingest source {section.name!r}, found a socket of this machine; if it "
                    "is meant, say allow_private: true."
                )
            continue
        check_address(host, url.port or 0, source=section.name, allow_private=section.allow_private)
    if not hosts and not section.allow_private:
        raise ConfigError(
            f"expected a host in the url of ingest source {section.name!r}, found none, which is this machine; if it is "
            "meant, say allow_private: true."
        )
    try:
        return sa.create_engine(url, poolclass=sa.NullPool)
    except ImportError as error:
        raise ConfigError(
            f"expected the driver of {url.drivername} for ingest source {section.name!r}, found none: {error}; install "
            "it (aifactory[postgres] for PostgreSQL)."
        ) from None


def _as_list(value: str | tuple[str, ...] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _sqlite_file(path: str, source: str) -> str:
    resolved = os.path.realpath(os.path.expanduser(path)) if path and path != ":memory:" else ""
    try:
        is_file = bool(resolved) and stat.S_ISREG(os.stat(resolved).st_mode)
    except OSError:
        is_file = False
    if not is_file:
        raise ConfigError(
            f"expected a file of SQLite at ingest source {source!r}, found none at {path!r}; correct its url."
        )
    return resolved


def _open_sqlite(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(f"file:{urllib.parse.quote(path)}?mode=ro", uri=True)
    connection.text_factory = _text
    connection.set_authorizer(_authorize)
    return connection


def _authorize(action: int, name: str | None, *_: str | None) -> int:
    """What a query may do: read, and nothing else; SQLAlchemy also asks for the isolation level."""
    is_allowed = action in _ALLOWED or (action == sqlite3.SQLITE_PRAGMA and name == "read_uncommitted")
    return sqlite3.SQLITE_OK if is_allowed else sqlite3.SQLITE_DENY


def _text(data: bytes) -> str | BrokenText:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return BrokenText(data)

"""Blocks: rows as they come out of a source, with the lines of the ledger that came between them.

A block holds at most about 16 MB of text. Which rows stand in one block depends on the piece alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from aifactory.ingest.columns import RAW_SCHEMA
from aifactory.records.rows import Rejected

MAX_BLOCK_BYTES = 16 << 20
"""Text in a block; one row alone may be longer."""
MAX_ROW_BYTES = 64 << 20
"""Longest row that is read, bytes; a longer one is a line of the ledger (`row_too_large`) with its beginning."""
HEAD_BYTES = 1000
"""So much the ledger keeps of a row that is too large."""
_FULL_BLOCK_BYTES = 3 << 20
_TEXTS = ("prompt", "text", "messages", "rejected")


class Raw(NamedTuple):
    """One row, as a source gives it: see RAW_SCHEMA."""

    prompt: str = ""
    text: str = ""
    messages: str = ""
    rejected: str = ""
    label: str = ""
    user: str = ""
    timestamp: str = ""
    weight: float = 1.0
    origin: str = ""
    """Where it comes from, if a column says so; "" for the file."""


class Problem(NamedTuple):
    """Why something is no row."""

    rule: str
    score: float
    detail: str


@dataclass(frozen=True, slots=True)
class Block:
    """Some of the rows of a piece, and what stood among them but is none."""

    rows: pa.Table
    """RAW_SCHEMA."""
    malformed: list[Rejected] = field(default_factory=list)


class BlockBuilder:
    """Gathers rows and tables of rows, and gives them out in blocks.

    What was added is taken by `full()`, block by block, as soon as there is enough of it, and by `rest()` at the end.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._tables: list[pa.Table] = []
        self._rows: list[tuple[str, int, Raw]] = []
        self._malformed: list[Rejected] = []
        self._bytes = 0

    def add_row(self, origin: str, position: int, row: Raw) -> None:
        self._rows.append((row.origin or origin, position, row))
        self._bytes += len(row.text) + len(row.prompt) + len(row.messages) + len(row.rejected)

    def add_table(self, rows: pa.Table, num_bytes: int) -> None:
        """Add a table of RAW_SCHEMA that holds so much text."""
        self._seal_rows()
        self._tables.append(rows)
        self._bytes += num_bytes

    def reject(self, origin: str, position: int, problem: Problem, text: str = "") -> None:
        self._malformed.append(
            Rejected(
                source=self._source,
                origin=origin,
                position=position,
                rule=problem.rule,
                score=problem.score,
                detail=problem.detail,
                text=text,
            )
        )
        self._bytes += len(text)

    def full(self) -> Iterator[Block]:
        """A block, if there is enough for one."""
        if self._bytes >= _FULL_BLOCK_BYTES:
            yield from self.rest()

    def rest(self) -> Iterator[Block]:
        """All that is there, if there is anything."""
        self._seal_rows()
        if not self._tables and not self._malformed:
            return
        rows = pa.concat_tables(self._tables) if self._tables else RAW_SCHEMA.empty_table()
        malformed, self._malformed = self._malformed, []
        self._tables, self._bytes = [], 0
        for part in _split(rows):
            yield Block(part, malformed)
            malformed = []

    def _seal_rows(self) -> None:
        if not self._rows:
            return
        fields = zip(*(row for _, _, row in self._rows), strict=True)
        columns = dict(zip(Raw._fields, map(list, fields), strict=True))
        columns["origin"] = [origin for origin, _, _ in self._rows]
        columns["position"] = [position for _, position, _ in self._rows]
        self._tables.append(pa.table([pa.array(columns[f.name], f.type) for f in RAW_SCHEMA], schema=RAW_SCHEMA))
        self._rows = []


def _split(rows: pa.Table) -> Iterator[pa.Table]:
    """A table in parts of at most so much text as a block may hold; always at least one."""
    size = text_bytes(rows)
    if size <= MAX_BLOCK_BYTES or rows.num_rows < 2:
        yield rows.combine_chunks()
        return
    half = rows.num_rows // 2
    yield from _split(rows.slice(0, half))
    yield from _split(rows.slice(half))


def text_bytes(rows: pa.Table) -> int:
    """Bytes of text in a table of RAW_SCHEMA."""
    return sum(pc.sum(pc.binary_length(rows[name])).as_py() or 0 for name in _TEXTS)


def same_texts(text: str, count: int) -> pa.Array:
    """The same text so many times."""
    return pa.repeat(pa.scalar(text, pa.string()), count)


def raw_table(origin: pa.Array | str, positions: pa.Array, columns: dict[str, pa.Array]) -> pa.Table:
    """A table of RAW_SCHEMA from those of its columns that are not the same in every row."""
    count = len(positions)
    found: list[pa.Array] = []
    for name in RAW_SCHEMA.names:
        if name == "origin":
            found.append(same_texts(origin, count) if isinstance(origin, str) else origin)
        elif name == "position":
            found.append(positions)
        elif name in columns:
            found.append(columns[name])
        elif name == "weight":
            found.append(pa.repeat(pa.scalar(1.0), count))
        else:
            found.append(same_texts("", count))
    return pa.table(found, schema=RAW_SCHEMA)


def head_of(data: bytes) -> str:
    """The beginning of a row that is too large, as text."""
    return data[:HEAD_BYTES].decode("utf-8", "backslashreplace")


def describe_names(names: Sequence[str]) -> str:
    """The first of the names that were found instead of one that was looked for."""
    return str(sorted(names)[:20])

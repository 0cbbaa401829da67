"""Tables: what rows from CSV, Parquet and Arrow streams have in common.

Columns pass through Arrow; only a row that is not plain (null, no UTF-8, of another type) is looked at by itself.
Positions count records from the beginning of the piece's part of the file.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from aifactory.config.sources import Columns
from aifactory.ingest.blocks import BlockBuilder, Problem, raw_table, text_bytes
from aifactory.ingest.cuts import MIN_BYTES
from aifactory.ingest.shapes import BrokenText, Shape

UNREADABLE = -1
"""Where a cut ends that is a whole file because nothing could be made of it; its digest is that of the bytes."""
RUN_BYTES = 2 * MIN_BYTES
"""A cut of a file has so many bytes or a little more."""
BROKEN_TABLE = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, MemoryError)
"""What Arrow raises at a damaged file."""


class ChangedError(Exception):
    """A part of a file is no longer what was listed."""


def add_table(
    table: pa.Table | pa.RecordBatch,
    positions_N: npt.NDArray[np.int64],
    shape: Shape,
    origin: str,
    builder: BlockBuilder,
) -> None:
    """Add the rows of a table that has every required column."""
    mapped = shape.table(table)
    is_plain_N = mapped.is_plain_N
    if is_plain_N.any():
        where = origin if mapped.origin is None else pc.if_else(pc.equal(mapped.origin, ""), origin, mapped.origin)
        rows = raw_table(where, pa.array(positions_N[is_plain_N]), mapped.columns)
        builder.add_table(rows, text_bytes(rows))
    if is_plain_N.all():
        return
    odd = np.flatnonzero(~is_plain_N)
    for position, values in zip(positions_N[odd].tolist(), _values_of(table, odd), strict=True):
        row = shape.row(values)
        if not isinstance(row, Problem):
            builder.add_row(origin, position, row)
            continue
        broken = next((value for value in values.values() if isinstance(value, BrokenText)), None)
        text = str(values) if broken is None else broken.decode("utf-8", "backslashreplace")
        builder.reject(origin, position, row, text)


def _values_of(table: pa.Table | pa.RecordBatch, rows: npt.NDArray[np.int64]) -> Iterator[dict[str, object]]:
    """Some rows of a table as Python has them."""
    for row in rows.tolist():
        one = table.slice(row, 1)
        yield {name: _value_of(one.column(name)) for name in table.schema.names}


def _value_of(column: pa.Array | pa.ChunkedArray) -> object:
    """The only value of a column."""
    kind = column.type
    if pa.types.is_timestamp(kind):  # Python's times end at microseconds
        column = column.cast(pa.timestamp("us", kind.tz), safe=False)
    elif pa.types.is_time64(kind):
        column = column.cast(pa.time64("us"), safe=False)
    try:
        return column.to_pylist()[0]
    except UnicodeDecodeError as error:
        return BrokenText(error.object)
    except (ValueError, OverflowError, pa.ArrowException):
        return object()  # a time that Python has none for


def no_column(names: Sequence[str], columns: Columns) -> Problem | None:
    """What is wrong with the names of a table's columns."""
    for name in columns.asked:
        count = names.count(name)
        if count > 1:
            return Problem("missing_column", 1.0, f"expected one column {name!r}, found {count}")
        if not count and name in columns.required:
            return Problem("missing_column", 1.0, f"no {name!r} among {list(names[:20])}")
    return None


def digest_of_file(file: IO[bytes]) -> str:
    """SHA-256 of a whole file."""
    file.seek(0)
    state = hashlib.sha256()
    while block := file.read(1 << 20):
        state.update(block)
    return state.hexdigest()


def read_at(file: IO[bytes], start: int, length: int) -> bytes:
    """So many bytes of a file.

    Raises   ChangedError if they are not there.
    """
    file.seek(start)
    parts: list[bytes] = []
    while length:
        part = file.read(min(length, 1 << 30))
        if not part:
            raise ChangedError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


class RandomFile(io.RawIOBase):
    """A file of which Arrow reads at random."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._num_bytes}[whence]
        self._at = max(0, base + offset)
        return self._at


class WholeFile(RandomFile):
    """A file that stays open when Arrow closes it."""

    def __init__(self, file: IO[bytes], num_bytes: int) -> None:
        super().__init__(num_bytes)
        self._file = file

    def read(self, size: int = -1, /) -> bytes:
        self._file.seek(self._at)
        data = self._file.read(size)
        self._at += len(data)
        return data

"""JSON lines: rows from lines, each of which is an object.

What holds is `values_of_line`, line by line. Where a block of lines is plain, Arrow reads it as a whole, several times
as fast; a block is plain if every line of it is an object that stands alone, nothing in it is nested deeply, all of it is
UTF-8, and every column has the type that it has in the first line. Whatever Arrow would read in another way than line by
line, or where it is in doubt, makes the block not plain.

Blank lines are no rows; they count. A byte order mark before the first line is no part of it. Of a key that stands twice
in an object the last holds.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import orjson
import pyarrow as pa

from aifactory.ingest.blocks import (
    HEAD_BYTES,
    MAX_ROW_BYTES,
    BlockBuilder,
    Problem,
    Raw,
    head_of,
    raw_table,
    text_bytes,
)
from aifactory.ingest.reach import ArchiveTooLargeError
from aifactory.ingest.shapes import Shape

BROKEN_FILE = (OSError, EOFError, zlib.error)
"""What reading a damaged file raises."""
_WORK_BYTES = 2 << 20
_MAX_OPENINGS = 900
"""Most brackets that a line of a plain block opens; parsers that call themselves end at about a thousand."""
_EXACT_FLOAT = 2.0**53


def read_json_lines(blocks: Iterator[bytes], shape: Shape, origin: str, builder: BlockBuilder) -> Iterator[None]:
    """Add the rows of a file, or of a part of one, that comes in blocks; yields after every few."""
    position = 0
    try:
        for lines in lines_of(blocks):
            if isinstance(lines, LongLine):
                builder.reject(origin, position, lines.problem(), head_of(lines.head))
                position += 1
            else:
                position += _add_lines(lines, shape, origin, position, builder)
            yield
    except ArchiveTooLargeError as error:
        builder.reject(origin, position, Problem("archive_too_large", error.ratio, str(error)))
    except BROKEN_FILE as error:
        builder.reject(origin, position, Problem("unreadable_file", 1.0, f"{type(error).__name__}: {error}"))


# ── lines ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class LongLine:
    """A line that is too long to be read."""

    head: bytes
    num_bytes: int

    def problem(self) -> Problem:
        return Problem("row_too_large", float(self.num_bytes), f"{self.num_bytes} bytes, more than {MAX_ROW_BYTES}")


def lines_of(blocks: Iterator[bytes]) -> Iterator[bytes | LongLine]:
    """Blocks of bytes as blocks of whole lines of about 2 MB; only the last line of all may have no end.

    A line that is longer than a row may be comes alone, and is never held as a whole. Where the blocks end in an error
    the whole lines before it still come.
    """
    ended: Exception | None = None
    waiting: list[bytes] = []
    size = 0
    head, skipped = b"", 0  # of a line that is being skipped
    while True:
        try:
            block = next(blocks, None)
        except (ArchiveTooLargeError, *BROKEN_FILE) as error:
            ended, block = error, None
        if block is None:
            break
        if skipped:
            end = block.find(b"\n")
            if end < 0:
                skipped += len(block)
                continue
            yield LongLine(head, skipped + end)
            head, skipped, block = b"", 0, block[end + 1 :]
        waiting.append(block)
        size += len(block)
        if size < _WORK_BYTES:
            continue
        data = b"".join(waiting)
        end = data.rfind(b"\n") + 1
        if end:
            yield from _without_long_lines(data[:end])
        elif size > MAX_ROW_BYTES:
            head, skipped, end = data[:HEAD_BYTES], size, size
        waiting, size = [data[end:]], len(data) - end
    data = b"".join(waiting)
    if ended is not None:
        data = data[: data.rfind(b"\n") + 1]
    elif skipped:
        yield LongLine(head, skipped)
    if data:
        yield from _without_long_lines(data)
    if ended is not None:
        raise ended


def _without_long_lines(data: bytes) -> Iterator[bytes | LongLine]:
    if len(data) <= MAX_ROW_BYTES:
        yield data
        return
    for line in io.BytesIO(data):
        length = len(line) - line.endswith(b"\n")
        yield line if length <= MAX_ROW_BYTES else LongLine(line[:HEAD_BYTES], length)


def _add_lines(data: bytes, shape: Shape, origin: str, position: int, builder: BlockBuilder) -> int:
    """Add the rows of some lines; how many lines there were."""
    if position == 0:
        data = data.removeprefix(b"\xef\xbb\xbf")
    rows = plain_rows(data, shape, origin, position)
    if rows is not None:
        builder.add_table(rows, text_bytes(rows))
        return int(rows.num_rows)
    for number, line in enumerate(io.BytesIO(data)):
        if not line.strip():
            continue
        row = row_of_line(line, shape)
        if isinstance(row, Problem):
            text = line.rstrip(b"\r\n").decode("utf-8", "backslashreplace")
            builder.reject(origin, position + number, row, text)
        else:
            builder.add_row(origin, position + number, row)
    return data.count(b"\n") + (not data.endswith(b"\n"))


# ── line by line ──────────────────────────────────────────────────────────────────────────────────────────────────────


def row_of_line(line: bytes, shape: Shape) -> Raw | Problem:
    """The row that a line is."""
    values = values_of_line(line, shape.columns.asked)
    return values if isinstance(values, Problem) else shape.row(values)


def values_of_line(line: bytes, asked: tuple[str, ...] = ()) -> dict[str, object] | Problem:
    """The object that a line is. Numbers in the columns that are asked for are exact."""
    try:
        values = orjson.loads(line)
        if isinstance(values, dict) and any(
            isinstance(value := values.get(name), float) and abs(value) >= _EXACT_FLOAT for name in asked
        ):
            values = _loads(line)
    except orjson.JSONDecodeError:  # it is stricter than the standard library: no NaN, no lone surrogate
        try:
            values = _loads(line.rstrip(b"\r\n"))
        except UnicodeDecodeError as error:
            return Problem("invalid_utf8", float(error.start), f"{error.reason} at byte {error.start}")
        except (ValueError, RecursionError) as error:
            return Problem("invalid_json", 1.0, str(error))
    if not isinstance(values, dict):
        return Problem("invalid_json", 1.0, f"expected an object, found {type(values).__name__}")
    return values


def _loads(line: bytes) -> object:
    return json.loads(line.decode(), parse_int=_number)


def _number(digits: str) -> int | float:
    """A whole number; one that has more digits than Python converts is as good as infinite."""
    return int(digits) if len(digits) < 4000 else float(digits)


# ── a block at once ───────────────────────────────────────────────────────────────────────────────────────────────────


def plain_rows(data: bytes, shape: Shape, origin: str, position: int) -> pa.Table | None:
    """The rows of a block of lines of which the first is `position`; None if the block is not plain."""
    count = _count_plain_lines(data)
    schema = _schema_of(data[: data.find(b"\n") + 1] or data, shape) if count else None
    if schema is None:
        return None
    from pyarrow import json as pajson

    try:
        table = pajson.read_json(
            pa.BufferReader(data),
            read_options=pajson.ReadOptions(use_threads=False, block_size=len(data) + 1),
            parse_options=pajson.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except pa.ArrowException:
        return None
    # As many objects as lines, of which each begins and ends one: none of them holds two.
    if table.num_rows != count:
        return None
    mapped = shape.table(table)
    if not mapped.is_plain_N.all():
        return None
    where = origin if mapped.origin is None else _or_file(mapped.origin, origin)
    return raw_table(where, pa.array(np.arange(position, position + count)), mapped.columns)


def _or_file(origins: pa.Array, file: str) -> pa.Array:
    import pyarrow.compute as pc

    return pc.if_else(pc.equal(origins, ""), file, origins)


def _count_plain_lines(data: bytes) -> int:
    """The lines of a block; 0 if one of them is blank, does not begin and end an object, or may be nested deeply."""
    if b"\0" in data:  # Arrow's parser ends there
        return 0
    data_B = np.frombuffer(data, np.uint8)
    ends_L = np.flatnonzero(data_B == 0x0A)
    if not data.endswith(b"\n"):
        ends_L = np.append(ends_L, len(data))
    starts_L = np.concatenate(([0], ends_L[:-1] + 1))
    lengths_L = ends_L - starts_L
    if lengths_L.min() < 2 or not (data_B[starts_L] == ord("{")).all():
        return 0
    last_L = data_B[ends_L - 1]
    if not (last_L == ord("}")).all() and not (
        ((last_L == ord("}")) | ((last_L == ord("\r")) & (data_B[ends_L - 2] == ord("}")))).all()
    ):
        return 0
    if lengths_L.max() > _MAX_OPENINGS:
        openings = np.flatnonzero((data_B | 0x20) == ord("{"))  # also "["
        spans = openings[_MAX_OPENINGS:] - openings[: max(0, len(openings) - _MAX_OPENINGS)]
        # Unless so many stand so close together, they do not stand in one line.
        if len(openings) > _MAX_OPENINGS and spans.min() <= lengths_L.max():
            before_L = np.searchsorted(openings, np.append(starts_L, len(data)))
            if np.diff(before_L).max() > _MAX_OPENINGS:
                return 0
    # Arrow looks at the texts that are asked for; a line is read as a whole.
    return len(ends_L) if is_utf8(data) else 0


def is_utf8(data: bytes) -> bool:
    """Whether some bytes are UTF-8; several times as fast as decoding them."""
    offsets = pa.py_buffer(np.array([0, len(data)], np.int64))
    try:
        pa.LargeStringArray.from_buffers(1, offsets, pa.py_buffer(data)).validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _schema_of(line: bytes, shape: Shape) -> pa.Schema | None:
    """The types of the columns, as the first line has them; None if they are not plain."""
    values = values_of_line(line)
    if isinstance(values, Problem):
        return None
    columns = shape.columns
    fields: dict[str, pa.DataType | None] = {}
    for name in columns.required:
        fields[name] = _spoken_type(values.get(name), columns.turns)
    for name in columns.optional:
        fields[name] = pa.float64() if name == columns.weight else _optional_type(values.get(name))
    return None if None in fields.values() else pa.schema(list(fields.items()))


def _spoken_type(value: object, style: str) -> pa.DataType | None:
    if isinstance(value, str):
        return pa.string()
    if isinstance(value, list):
        names = ("role", "content") if style == "openai" else ("from", "value")
        return pa.list_(pa.struct([(name, pa.string()) for name in names]))
    return None


def _optional_type(value: object) -> pa.DataType | None:
    """The type of a label, a user, a time. A number with a fraction is written as Python writes it, not as Arrow does."""
    match value:
        case None | str():
            return pa.string()
        case bool():
            return pa.bool_()
        case int():
            return pa.int64()
        case _:
            return None

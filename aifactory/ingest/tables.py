"""Tables: rows from CSV, from Parquet, and from the Arrow streams that the library `datasets` saves.

Columns pass through Arrow; only a row that is not plain (null, no UTF-8, of another type) is looked at by itself.
Parquet is cut at row groups and Arrow streams at record batches, and of Parquet only the columns that are asked for are
read and hashed.

Positions count records from the beginning of the piece's part of the file. CSV is what Arrow's reader takes it for: RFC
4180, with blank lines left out, and a record with too many or too few values is a line of the ledger (`wrong_columns`).
"""

from __future__ import annotations

import codecs
import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from aifactory.config.sources import Columns, CsvSource
from aifactory.ingest.blocks import BlockBuilder, Problem, raw_table, text_bytes
from aifactory.ingest.cuts import MIN_BYTES, Cut
from aifactory.ingest.json_lines import BROKEN_FILE, is_utf8
from aifactory.ingest.parquet_footer import read_footer
from aifactory.ingest.reach import ArchiveTooLargeError, BlockReader, packing_of
from aifactory.ingest.shapes import BrokenText, Shape
from aifactory.records.identity import canonical_json

if TYPE_CHECKING:
    import pyarrow.parquet as pq

UNREADABLE = -1
"""Where a cut ends that is a whole file because nothing could be made of it; its digest is that of the bytes."""
_CSV_BLOCK_BYTES = 16 << 20
"""Longest record of CSV, bytes."""
_HEADER_BYTES = 1 << 20
_BATCH_BYTES = 4 << 20
_MAX_BATCH_BYTES = 64 << 20
_MAX_BATCH_ROWS = 16_384
_RUN_BYTES = 2 * MIN_BYTES


class ChangedError(Exception):
    """A part of a file is no longer what was listed."""


def _add_table(
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


def _no_column(names: Sequence[str], columns: Columns) -> Problem | None:
    """What is wrong with the names of a table's columns."""
    for name in columns.asked:
        count = names.count(name)
        if count > 1:
            return Problem("missing_column", 1.0, f"expected one column {name!r}, found {count}")
        if not count and name in columns.required:
            return Problem("missing_column", 1.0, f"no {name!r} among {list(names[:20])}")
    return None


# ── CSV ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_csv(
    blocks: Iterator[bytes], header: bytes, section: CsvSource, name: str, origin: str, builder: BlockBuilder
) -> Iterator[None]:
    """Add the rows of the file `name`, or of a part of it after its first that is preceded by `header`."""
    from pyarrow import csv as pacsv

    shape = Shape(section.columns)
    position = 0
    wrong: list[tuple[int, Problem, str]] = []
    bad: list[int] = []
    text = _MarkedText()
    has_header = not section.column_names

    def reject(row: pacsv.InvalidRow) -> str:
        detail = f"expected {row.expected_columns} values, found {row.actual_columns}"
        number = row.number - 1 - has_header
        bad.append(number)
        record = text.restore(row.text).decode("utf-8", "backslashreplace")
        wrong.append((number, Problem("wrong_columns", float(row.actual_columns), detail), record))
        return "skip"

    is_tsv = ".tsv" in os.path.splitext(name if packing_of(name) is None else os.path.splitext(name)[0])[1].lower()
    parse = pacsv.ParseOptions(
        delimiter=section.delimiter or ("\t" if is_tsv else ","),
        quote_char=section.quote or False,
        escape_char=section.escape or False,
        newlines_in_values=section.multiline,
        invalid_row_handler=reject,
    )
    try:
        blocks = text.mark(_chain(header, blocks))
        start = next(blocks, b"")
        if not start.strip(b"\r\n"):
            return
        names = list(section.column_names) or _csv_names(start, parse)
        wrong.clear()
        bad.clear()
        problem = _no_column(names, section.columns)
        if problem is not None:
            builder.reject(origin, 0, problem)
            return
        reader = pacsv.open_csv(
            BlockReader(_chain(start, blocks)),
            read_options=pacsv.ReadOptions(
                use_threads=False, block_size=_CSV_BLOCK_BYTES, column_names=list(section.column_names) or None
            ),
            parse_options=parse,
            convert_options=pacsv.ConvertOptions(
                include_columns=[name for name in section.columns.asked if name in names],
                column_types={name: pa.string() for name in names},
                strings_can_be_null=False,
                check_utf8=False,  # row by row, later
            ),
        )
        for batch in reader:
            # Arrow reads ahead: some of the bad ones may come after this batch.
            numbers = np.arange(position, position + batch.num_rows + len(bad))
            positions_N = numbers[~np.isin(numbers, bad)][: batch.num_rows]
            _add_table(text.restore_batch(batch), positions_N, shape, origin, builder)
            position = int(positions_N[-1]) + 1 if batch.num_rows else position
            bad[:] = [number for number in bad if number >= position]
            yield from _add_wrong(wrong, origin, builder)
    except ArchiveTooLargeError as error:
        builder.reject(origin, position, Problem("archive_too_large", error.ratio, str(error)))
    except (pa.ArrowException, UnicodeDecodeError, *BROKEN_FILE) as error:
        builder.reject(origin, position, Problem("unreadable_file", 1.0, f"{type(error).__name__}: {error}"))
    yield from _add_wrong(wrong, origin, builder)


def _add_wrong(wrong: list[tuple[int, Problem, str]], origin: str, builder: BlockBuilder) -> Iterator[None]:
    for number, problem, text in wrong:
        builder.reject(origin, number, problem, text)
    wrong.clear()
    yield


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from rest


_MARK = "\U0010ffff"
_FIRST_MARKED = 0xE000
_MARKED = re.compile(_MARK.encode() + b"(\xee[\x80-\x83][\x80-\xbf])")


class _MarkedText:
    """A text of which the bytes that are no UTF-8 are marked, so that Arrow's reader can hand out every record.

    Such a byte becomes the noncharacter U+10FFFF and a character of the private use area that says which byte it was;
    so do the four bytes of a U+10FFFF that stands in the text itself, and nothing that was not marked looks marked.
    """

    def __init__(self) -> None:
        self._is_marked = False

    def mark(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        """The same text in UTF-8."""
        waiting = b""
        for block in blocks:
            data = waiting + block
            end = _end_of_characters(data)
            waiting = data[end:]
            yield self._marked(data[:end])
        yield self._marked(waiting)

    def restore(self, text: str) -> bytes:
        """What was there before."""
        return _MARKED.sub(lambda found: bytes([ord(found[1].decode()) - _FIRST_MARKED]), text.encode())

    def restore_batch(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """What was there before, in columns of texts that may be no UTF-8."""
        if not self._is_marked:
            return batch
        columns = [
            pa.array([self.restore(text) for text in column.to_pylist()], pa.binary()).view(pa.string())
            for column in batch.columns
        ]
        return pa.RecordBatch.from_arrays(columns, batch.schema.names)

    def _marked(self, data: bytes) -> bytes:
        mark = _MARK.encode()
        if mark not in data and is_utf8(data):
            return data
        self._is_marked = True
        parts = (part.decode("utf-8", "aifactory-spell") for part in data.split(mark))
        return _spell(mark).join(parts).encode()


def _spell(data: bytes) -> str:
    return "".join(_MARK + chr(_FIRST_MARKED + byte) for byte in data)


def _spell_broken(error: UnicodeError) -> tuple[str, int]:
    """What stands for bytes that are no UTF-8, and where reading goes on: a handler of codecs."""
    assert isinstance(error, UnicodeDecodeError)
    return _spell(error.object[error.start : error.end]), error.end


codecs.register_error("aifactory-spell", _spell_broken)


def _end_of_characters(data: bytes) -> int:
    """Where the last character of some UTF-8 ends that is there as a whole."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            length = 1 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if length > back else len(data)
    return len(data)


def _csv_names(start: bytes, parse: object) -> list[str]:
    from pyarrow import csv as pacsv

    head = start[:_HEADER_BYTES]
    reader = pacsv.open_csv(
        pa.BufferReader(head),
        read_options=pacsv.ReadOptions(use_threads=False, block_size=len(head) + 1),
        parse_options=parse,
        convert_options=pacsv.ConvertOptions(check_utf8=False),
    )
    return list(reader.schema.names)


def csv_header(file: IO[bytes]) -> bytes:
    """The first line of a file that is cut at lines."""
    file.seek(0)
    data = b""
    while b"\n" not in data:
        more = file.read(_HEADER_BYTES)
        if not more:
            return data
        data += more
    return data[: data.find(b"\n") + 1]


# ── Parquet ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def cut_parquet(file: IO[bytes], num_bytes: int, columns: Columns) -> list[Cut]:
    """The runs of row groups of a file."""
    try:
        layout = _Layout(file, num_bytes, columns)
    except _BROKEN_TABLE:
        return [Cut(0, UNREADABLE, 0, num_bytes, digest_of_file(file))]
    cuts: list[Cut] = []
    start = first = rows = size = 0
    state = layout.state()
    for group in range(layout.num_groups):
        state.update(layout.digest(group, layout.load(file, group)))
        rows += layout.num_rows(group)
        size += layout.num_bytes(group)
        if size >= _RUN_BYTES and group + 1 < layout.num_groups:
            cuts.append(Cut(start, group + 1, first, size, state.hexdigest()))
            start, first, size, state = group + 1, rows, 0, layout.state()
    return [*cuts, Cut(start, layout.num_groups, first, size, state.hexdigest())]


def read_parquet(
    file: IO[bytes], start: int, stop: int, sha256: str | None, columns: Columns, origin: str, builder: BlockBuilder
) -> Iterator[None]:
    """Add the rows of a run of row groups; one that is damaged harms no other.

    Raises   ChangedError if they are not what `sha256` says; None: that is known already.
    """
    try:
        layout = _Layout(file, file.seek(0, os.SEEK_END), columns)
    except _BROKEN_TABLE as error:
        builder.reject(origin, 0, Problem("unreadable_file", 1.0, f"{type(error).__name__}: {error}"))
        if stop != UNREADABLE or (sha256 is not None and digest_of_file(file) != sha256):
            raise ChangedError from error
        return
    if not start <= stop <= layout.num_groups:
        raise ChangedError
    problem = _no_column(layout.names, columns)
    if problem is not None:
        builder.reject(origin, 0, problem)
    shape = Shape(columns)
    state = layout.state()
    first = 0
    for group in range(start, stop):
        loaded = layout.load(file, group)
        if sha256 is not None:
            state.update(layout.digest(group, loaded))
        position = first
        try:
            for batch in layout.batches(group, loaded) if problem is None else ():
                positions_N = np.arange(position, position + batch.num_rows)
                _add_table(batch, positions_N, shape, origin, builder)
                position += batch.num_rows
                yield
        except _BROKEN_TABLE as error:
            builder.reject(origin, position, Problem("unreadable_file", 1.0, f"{type(error).__name__}: {error}"))
        first += layout.num_rows(group)
    if sha256 is not None and state.hexdigest() != sha256:
        raise ChangedError


def digest_of_file(file: IO[bytes]) -> str:
    """SHA-256 of a whole file."""
    file.seek(0)
    state = hashlib.sha256()
    while block := file.read(1 << 20):
        state.update(block)
    return state.hexdigest()


_BROKEN_TABLE = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, MemoryError)
"""What Arrow raises at a damaged file."""

_Loaded = list[tuple[int, bytes]]
"""Ranges of a file: where each begins, and its bytes."""


class _Layout:
    """Where the columns that are asked for lie in a Parquet file.

    Raises   one of _BROKEN_TABLE if it has no footer that makes sense.
    """

    def __init__(self, file: IO[bytes], num_bytes: int, columns: Columns) -> None:
        import pyarrow.parquet as pq

        footer = read_footer(file, num_bytes)
        opened = pq.ParquetFile(pa.PythonFile(_Whole(file, num_bytes), mode="r"), pre_buffer=False)
        # Handed on as it is: looking into it may end the process where it is damaged.
        self._metadata = opened.metadata
        self._num_bytes = num_bytes
        self.names = [name for name, _ in footer.columns]
        self._asked = [name for name in columns.asked if name in self.names]
        self._types = sorted([name, kind] for name, kind in footer.columns if name in self._asked)
        self.num_groups = len(footer.row_groups)
        self._rows = [group.num_rows for group in footer.row_groups]
        self._chunks = [
            sorted((chunk for chunk in group.chunks if chunk.path[0] in self._asked), key=lambda chunk: chunk.start)
            for group in footer.row_groups
        ]

    def num_rows(self, group: int) -> int:
        """Records of a row group, as the file says."""
        return self._rows[group]

    def num_bytes(self, group: int) -> int:
        """Bytes of a row group's columns that are asked for, unpacked, as the file says."""
        return sum(chunk.num_bytes_unpacked for chunk in self._chunks[group])

    def state(self) -> Any:
        """The hash of a run before its first row group."""
        return hashlib.sha256(canonical_json(self._types).encode())

    def digest(self, group: int, loaded: _Loaded) -> bytes:
        """The hash of what is asked for of a row group."""
        told = [[list(chunk.path), list(chunk.identity)] for chunk in self._chunks[group]]
        state = hashlib.sha256(canonical_json([self._rows[group], told]).encode())
        for _, data in loaded:
            state.update(data)
        return state.digest()

    def load(self, file: IO[bytes], group: int) -> _Loaded:
        """The bytes of the columns that are asked for."""
        return [(chunk.start, _read_at(file, chunk.start, chunk.num_bytes)) for chunk in self._chunks[group]]

    def batches(self, group: int, loaded: _Loaded) -> Iterator[pa.RecordBatch]:
        """The rows of a row group, a few MB at a time."""
        rows = self._rows[group] * _BATCH_BYTES // max(1, self.num_bytes(group))
        rows = max(1, min(_MAX_BATCH_ROWS, rows))
        longest = self._longest_entry(group, loaded)
        if longest * rows > _MAX_BATCH_BYTES:  # a dictionary says a long text over and over in a few bytes
            rows = max(1, _MAX_BATCH_BYTES // longest)
        opened = self._open(loaded)
        yield from opened.iter_batches(row_groups=[group], columns=self._asked, batch_size=rows, use_threads=False)

    def _longest_entry(self, group: int, loaded: _Loaded) -> int:
        """Bytes of the longest text in the dictionaries of a row group; 0 where there are none."""
        longest = 0
        for chunk in self._chunks[group]:
            if not chunk.is_text or not chunk.has_dictionary:
                continue
            path = ".".join(chunk.path)
            opened = self._open(loaded, read_dictionary=[path])
            batch = next(opened.iter_batches(row_groups=[group], columns=[path], batch_size=1, use_threads=False), None)
            array = None if batch is None else batch.column(0)
            while array is not None and not pa.types.is_dictionary(array.type):
                nested = pa.types.is_list(array.type) or pa.types.is_large_list(array.type)
                struct = pa.types.is_struct(array.type) and array.type.num_fields
                array = array.values if nested else array.field(0) if struct else None
            if array is not None:
                longest = max(longest, pc.max(pc.binary_length(array.dictionary)).as_py() or 0)
        return longest

    def _open(self, loaded: _Loaded, read_dictionary: list[str] | None = None) -> pq.ParquetFile:
        import pyarrow.parquet as pq

        window = pa.PythonFile(_Windows(loaded, self._num_bytes), mode="r")
        return pq.ParquetFile(window, metadata=self._metadata, read_dictionary=read_dictionary, pre_buffer=False)


def _read_at(file: IO[bytes], start: int, length: int) -> bytes:
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


class _Random(io.RawIOBase):
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


class _Whole(_Random):
    """A file that stays open when Arrow closes it."""

    def __init__(self, file: IO[bytes], num_bytes: int) -> None:
        super().__init__(num_bytes)
        self._file = file

    def read(self, size: int = -1, /) -> bytes:
        self._file.seek(self._at)
        data = self._file.read(size)
        self._at += len(data)
        return data


class _Windows(_Random):
    """Some ranges of a file, in memory; what lies outside them was not listed, and is not there."""

    def __init__(self, loaded: _Loaded, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self._loaded = loaded

    def read(self, size: int = -1, /) -> bytes:
        for start, data in self._loaded:
            inside = self._at - start
            if 0 <= inside < len(data):
                part = data[inside : inside + size] if size >= 0 else data[inside:]
                self._at += len(part)
                return part
        raise OSError(f"nothing was listed at byte {self._at}")


# ── Arrow streams ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Message:
    start: int
    stop: int
    kind: str
    num_rows: int


def cut_arrow(file: IO[bytes], num_bytes: int) -> list[Cut]:
    """The runs of record batches of a stream."""
    try:
        messages = list(_messages(file, num_bytes))
        if not messages or messages[0].kind != "schema":
            raise ValueError("no schema at the beginning")
    except _BROKEN_TABLE:
        return [Cut(0, UNREADABLE, 0, num_bytes, digest_of_file(file))]
    schema, batches = messages[0], messages[1:]
    if any(message.kind != "record batch" for message in batches):  # dictionaries hold for all that follows
        return [Cut(0, num_bytes, 0, num_bytes, digest_of_file(file))]
    head = _read_at(file, schema.start, schema.stop - schema.start)
    cuts: list[Cut] = []
    start, first, rows = schema.stop, 0, 0
    for number, message in enumerate(batches):
        rows += message.num_rows
        if message.stop - start >= _RUN_BYTES or number + 1 == len(batches):
            data = _read_at(file, start, message.stop - start)
            digest = hashlib.sha256(head + data).hexdigest()
            cuts.append(Cut(start, message.stop, first, len(data), digest))
            start, first = message.stop, rows
    return cuts or [Cut(schema.stop, schema.stop, 0, 0, hashlib.sha256(head).hexdigest())]


def read_arrow(
    file: IO[bytes], start: int, stop: int, sha256: str | None, columns: Columns, origin: str, builder: BlockBuilder
) -> Iterator[None]:
    """Add the rows of a run of record batches.

    Raises   ChangedError if they are not what `sha256` says; None: that is known already.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    position = 0
    try:
        if stop == UNREADABLE or start == 0:
            whole = _read_at(file, 0, num_bytes)
        else:
            schema = next(_messages(file, num_bytes), None)
            if schema is None or schema.kind != "schema":
                raise ChangedError
            whole = _read_at(file, 0, schema.stop) + _read_at(file, start, stop - start)
        if sha256 is not None and hashlib.sha256(whole).hexdigest() != sha256:
            raise ChangedError
        reader = pa.ipc.open_stream(pa.BufferReader(whole))
        problem = _no_column(list(reader.schema.names), columns)
        if problem is not None:
            builder.reject(origin, 0, problem)
            return
        shape = Shape(columns)
        asked = [name for name in columns.asked if name in reader.schema.names]
        for batch in reader:
            some = batch.select(asked)
            _check_structure(some)
            _add_table(some, np.arange(position, position + some.num_rows), shape, origin, builder)
            position += some.num_rows
            yield
        if stop == UNREADABLE:
            raise pa.ArrowInvalid("the stream can't be cut")
    except _BROKEN_TABLE as error:
        builder.reject(origin, position, Problem("unreadable_file", 1.0, f"{type(error).__name__}: {error}"))


def _messages(file: IO[bytes], num_bytes: int) -> Iterator[_Message]:
    """The messages of a stream, up to its end."""
    whole = _Whole(file, num_bytes)
    whole.seek(0)
    reader = pa.ipc.MessageReader.open_stream(pa.PythonFile(whole, mode="r"))
    schema = None
    start = 0
    while True:
        try:
            message = reader.read_next_message()
        except StopIteration:
            return
        rows = 0
        if message.type == "schema":
            schema = pa.ipc.read_schema(message)
        elif message.type != "record batch":
            schema = None  # dictionaries, without which a batch makes no sense
        elif schema is not None:
            rows = pa.ipc.read_record_batch(message, schema).num_rows
        yield _Message(start, whole.tell(), message.type, rows)
        start = whole.tell()


def _check_structure(batch: pa.RecordBatch) -> None:
    """Refuse a batch whose offsets lead outside it.

    Raises   ArrowInvalid. Texts that are no UTF-8 are left to whoever looks at them row by row.
    """
    for column in batch.columns:
        if pa.types.is_string(column.type):
            column.view(pa.binary()).validate(full=True)
        elif pa.types.is_large_string(column.type):
            column.view(pa.large_binary()).validate(full=True)
        else:
            column.validate(full=True)

"""CSV: what Arrow's reader takes for it: RFC 4180, with blank lines left out; a record with too many or too few values is a
line of the ledger (`wrong_columns`).
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator
from typing import IO

import numpy as np
import pyarrow as pa

from aifactory.config.sources import CsvSource
from aifactory.ingest.blocks import BlockBuilder, Problem
from aifactory.ingest.json_lines import BROKEN_FILE, is_utf8
from aifactory.ingest.reach import ArchiveTooLargeError, BlockReader, packing_of
from aifactory.ingest.shapes import Shape
from aifactory.ingest.tables import add_table, no_column

_CSV_BLOCK_BYTES = 16 << 20
"""Longest record of CSV, bytes."""
_HEADER_BYTES = 1 << 20


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
        problem = no_column(names, section.columns)
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
            add_table(text.restore_batch(batch), positions_N, shape, origin, builder)
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

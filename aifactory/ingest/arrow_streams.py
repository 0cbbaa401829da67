"""Arrow streams, which the library `datasets` saves: cut at record batches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
import pyarrow as pa

from aifactory.config.sources import Columns
from aifactory.ingest.blocks import BlockBuilder, Problem
from aifactory.ingest.cuts import Cut
from aifactory.ingest.shapes import Shape
from aifactory.ingest.tables import (
    BROKEN_TABLE,
    RUN_BYTES,
    UNREADABLE,
    ChangedError,
    WholeFile,
    add_table,
    digest_of_file,
    no_column,
    read_at,
)


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
    except BROKEN_TABLE:
        return [Cut(0, UNREADABLE, 0, num_bytes, digest_of_file(file))]
    schema, batches = messages[0], messages[1:]
    if any(message.kind != "record batch" for message in batches):  # dictionaries hold for all that follows
        return [Cut(0, num_bytes, 0, num_bytes, digest_of_file(file))]
    head = read_at(file, schema.start, schema.stop - schema.start)
    cuts: list[Cut] = []
    start, first, rows = schema.stop, 0, 0
    for number, message in enumerate(batches):
        rows += message.num_rows
        if message.stop - start >= RUN_BYTES or number + 1 == len(batches):
            data = read_at(file, start, message.stop - start)
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
            whole = read_at(file, 0, num_bytes)
        else:
            schema = next(_messages(file, num_bytes), None)
            if schema is None or schema.kind != "schema":
                raise ChangedError
            whole = read_at(file, 0, schema.stop) + read_at(file, start, stop - start)
        if sha256 is not None and hashlib.sha256(whole).hexdigest() != sha256:
            raise ChangedError
        reader = pa.ipc.open_stream(pa.BufferReader(whole))
        problem = no_column(list(reader.schema.names), columns)
        if problem is not None:
            builder.reject(origin, 0, problem)
            return
        shape = Shape(columns)
        asked = [name for name in columns.asked if name in reader.schema.names]
        for batch in reader:
            some = batch.select(asked)
            _check_structure(some)
            add_table(some, np.arange(position, position + some.num_rows), shape, origin, builder)
            position += some.num_rows
            yield
        if stop == UNREADABLE:
            raise pa.ArrowInvalid("the stream can't be cut")
    except BROKEN_TABLE as error:
        builder.reject(origin, position, Problem("unreadable_file", 1.0, f"{type(error).__name__}: {error}"))


def _messages(file: IO[bytes], num_bytes: int) -> Iterator[_Message]:
    """The messages of a stream, up to its end."""
    whole = WholeFile(file, num_bytes)
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

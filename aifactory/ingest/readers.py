"""Readers: the rows of a piece.

What can't be read becomes a line of the ledger, never an exception: a bad file harms no other one. What is no longer what
was listed is an exception, since its rows would bear a false identity. That is known for certain only when all of a
piece has been read, so nothing of a piece may be published before `read_piece` has come to its end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import IO, Any

from aifactory.config.sources import (
    CsvSource,
    DatasetSource,
    FeedbackSource,
    FileSource,
    JsonlSource,
    KafkaSource,
    ParquetSource,
    SqlSource,
    WarcSource,
)
from aifactory.errors import StorageError
from aifactory.ingest import (
    arrow_streams,
    csv_files,
    databases,
    documents,
    json_lines,
    parquet_files,
    streams,
    tables,
    warc,
)
from aifactory.ingest.blocks import Block, BlockBuilder, Problem
from aifactory.ingest.hub import CachePlace
from aifactory.ingest.listing import Piece, Span
from aifactory.ingest.places import Place, is_unchanged, open_place
from aifactory.ingest.reach import packing_of, unpack
from aifactory.ingest.shapes import Shape

_READ_BYTES = 1 << 20


def read_piece(piece: Piece, *, open_consumer: streams.OpenConsumer = streams.open_consumer) -> Iterator[Block]:
    """The rows of a piece, in blocks, with the lines of the ledger between them. Every position counts from 0 where the
    piece's part of its file begins.

    Raises   StorageError if the piece is no longer what was listed, ConfigError if it can't be opened any more.
    """
    section = piece.section
    builder = BlockBuilder(piece.source)
    place: Place | None = None
    if not isinstance(section, SqlSource | FeedbackSource | KafkaSource):
        is_cached = isinstance(section, DatasetSource) and section.hub is not None
        place = CachePlace() if is_cached else open_place(section)
    for span in piece.spans:
        try:
            if isinstance(section, SqlSource | FeedbackSource):
                steps = databases.read_database(
                    section, str(span.start), str(span.stop), span.sha256, span.origin, builder
                )
            elif isinstance(section, KafkaSource):
                steps = _read_topic(section, span, builder, open_consumer)
            else:
                assert place is not None
                steps = _read_file(section, place, span, builder)
            for _ in steps:
                yield from builder.full()
        except tables.ChangedError:
            raise StorageError(
                f"expected {span.path or span.origin} as it was when the source {piece.source!r} was listed, found it "
                "changed or gone; run the same command again to read it as it is now."
            ) from None
    yield from builder.rest()


def _read_topic(
    section: KafkaSource, span: Span, builder: BlockBuilder, open_consumer: streams.OpenConsumer
) -> Iterator[None]:
    consumer = open_consumer(section)
    try:
        start, stop = int(span.start), int(span.stop)
        # A range of messages is small, and is what was listed or is not read.
        messages = list(streams.read_messages(consumer, section, span.partition, start, stop))
        if streams.digest_of_messages(messages)[0] != span.sha256:
            raise tables.ChangedError
        yield from streams.add_messages(messages, section, builder)
    finally:
        consumer.close()


def _read_file(section: FileSource, place: Place, span: Span, builder: BlockBuilder) -> Iterator[None]:
    if not span.sha256:
        detail = "the file could not be read when it was listed"
        builder.reject(span.origin, 0, Problem("unreadable_file", 1.0, detail))
        return
    try:
        file = place.open(span.path)
    except OSError as error:
        raise tables.ChangedError from error
    with file:
        is_known = is_unchanged(file, span.stamp)
        start, stop, origin = int(span.start), int(span.stop), span.origin
        sha256 = None if is_known else span.sha256
        if isinstance(section, ParquetSource):
            yield from parquet_files.read_parquet(file, start, stop, sha256, section.columns, origin, builder)
        elif isinstance(section, DatasetSource):
            yield from arrow_streams.read_arrow(file, start, stop, sha256, section.columns, origin, builder)
        else:
            header = b""
            if isinstance(section, CsvSource) and start and not section.column_names:
                header = csv_files.csv_header(file)
            content = _Content(file, start, stop, None if is_known else hashlib.sha256(header))
            yield from _read_content(section, content, span, header, builder)
            content.finish(span.sha256)
        if is_known and not is_unchanged(file, span.stamp):
            raise tables.ChangedError


def _read_content(
    section: FileSource, content: _Content, span: Span, header: bytes, builder: BlockBuilder
) -> Iterator[None]:
    origin = span.origin
    blocks = iter(lambda: content.read(_READ_BYTES), b"")
    packing = packing_of(span.name)
    if packing is not None:
        blocks = unpack(
            content,
            packing,
            packed_bytes=content.num_bytes,
            max_ratio=section.max_ratio,
            max_unpacked_bytes=section.max_unpacked_bytes,
        )
    if isinstance(section, JsonlSource):
        yield from json_lines.read_json_lines(blocks, Shape(section.columns), origin, builder)
    elif isinstance(section, CsvSource):
        yield from csv_files.read_csv(blocks, header, section, span.name, origin, builder)
    elif isinstance(section, WarcSource):
        yield from warc.read_warc(blocks, section.max_ratio, origin, builder)
    else:
        yield from documents.read_document(blocks, section.kind, origin, builder)


class _Content:
    """A part of a file, hashed as it is read unless `state` is None."""

    def __init__(self, file: IO[bytes], start: int, stop: int, state: Any) -> None:
        self._file = file
        self._left = stop - start
        self._state = state
        self.num_bytes = stop - start
        self.closed = False
        file.seek(start)

    def read(self, size: int = -1, /) -> bytes:
        """At most so many bytes; empty at the end.

        Raises   ChangedError if the file has become shorter.
        """
        wanted = self._left if size < 0 else min(size, self._left)
        if not wanted:
            return b""
        data = self._file.read(wanted)
        if not data:
            raise tables.ChangedError
        self._left -= len(data)
        if self._state is not None:
            self._state.update(data)
        return data

    def finish(self, sha256: str) -> None:
        """Read what is left, where it is to be compared.

        Raises   ChangedError if all of it is not what `sha256` says.
        """
        if self._state is None:
            return
        while self.read(_READ_BYTES):
            pass
        if self._state.hexdigest() != sha256:
            raise tables.ChangedError

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True

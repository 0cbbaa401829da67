"""Listing: what there is in the sources, cut into pieces.

A piece is some small files, a part of a large one, a range of a table or of a topic: about 8 MB, at most about 16 MB where
the data can be cut. The pieces follow from the data alone, and where the data changes only the pieces around the change
do (see `cuts`): a file that is added or deleted disturbs its own group, lines that are added to a large file of JSON
lines the part in which they stand.

A piece's digest is that of what its rows are made of: the source without its place, and of every span its name and the
SHA-256 of its content. It is the same on another machine and below another path. Rows of a part of a file say in which
part they stand by its digest (`big.jsonl#1f3a9c2e`), and count from its beginning, so that what is above it in the file
does not change them; `Piece.first_position` is where the part begins in the file now.

Everything that is listed is read and hashed, unless it is known: `Listing.seen` keeps for every file its digests beside
what its place tells of it (size, times, inode; ETag). Only reading is saved, what a file is follows from its content.
Two pieces may have the same digest, where the same content lies twice.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import IO, Any

import numpy as np

from aifactory.config.sources import (
    CsvSource,
    DatasetSource,
    FeedbackSource,
    FileSource,
    JsonlSource,
    KafkaSource,
    ParquetSource,
    Source,
    SqlSource,
)
from aifactory.ingest import streams
from aifactory.ingest.blocks import MAX_ROW_BYTES
from aifactory.ingest.cuts import (
    FILE_WEIGHT,
    MAX_BYTES,
    MIN_BYTES,
    PACKED_WEIGHT,
    Cut,
    ends_group,
    find_line_cut,
)
from aifactory.ingest.places import Entry, Place, open_place
from aifactory.ingest.reach import download, packing_of
from aifactory.records.identity import canonical_json, hash_text

CUTS_VERSION = 1
"""Grows whenever the same data would be cut in another way, or hashed in another way."""
_IN_FLIGHT = 2
_BATCH_BYTES = 1 << 20
_READ_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Span:
    """A file, or a part of one, of a table or of a topic."""

    origin: str
    """What its rows say they come from: the name below the source's path; that of a part ends with its digest."""
    path: str
    """What opens it; "" for a table or a topic."""
    start: int | str
    stop: int | str
    """See Cut."""
    num_bytes: int
    sha256: str
    """Of its content; "" where that could not be read, and then it stays a line of the ledger."""
    stamp: tuple[int | str, ...] = ()
    """What its place told of the file; while a file of this machine is that, it need not be hashed again."""
    partition: int = 0
    """Of a topic."""

    @property
    def name(self) -> str:
        """The file's name below the source's path."""
        return self.origin.removesuffix(_part_of(self.sha256))


def _part_of(sha256: str) -> str:
    return f"#{sha256[:8]}"


@dataclass(frozen=True, slots=True)
class Piece:
    """What one task reads."""

    section: Source
    spans: tuple[Span, ...]
    digest: str
    """SHA-256 of what its rows are made of, 64 hex digits."""
    num_bytes: int
    """As it lies there, packed or not."""
    first_position: int = 0
    """Position in its file of the first row, which itself counts from 0."""
    num_files: int = 0
    """Files (tables, partitions) that begin in it."""

    @property
    def source(self) -> str:
        """The source's name."""
        return self.section.name

    @property
    def keyed_by_file(self) -> bool:
        """Whether each row is a file, and its name makes its key."""
        return self.section.KEYED_BY_FILE


@dataclass(frozen=True, slots=True)
class Listing:
    """What there is."""

    pieces: tuple[Piece, ...]
    """In the order of the sources and of the names in them."""
    seen: dict[str, Any]
    """What is known of every file now: plain JSON, to be handed in the next time."""
    bytes_read: int
    """So much was read to know it."""

    @property
    def digest(self) -> str:
        """The identity of what the sources hold: contents and names, no paths of this machine and no times."""
        return hash_text(canonical_json([piece.digest for piece in self.pieces]))


def list_pieces(
    sources: Sequence[Source],
    *,
    seen: Mapping[str, Any] | None = None,
    open_consumer: streams.OpenConsumer = streams.open_consumer,
) -> Listing:
    """Every piece of every source.

    Raises   ConfigError if a source is not there, holds nothing, or may not be opened.
    """
    pieces: list[Piece] = []
    known: dict[str, Any] = {}
    bytes_read = 0
    for source in sources:
        memory = _Memory(source, (seen or {}).get(source.name))
        if isinstance(source, SqlSource | FeedbackSource):
            pieces += _pieces_of_database(source, memory)
        elif isinstance(source, KafkaSource):
            pieces += _pieces_of_topic(source, memory, open_consumer)
        else:
            pieces += _pieces_of_files(source, memory)
        known[source.name] = memory.to_json()
        bytes_read += memory.bytes_read
    return Listing(tuple(pieces), known, bytes_read)


class _Memory:
    """What is known of the files of one source."""

    def __init__(self, source: Source, known: object) -> None:
        columns = getattr(source, "columns", None)
        dialect = source.recipe() if isinstance(source, CsvSource) else {}
        self._rule = hash_text(
            canonical_json([CUTS_VERSION, source.kind, columns.asked if columns is not None else [], dialect])
        )[:16]
        files = known.get("files") if isinstance(known, dict) and known.get("rule") == self._rule else None
        self._files: dict[str, Any] = files if isinstance(files, dict) else {}
        self._now: dict[str, Any] = {}
        self.bytes_read = 0

    def recall(self, path: str, stamp: Sequence[int | str]) -> list[Cut] | None:
        """The cuts of a file that is what it was; None if that is not known."""
        told = self._files.get(path)
        if not stamp or not isinstance(told, list) or list(told[0]) != list(stamp):
            return None
        return [Cut(*cut) for cut in told[1]] or None

    def stamp_of(self, path: str) -> tuple[int | str, ...]:
        """What was told of a file the last time."""
        told = self._files.get(path)
        return tuple(told[0]) if isinstance(told, list) else ()

    def keep(self, path: str, stamp: Sequence[int | str], cuts: Sequence[Cut], bytes_read: int) -> None:
        """Remember the cuts of a file; one that could not be read, or of which nothing is told, is read again."""
        if stamp and all(cut.sha256 for cut in cuts):
            plain = [[cut.start, cut.stop, cut.first_position, cut.num_bytes, cut.sha256] for cut in cuts]
            self._now[path] = [list(stamp), plain]
        self.bytes_read += bytes_read

    def to_json(self) -> dict[str, Any]:
        return {"rule": self._rule, "files": self._now}


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _pieces_of_files(source: FileSource, memory: _Memory) -> list[Piece]:
    place: Place
    if isinstance(source, DatasetSource):
        from aifactory.ingest import hub

        if source.hub is not None:
            place, entries = hub.CachePlace(), hub.list_hub(source)
        else:
            place, entries = hub.list_saved(source)
    else:
        place = open_place(source)
        entries = place.entries()
    pieces: list[Piece] = []
    group: list[Span] = []
    weight = 0
    for entry, cuts in zip(entries, _cuts_of_all(source, place, entries, memory), strict=True):
        if len(cuts) > 1 or (len(cuts) == 1 and cuts[0].num_bytes > MAX_BYTES):
            pieces += _piece_of_group(source, group)
            group, weight = [], 0
            pieces += _pieces_of_cuts(source, entry, cuts)
            continue
        (cut,) = cuts
        packed = PACKED_WEIGHT if packing_of(entry.origin) else 1
        added = cut.num_bytes * packed + FILE_WEIGHT
        if group and weight + added > MAX_BYTES:
            pieces += _piece_of_group(source, group)
            group, weight = [], 0
        group.append(_span(entry, cut, entry.origin))
        weight += added
        if weight >= MIN_BYTES and ends_group(entry.origin, added):
            pieces += _piece_of_group(source, group)
            group, weight = [], 0
    return pieces + _piece_of_group(source, group)


def _span(entry: Entry, cut: Cut, origin: str) -> Span:
    return Span(origin, entry.path, cut.start, cut.stop, cut.num_bytes, cut.sha256, entry.stamp)


def _piece_of_group(source: Source, spans: Sequence[Span]) -> list[Piece]:
    return [_piece(source, spans, 0, len(spans))] if spans else []


def _pieces_of_cuts(source: Source, entry: Entry, cuts: Sequence[Cut]) -> Iterator[Piece]:
    for number, cut in enumerate(cuts):
        origin = entry.origin if len(cuts) == 1 else entry.origin + _part_of(cut.sha256)
        yield _piece(source, [_span(entry, cut, origin)], cut.first_position, int(number == 0))


def _piece(source: Source, spans: Sequence[Span], first_position: int, num_files: int) -> Piece:
    told = {
        "version": CUTS_VERSION,
        "source": source.recipe(),
        "spans": [[span.origin, span.partition, span.sha256 or "unreadable"] for span in spans],
    }
    return Piece(
        section=source,
        spans=tuple(spans),
        digest=hash_text(canonical_json(told)),
        num_bytes=sum(span.num_bytes for span in spans),
        first_position=first_position,
        num_files=num_files,
    )


@dataclass(slots=True)
class _Hashed:
    """What came of reading a file."""

    cuts: list[Cut] = field(default_factory=list)
    stamp: tuple[int | str, ...] = ()
    num_bytes: int = 0


def _cuts_of_all(source: FileSource, place: Place, entries: Sequence[Entry], memory: _Memory) -> Iterator[list[Cut]]:
    """The cuts of each file, in order; those that are not known are read by as many threads as there are processors."""
    known = [memory.recall(entry.path, entry.stamp) for entry in entries]
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(workers) as hashers:

        def read(batch: list[Entry]) -> list[_Hashed]:
            return [_read_and_cut(source, place, entry, memory, hashers) for entry in batch]

        new = [entry for entry, cuts in zip(entries, known, strict=True) if cuts is None]
        hashed = chain.from_iterable(readers.map(read, _batches(new)))
        for entry, cuts in zip(entries, known, strict=True):
            if cuts is not None:
                memory.keep(entry.path, entry.stamp, cuts, 0)
                yield cuts
            else:
                found = next(hashed)
                memory.keep(entry.path, found.stamp, found.cuts, found.num_bytes)
                yield found.cuts


def _batches(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Files that one task reads: handing one over takes longer than reading a small one."""
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        batch.append(entry)
        size += entry.num_bytes + FILE_WEIGHT
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _read_and_cut(
    source: FileSource, place: Place, entry: Entry, memory: _Memory, hashers: ThreadPoolExecutor
) -> _Hashed:
    try:
        if re.match(r"https?://", entry.path):
            return _download_and_cut(source, entry, memory, hashers)
        with place.open(entry.path) as file:
            cuts = cut_file(source, entry.origin, file, entry.num_bytes, hashers)
            num_bytes = file.seek(0, os.SEEK_END)
        return _Hashed(cuts, entry.stamp, num_bytes)
    except OSError:
        return _Hashed([Cut(0, 0, 0, 0, "")])  # a line of the ledger


def _download_and_cut(source: FileSource, entry: Entry, memory: _Memory, hashers: ThreadPoolExecutor) -> _Hashed:
    known = memory.stamp_of(entry.path)
    page = download(
        entry.path,
        source=source.name,
        allow_private=source.allow_private,
        max_bytes=source.max_unpacked_bytes,
        known_stamp=tuple(map(str, known)),
    )
    if page.file is None:
        return _Hashed(memory.recall(entry.path, known) or [], known)
    with page.file as file:
        num_bytes = file.seek(0, os.SEEK_END)
        return _Hashed(cut_file(source, entry.origin, file, num_bytes, hashers), page.stamp, num_bytes)


def cut_file(
    source: FileSource, origin: str, file: IO[bytes], num_bytes: int, hashers: ThreadPoolExecutor
) -> list[Cut]:
    """The parts of a file, each with the hash of its content.

    Raises   OSError if it can't be read.
    """
    from aifactory.ingest import arrow_streams, csv_files, parquet_files

    if isinstance(source, ParquetSource):
        return parquet_files.cut_parquet(file, num_bytes, source.columns)
    if isinstance(source, DatasetSource):
        return arrow_streams.cut_arrow(file, num_bytes)
    is_cut = isinstance(source, JsonlSource) or (isinstance(source, CsvSource) and not source.multiline)
    if num_bytes <= MAX_BYTES or not is_cut or packing_of(origin):
        state, size = hashlib.sha256(), 0
        file.seek(0)
        while block := file.read(_READ_BYTES):
            state.update(block)
            size += len(block)
        return [Cut(0, size, 0, size, state.hexdigest())]
    if isinstance(source, CsvSource):
        header = b"" if source.column_names else csv_files.csv_header(file)
        return _cut_lines(file, hashers, header, blank_lines_count=False)
    return _cut_lines(file, hashers, b"", blank_lines_count=True)


def _cut_lines(file: IO[bytes], hashers: ThreadPoolExecutor, header: bytes, *, blank_lines_count: bool) -> list[Cut]:
    """The parts of a file of lines; `header` belongs to each of them but the first, which has it already."""
    found: list[tuple[int, int, int, Future[str]]] = []
    flying: deque[Future[str]] = deque()
    start = rows = 0
    file.seek(0)
    for data in _parts_of_lines(file):
        while len(flying) >= _IN_FLIGHT:  # what is being hashed stays in memory
            flying.popleft().result()
        future = hashers.submit(_digest_of, header if found else b"", data)
        flying.append(future)
        found.append((start, start + len(data), rows, future))
        start += len(data)
        rows += _count_lines(data, blank_lines_count=blank_lines_count) - (bool(header) and len(found) == 1)
    cuts = [Cut(a, b, first, b - a, future.result()) for a, b, first, future in found]
    return cuts or [Cut(0, 0, 0, 0, hashlib.sha256().hexdigest())]


def _parts_of_lines(file: IO[bytes]) -> Iterator[bytes]:
    waiting = bytearray()
    is_last = False
    while True:
        wanted = MAX_BYTES - len(waiting)
        while wanted > 0 and not is_last:
            block = file.read(wanted)
            is_last = not block
            waiting += block
            wanted -= len(block)
        if not waiting:
            return
        cut = find_line_cut(np.frombuffer(waiting, np.uint8), is_last=is_last)
        if not cut:
            cut = _end_of_long_line(file, waiting)
        part = bytes(memoryview(waiting)[:cut])
        waiting = waiting[cut:]
        yield part


def _end_of_long_line(file: IO[bytes], waiting: bytearray) -> int:
    """Read on to the end of a line that is longer than a piece.

    Raises   OSError if it is so long that nobody wants it in memory.
    """
    while block := file.read(_READ_BYTES):
        end = block.find(b"\n")
        before = len(waiting)
        waiting += block
        if end >= 0:
            return before + end + 1
        if len(waiting) > _MAX_LINE_BYTES:
            raise OSError(f"a line of more than {_MAX_LINE_BYTES} bytes")
    return len(waiting)


_MAX_LINE_BYTES = 8 * MAX_ROW_BYTES


def _digest_of(*parts: bytes) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()


def _count_lines(data: bytes, *, blank_lines_count: bool) -> int:
    data_B = np.frombuffer(data, np.uint8)
    if blank_lines_count:
        return int(np.count_nonzero(data_B == 0x0A)) + (not data.endswith(b"\n"))
    ends_L = np.flatnonzero(data_B == 0x0A)
    if not data.endswith(b"\n"):
        ends_L = np.append(ends_L, len(data))
    lengths_L = np.diff(ends_L, prepend=-1) - 1
    is_blank_L = (lengths_L == 0) | ((lengths_L == 1) & (data_B[np.maximum(ends_L - 1, 0)] == 0x0D))
    return int(len(ends_L) - np.count_nonzero(is_blank_L))


# ── databases and streams ─────────────────────────────────────────────────────────────────────────────────────────────


def _pieces_of_database(source: SqlSource | FeedbackSource, memory: _Memory) -> Iterable[Piece]:
    from aifactory.ingest import databases

    cuts = databases.cut_database(source)
    memory.bytes_read += sum(cut.num_bytes for cut in cuts)
    return _pieces_of_cuts(source, Entry(databases.origin_of(source), "", 0, ()), cuts)


def _pieces_of_topic(source: KafkaSource, memory: _Memory, open_consumer: Callable[..., Any]) -> Iterator[Piece]:
    consumer = open_consumer(source)
    try:
        for partition, start, stop in streams.bounds_of(consumer, source):
            for number, (first, last) in enumerate(streams.ranges_of(start, stop)):
                cut = _cut_of_messages(consumer, source, memory, partition, first, last)
                origin = f"{source.topic}/{partition}"
                span = Span(origin, "", cut.start, cut.stop, cut.num_bytes, cut.sha256, (), partition)
                yield _piece(source, [span], 0, int(number == 0))
    finally:
        consumer.close()


def _cut_of_messages(
    consumer: streams.Consumer, source: KafkaSource, memory: _Memory, partition: int, start: int, stop: int
) -> Cut:
    path = f"{partition}/{start}"
    # A log is only added to: if the last message is the one that was seen, so are those before it.
    _, _, last = streams.digest_of_messages(streams.read_messages(consumer, source, partition, stop - 1, stop))
    stamp = (start, stop, last) if last else ()
    known = memory.recall(path, stamp)
    if known is None:
        messages = streams.read_messages(consumer, source, partition, start, stop)
        digest, size, _ = streams.digest_of_messages(messages)
        known = [Cut(start, stop, 0, size, digest)]
        memory.keep(path, stamp, known, size)
    else:
        memory.keep(path, stamp, known, 0)
    return known[0]

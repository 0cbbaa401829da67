"""Parquet: cut at row groups; of a file only the columns that are asked for are read and hashed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aifactory.config.sources import Columns
from aifactory.ingest.blocks import BlockBuilder, Problem
from aifactory.ingest.cuts import Cut
from aifactory.ingest.parquet_footer import read_footer
from aifactory.ingest.shapes import Shape
from aifactory.ingest.tables import (
    BROKEN_TABLE,
    RUN_BYTES,
    UNREADABLE,
    ChangedError,
    RandomFile,
    WholeFile,
    add_table,
    digest_of_file,
    no_column,
    read_at,
)
from aifactory.records.identity import canonical_json

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_BATCH_BYTES = 4 << 20
_MAX_BATCH_BYTES = 64 << 20
_MAX_BATCH_ROWS = 16_384


def cut_parquet(file: IO[bytes], num_bytes: int, columns: Columns) -> list[Cut]:
    """The runs of row groups of a file."""
    try:
        layout = _Layout(file, num_bytes, columns)
    except BROKEN_TABLE:
        return [Cut(0, UNREADABLE, 0, num_bytes, digest_of_file(file))]
    cuts: list[Cut] = []
    start = first = rows = size = 0
    state = layout.state()
    for group in range(layout.num_groups):
        state.update(layout.digest(group, layout.load(file, group)))
        rows += layout.num_rows(group)
        size += layout.num_bytes(group)
        if size >= RUN_BYTES and group + 1 < layout.num_groups:
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
    except BROKEN_TABLE as error:
        builder.reject(origin, 0, Problem("unreadable_file", 1.0, f"{type(error).__name__}: {error}"))
        if stop != UNREADABLE or (sha256 is not None and digest_of_file(file) != sha256):
            raise ChangedError from error
        return
    if not start <= stop <= layout.num_groups:
        raise ChangedError
    problem = no_column(layout.names, columns)
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
                add_table(batch, positions_N, shape, origin, builder)
                position += batch.num_rows
                yield
        except BROKEN_TABLE as error:
            builder.reject(origin, position, Problem("unreadable_file", 1.0, f"{type(error).__name__}: {error}"))
        first += layout.num_rows(group)
    if sha256 is not None and state.hexdigest() != sha256:
        raise ChangedError


_Loaded = list[tuple[int, bytes]]
"""Ranges of a file: where each begins, and its bytes."""


class _Layout:
    """Where the columns that are asked for lie in a Parquet file.

    Raises   one of BROKEN_TABLE if it has no footer that makes sense.
    """

    def __init__(self, file: IO[bytes], num_bytes: int, columns: Columns) -> None:
        import pyarrow.parquet as pq

        footer = read_footer(file, num_bytes)
        opened = pq.ParquetFile(pa.PythonFile(WholeFile(file, num_bytes), mode="r"), pre_buffer=False)
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
        return [(chunk.start, read_at(file, chunk.start, chunk.num_bytes)) for chunk in self._chunks[group]]

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


class _Windows(RandomFile):
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

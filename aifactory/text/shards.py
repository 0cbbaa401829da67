"""Shards: packed rows in Arrow IPC files, mapped into memory and read at random by their global index.

Layout   ids        fixed_size_list<uint16 or uint32>[T]   token ids
         documents  list<struct<row, start, offset, length, prompt>>   which tokens of which row lie where
Shapes   N rows of T tokens.

A piece is what one row holds of one document: the `length` tokens from `start` on are those of the document `row` from its
token `offset` on. `prompt` of the document's tokens stand before its text. That says all else that training reads, so it
is not written a second time: positions restart at 0 with each piece, and with the padding; a token is predicted and
carries loss where it belongs to the text and is not the first of its piece.

Preferences   Rows of answers that were preferred or not have a field more, `mark`: +1 or -1. Their documents are never cut.
              Of a pair the chosen one and then the rejected one stand side by side, with one row id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_PLACES = ("start", "offset", "length", "prompt")
PIECE = pa.struct([("row", pa.string()), *((name, pa.int32()) for name in _PLACES)])
"""A piece: see the module."""
MARKED_PIECE = pa.struct([*PIECE, ("mark", pa.int8())])
"""A document that was preferred or not."""

Places = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]
"""start, offset, length and prompt of pieces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """Rows in memory. ids_NT: unsigned integers; documents: list<PIECE> or list<MARKED_PIECE>, in the order in which they lie in
    their row."""

    ids_NT: npt.NDArray[np.unsignedinteger]
    documents: pa.ListArray

    def count_loss_tokens(self) -> int:
        """How many tokens of all rows carry loss."""
        return int(_loss_tokens(_places(self.documents)).sum())


def integer_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The narrowest unsigned type that holds every token id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def shard_bytes(rows: PackedRows) -> bytes:
    """One shard as the bytes of an Arrow IPC file; they depend on the rows alone."""
    flat = pa.array(np.ascontiguousarray(rows.ids_NT).reshape(-1))
    ids = pa.FixedSizeListArray.from_arrays(flat, rows.ids_NT.shape[1])
    sink = pa.BufferOutputStream()
    # One batch a shard: then a column is one contiguous buffer, which NumPy indexes without a copy.
    batch = pa.record_batch({"ids": ids, "documents": rows.documents})
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


class TokenRows:
    """All packed rows of a token set, in the order of its shards, mapped into memory."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._shards = [_map_shard(folder / name) for name in names]
        counts = [shard.num_rows for shard in self._shards]
        self._ends = np.cumsum(counts) if counts else np.zeros(0, np.int64)
        self._ids = [_as_matrix(shard.column("ids")) for shard in self._shards]
        documents = [shard.column("documents") for shard in self._shards]
        self._bounds = [column.offsets.to_numpy() for column in documents]
        self._pieces = [_places(column) for column in documents]
        self._marks = [_marks(column) for column in documents]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def row_len(self) -> int:
        return int(self._ids[0].shape[1])

    def read(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], ...]:
        """ids_BT, positions_BT, loss_mask_BT (int64) of the rows with these global indices, in their order."""
        places = self._places(indices)
        shape = (len(places), self.row_len)
        ids_BT = np.empty(shape, np.int64)
        for i, (shard, row) in enumerate(places):
            ids_BT[i] = self._ids[shard][row]
        counts, (start, offset, length, prompt) = self._gather(places)
        # All rows end to end, and after the pieces of each its padding: where each of them begins, where the loss in it
        # begins, and how long it is.
        which = np.arange(len(places))
        row_of_piece = np.repeat(which, counts)
        piece, padding = np.arange(len(start)) + row_of_piece, np.cumsum(counts, dtype=np.int64) + which
        began, loss, lengths = np.empty((3, len(start) + len(places)), np.int64)
        lengths[piece] = length
        lengths[padding] = shape[1] - np.bincount(row_of_piece, length, len(places)).astype(np.int64)
        began[piece] = row_of_piece * shape[1] + start
        began[padding] = (which + 1) * shape[1] - lengths[padding]
        loss[piece] = began[piece] + _without_loss(offset, prompt)
        loss[padding] = ids_BT.size
        at = np.arange(ids_BT.size)
        positions = at - np.repeat(began, lengths)
        loss_mask = (at >= np.repeat(loss, lengths)).astype(np.int64)
        return ids_BT, positions.reshape(shape), loss_mask.reshape(shape)

    @property
    def has_marks(self) -> bool:
        """Whether the documents were preferred or not, in every shard."""
        return bool(self._marks) and all(marks is not None for marks in self._marks)

    def marks(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """marks_BT of the rows with these global indices: the mark of each token's document, 0 for padding."""
        places = self._places(indices)
        marks_BT = np.zeros((len(places), self.row_len), np.int64)
        for i, (shard, row) in enumerate(places):
            marks = self._marks[shard]
            assert marks is not None, "rows of preferences"
            begin, end = self._bounds[shard][row : row + 2].tolist()
            told = np.repeat(marks[begin:end], self._pieces[shard][2][begin:end])
            marks_BT[i, : len(told)] = told
        return marks_BT

    def count_documents(self, indices: npt.NDArray[np.int64]) -> int:
        """How many pieces the rows with these global indices hold; of preferences each is a document."""
        return sum(int(np.diff(self._bounds[shard][row : row + 2])[0]) for shard, row in self._places(indices))

    def count_loss_tokens(self, indices: npt.NDArray[np.int64]) -> int:
        """How many tokens of the rows with these global indices carry loss."""
        _, pieces = self._gather(self._places(indices))
        return int(_loss_tokens(pieces).sum())

    def documents(self, index: int) -> list[dict[str, object]]:
        """Which source rows lie in the packed row of this global index."""
        ((shard, row),) = self._places(np.array([index]))
        return list(self._shards[shard].column("documents")[row].as_py())

    def whole_documents(self) -> Iterator[tuple[str, npt.NDArray[np.unsignedinteger]]]:
        """Each document, by the id of its source row, and all its token ids, put together again from its pieces.

        A document never spans two shards, and no two of a shard have the same id; but a pair has one, and is given as two
        documents, first the chosen one.
        """
        for shard, ids, bounds, (start, offset, length, _), marks in zip(
            self._shards, self._ids, self._bounds, self._pieces, self._marks, strict=True
        ):
            flat = ids.reshape(-1)
            first = np.repeat(np.arange(len(bounds) - 1) * self.row_len, np.diff(bounds)) + start
            names = shard.column("documents").values.field("row").dictionary_encode()
            rows = names.indices.to_numpy()
            documents = rows if marks is None else 2 * rows + (marks < 0)
            order = np.lexsort((offset, documents))
            ends = np.flatnonzero(np.diff(documents[order])) + 1
            for pieces in np.split(order, ends) if len(order) else ():
                name = names.dictionary[int(rows[pieces[0]])].as_py()
                yield name, np.concatenate([flat[first[i] : first[i] + length[i]] for i in pieces])

    def _places(self, indices: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
        """The shard and the row in it of each global index."""
        shards = np.searchsorted(self._ends, indices, side="right")
        starts = np.concatenate([[0], self._ends])[shards]
        return list(zip(shards.tolist(), (indices - starts).tolist(), strict=True))

    def _gather(self, places: Sequence[tuple[int, int]]) -> tuple[list[int], Places]:
        """How many pieces each of these rows has, and all of them."""
        spans = [(shard, *self._bounds[shard][row : row + 2].tolist()) for shard, row in places]
        columns = (
            [np.zeros(0, np.int32), *(self._pieces[shard][i][begin:end] for shard, begin, end in spans)]
            for i in range(len(_PLACES))
        )
        start, offset, length, prompt = map(np.concatenate, columns)
        return [end - begin for _, begin, end in spans], (start, offset, length, prompt)


def _places(documents: pa.ListArray) -> Places:
    """The numbers of all pieces, without a copy."""
    start, offset, length, prompt = (documents.values.field(name).to_numpy() for name in _PLACES)
    return start, offset, length, prompt


def _marks(documents: pa.ListArray) -> npt.NDArray[np.int8] | None:
    """The marks of all pieces; None where they have none."""
    if documents.values.type.get_field_index("mark") < 0:
        return None
    marks: npt.NDArray[np.int8] = documents.values.field("mark").to_numpy()
    return marks


def _without_loss(offset: npt.NDArray[np.int32], prompt: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """How many tokens at the beginning of a piece carry no loss: those of the prompt, and the first in any case, which
    is predicted from nothing that is its own. May be more than the piece has."""
    without: npt.NDArray[np.int32] = np.maximum(prompt - offset, 1)
    return without


def _loss_tokens(pieces: Places) -> npt.NDArray[np.int32]:
    """How many tokens of each piece carry loss."""
    _, offset, length, prompt = pieces
    carry: npt.NDArray[np.int32] = np.maximum(length - _without_loss(offset, prompt), 0)
    return carry


def _map_shard(path: Path) -> pa.RecordBatch:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return reader.get_batch(0)


def _as_matrix(column: pa.FixedSizeListArray) -> npt.NDArray[np.unsignedinteger]:
    flat: npt.NDArray[np.unsignedinteger] = column.values.to_numpy(zero_copy_only=True)
    return flat.reshape(len(column), column.type.list_size)

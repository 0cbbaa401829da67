"""Shards: packed rows in Arrow IPC files, mapped into memory and read at random by their global index.

Layout   ids        fixed_size_list<uint16 or uint32>[T]   token ids
         positions  fixed_size_list<uint16 or uint32>[T]   restart at 0 with each document, and with the padding
         loss_mask  fixed_size_list<uint8>[T]              1 where the token is predicted and carries loss
         documents  list<struct<row, start, offset, length>>   which tokens of which row lie where
Shapes   N rows of T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """Rows in memory. ids_NT, positions_NT: integers; loss_mask_NT: uint8."""

    ids_NT: npt.NDArray[np.integer]
    positions_NT: npt.NDArray[np.integer]
    loss_mask_NT: npt.NDArray[np.uint8]
    documents: Sequence[Sequence[dict[str, object]]]


def integer_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The narrowest unsigned type that holds every token id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def shard_bytes(rows: PackedRows) -> bytes:
    """One shard as the bytes of an Arrow IPC file; they depend on the rows alone."""
    row_len = rows.ids_NT.shape[1]
    columns = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), row_len)
        for name, values in (
            ("ids", rows.ids_NT),
            ("positions", rows.positions_NT),
            ("loss_mask", rows.loss_mask_NT),
        )
    }
    place = pa.struct([("row", pa.string()), ("start", pa.int32()), ("offset", pa.int32()), ("length", pa.int32())])
    table = pa.table({**columns, "documents": pa.array(rows.documents, pa.list_(place))})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        # One batch a shard: then a column is one contiguous buffer, which NumPy indexes without a copy.
        writer.write_batch(table.combine_chunks().to_batches()[0])
    return bytes(sink.getvalue())


class TokenRows:
    """All packed rows of a token set, in the order of its shards, mapped into memory."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._shards = [_map_shard(folder / name) for name in names]
        counts = [shard.num_rows for shard in self._shards]
        self._ends = np.cumsum(counts) if counts else np.zeros(0, np.int64)
        self._columns = {
            name: [_as_matrix(shard.column(name)) for shard in self._shards]
            for name in ("ids", "positions", "loss_mask")
        }

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def row_len(self) -> int:
        return int(self._columns["ids"][0].shape[1])

    def read(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], ...]:
        """ids_BT, positions_BT, loss_mask_BT (int64) of the rows with these global indices, in their order."""
        places = self._places(indices)
        return tuple(
            np.stack([columns[shard][row] for shard, row in places]).astype(np.int64)
            for columns in (self._columns["ids"], self._columns["positions"], self._columns["loss_mask"])
        )

    def count_loss_tokens(self, indices: npt.NDArray[np.int64]) -> int:
        """How many tokens of the rows with these global indices carry loss."""
        columns = self._columns["loss_mask"]
        return sum(int(columns[shard][row].sum()) for shard, row in self._places(indices))

    def documents(self, index: int) -> list[dict[str, object]]:
        """Which source rows lie in the packed row of this global index."""
        ((shard, row),) = self._places(np.array([index]))
        return list(self._shards[shard].column("documents")[row].as_py())

    def _places(self, indices: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
        """The shard and the row in it of each global index."""
        shards = np.searchsorted(self._ends, indices, side="right")
        starts = np.concatenate([[0], self._ends])[shards]
        return list(zip(shards.tolist(), (indices - starts).tolist(), strict=True))


def _map_shard(path: Path) -> pa.RecordBatch:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return reader.get_batch(0)


def _as_matrix(column: pa.FixedSizeListArray) -> npt.NDArray[np.integer]:
    flat: npt.NDArray[np.integer] = column.values.to_numpy(zero_copy_only=True)
    return flat.reshape(len(column), column.type.list_size)

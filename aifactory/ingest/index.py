"""The index of a part: what decides over all rows at once, without their texts.

Columns  id, content   fixed_size_binary(16)           the row's id and content hash
         holdout       bool                            which side
         signature     fixed_size_list<uint32>[P]      MinHash; only where near-duplicates are looked for
         sketch        list<uint32>                    the least hashes of its runs (`sketches`); only where what nearly equals
                                                       a holdout is told by them, in a corpus of rows that are held out
The rows stand in the order of the part's files: those that train, then those that are held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from aifactory.config import NearDuplicatesStep
from aifactory.records.rows import hash_lanes, one_array

if TYPE_CHECKING:
    from aifactory.ingest.sketches import Sketches

INDEX_FILE = "index.arrow"


@dataclass(frozen=True, slots=True)
class Index:
    """N rows; the hashes as two 64-bit numbers each."""

    ids_N2: npt.NDArray[np.uint64]
    contents_N2: npt.NDArray[np.uint64]
    is_holdout_N: npt.NDArray[np.bool_]
    signatures_NP: npt.NDArray[np.uint32] | None
    sketches: Sketches | None = None

    def __len__(self) -> int:
        return len(self.is_holdout_N)

    def take(self, rows: npt.NDArray[np.bool_]) -> Index:
        """The rows of a mask."""
        signatures = None if self.signatures_NP is None else self.signatures_NP[rows]
        sketches = None if self.sketches is None else self.sketches.take(rows)
        return Index(self.ids_N2[rows], self.contents_N2[rows], self.is_holdout_N[rows], signatures, sketches)

    def to_keep(self) -> Index:
        """The index without the sketches of rows that train: later rows are compared with what is held out alone."""
        return self if self.sketches is None else replace(self, sketches=self.sketches.only(self.is_holdout_N))


EMPTY = Index(np.zeros((0, 2), np.uint64), np.zeros((0, 2), np.uint64), np.zeros(0, bool), None)


def index_of(rows: pa.Table, *, near: NearDuplicatesStep | None = None, has_sketches: bool = False) -> Index:
    """The index of rows of CORPUS_SCHEMA."""
    is_holdout = np.array([side == "holdout" for side in rows["side"].to_pylist()], bool)
    return Index(
        hash_lanes(rows["id"]),
        hash_lanes(rows["content_hash"]),
        is_holdout,
        None if near is None else sign(rows, near),
        sketch(rows) if has_sketches else None,
    )


def sign(rows: pa.Table, step: NearDuplicatesStep) -> npt.NDArray[np.uint32]:
    """The MinHash signatures of rows: of what was asked and what was answered together."""
    from aifactory.ingest.minhash import signatures

    return signatures(
        whole_texts(rows), ngram_words=step.ngram_words, num_bands=step.num_bands, rows_per_band=step.rows_per_band
    )


def sketch(rows: pa.Table) -> Sketches:
    """The sketches of rows: of what was asked and what was answered together."""
    from aifactory.ingest.sketches import Sketches

    return Sketches.of(whole_texts(rows))


def whole_texts(rows: pa.Table) -> pa.Array:
    """What each row was asked and answers, as one text."""
    texts = one_array(rows["text"])
    asked = [one_array(rows[name]) for name in ("prompt", "messages")]
    if any(pc.any(pc.not_equal(column, "")).as_py() for column in asked):
        texts = pc.binary_join_element_wise(*asked, texts, "\n")
    return texts


def signature_recipe(step: NearDuplicatesStep) -> dict[str, int]:
    """What signatures depend on: only signatures of one recipe can be compared."""
    return {name: getattr(step, name) for name in ("ngram_words", "num_bands", "rows_per_band")}


def index_bytes(index: Index) -> bytes:
    """The bytes of an Arrow IPC file."""
    columns = {
        "id": _binary(index.ids_N2),
        "content": _binary(index.contents_N2),
        "holdout": pa.array(index.is_holdout_N),
    }
    if index.signatures_NP is not None:
        flat = pa.array(np.ascontiguousarray(index.signatures_NP).reshape(-1))
        columns["signature"] = pa.FixedSizeListArray.from_arrays(flat, index.signatures_NP.shape[1])
    if index.sketches is not None:
        ends = pa.array(index.sketches.end_N1.astype(np.int32))
        columns["sketch"] = pa.ListArray.from_arrays(ends, pa.array(index.sketches.hash_M))
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def read_index(data: bytes | pa.Buffer) -> Index:
    """The index in the bytes of an Arrow IPC file; its arrays lie in them."""
    table = pa.ipc.open_file(pa.BufferReader(data)).read_all().combine_chunks()
    signatures = None
    if "signature" in table.column_names:
        column = _only(table, "signature")
        signatures = column.flatten().to_numpy().reshape(len(column), column.type.list_size)
    sketches = _sketches(_only(table, "sketch")) if "sketch" in table.column_names else None
    holdout = _only(table, "holdout").to_numpy(zero_copy_only=False).astype(bool)
    return Index(_lanes(_only(table, "id")), _lanes(_only(table, "content")), holdout, signatures, sketches)


def joined(indexes: Sequence[Index]) -> Index:
    """All rows of several indexes, in their order."""
    indexes = [index for index in indexes if len(index)]
    if not indexes:
        return EMPTY
    signatures = [index.signatures_NP for index in indexes if index.signatures_NP is not None]
    sketches = [index.sketches for index in indexes if index.sketches is not None]
    return Index(
        np.concatenate([index.ids_N2 for index in indexes]),
        np.concatenate([index.contents_N2 for index in indexes]),
        np.concatenate([index.is_holdout_N for index in indexes]),
        np.concatenate(signatures) if len(signatures) == len(indexes) else None,
        type(sketches[0]).joined(sketches) if len(sketches) == len(indexes) else None,
    )


def held_out(index: Index) -> Index:
    """The rows of an index that are held out."""
    return index.take(index.is_holdout_N)


def _sketches(column: pa.Array) -> Sketches:
    from aifactory.ingest.sketches import Sketches

    ends = column.offsets.to_numpy() if len(column) else np.zeros(1, np.int32)
    return Sketches(column.flatten().to_numpy(), ends.astype(np.int64))


def _only(table: pa.Table, name: str) -> pa.Array:
    column = table[name]
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def _binary(lanes_N2: npt.NDArray[np.uint64]) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), len(lanes_N2), [None, pa.py_buffer(lanes_N2.astype(">u8").tobytes())]
    )


def _lanes(hashes: pa.Array) -> npt.NDArray[np.uint64]:
    data = hashes.buffers()[1]
    start = hashes.offset * 2
    found = np.frombuffer(data, ">u8") if data is not None else np.zeros(0, ">u8")
    return found[start : start + 2 * len(hashes)].astype(np.uint64).reshape(-1, 2)

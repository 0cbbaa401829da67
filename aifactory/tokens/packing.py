"""Packing: documents into rows of exactly T tokens.

A document longer than a row is cut into whole rows and a rest; rests are placed best fit, longest first. Positions
restart with every piece, and attention never crosses from one to another.

Legend   D documents, P pieces of them, N packed rows of T tokens.
Sources  Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830, section 3 (best fit);
         Fredman et al. 1986, "The Pairing Heap: A New Form of Self-Adjusting Heap", section 2.

Imports numba, which takes a while: import this where documents are packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aifactory.text.documents import EncodedDocuments
from aifactory.text.shards import MARKED_PIECE, PIECE, PackedRows, integer_type
from aifactory.tokens.preferences import Preferences


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """Token ids of one row, and which of them carry loss: none of the first ones, then all. Both have the same length, at
    least 1."""

    row: str
    ids: Sequence[int]
    loss_mask: Sequence[bool]


def pack(documents: Sequence[Document], *, row_len: int, vocab_size: int, pad_id: int) -> PackedRows:
    """`pack_documents` of documents that are lists.

    Raises   ValueError for a mask that is not that of a prompt and its answer.
    """
    lengths = np.array([len(document.ids) for document in documents], np.int64)
    prompts = np.array([len(document.loss_mask) - sum(document.loss_mask) for document in documents], np.int64)
    for document, prompt in zip(documents, prompts.tolist(), strict=True):
        if any(document.loss_mask[:prompt]):
            raise ValueError(
                f"Expected a prompt without loss and then a text with it, found another mask in {document.row}."
            )
    encoded = EncodedDocuments(
        ids_N=np.array([token for document in documents for token in document.ids], integer_type(vocab_size)),
        offsets_D1=np.concatenate([[0], np.cumsum(lengths)]),
        prompt_lengths_D=prompts,
        refused={},
    )
    names = pa.array([document.row for document in documents], pa.string())
    return pack_documents(names, encoded, row_len=row_len, pad_id=pad_id)


def pack_documents(names: pa.Array, documents: EncodedDocuments, *, row_len: int, pad_id: int) -> PackedRows:
    """Pack the documents, in an order that depends on them alone; names[i] is the id of the row that document i came from.

    Invariant  every token of every document is in exactly one row; padding carries no loss.
    Units      lengths in tokens.
    """
    lengths_D = np.diff(documents.offsets_D1)
    counts_D = -(-lengths_D // row_len)
    document_P = np.repeat(np.arange(len(documents)), counts_D)
    offset_P = (np.arange(len(document_P)) - np.repeat(np.cumsum(counts_D) - counts_D, counts_D)) * row_len
    length_P = np.minimum(lengths_D[document_P] - offset_P, row_len)

    order, row_P, start_P, num_rows = _placed(length_P, row_len)
    document_P, offset_P, length_P = document_P[order], offset_P[order], length_P[order]

    ids_NT = np.full((num_rows, row_len), pad_id, documents.ids_N.dtype)
    begin_P = documents.offsets_D1[document_P] + offset_P
    _fill(ids_NT, documents.ids_N, begin_P, length_P, row_P, start_P)
    pieces = pa.StructArray.from_arrays(
        [
            names.take(pa.array(document_P)),
            *(
                pa.array(values.astype(np.int32))
                for values in (start_P, offset_P, length_P, documents.prompt_lengths_D[document_P])
            ),
        ],
        fields=list(PIECE),
    )
    return PackedRows(ids_NT=ids_NT, documents=_by_row(pieces, row_P, num_rows))


def pack_preferences(names: pa.Array, preferences: Preferences, *, row_len: int, pad_id: int) -> PackedRows:
    """Pack what is compared, each whole and in one row; names[i] is the id of the row that unit i came from.

    Invariant  every document of every unit that was not refused is in exactly one row, beside those of its unit.
    """
    length_U = preferences.lengths_UK.sum(1)
    kept_U = np.flatnonzero(length_U)
    order, row_U, start_U, num_rows = _placed(length_U[kept_U], row_len)
    unit_U = kept_U[order]
    each = preferences.lengths_UK.shape[1]
    unit_P, row_P = np.repeat(unit_U, each), np.repeat(row_U, each)
    length_P = preferences.lengths_UK[unit_U].reshape(-1)
    start_P = (start_U[:, None] + np.cumsum(preferences.lengths_UK[unit_U], axis=1)).reshape(-1) - length_P

    ids_NT = np.full((num_rows, row_len), pad_id, preferences.ids_N.dtype)
    _fill(ids_NT, preferences.ids_N, preferences.begins_UK[unit_U].reshape(-1), length_P, row_P, start_P)
    pieces = pa.StructArray.from_arrays(
        [
            names.take(pa.array(unit_P)),
            *(
                pa.array(values.astype(np.int32))
                for values in (
                    start_P,
                    np.zeros_like(start_P),
                    length_P,
                    preferences.prompt_lengths_UK[unit_U].reshape(-1),
                )
            ),
            pa.array(preferences.marks_UK[unit_U].reshape(-1).astype(np.int8)),
        ],
        fields=list(MARKED_PIECE),
    )
    return PackedRows(ids_NT=ids_NT, documents=_by_row(pieces, row_P, num_rows))


def _placed(
    length_P: npt.NDArray[np.int64], row_len: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """Which piece comes first, second..., the row of each of them in that order and where in it it begins; how many rows."""
    # Longest first; those of one length in the order of the documents.
    order = np.argsort(-length_P, kind="stable")
    row_P, start_P, num_rows = _best_fit(length_P[order], row_len)
    # By row, and in it from left to right: a row is filled in the order in which its pieces are placed.
    by_row = np.argsort(row_P, kind="stable")
    return order[by_row], row_P[by_row], start_P[by_row], num_rows


def _fill(
    ids_NT: npt.NDArray[np.unsignedinteger],
    ids_N: npt.NDArray[np.unsignedinteger],
    begin_P: npt.NDArray[np.int64],
    length_P: npt.NDArray[np.int64],
    row_P: npt.NDArray[np.int64],
    start_P: npt.NDArray[np.int64],
) -> None:
    width = ids_NT.itemsize
    target_P = row_P * ids_NT.shape[1] + start_P
    _copy(_bytes(ids_N), begin_P * width, length_P * width, target_P * width, _bytes(ids_NT))


def _by_row(pieces: pa.StructArray, row_P: npt.NDArray[np.int64], num_rows: int) -> pa.ListArray:
    bounds = np.searchsorted(row_P, np.arange(num_rows + 1)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(bounds), pieces)


def _bytes(values: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.uint8]:
    # One kernel then serves every width of ids.
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


# ── kernels ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@numba.njit(cache=True, nogil=True)
def _copy(
    source: npt.NDArray[np.uint8],
    begin_P: npt.NDArray[np.int64],
    length_P: npt.NDArray[np.int64],
    target_P: npt.NDArray[np.int64],
    target: npt.NDArray[np.uint8],
) -> None:
    for p in range(len(begin_P)):
        begin, at, length = begin_P[p], target_P[p], length_P[p]
        target[at : at + length] = source[begin : begin + length]


@numba.njit(cache=True, nogil=True)
def _best_fit(
    length_P: npt.NDArray[np.int64], row_len: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """The row of each piece and where in it the piece begins, and how many rows there are.

    Each piece, in the order given, goes to the row with the least room that is enough; of several to the first; where
    there is none, to a new one.
    """
    num_pieces = len(length_P)
    row_P = np.empty(num_pieces, np.int64)
    start_P = np.empty(num_pieces, np.int64)
    filled_N = np.zeros(num_pieces, np.int64)
    # The rows of each room are a pairing heap, whose top is the first of them; -1 stands for none.
    top = np.full(row_len + 1, -1, np.int64)
    child_N = np.full(num_pieces, -1, np.int64)
    sibling_N = np.full(num_pieces, -1, np.int64)
    # How many of 64 neighbouring rooms have a row: what is empty is skipped at once.
    used = np.zeros(row_len // 64 + 1, np.int64)
    num_rows = 0
    for p in range(num_pieces):
        length = length_P[p]
        room = length
        while room < row_len and top[room] < 0:
            room = (room // 64 + 1) * 64 if used[room // 64] == 0 else room + 1
        if room < row_len:
            row = top[room]
            top[room] = _without_top(row, child_N, sibling_N)
            if top[room] < 0:
                used[room // 64] -= 1
        else:
            row = num_rows
            num_rows += 1
        row_P[p] = row
        start_P[p] = filled_N[row]
        filled_N[row] += length
        room = row_len - filled_N[row]
        if room > 0:
            child_N[row] = -1
            sibling_N[row] = -1
            if top[room] < 0:
                used[room // 64] += 1
                top[room] = row
            else:
                top[room] = _meld(top[room], row, child_N, sibling_N)
    return row_P, start_P, num_rows


@numba.njit(cache=True, nogil=True)
def _meld(one: int, other: int, child_N: npt.NDArray[np.int64], sibling_N: npt.NDArray[np.int64]) -> int:
    """The top of two heaps made one."""
    if other < one:
        one, other = other, one
    sibling_N[other] = child_N[one]
    child_N[one] = other
    return one


@numba.njit(cache=True, nogil=True)
def _without_top(top: int, child_N: npt.NDArray[np.int64], sibling_N: npt.NDArray[np.int64]) -> int:
    """The top of a heap whose top was taken away; -1 where nothing is left."""
    rest = child_N[top]
    pairs = -1
    while rest >= 0:  # from left to right by twos
        one = rest
        other = sibling_N[one]
        if other < 0:
            rest = -1
        else:
            rest = sibling_N[other]
            one = _meld(one, other, child_N, sibling_N)
        sibling_N[one] = pairs
        pairs = one
    top = -1
    while pairs >= 0:  # and from right to left into one
        one = pairs
        pairs = sibling_N[one]
        sibling_N[one] = -1
        top = one if top < 0 else _meld(top, one, child_N, sibling_N)
    return top

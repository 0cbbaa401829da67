"""Runs: the index of a shard, made as the shard is written. `aifactory.tokens.spans` says what is in it and searches it.

Legend   N tokens of a shard, P pieces in it, M entries of its index.

Imports numba, which takes a while: import this where documents are packed.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aifactory.text.shards import PackedRows
from aifactory.tokens.spans import FACTOR, FINISH, INDEX_SCHEMA, RUN, STRIDE, Pieces

_DIGIT_BITS = 11
"""Hashes are sorted by three digits of so many bits: their counts stay in the fastest cache."""


def index_bytes(rows: PackedRows) -> bytes:
    """The index of a shard as the bytes of an Arrow IPC file; they depend on the rows alone.

    Raises   ValueError for a shard of more than 2**32 tokens.
    """
    hash_M, place_M = entries(Pieces(rows.ids_NT, rows.documents))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, INDEX_SCHEMA) as writer:
        writer.write_batch(pa.record_batch([pa.array(hash_M), pa.array(place_M)], schema=INDEX_SCHEMA))
    return bytes(sink.getvalue())


def entries(pieces: Pieces) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Hash and place of every entry of the index, in its order."""
    if len(pieces.ids_N) > 2**32:
        raise ValueError(f"Expected a shard of at most 2**32 tokens, found {len(pieces.ids_N):,}; make smaller parts.")
    most = int((-(-(pieces.end_P - pieces.begin_P) // STRIDE)).sum())
    hash_M, place_M = np.empty((2, most), np.uint32)
    num = _find(pieces.ids_N, pieces.begin_P, pieces.end_P, pieces.offset_P, pieces.links[0], hash_M, place_M)
    return _sorted(hash_M[:num], place_M[:num])


# ── kernels ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@numba.njit(cache=True, nogil=True)
def _find(
    ids_N: npt.NDArray[np.unsignedinteger],
    begin_P: npt.NDArray[np.int64],
    end_P: npt.NDArray[np.int64],
    offset_P: npt.NDArray[np.int64],
    next_P: npt.NDArray[np.int64],
    hash_M: npt.NDArray[np.uint32],
    place_M: npt.NDArray[np.uint32],
) -> int:
    """Write the entries, by place; return how many there are."""
    num = 0
    for p in range(len(begin_P)):
        end = end_P[p]
        place = begin_P[p] + -offset_P[p] % STRIDE
        while place <= end - RUN:
            mixed = np.uint64(0)
            for i in range(RUN):
                mixed = mixed * FACTOR + np.uint64(ids_N[place + i])
            hash_M[num] = _finished(mixed)
            place_M[num] = place
            num += 1
            place += STRIDE
        # A run that goes on in the next piece, if there is one.
        while place < end:
            mixed = np.uint64(0)
            piece, at = p, place
            for _ in range(RUN):
                if at == end_P[piece]:
                    piece = next_P[piece]
                    if piece < 0:
                        break
                    at = begin_P[piece]
                mixed = mixed * FACTOR + np.uint64(ids_N[at])
                at += 1
            if piece >= 0:
                hash_M[num] = _finished(mixed)
                place_M[num] = place
                num += 1
            place += STRIDE
    return num


@numba.njit(cache=True, nogil=True)
def _finished(mixed: np.uint64) -> np.uint32:
    return np.uint32(((mixed ^ (mixed >> np.uint64(32))) * FINISH) >> np.uint64(32))


@numba.njit(cache=True, nogil=True)
def _sorted(
    hash_M: npt.NDArray[np.uint32], place_M: npt.NDArray[np.uint32]
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """The entries by hash; equal ones stay in their order.

    Source   Knuth 1998, "The Art of Computer Programming", volume 3, section 5.2.5, algorithm R.
    """
    low = np.uint32((1 << _DIGIT_BITS) - 1)
    # The number of entries of each digit, of all three digits in one pass; then where the first of them goes.
    next_D3 = np.zeros((3, 1 << _DIGIT_BITS), np.int64)
    for m in range(len(hash_M)):
        for digit in range(3):
            next_D3[digit, (hash_M[m] >> np.uint32(digit * _DIGIT_BITS)) & low] += 1
    for digit in range(3):
        total = 0
        for value in range(1 << _DIGIT_BITS):
            total, next_D3[digit, value] = total + next_D3[digit, value], total
    other_hash_M, other_place_M = np.empty_like(hash_M), np.empty_like(place_M)
    for digit in range(3):
        shift = np.uint32(digit * _DIGIT_BITS)
        for m in range(len(hash_M)):
            value = (hash_M[m] >> shift) & low
            to = next_D3[digit, value]
            next_D3[digit, value] = to + 1
            other_hash_M[to] = hash_M[m]
            other_place_M[to] = place_M[m]
        hash_M, other_hash_M = other_hash_M, hash_M
        place_M, other_place_M = other_place_M, place_M
    return hash_M, place_M

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

_HASH_MASK = np.uint64(0xFFFFFFFF00000000)


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
    keys_M = np.empty(most, np.uint64)
    num = _find(pieces.ids_N, pieces.begin_P, pieces.end_P, pieces.offset_P, pieces.links[0], keys_M)
    keys_M = keys_M[:num]
    keys_M.sort()  # no two are equal, so that every way of sorting gives the same
    return (keys_M >> np.uint64(32)).astype(np.uint32), keys_M.astype(np.uint32)


# ── kernels ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@numba.njit(cache=True, nogil=True)
def _find(
    ids_N: npt.NDArray[np.unsignedinteger],
    begin_P: npt.NDArray[np.int64],
    end_P: npt.NDArray[np.int64],
    offset_P: npt.NDArray[np.int64],
    next_P: npt.NDArray[np.int64],
    keys_M: npt.NDArray[np.uint64],
) -> int:
    """Write the entries by place, each the 32 bits of its hash and the 32 bits of its place; return how many there are."""
    num = 0
    for p in range(len(begin_P)):
        end = end_P[p]
        place = begin_P[p] + -offset_P[p] % STRIDE
        while place <= end - RUN:
            mixed = np.uint64(0)
            for i in range(RUN):
                mixed = mixed * FACTOR + np.uint64(ids_N[place + i])
            keys_M[num] = _finished(mixed) | np.uint64(place)
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
                keys_M[num] = _finished(mixed) | np.uint64(place)
                num += 1
            place += STRIDE
    return num


@numba.njit(cache=True, nogil=True)
def _finished(mixed: np.uint64) -> np.uint64:
    """The hash, in the upper half."""
    return ((mixed ^ (mixed >> np.uint64(32))) * FINISH) & _HASH_MASK

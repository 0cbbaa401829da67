"""Packing: documents into rows of exactly T tokens.

A document longer than a row is cut into whole rows and a rest; rests are placed best fit, longest first. Positions
restart with every piece, and attention never crosses from one to another.
Source   Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830, section 3 (best fit).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aifactory.text.shards import PackedRows, integer_type


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """Token ids of one row, and which of them carry loss. Both have the same length, at least 1."""

    row: str
    ids: Sequence[int]
    loss_mask: Sequence[bool]


@dataclass(frozen=True, slots=True)
class _Piece:
    document: int
    offset: int
    length: int


def pack(documents: Sequence[Document], *, row_len: int, vocab_size: int, pad_id: int) -> PackedRows:
    """Pack the documents, in an order that depends on them alone.

    Invariant  every token of every document is in exactly one row; padding carries no loss.
    Units      lengths in tokens.
    """
    pieces = [
        _Piece(i, start, min(row_len, len(document.ids) - start))
        for i, document in enumerate(documents)
        for start in range(0, len(document.ids), row_len)
    ]
    bins = _best_fit(pieces, row_len)
    shape = (len(bins), row_len)
    ids_NT = np.full(shape, pad_id, integer_type(vocab_size))
    positions_NT = np.zeros(shape, integer_type(row_len))
    loss_mask_NT = np.zeros(shape, np.uint8)
    places: list[list[dict[str, object]]] = []
    for n, contents in enumerate(bins):
        filled = 0
        where: list[dict[str, object]] = []
        for piece in contents:
            document = documents[piece.document]
            here = slice(filled, filled + piece.length)
            there = slice(piece.offset, piece.offset + piece.length)
            ids_NT[n, here] = document.ids[there]
            positions_NT[n, here] = np.arange(piece.length)
            loss_mask_NT[n, here] = document.loss_mask[there]
            # The first token of a piece is predicted from nothing that is its own.
            loss_mask_NT[n, filled] = 0
            where.append({"row": document.row, "start": filled, "offset": piece.offset, "length": piece.length})
            filled += piece.length
        positions_NT[n, filled:] = np.arange(row_len - filled)
        places.append(where)
    return PackedRows(ids_NT=ids_NT, positions_NT=positions_NT, loss_mask_NT=loss_mask_NT, documents=places)


def _best_fit(pieces: Sequence[_Piece], row_len: int) -> list[list[_Piece]]:
    bins: list[list[_Piece]] = []
    # (room left, bin), sorted: the first that is large enough leaves the least.
    rooms: list[tuple[int, int]] = []
    for piece in sorted(pieces, key=lambda p: (-p.length, p.document, p.offset)):
        at = bisect.bisect_left(rooms, (piece.length, -1))
        if at < len(rooms):
            room, chosen = rooms.pop(at)
        else:
            room, chosen = row_len, len(bins)
            bins.append([])
        bins[chosen].append(piece)
        if room > piece.length:
            bisect.insort(rooms, (room - piece.length, chosen))
    return bins

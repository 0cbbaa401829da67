"""Spans: from a text back to the rows that share the longest runs of its tokens.

Layout   trace-*.arrow, beside each shard-*.arrow and made of it alone:
             hash    uint32   of a run of RUN tokens; ascending, equal ones by their place
             place   uint32   where in the shard the run begins: row * T + column
Index    the runs that begin at every STRIDE-th token of a document, counted from its first. A run goes on over the cuts of
         a long document and never from one document to the next. Prompts are indexed as texts are.
Search   the runs that begin at any token of the text are looked up; each that is found is compared token by token, and
         followed in both directions as far as document and text are the same.
Law      a span of STRIDE + RUN - 1 = GUARANTEED tokens holds a whole run of the index wherever it begins, so it is found.
         A span of n tokens, RUN <= n < GUARANTEED, is found at n - RUN + 1 of any STRIDE places at which it may begin.
         Where the runs of a text are so common that more than MOST_CANDIDATES places would have to be compared, the rarest
         are compared first and what is left out is counted: what is then missed are spans of the commonest runs alone.
Size     8 bytes for every STRIDE tokens: half of a shard of uint16, a quarter of one of uint32.
Legend   N tokens of a shard, P pieces in it, M entries of its index; S shards; Q runs of the text, H different ones;
         C candidates, each a place and a run of the text that have the same hash.
Sources  Kent 2002, "BLAT - The BLAST-Like Alignment Tool", Genome Research 12(4), "Methods": runs of the data that do not
         overlap, looked up by all of the query's. Winnowing (Schleimer et al. 2003, SIGMOD, section 4) chooses by content
         on both sides, and so needs 1.8 times the entries for the same guarantee.
"""

from __future__ import annotations

import heapq
import mmap
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aifactory.errors import StorageError

RUN = 5
STRIDE = 8
GUARANTEED = RUN + STRIDE - 1
MOST_CANDIDATES = 200_000
"""Places that are compared with the text, over all shards of a token set."""

Ints = npt.NDArray[np.int64]
Number = TypeVar("Number", bound=np.generic)
Fetch = Callable[[list[str]], Path]
"""A local folder that holds the files of these names."""

_BLOCK = 64
"""Tokens that are compared at once."""
INDEX_SCHEMA = pa.schema([("hash", pa.uint32()), ("place", pa.uint32())], metadata={"run": str(RUN)})
FACTOR, FINISH = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharingRow:
    """A row of the corpus and the longest span that it shares with the text; of equally long ones the first in the text."""

    row: str
    shard: str
    length: int
    """Tokens of the span."""
    text_begin: int
    """The token of the text at which it begins."""
    row_begin: int
    """The token of the row's document at which it begins; the document's first is [bos]."""
    covered: int
    """Tokens of the text that lie in any span which the row shares with it."""
    num_spans: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The rows that share most, and how many there are."""

    rows: list[SharingRow]
    """By the length of the span, then by `covered`, then by id."""
    num_rows: int
    left_out: int
    """Candidates that were not compared, since there are more than MOST_CANDIDATES."""


# ── the index ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def index_name(shard: str) -> str:
    """The name of the index of a shard."""
    return shard.replace("shard-", "trace-", 1)


class Pieces:
    """The tokens of a shard and how its documents lie in it. Pieces are in the order of `begin_P`."""

    def __init__(self, ids_NT: npt.NDArray[np.unsignedinteger], documents: pa.ListArray) -> None:
        num_rows, self._row_len = ids_NT.shape
        counts = np.diff(_numbers(documents.offsets, np.int32))
        places = documents.values
        start_P, offset_P, length_P = (
            _numbers(places.field(name), np.int32).astype(np.int64) for name in ("start", "offset", "length")
        )
        self.ids_N = ids_NT.reshape(-1)
        self.rows: pa.StringArray = places.field("row")
        """The id of the row of each piece."""
        self.begin_P: Ints = np.repeat(np.arange(num_rows) * self._row_len, counts) + start_P
        self.end_P: Ints = self.begin_P + length_P
        self.offset_P: Ints = offset_P
        """The token of its document that a piece begins with."""

    @cached_property
    def links(self) -> tuple[Ints, Ints, Ints]:
        """Of each piece the one that goes on where it ends, the one before it (-1 where there is none), and the first of its
        document. It takes a while, and most spans reach over no cut."""
        next_P, previous_P = np.full((2, len(self.begin_P)), -1)
        first_P = np.arange(len(self.begin_P))
        # Only what fills a row can go on in another one.
        some = np.flatnonzero((self.end_P - self.begin_P == self._row_len) | (self.offset_P > 0))
        if len(some):
            document = _numbers(self.rows.dictionary_encode().indices, np.int32)[some]
            order = np.lexsort((self.offset_P[some], document))
            some, document = some[order], document[order]
            goes_on = document[1:] == document[:-1]
            next_P[some[:-1][goes_on]], previous_P[some[1:][goes_on]] = some[1:][goes_on], some[:-1][goes_on]
            starts = np.flatnonzero(np.concatenate([[True], ~goes_on]))
            first_P[some] = np.repeat(some[starts], np.diff([*starts, len(some)]))
        return next_P, previous_P, first_P

    def first_pieces(self, piece: Ints) -> Ints:
        """The first pieces of the documents of these: they stand for them."""
        return self.links[2][piece] if self.offset_P[piece].any() else piece

    def agreement(self, text: npt.NDArray[np.unsignedinteger], piece_C: Ints, place_C: Ints, at_C: Ints) -> Ints:
        """How many tokens from these places on, within the document, are those of the text from `at_C` on."""
        return self._agreement(text, piece_C, place_C, at_C, forward=True)

    def agreement_before(self, text: npt.NDArray[np.unsignedinteger], piece_C: Ints, place_C: Ints, at_C: Ints) -> Ints:
        """How many tokens that end before these places are those of the text that end before `at_C`."""
        return self._agreement(text, piece_C, place_C, at_C, forward=False)

    def _agreement(
        self, text: npt.NDArray[np.unsignedinteger], piece: Ints, place: Ints, at: Ints, *, forward: bool
    ) -> Ints:
        sign, steps = (1, np.arange(_BLOCK)) if forward else (-1, -1 - np.arange(_BLOCK))
        border_P = self.begin_P if forward else self.end_P
        agreed = np.zeros(len(piece), np.int64)
        piece, going = piece.copy(), np.arange(len(piece))
        while len(going):
            left_in_piece = self.end_P[piece] - place if forward else place - self.begin_P[piece]
            left_in_text = len(text) - at if forward else at
            room = np.minimum(left_in_piece, left_in_text)
            same = self.ids_N.take(place[:, None] + steps, mode="clip") == text.take(at[:, None] + steps, mode="clip")
            same &= np.arange(_BLOCK) < room[:, None]
            count = np.where(same.all(axis=1), _BLOCK, same.argmin(axis=1))
            agreed[going] += count
            place, at = place + sign * count, at + sign * count
            goes_on = (count == np.minimum(room, _BLOCK)) & (count < left_in_text)
            crosses = np.flatnonzero(goes_on & (count == left_in_piece) & self._may_cross(piece, forward=forward))
            goes_on &= count < left_in_piece
            if len(crosses):
                piece[crosses] = self.links[0 if forward else 1][piece[crosses]]
                goes_on[crosses] = piece[crosses] >= 0
                place[crosses] = border_P[piece[crosses]]
            going, piece, place, at = going[goes_on], piece[goes_on], place[goes_on], at[goes_on]
        return agreed

    def _may_cross(self, piece: Ints, *, forward: bool) -> npt.NDArray[np.bool_]:
        """Whether a document may go on beyond its piece, as far as can be told without the links."""
        found: npt.NDArray[np.bool_] = (
            self.end_P[piece] - self.begin_P[piece] == self._row_len if forward else self.offset_P[piece] > 0
        )
        return found


def _hashes(tokens: Iterable[npt.NDArray[np.unsignedinteger]]) -> npt.NDArray[np.uint32]:
    """The hashes of runs, given their first tokens, their second tokens and so on."""
    mixed = np.zeros(1, np.uint64)
    for some in tokens:
        mixed = mixed * FACTOR + some
    mixed = (mixed ^ (mixed >> _HALF)) * FINISH
    return (mixed >> _HALF).astype(np.uint32)


def _ranks(counts: Ints) -> Ints:
    """0, 1, ..., count - 1 of each count, end to end."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


# ── the search ────────────────────────────────────────────────────────────────────────────────────────────────────────


def find_rows(ids: Sequence[int], shards: Sequence[str], names: Collection[str], fetch: Fetch, *, limit: int) -> Found:
    """The rows that share the longest spans with a text, at most `limit`, from the shards of one token set.

    ids      the tokens of the text, by the tokenizer of the token set
    names    the files of the token set. Where there is no index of a shard among them, since it was made by a version
             that had none, it is made now, in memory
    limit    at least 1
    Raises   ValueError for less than RUN tokens; StorageError.
    """
    if len(ids) < RUN:
        raise ValueError(f"Expected a text of at least {RUN} tokens, found {len(ids)}.")
    text = np.array(ids, np.uint32)
    hash_Q = _hashes(text[i : len(text) - RUN + 1 + i] for i in range(RUN))
    hash_H, which_Q = np.unique(hash_Q, return_inverse=True)
    fetch([name for name in map(index_name, shards) if name in names])
    low_SH, counts_SH = np.zeros((2, len(shards), len(hash_H)), np.int64)
    # No file stays open for longer than it is read: there may be more shards than a process may have files.
    for number, shard in enumerate(shards):
        low_SH[number], counts_SH[number] = _Index.open(shard, names, fetch).look_up(hash_H)
    compared_SH = _rarest_first(counts_SH, np.bincount(which_Q))
    best: list[SharingRow] = []
    num_rows = 0
    for number in np.flatnonzero(compared_SH.any(axis=1)).tolist():
        counts_Q = compared_SH[number][which_Q]
        entry_C = np.repeat(low_SH[number][which_Q], counts_Q) + _ranks(counts_Q)
        place_C = _Index.open(shards[number], names, fetch).place_M[entry_C].astype(np.int64)
        pieces = _pieces(shards[number], fetch)
        spans = _follow(pieces, text, place_C, np.repeat(np.arange(len(which_Q)), counts_Q))
        rows, num = _best_rows(shards[number], pieces, spans, limit)
        best, num_rows = best + rows, num_rows + num
    left_out = int((counts_SH - compared_SH).sum(axis=0)[which_Q].sum())
    return Found(rows=heapq.nsmallest(limit, best, key=_rank), num_rows=num_rows, left_out=left_out)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Index:
    """The index of one shard."""

    hash_M: npt.NDArray[np.uint32]
    place_M: npt.NDArray[np.uint32]

    @classmethod
    def open(cls, shard: str, names: Collection[str], fetch: Fetch) -> Self:
        """Map it into memory, or make it where the token set has none."""
        name = index_name(shard)
        if name not in names:
            from aifactory.tokens.runs import entries

            hash_M, place_M = entries(_pieces(shard, fetch))
            return cls(hash_M=hash_M, place_M=place_M)
        batch = _mapped(fetch([name]) / name)
        run = (batch.schema.metadata or {}).get(b"run", b"none").decode()
        if run != str(RUN):
            raise StorageError(
                f"expected an index of runs of {RUN} tokens in {name}, found {run}: another version made it. Move its token "
                "set away and tokenize again."
            )
        return cls(hash_M=_numbers(batch.column("hash"), np.uint32), place_M=_numbers(batch.column("place"), np.uint32))

    def look_up(self, hash_H: npt.NDArray[np.uint32]) -> tuple[Ints, Ints]:
        """The first entry of each of these hashes, which are ascending, and how many entries it has."""
        low_H = np.searchsorted(self.hash_M, hash_H)
        counts_H = np.zeros(len(hash_H), np.int64)
        there = np.flatnonzero(low_H < len(self.hash_M))
        there = there[self.hash_M[low_H[there]] == hash_H[there]]
        counts_H[there] = np.searchsorted(self.hash_M, hash_H[there], side="right") - low_H[there]
        return low_H, counts_H


def _pieces(shard: str, fetch: Fetch) -> Pieces:
    """A shard, mapped into memory."""
    batch = _mapped(fetch([shard]) / shard)
    ids = batch.column("ids")
    kind: type[np.unsignedinteger] = np.uint16 if ids.type.value_type == pa.uint16() else np.uint32
    return Pieces(_numbers(ids.values, kind).reshape(len(ids), ids.type.list_size), batch.column("documents"))


def _mapped(path: Path) -> pa.RecordBatch:
    try:
        # pyarrow's own map asks the system to read all of the file; a search touches little of it.
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise StorageError(f"expected {path}, found no such file; move its folder away and tokenize again.") from error
    return pa.ipc.open_file(pa.py_buffer(data)).get_batch(0)


def _numbers(array: pa.Array, kind: type[Number]) -> npt.NDArray[Number]:
    """The numbers of an array without nulls, where they lie. `to_numpy` does the same and first imports pandas."""
    if not len(array):
        return np.zeros(0, kind)
    return np.frombuffer(array.buffers()[1], kind, len(array), array.offset * np.dtype(kind).itemsize)


def _rarest_first(counts_SH: Ints, repeats_H: Ints) -> Ints:
    """How many of the places of each run, in the order of the shards, are compared: MOST_CANDIDATES in all.

    The rarest runs come first, all places of each; of the first that is too common, as many as there is room for.
    repeats_H   how often each run is in the text
    """
    places_H = counts_SH.sum(axis=0)
    order = np.argsort(places_H, kind="stable")
    ends = np.cumsum((places_H * repeats_H)[order])
    room = np.maximum(MOST_CANDIDATES - (ends - (places_H * repeats_H)[order]), 0)
    compared_H = np.zeros_like(places_H)
    compared_H[order] = np.minimum(places_H[order], room // repeats_H[order])
    before_SH = np.cumsum(counts_SH, axis=0) - counts_SH
    compared_SH: Ints = np.clip(compared_H - before_SH, 0, counts_SH)
    return compared_SH


_Spans = tuple[Ints, Ints, Ints, Ints]
"""Of each span: the first piece of its document, the token of it and the token of the text where it begins, its length."""


def _follow(pieces: Pieces, text: npt.NDArray[np.uint32], place_C: Ints, at_C: Ints) -> _Spans:
    """The spans around the candidates, each once, by document and by where they begin in the text."""
    text = text.astype(pieces.ids_N.dtype)
    piece = np.searchsorted(pieces.begin_P, place_C, side="right") - 1
    # Candidates of one line, that is at the same distance from the text, are in one span wherever all between is equal.
    order = np.lexsort((at_C, place_C - at_C, piece))
    piece, place, at = piece[order], place_C[order], at_C[order]
    found = [np.zeros((4, 0), np.int64)]
    while len(at):
        begins_line = np.concatenate([[True], (np.diff(piece) != 0) | (np.diff(place - at) != 0)])
        heads = (piece[begins_line], place[begins_line], at[begins_line])
        after = pieces.agreement(text, *heads)
        real = after >= RUN  # else the hashes are equal and the runs are not
        heads_of_spans = (heads[0][real], heads[1][real], heads[2][real])
        before = pieces.agreement_before(text, *heads_of_spans)
        head_piece, head_place, head_at = heads_of_spans
        in_document = pieces.offset_P[head_piece] + head_place - pieces.begin_P[head_piece]
        found.append(
            np.stack(
                [pieces.first_pieces(head_piece), in_document - before, head_at - before, after[real] + before],
            )
        )
        ends = heads[2] + np.maximum(after, 1)
        rest = at >= ends[np.cumsum(begins_line) - 1]
        piece, place, at = piece[rest], place[rest], at[rest]
    spans = np.concatenate(found, axis=1)
    spans = spans[:, np.lexsort((spans[1], spans[2], spans[0]))]
    # A span over a cut is found from both sides.
    once = np.concatenate([[True], (np.diff(spans[:3], axis=1) != 0).any(axis=0)])[: spans.shape[1]]
    document, in_document, in_text, length = spans[:, once]
    return document, in_document, in_text, length


def _best_rows(shard: str, pieces: Pieces, spans: _Spans, limit: int) -> tuple[list[SharingRow], int]:
    """Of the D documents of one shard with such spans the `limit` that share most, in any order, and D."""
    document, in_document, in_text, length = spans
    piece_D, begins_D, num_spans_D = np.unique(document, return_index=True, return_counts=True)
    if not len(piece_D):
        return [], 0
    longest_D = np.lexsort((-length, document))[begins_D]
    # Over what the spans before it have covered, each covers what lies beyond the furthest of them.
    ends = in_text + length
    base = np.repeat(np.arange(len(piece_D)), num_spans_D) * (int(ends.max()) + 1)
    furthest = np.concatenate([[0], np.maximum.accumulate(base + ends)[:-1]])
    covered_D = np.add.reduceat(np.maximum(base + ends - np.maximum(base + in_text, furthest), 0), begins_D)
    length_D = length[longest_D]
    last = np.lexsort((-covered_D, -length_D))[min(limit, len(piece_D)) - 1]
    # Those that are equal to the last one compete by their ids.
    some = np.flatnonzero((length_D > length_D[last]) | ((length_D == length_D[last]) & (covered_D >= covered_D[last])))
    names = [pieces.rows[at].as_py() for at in piece_D[some].tolist()]
    ranks = zip((-length_D[some]).tolist(), (-covered_D[some]).tolist(), names, some.tolist(), strict=True)
    rows = [
        SharingRow(
            row=name,
            shard=shard,
            length=-length,
            text_begin=int(in_text[longest_D[at]]),
            row_begin=int(in_document[longest_D[at]]),
            covered=-covered,
            num_spans=int(num_spans_D[at]),
        )
        for length, covered, name, at in heapq.nsmallest(limit, ranks)
    ]
    return rows, len(piece_D)


def _rank(row: SharingRow) -> tuple[int, int, str]:
    return -row.length, -row.covered, row.row

"""Sketches: of each row the least hashes of its runs, by which rows that nearly equal one that is held out are told.

Run         RUN bytes that follow one another, A-Z as a-z, about five words.
Hash        32 bits; of each run from that of the run before, by a shift and an addition (the gear hash of Xia et al. 2016, FastCDC, USENIX
            ATC, 3.1). What is in the first bytes of a run stands in its upper bits alone, so a run is a little less than RUN.
Sketch      the least SIZE hashes of a text, each once, ascending. A text of fewer than SHORTEST bytes, some twenty words, has none: in it
            one word may make all the difference (what is asked of one city and of another).
Similarity  of two sketches: of the least SIZE hashes of both together the share that is in both, which estimates the Jaccard similarity
            of their runs (Broder 1997, On the resemblance and containment of documents, 2). Its error is at most
            sqrt(J (1 - J) / SIZE). Of 50 words of five letters of which 2 are changed J is 0.57 or more, of 100 of which 3 are 0.68
            or more.
Common      a run that more than MOST_ROWS rows of the holdout have among their least is common to all (a licence, a form): it makes
            no row like another.
Cost        about 3 ns of CPU a byte (`benchmarks/ingest_profile.py`), and 4 bytes a hash. Sketches are made where a row is read, and none is read again.

Import this module where it is needed: numba takes its time.

Legend   B bytes, N rows, M hashes of all of them, H rows that are held out, K hashes of all of those, C hashes that are collected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aifactory.text.buffers import text_buffers

RUN = 32
SIZE = 32
SHORTEST = 128
MOST_ROWS = 16
_ROOM = 4 * SIZE
_FILTER_BITS = 16
_SPREAD = np.uint32(0x9E3779B1)
_ALL, _LOW, _ONE = np.uint64(1 << 32), np.uint64((1 << 32) - 1), np.uint64(1)


def _gear() -> npt.NDArray[np.uint64]:
    """A number for each byte, the same in every process (SplitMix64; Steele et al. 2014, OOPSLA)."""
    numbers = []
    for byte in range(256):
        value = (ord(chr(byte).lower()) + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF if byte < 128 else 0
        value = value or (byte + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        numbers.append((value ^ value >> 31) >> 32)
    return np.array(numbers, np.uint64)


_GEAR = _gear()


@dataclass(frozen=True)
class Sketches:
    """Those of N rows."""

    hash_M: npt.NDArray[np.uint32]
    end_N1: npt.NDArray[np.int64]
    """Those of row i are hash_M[end_N1[i] : end_N1[i + 1]]."""

    @staticmethod
    def of(texts: pa.Array) -> Sketches:
        """Those of texts (string or large_string without nulls)."""
        data_B, offset_N1 = text_buffers(texts)
        # A view that can't be written: buffers of either kind are one type to the compiler.
        data_B = data_B.view()
        data_B.flags.writeable = False
        offset_N1 = offset_N1.astype(np.int64)
        most = np.clip(np.diff(offset_N1) - RUN + 1, 0, SIZE).sum()
        hash_M, end_N1 = np.empty(int(most), np.uint32), np.zeros(len(texts) + 1, np.int64)
        _sketch(data_B, offset_N1, _GEAR, hash_M, end_N1)
        return Sketches(hash_M[: end_N1[-1]], end_N1)

    @staticmethod
    def joined(some: Sequence[Sketches]) -> Sketches:
        """All rows of several, in their order."""
        lengths = np.concatenate([np.empty(0, np.int64), *(np.diff(each.end_N1) for each in some)])
        hashes = np.concatenate([np.empty(0, np.uint32), *(each.hash_M for each in some)])
        return Sketches(hashes, np.append(np.int64(0), np.cumsum(lengths)))

    def __len__(self) -> int:
        return len(self.end_N1) - 1

    def take(self, rows: npt.NDArray[np.bool_]) -> Sketches:
        """The rows of a mask."""
        lengths = np.diff(self.end_N1)
        return Sketches(self.hash_M[np.repeat(rows, lengths)], np.append(np.int64(0), np.cumsum(lengths[rows])))

    def only(self, rows: npt.NDArray[np.bool_]) -> Sketches:
        """All rows, of which those that are not in the mask have no sketch any more."""
        lengths = np.diff(self.end_N1)
        return Sketches(
            self.hash_M[np.repeat(rows, lengths)], np.append(np.int64(0), np.cumsum(np.where(rows, lengths, 0)))
        )

    def most_like(self, held: Sketches) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """For each row which row of `held` it is most like, the first of equals, and how much; -1 and 0 where it has no run with any
        that is not common."""
        like_N = np.full(len(self), -1, np.int64)
        similarity_N = np.zeros(len(self))
        _find(self.hash_M, self.end_N1, held.hash_M, held.end_N1, *held._postings, like_N, similarity_N)
        return like_N, similarity_N

    @cached_property
    def _postings(
        self,
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint32], npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        """Which of the hashes are not common; those in order, each as often as rows have it, those rows, and a filter of them."""
        row_K = np.repeat(np.arange(len(self)), np.diff(self.end_N1))
        order_K = np.lexsort((row_K, self.hash_M))
        hash_K, row_K = self.hash_M[order_K], row_K[order_K]
        _, place_K, count_K = np.unique(hash_K, return_inverse=True, return_counts=True)
        is_rare_K = np.empty(len(hash_K), bool)
        is_rare_K[order_K] = count_K[place_K] <= MOST_ROWS
        hash_K, row_K = hash_K[is_rare_K[order_K]], row_K[is_rare_K[order_K]]
        filter_F = np.zeros(1 << max(len(hash_K) * _FILTER_BITS, 8).bit_length(), np.uint8)
        _fill(hash_K, filter_F)
        return is_rare_K, hash_K, row_K, filter_F


# ── kernels ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@numba.njit(cache=True, nogil=True)
def _sketch(data_B, offset_N1, gear_256, hash_M, end_N1):  # type: ignore[no-untyped-def]
    hash_C = np.empty(_ROOM, np.uint64)
    m = 0
    for i in range(len(offset_N1) - 1):
        runs = offset_N1[i + 1] - offset_N1[i] - RUN + 1
        if runs > SHORTEST - RUN:
            # So that about twice SIZE are below it; should they be too few after all, it is raised.
            bound = min(_ALL, _ALL * np.uint64(2 * SIZE) // np.uint64(runs))
            count = _collect(data_B, offset_N1[i], offset_N1[i + 1], gear_256, bound, hash_C)
            while count < SIZE and bound < _ALL:
                bound = min(_ALL, bound * np.uint64(8))
                count = _collect(data_B, offset_N1[i], offset_N1[i + 1], gear_256, bound, hash_C)
            hash_M[m : m + count] = hash_C[:count]
            m += count
        end_N1[i + 1] = m


@numba.njit(cache=True, nogil=True)
def _collect(data_B, begin, end, gear_256, bound, hash_C):  # type: ignore[no-untyped-def]
    """The least hashes below the bound, at most SIZE, each once, ascending; how many they are."""
    value = np.uint64(0)
    for b in range(begin, begin + RUN - 1):
        value = (value << _ONE) + gear_256[data_B[b]]
    count = 0
    for b in range(begin + RUN - 1, end):
        value = (value << _ONE) + gear_256[data_B[b]]
        # Written in any case: whether it is wanted nobody can foretell.
        hash_C[count] = value & _LOW
        count += (value & _LOW) < bound
        if count == _ROOM:
            count = _least(hash_C, count)
            if count == SIZE:
                bound = hash_C[SIZE - 1]
    return _least(hash_C, count)


@numba.njit(cache=True, nogil=True)
def _least(hash_C, count):  # type: ignore[no-untyped-def]
    """Leave the least SIZE of so many, each once, ascending; how many they are."""
    found_C = np.sort(hash_C[:count])
    left = 0
    for c in range(count):
        if left == SIZE:
            break
        if left == 0 or found_C[c] != hash_C[left - 1]:
            hash_C[left] = found_C[c]
            left += 1
    return left


@numba.njit(cache=True, nogil=True)
def _bit(found, last):  # type: ignore[no-untyped-def]
    """Where a hash stands in a filter: the least hashes of texts are small, so they are spread first."""
    spread = np.uint32(found * _SPREAD)
    return np.int64(spread ^ (spread >> np.uint32(15))) & last


@numba.njit(cache=True, nogil=True)
def _fill(hash_K, filter_F):  # type: ignore[no-untyped-def]
    for found in hash_K:
        filter_F[_bit(found, len(filter_F) - 1)] = 1


@numba.njit(cache=True, nogil=True)
def _find(hash_M, end_N1, held_K, held_end_H1, is_rare_K, posted_K, row_K, filter_F, like_N, similarity_N):  # type: ignore[no-untyped-def]
    """For each row the row of the holdout that it is most like, among those that share a rare run with it."""
    seen_H = np.full(len(held_end_H1) - 1, -1, np.int64)
    for i in range(len(like_N)):
        begin, end = end_N1[i], end_N1[i + 1]
        for m in range(begin, end):
            found = hash_M[m]
            if filter_F[_bit(found, len(filter_F) - 1)] == 0:
                continue
            low = np.searchsorted(posted_K, found)
            while low < len(posted_K) and posted_K[low] == found:
                h = row_K[low]
                low += 1
                if seen_H[h] == i:
                    continue
                seen_H[h] = i
                row = slice(held_end_H1[h], held_end_H1[h + 1])
                similarity = _similarity(hash_M[begin:end], held_K[row], is_rare_K[row])
                if similarity > similarity_N[i] or (similarity == similarity_N[i] and h < like_N[i]):
                    like_N[i], similarity_N[i] = h, similarity


@numba.njit(cache=True, nogil=True)
def _similarity(one_S, other_S, is_rare_S):  # type: ignore[no-untyped-def]
    """Of the least SIZE of both together the share that is in both, and rare in the other."""
    i = j = both = seen = 0
    while seen < SIZE and (i < len(one_S) or j < len(other_S)):
        if j == len(other_S) or (i < len(one_S) and one_S[i] < other_S[j]):
            i += 1
        elif i == len(one_S) or other_S[j] < one_S[i]:
            j += 1
        else:
            both += is_rare_S[j]
            i, j = i + 1, j + 1
        seen += 1
    return both / seen

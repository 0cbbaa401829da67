"""Contamination: how much of a text occurs word for word in texts that are held out.

Words      as in `minhash`: lower case, no punctuation, split at white space.
N-grams    A text's runs of 13 words; one of 8 to 12 words has one, of all its words, and matches a text of just these words; a
           shorter one has none and matches nothing (Brown et al. 2020, Language Models are Few-Shot Learners, appendix C:
           13 words at most, and 8 at least, because shorter runs collide by chance). `build` over prompts and
           answers apart: a run that spans both is nobody's quotation.
Measured   The share of a text's n-grams that occur in any text of the index; and its largest passage: the words that are
           covered by n-grams which occur there and of which each begins at most 4 * ngram_words after the one
           before. So a passage goes on over three words that were changed, wherever they stand.
Leak       A share of MAX_SHARE, or a passage of MAX_PASSAGE_WORDS. The share finds copies among short texts, whatever was
           changed at their ends; the passage finds a copy in a long document, of which it may be one per cent. In 100 words of
           which 3 are changed a share of 0.55 or more is left. A quotation of one sentence is neither: 25 words
           make 13 n-grams, less than a fifth in a text of 78 words or more. Verbatim passages of 50 tokens are what Lee
           et al. 2021 (arXiv 2107.06499, 4.1) take for duplicates.
Common     What many training rows have in common (a licence, a greeting, a form) leaks nothing. Count by
           `document_counts` in how many training rows each n-gram occurs, add the counts up over blocks, measure again by
           `without`. Rows without a match need not be read again. Count after duplicates are dropped: many copies of
           one leak would pass for common.
Law        An index is a set: it depends on the texts alone, not on their order, number or blocks, and the merge of
           indexes is the index of all their texts.
Chance     N-grams are 64-bit hashes: K of them make a given other one a false match with probability K / 2^64.

Import this module where it is needed: numba takes its time.

Legend   N texts, W words or n-grams of some of them, K n-grams of the index, F words of the filter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aifactory.ingest.minhash import hashed_words

NGRAM_WORDS = 13
MIN_WORDS = 8
MAX_SHARE = 0.2
MAX_PASSAGE_WORDS = 50
MAX_DOCUMENTS = 10

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)
_REACH = 4  # times ngram_words: how far apart the n-grams of a passage may begin
_FILTER_BITS = 16  # for each n-gram: half a per cent of the others pass the filter


@dataclass(frozen=True, slots=True)
class Overlaps:
    """What N texts have in common with the texts of an index."""

    share_N: npt.NDArray[np.float64]
    """Of the text's n-grams; 0 where it has none."""
    passage_words_N: npt.NDArray[np.int64]
    """The words of the largest passage that occur there; 0 where there is none."""

    def leaks(
        self, *, max_share: float = MAX_SHARE, max_passage_words: int = MAX_PASSAGE_WORDS
    ) -> npt.NDArray[np.bool_]:
        """Which of the N texts reach either bound."""
        return (self.share_N >= max_share) | (self.passage_words_N >= max_passage_words)


@dataclass(frozen=True, eq=False)
class ContaminationIndex:
    """The n-grams of texts that are held out.

    Is kept as `np.save` of `keys_K` (8 bytes an n-gram) and may be mapped into memory; a filter of 2 to 4 bytes an n-gram is
    made where texts are first compared.
    """

    keys_K: npt.NDArray[np.uint64]
    """Sorted, each once."""
    ngram_words: int = NGRAM_WORDS
    min_words: int = MIN_WORDS

    @staticmethod
    def build(texts: pa.Array, *, ngram_words: int = NGRAM_WORDS, min_words: int = MIN_WORDS) -> ContaminationIndex:
        """The index of texts (string or large_string without nulls).

        Raises   ValueError where not 1 <= min_words <= ngram_words.
        """
        if not 1 <= min_words <= ngram_words:
            raise ValueError(f"expected 1 <= min_words <= ngram_words, found {min_words} and {ngram_words}")
        keys = [_sorted_set([ngram_W]) for ngram_W, _, _ in _ngrams(texts, ngram_words, min_words)]
        return ContaminationIndex(_sorted_set(keys), ngram_words, min_words)

    @staticmethod
    def merge(indexes: Sequence[ContaminationIndex]) -> ContaminationIndex:
        """The index of all the texts of one index or more.

        Raises   ValueError where they were built with different lengths.
        """
        lengths = {(index.ngram_words, index.min_words) for index in indexes}
        if len(lengths) != 1:
            raise ValueError(
                f"expected indexes with one ngram_words and min_words, found {sorted(lengths)}; build them again alike"
            )
        return ContaminationIndex(_sorted_set([index.keys_K for index in indexes]), *lengths.pop())

    @property
    def digest(self) -> str:
        """SHA-256 of the lengths and the n-grams, 64 hex digits."""
        state = hashlib.sha256(f"{self.ngram_words} {self.min_words}\n".encode())
        state.update(np.ascontiguousarray(self.keys_K, "<u8").data)
        return state.hexdigest()

    def overlaps(self, texts: pa.Array) -> Overlaps:
        """What each text has in common with the texts of the index."""
        overlaps = Overlaps(np.zeros(len(texts)), np.zeros(len(texts), np.int64))
        start = 0
        for found_W, end_N1, length_N in self._found(texts):
            rows = slice(start, start + len(length_N))
            _measure(
                found_W,
                end_N1,
                length_N,
                _REACH * self.ngram_words,
                overlaps.share_N[rows],
                overlaps.passage_words_N[rows],
            )
            start = rows.stop
        return overlaps

    def document_counts(self, texts: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The places in `keys_K` of the n-grams that occur in the texts, and in how many of the texts each does.

        `np.add.at(count_K, places, counts)` adds up the counts of blocks.
        """
        codes = [np.empty(0, np.int64)]
        for found_W, end_N1, length_N in self._found(texts):
            text_W = np.repeat(np.arange(len(length_N)), np.diff(end_N1))
            code_W = np.unique(text_W[found_W >= 0] * len(self.keys_K) + found_W[found_W >= 0])
            codes.append(code_W % max(len(self.keys_K), 1))
        places, counts = np.unique(np.concatenate(codes), return_counts=True)
        return places, counts.astype(np.int64)

    def without(self, count_K: npt.NDArray[np.int64], *, max_documents: int = MAX_DOCUMENTS) -> ContaminationIndex:
        """The index without the n-grams that occur in more than `max_documents` texts by `count_K`."""
        if len(count_K) != len(self.keys_K):
            raise ValueError(f"expected a count for each of {len(self.keys_K)} n-grams, found {len(count_K)}")
        return ContaminationIndex(self.keys_K[count_K <= max_documents], self.ngram_words, self.min_words)

    def _found(
        self, texts: pa.Array
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """What `_ngrams` yields, with the place in `keys_K` for each n-gram, or -1."""
        key_K = np.asarray(self.keys_K).view()
        key_K.flags.writeable = False  # one type to the compiler, whether it lies in a file or not
        for ngram_W, end_N1, length_N in _ngrams(texts, self.ngram_words, self.min_words):
            yield _look_up(ngram_W, self._filter, key_K), end_N1, length_N

    @cached_property
    def _filter(self) -> npt.NDArray[np.uint64]:
        words = 1 << max(len(self.keys_K) * _FILTER_BITS // 64, 1).bit_length()
        filter_F = np.zeros(words, np.uint64)
        _fill_filter(np.array(self.keys_K), filter_F)
        return filter_F


def _sorted_set(keys: Sequence[npt.NDArray[np.uint64]]) -> npt.NDArray[np.uint64]:
    """All keys, each once (numpy.unique hashes, which takes twenty times as long)."""
    key_K: npt.NDArray[np.uint64] = np.sort(np.concatenate([np.empty(0, np.uint64), *keys]))
    is_first_K = np.append(True, key_K[1:] != key_K[:-1])[: len(key_K)]
    key_K = key_K[is_first_K]
    return key_K


def _ngrams(
    texts: pa.Array, ngram_words: int, min_words: int
) -> Iterator[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """For some texts after the other the hashes of their n-grams, where each text's end, and the words of each of them."""
    for word_W, word_end_N1 in hashed_words(texts):
        words_N = np.diff(word_end_N1)
        length_N = np.minimum(words_N, ngram_words)
        end_N1 = np.zeros(len(word_end_N1), np.int64)
        np.cumsum(np.where(words_N >= min_words, words_N - length_N + 1, 0), out=end_N1[1:])
        yield _hash_ngrams(word_W, word_end_N1, end_N1, length_N), end_N1, length_N


# ── kernels ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@numba.njit(cache=True, nogil=True)
def _hash_ngrams(word_W, word_end_N1, end_N1, length_N):  # type: ignore[no-untyped-def]
    """A polynomial of the words' hashes for each n-gram, from that of the n-gram before it."""
    ngram_W = np.empty(end_N1[-1], np.uint64)
    for i in range(len(length_N)):
        if end_N1[i + 1] == end_N1[i]:
            continue
        length = length_N[i]
        salt = np.uint64(length) * _MIX_B
        begin = word_end_N1[i]
        value = np.uint64(0)
        leaving = np.uint64(1)
        for q in range(begin, begin + length):
            value = value * _GOLDEN + word_W[q]
            leaving = leaving * _GOLDEN
        for w in range(end_N1[i], end_N1[i + 1]):
            q = begin + w - end_N1[i]
            if w > end_N1[i]:
                value = value * _GOLDEN + word_W[q + length - 1] - word_W[q - 1] * leaving
            mixed = (value ^ salt) * _MIX_A
            mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIX_B
            ngram_W[w] = mixed ^ (mixed >> np.uint64(32))
    return ngram_W


@numba.njit(cache=True, nogil=True)
def _filter_mask(key):  # type: ignore[no-untyped-def]
    """Three of the 64 bits of a word of the filter; the word itself is told by the upper half of the key."""
    six = np.uint64(63)
    one = np.uint64(1)
    return one << (key & six) | one << ((key >> np.uint64(6)) & six) | one << ((key >> np.uint64(12)) & six)


@numba.njit(cache=True, nogil=True)
def _fill_filter(key_K, filter_F):  # type: ignore[no-untyped-def]
    """A Bloom filter whose bits of one key lie in one word (Putze, Sanders and Singler 2007, WEA)."""
    last = np.uint64(len(filter_F) - 1)
    for key in key_K:
        filter_F[(key >> np.uint64(32)) & last] |= _filter_mask(key)


@numba.njit(cache=True, nogil=True)
def _look_up(ngram_W, filter_F, key_K):  # type: ignore[no-untyped-def]
    """Where each n-gram stands among the sorted keys; -1 where it doesn't."""
    found_W = np.full(len(ngram_W), -1, np.int64)
    last = np.uint64(len(filter_F) - 1)
    for w in range(len(ngram_W)):
        key = ngram_W[w]
        mask = _filter_mask(key)
        if filter_F[(key >> np.uint64(32)) & last] & mask != mask:
            continue
        low, high = 0, len(key_K)
        while low < high:
            middle = (low + high) >> 1
            if key_K[middle] < key:
                low = middle + 1
            else:
                high = middle
        if low < len(key_K) and key_K[low] == key:
            found_W[w] = low
    return found_W


@numba.njit(cache=True, nogil=True)
def _measure(found_W, end_N1, length_N, reach, share_N, passage_words_N):  # type: ignore[no-untyped-def]
    """The share of each text's n-grams that were found, and the words of its largest passage."""
    for i in range(len(length_N)):
        begin, end = end_N1[i], end_N1[i + 1]
        hits = largest = covered = 0
        before = begin - reach - 1
        for w in range(begin, end):
            if found_W[w] < 0:
                continue
            if w - before > reach:
                covered = 0
            covered += min(w - before, length_N[i])
            before = w
            hits += 1
            largest = max(largest, covered)
        passage_words_N[i] = largest
        share_N[i] = hits / (end - begin) if end > begin else 0.0

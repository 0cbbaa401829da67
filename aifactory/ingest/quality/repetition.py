"""Gopher's repetition rules: `gopher_repetition` (Rae et al. 2021, arXiv:2112.11446, table A1)."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import pyarrow as pa

from aifactory.ingest.columns import Verdicts
from aifactory.ingest.quality.spans import (
    HALF,
    KEY_A,
    KEY_B,
    KEY_C,
    LOW_6,
    MOST_BITS,
    SIX,
    bound_repeated,
    count_repeated,
    table_bits,
)
from aifactory.ingest.words import (
    BYTES,
    NONE,
    ONE,
    SLACK,
    copy_16,
    count_chars,
    equal_bytes,
    first_bits,
    first_bytes,
    hash_bytes,
    is_ascii,
    load_8,
    lowest,
    ones,
    spaces,
    strip_left,
    strip_right,
    with_slack,
    within,
)

_KEY_BYTES = 16
_BOOLS = numba.types.Array(numba.boolean, 1, "C")
_U8, _I64, _F64 = numba.uint8[::1], numba.int64[::1], numba.float64[::1]
_TOP_BIT = np.uint64(63)


@dataclass(frozen=True, slots=True)
class GopherRepetition:
    """Thresholds of `gopher_repetition`. An empty tuple switches its rules off, a fraction of 0 in it does not.

    Raises   ValueError for n-grams of fewer than one word.
    """

    dup_line_frac: float = 0.3
    """Greatest share of lines that occurred before in the text."""
    dup_para_frac: float = 0.3
    """Greatest share of paragraphs that did."""
    dup_line_char_frac: float = 0.2
    """Greatest share of the text's characters in such lines."""
    dup_para_char_frac: float = 0.2
    """Greatest share of the text's characters in such paragraphs."""
    top_n_grams: tuple[tuple[int, float], ...] = ((2, 0.2), (3, 0.18), (4, 0.16))
    """Words of an n-gram, and the greatest share of the text's characters in the most frequent of these n-grams."""
    dup_n_grams: tuple[tuple[int, float], ...] = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
    """Words of an n-gram, and the greatest share of the text's characters in n-grams that occurred before in it."""

    def __post_init__(self) -> None:
        if low := [n for n, _ in (*self.top_n_grams, *self.dup_n_grams) if n < 1]:
            raise ValueError(f"expected n-grams of at least 1 word, found {low[0]} in top_n_grams or dup_n_grams")


def gopher_repetition_rules(params: GopherRepetition) -> tuple[str, ...]:
    """The rules' names, in order."""
    return (
        "empty",
        "dup_para_frac",
        "dup_para_char_frac",
        "dup_line_frac",
        "dup_line_char_frac",
        *(f"top_{n}_gram" for n, _ in params.top_n_grams),
        *(f"duplicated_{n}_n_grams" for n, _ in params.dup_n_grams),
    )


def gopher_repetition(texts: pa.Array, params: GopherRepetition) -> Verdicts:
    """Which of `gopher_repetition_rules(params)` each text breaks first; the score is the share that is too great."""
    verdicts = Verdicts.none(len(texts), gopher_repetition_rules(params))
    limits = np.array(
        [params.dup_para_frac, params.dup_para_char_frac, params.dup_line_frac, params.dup_line_char_frac], np.float64
    )
    top, dup = (np.array(grams, np.float64).reshape(-1, 2) for grams in (params.top_n_grams, params.dup_n_grams))
    for rows, data_B, offset_N1 in with_slack(texts):
        _gopher_repetition(
            data_B,
            offset_N1,
            limits,
            top[:, 0].astype(np.int64),
            top[:, 1].copy(),
            dup[:, 0].astype(np.int64),
            dup[:, 1].copy(),
            verdicts.broken_N[rows],
            verdicts.score_N[rows],
        )
    return verdicts


# ── kernels ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@numba.njit(cache=True, nogil=True)
def _split(data_B, begin, end, line_L2, paragraph_L2):  # type: ignore[no-untyped-def]
    """Where lines and paragraphs begin and end, from `begin` on; and how many of each there are.

    Lines are apart by one LF or more, paragraphs, of the text without white space at its ends, by two or more.
    """
    first = strip_left(data_B, begin, end)
    last = strip_right(data_B, first, end)
    lines, paragraphs = 0, 0
    line, paragraph = begin, first
    run, run_end = begin, begin  # the last run of LF
    for at in range(begin, end, 64):
        feeds = within(data_B, at, 0x0A, 1) & first_bits(end - at)
        while feeds != NONE:
            feed = at + lowest(feeds)
            feeds &= feeds - ONE
            if feed > run_end or run == run_end:
                run = feed
                line_L2[lines, 0] = line - begin
                line_L2[lines, 1] = feed - begin
                lines += 1
            elif feed == run + 1 and run > first and run < last:
                paragraph_L2[paragraphs, 0] = paragraph - begin
                paragraph_L2[paragraphs, 1] = run - begin
                paragraphs += 1
            run_end = feed + 1
            line = run_end
            if run_end - run >= 2 and run > first and run < last:
                paragraph = run_end
    line_L2[lines, 0] = line - begin
    line_L2[lines, 1] = end - begin
    paragraph_L2[paragraphs, 0] = paragraph - begin
    paragraph_L2[paragraphs, 1] = last - begin
    return lines + 1, paragraphs + 1


@numba.njit(cache=True, nogil=True)
def _broken_by_spans(  # type: ignore[no-untyped-def]
    data_B, begin, span_L2, spans, chars, ascii_only, limit, char_limit, table, seen
):
    """1 and the share of spans that occurred before, 2 and that of the characters in them, or 0."""
    if spans < 2 or (limit == 0 and char_limit == 0):
        return 0, 0.0
    repeated, repeated_bytes = bound_repeated(data_B, begin, span_L2, spans, seen)
    if repeated == 0 or (ascii_only and repeated / spans <= limit and repeated_bytes / chars <= char_limit):
        return 0, 0.0
    repeated, repeated_chars = count_repeated(data_B, begin, span_L2, spans, ascii_only, table)
    if limit != 0 and repeated / spans > limit:
        return 1, repeated / spans
    if char_limit != 0 and repeated_chars / chars > char_limit:
        return 2, repeated_chars / chars
    return 0, 0.0


@numba.njit(cache=True, nogil=True)
def _join_words(data_B, begin, end, ascii_only, edge_W2, joined_B, begin_W1, char_W1):  # type: ignore[no-untyped-def]
    """Writes the words without the white space between them, where each begins in bytes and in characters; how many."""
    edges, edge_count = 0, 0
    last_body, spill = NONE, NONE
    for at in range(begin, end, 64):
        space, spill = spaces(data_B, at, spill)
        body = ~space & first_bits(end - at)
        turns = body ^ (body << ONE | last_body)
        last_body = body >> _TOP_BIT
        edge_count = edges + ones(turns)
        # Four at once, whether there are so many or not: how often a loop ends is what a processor guesses wrong.
        for k in range(edges, edge_count, 4):
            for q in range(4):
                edge_W2[k + q] = at - begin + lowest(turns)
                turns &= turns - ONE
        edges = edge_count
    if edges % 2 == 1:
        edge_W2[edges] = end - begin
        edges += 1
    words = edges // 2
    to = 0
    chars = 0
    for w in range(words):
        first, last = begin + edge_W2[2 * w], begin + edge_W2[2 * w + 1]
        begin_W1[w] = to
        char_W1[w] = chars
        copy_16(joined_B, to, data_B, first)
        for k in range(16, last - first, 16):
            copy_16(joined_B, to + k, data_B, first + k)
        to += last - first
        chars += last - first if ascii_only else count_chars(data_B, first, last)
    begin_W1[words] = to
    char_W1[words] = chars
    return words


@numba.njit(cache=True, nogil=True)
def _broken_by_top(joined_B, words, begin_W1, char_W1, chars, top_n, top_limit, slot_W, count_W, table):  # type: ignore[no-untyped-def]
    """1 + the number of the rule that the most frequent n-gram breaks, and its share of the characters; or 0.

    An n-gram occurs at most as often as the pair of words with which it begins, which settles nearly all texts; and as
    the rarest pair of words in it. A pair occurs at most as often as there are pairs in its slot of a table.
    """
    if len(top_n) == 0:
        return 0, 0.0
    least, most = top_n[0], top_n[0]
    least_limit = top_limit[0]
    for k in range(len(top_n)):
        least, most = min(least, top_n[k]), max(most, top_n[k])
        least_limit = min(least_limit, top_limit[k])
    bits = min(table_bits(4 * words), MOST_BITS)
    shift = np.uint64(64 - bits)
    table[: 1 << bits] = 0
    last = NONE
    largest = 0
    for w in range(words):
        length = begin_W1[w + 1] - begin_W1[w]
        value = load_8(joined_B, begin_W1[w]) & first_bytes(length)
        value = (value ^ np.uint64(length) * KEY_A) * KEY_B
        value ^= value >> HALF
        slot = ((last << np.uint64(23) | last >> np.uint64(41)) + value) * KEY_C >> shift
        last = value
        if w > 0:
            slot_W[w - 1] = np.int64(slot)
            table[slot] += char_W1[min(w - 1 + most, words)] - char_W1[w - 1] + most - 1
            largest = max(largest, table[slot])
    # The characters in the longest n-grams that begin with a pair: those of shorter ones, all of one, are no more.
    if least > 1 and largest / chars <= least_limit:
        return 0, 0.0
    table[: 1 << bits] = 0
    for w in range(words - 1):
        table[slot_W[w]] += 1
    for w in range(words - 1):
        count_W[w] = table[slot_W[w]]
    bound_n = np.full(most + 1, chars, np.int64)
    for n in range(2, most + 1):
        bound = 0
        for w in range(words - n + 1):
            if n > 2:
                count_W[w] = min(count_W[w], count_W[w + 1])
            bound = max(bound, count_W[w] * (char_W1[w + n] - char_W1[w] + n - 1))
        bound_n[n] = bound
    for k in range(len(top_n)):
        n = top_n[k]
        if words >= n and (n == 1 or bound_n[n] / chars > top_limit[k]):
            share = _most_frequent(joined_B, words, n, begin_W1, char_W1, table, count_W) / chars
            if share > top_limit[k]:
                return 1 + k, share
    return 0, 0.0


@numba.njit(cache=True, nogil=True)
def _most_frequent(joined_B, words, n, begin_W1, char_W1, table, count_W):  # type: ignore[no-untyped-def]
    """The characters, with one space between words, in all occurrences of the n-gram that occurs most often, or the first such."""
    bits = table_bits(2 * words)
    shift = np.uint64(64 - bits)
    table[: 1 << bits] = 0
    for w in range(words - n + 1):
        count_W[w] = 0
        first, length = begin_W1[w], begin_W1[w + n] - begin_W1[w]
        value = hash_bytes(joined_B, first, first + length)
        for k in range(1, n):
            value = (value ^ np.uint64(begin_W1[w + k] - first)) * KEY_A
            value ^= value >> HALF
        slot = np.int64(value * KEY_B >> shift)
        while table[slot] != 0:
            other = table[slot] - 1
            same = True
            for k in range(1, n + 1):
                same &= begin_W1[other + k] - begin_W1[other] == begin_W1[w + k] - first
            if same and equal_bytes(joined_B, begin_W1[other], first, length):
                count_W[other] += 1
                break
            slot = (slot + 1) & ((1 << bits) - 1)
        else:
            table[slot] = w + 1
            count_W[w] = 1
    best = 0
    for w in range(1, words - n + 1):
        if count_W[w] > count_W[best]:
            best = w
    return count_W[best] * (char_W1[best + n] - char_W1[best] + n - 1)


@numba.njit(cache=True, nogil=True)
def _broken_by_duplicates(  # type: ignore[no-untyped-def]
    joined_B, words, begin_W1, char_W1, chars, dup_n, dup_limit, slot_W, member_W, table, seen, again
):
    """1 + the number of the rule that n-grams which occurred before break, and their share of the characters; or 0.

    N-grams are equal where their words are, joined without a space: "a bc" is "ab c". So two equal ones agree in their
    first _KEY_BYTES bytes, or are shorter than that and agree in half as many. Those for which neither is so are left out.
    """
    least = words + 1
    for n in dup_n:
        least = min(least, n)
    if least > words:
        return 0, 0.0
    bits = min(table_bits(64 * words), MOST_BITS)
    shift = np.uint64(64 - bits)
    seen[: 1 << (bits - 6)] = NONE
    suspects = 0
    for w in range(words - least + 1):
        first = begin_W1[w]
        value = (load_8(joined_B, first) ^ KEY_A) * KEY_B
        value = (value ^ (value >> HALF) ^ load_8(joined_B, first + 8)) * KEY_C
        slot = value >> shift
        slot_W[w] = np.int64(slot)
        before = seen[slot >> SIX]
        seen[slot >> SIX] = before | ONE << (slot & LOW_6)
        is_suspect = before >> (slot & LOW_6) & ONE != NONE
        length = begin_W1[w + least] - first
        if length < _KEY_BYTES:
            # An equal one of fewer bytes than a key has is as short, and agrees in its first half of a key, if it has that.
            value = (load_8(joined_B, first) ^ KEY_C) * KEY_A
            slot = (value ^ (value >> HALF)) * KEY_B >> shift
            before = seen[slot >> SIX]
            seen[slot >> SIX] = before | ONE << (slot & LOW_6)
            is_suspect |= (before >> (slot & LOW_6) & ONE != NONE) | (length < _KEY_BYTES // 2)
        member_W[suspects] = w
        suspects += is_suspect
    if suspects == 0:
        return 0, 0.0
    is_marked = False
    members = suspects
    for k in range(len(dup_n)):
        n = dup_n[k]
        if not is_marked:
            # Whichever of them occurred before, their characters are all within the suspects' n-grams.
            covered, reach = 0, 0
            for m in range(suspects):
                if member_W[m] + n <= words:
                    covered += char_W1[member_W[m] + n] - max(reach, char_W1[member_W[m]])
                    reach = char_W1[member_W[m] + n]
            if covered / chars <= dup_limit[k]:
                continue
            is_marked = True
            again[: 1 << (bits - 6)] = NONE
            for m in range(suspects):
                slot = np.uint64(slot_W[member_W[m]])
                again[slot >> SIX] |= ONE << (slot & LOW_6)
            members = 0
            for w in range(words - least + 1):
                slot = np.uint64(slot_W[w])
                member_W[members] = w
                members += (again[slot >> SIX] >> (slot & LOW_6) & ONE != NONE) | (
                    begin_W1[w + least] - begin_W1[w] < _KEY_BYTES
                )
        share = _count_duplicated(joined_B, words, n, member_W, members, begin_W1, char_W1, table) / chars
        if share > dup_limit[k]:
            return 1 + k, share
    return 0, 0.0


@numba.njit(cache=True, nogil=True)
def _count_duplicated(joined_B, words, n, member_W, members, begin_W1, char_W1, table):  # type: ignore[no-untyped-def]
    """The characters in n-grams of members that occurred before; after each of these its words begin no other."""
    bits = table_bits(2 * members)
    shift = np.uint64(64 - bits)
    table[: 1 << bits] = 0
    duplicated = 0
    following = 0
    for m in range(members):
        w = member_W[m]
        if w < following or w + n > words:
            continue
        first, length = begin_W1[w], begin_W1[w + n] - begin_W1[w]
        slot = np.int64(hash_bytes(joined_B, first, first + length) >> shift)
        while table[slot] != 0:
            other = table[slot] - 1
            if begin_W1[other + n] - begin_W1[other] == length and equal_bytes(
                joined_B, begin_W1[other], first, length
            ):
                duplicated += char_W1[w + n] - char_W1[w]
                following = w + n
                break
            slot = (slot + 1) & ((1 << bits) - 1)
        else:
            table[slot] = w + 1
    return duplicated


@numba.njit(numba.void(BYTES, _I64, _F64, _I64, _F64, _I64, _F64, _U8, _F64), cache=True, nogil=True)
def _gopher_repetition(data_B, offset_N1, limits, top_n, top_limit, dup_n, dup_limit, broken_N, score_N):  # type: ignore[no-untyped-def]
    longest = 0
    for i in range(len(broken_N)):
        longest = max(longest, offset_N1[i + 1] - offset_N1[i])
    words = longest // 2 + 1
    span_L2 = np.empty((words + 1, 2), np.int32)
    paragraph_L2 = np.empty((words, 2), np.int32)
    edge_W2 = np.empty(2 * words + 2 + 4, np.int32)
    begin_W1 = np.empty(words + 1, np.int32)
    char_W1 = np.empty(words + 1, np.int32)
    slot_W = np.empty(words + 1, np.int32)
    count_W = np.empty(words + 1, np.int32)
    member_W = np.empty(words + 1, np.int32)
    joined_B = np.empty(longest + SLACK, np.uint8)
    table = np.empty(1 << table_bits(4 * words), np.int32)
    seen = np.empty(1 << table_bits(words + 1), np.uint64)
    again = np.empty(1 << table_bits(words + 1), np.uint64)
    for i in range(len(broken_N)):
        begin, end = offset_N1[i], offset_N1[i + 1]
        if begin == end:
            broken_N[i], score_N[i] = 1, 0.0
            continue
        ascii_only = is_ascii(data_B, begin, end)
        chars = end - begin if ascii_only else count_chars(data_B, begin, end)
        lines, paragraphs = _split(data_B, begin, end, span_L2, paragraph_L2)
        broken, score = _broken_by_spans(
            data_B, begin, paragraph_L2, paragraphs, chars, ascii_only, limits[0], limits[1], table, seen
        )
        if broken == 0:
            broken, score = _broken_by_spans(
                data_B, begin, span_L2, lines, chars, ascii_only, limits[2], limits[3], table, seen
            )
            broken += 2 * (broken > 0)
        if broken == 0:
            words = _join_words(data_B, begin, end, ascii_only, edge_W2, joined_B, begin_W1, char_W1)
            broken, score = _broken_by_top(
                joined_B, words, begin_W1, char_W1, chars, top_n, top_limit, slot_W, count_W, table
            )
            broken += 4 * (broken > 0)
        if broken == 0:
            broken, score = _broken_by_duplicates(
                joined_B, words, begin_W1, char_W1, chars, dup_n, dup_limit, slot_W, member_W, table, seen, again
            )
            broken += (4 + len(top_n)) * (broken > 0)
        broken_N[i] = broken + (broken > 0)
        score_N[i] = score

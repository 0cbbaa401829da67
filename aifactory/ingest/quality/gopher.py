"""Gopher's quality rules: `gopher_quality` (Rae et al. 2021, arXiv:2112.11446, A.1.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import pyarrow as pa

from aifactory.ingest.columns import Verdicts
from aifactory.ingest.quality.characters import LETTER, WORDY, joined, kinds_of_characters
from aifactory.ingest.words import (
    BYTES,
    NONE,
    ONE,
    breaks,
    char_bytes,
    count_chars,
    decode,
    first_bits,
    highest,
    is_break,
    is_space,
    last_char,
    lowest,
    ones,
    run_on,
    spaces,
    wide_general,
    with_slack,
    within,
    within_folded,
)

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
"""Of English; Gopher, A.1.1."""
GOPHER_QUALITY_RULES = (
    "short_doc",
    "long_doc",
    "below_avg_threshold",
    "above_avg_threshold",
    "too_many_hashes",
    "too_many_ellipsis",
    "too_many_bullets",
    "too_many_end_ellipsis",
    "below_alpha_threshold",
    "enough_stop_words",
)
_BOOLS = numba.types.Array(numba.boolean, 1, "C")
_U8, _I64, _F64 = numba.uint8[::1], numba.int64[::1], numba.float64[::1]
_TOP_BIT = np.uint64(63)


@dataclass(frozen=True, slots=True)
class GopherQuality:
    """Thresholds of `gopher_quality`."""

    min_doc_words: int = 50
    """Least number of words that are not punctuation alone."""
    max_doc_words: int = 100_000
    """Greatest number of them."""
    min_avg_word_length: float = 3
    """Least mean length of them, characters."""
    max_avg_word_length: float = 10
    """Greatest mean length of them, characters."""
    max_symbol_word_ratio: float = 0.1
    """Greatest number of # by word, and of ellipses (... or …) by word."""
    max_bullet_lines_ratio: float = 0.9
    """Greatest share of lines that begin with • or -."""
    max_ellipsis_lines_ratio: float = 0.3
    """Greatest share of lines that end with an ellipsis."""
    max_non_alpha_words_ratio: float = 0.8
    """Least share of words that have a letter. The name is the library's, which says it is the wrong way round."""
    min_stop_words: int = 2
    """Least number of different stop words."""
    stop_words: tuple[str, ...] = STOP_WORDS
    """Words, in the case that they are written in."""


def gopher_quality(texts: pa.Array, params: GopherQuality) -> Verdicts:
    """Which of GOPHER_QUALITY_RULES each text breaks first.

    The score is the number of words, their mean length in characters, the ratio, or the number of different stop words.
    """
    verdicts = Verdicts.none(len(texts), GOPHER_QUALITY_RULES)
    limits = np.array(
        [
            params.min_doc_words,
            params.max_doc_words,
            params.min_avg_word_length,
            params.max_avg_word_length,
            params.max_symbol_word_ratio,
            params.max_bullet_lines_ratio,
            params.max_ellipsis_lines_ratio,
            params.max_non_alpha_words_ratio,
            params.min_stop_words,
        ],
        np.float64,
    )
    # What is no word of its own is never found among words.
    stop_words = tuple(sorted({word for word in params.stop_words if word.split() == [word]}))
    for rows, data_B, offset_N1 in with_slack(texts):
        _gopher_quality(
            data_B,
            offset_N1,
            limits,
            kinds_of_characters(),
            *joined(stop_words),
            verdicts.broken_N[rows],
            verdicts.score_N[rows],
        )
    return verdicts


# ── kernels ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@numba.njit(cache=True, nogil=True)
def _broken_by_counts(data_B, begin, end, limits, kinds):  # type: ignore[no-untyped-def]
    """The number of the rule that is broken, among those that count, and its score.

    Words with a letter are those whose run of other characters from their beginning on ends at a letter; words of
    punctuation alone those whose run of it ends where they do. Lines are told by their first visible character likewise.
    """
    words = 0
    body_chars = 0
    lettered = 0
    symbol_words = 0
    symbol_chars = 0
    hashes = 0
    ellipses = 0
    bullets = 0
    lines = 0
    dots_meet = NONE
    spill, last_body, letter_carry, symbol_carry, line_carry = NONE, NONE, NONE, NONE, NONE
    last_return, last_dot = NONE, NONE
    last_break = ONE
    word_begin = begin
    for at in range(begin, end, 64):
        valid = first_bits(end - at)
        space, spill = spaces(data_B, at, spill)
        broke, last_return = breaks(data_B, at, last_return)
        broke &= valid
        letter = within_folded(data_B, at, 0x61, 26)
        wordy = letter | within(data_B, at, 0x30, 10)
        bullet = within(data_B, at, 0x2D, 1)
        dot = within(data_B, at, 0x2E, 1) & valid
        inner = NONE
        if within(data_B, at, 0x80, 0x80) & valid != NONE:
            inner = within(data_B, at, 0x80, 0x40)
            bullet |= wide_general(data_B, at, 0x22, 1)
            ellipses += ones(wide_general(data_B, at, 0x26, 1) & valid)
            leads = within(data_B, at, 0xC0, 0x40) & valid
            while leads != NONE:
                bit = lowest(leads)
                kind = kinds[decode(data_B, at + bit)]
                letter |= np.uint64(kind & LETTER) << np.uint64(bit)
                wordy |= np.uint64((kind & WORDY) >> 1) << np.uint64(bit)
                leads &= leads - ONE
        body = valid & ~space
        starts = body & ~(body << ONE | last_body)
        last_body = body >> _TOP_BIT
        words += ones(starts)
        body_chars += ones(body & ~inner)
        met, letter_carry = run_on(starts, body & ~letter, letter_carry)
        lettered += ones(met & letter & valid)
        met, symbol_carry = run_on(starts, body & ~wordy, symbol_carry)
        met &= ~body
        while met != NONE:
            bit = lowest(met)
            earlier = starts & first_bits(bit)
            first = at + highest(earlier) if earlier != NONE else word_begin
            symbol_words += 1
            symbol_chars += count_chars(data_B, first, at + bit)
            met &= met - ONE
        if starts != NONE:
            word_begin = at + highest(starts)
        hashes += ones(within(data_B, at, 0x23, 1) & valid)
        dots_meet |= dot & (dot << ONE | last_dot)
        last_dot = dot >> _TOP_BIT
        lines += ones(broke)
        met, line_carry = run_on(broke << ONE | last_break, space & ~broke & valid, line_carry)
        last_break = broke >> _TOP_BIT
        bullets += ones(met & bullet & body)
    if symbol_carry != NONE:
        symbol_words += 1
        symbol_chars += count_chars(data_B, word_begin, end)
    if words == 0:
        return 1, 0.0
    lines += not is_break(decode(data_B, last_char(data_B, end)))

    visible_words = words - symbol_words
    if limits[0] != 0 and visible_words < limits[0]:
        return 1, np.float64(visible_words)
    if limits[1] != 0 and visible_words > limits[1]:
        return 2, np.float64(visible_words)
    if visible_words > 0:
        mean = (body_chars - symbol_chars) / visible_words
        if limits[2] != 0 and mean < limits[2]:
            return 3, mean
        if limits[3] != 0 and mean > limits[3]:
            return 4, mean
    if limits[4] != 0 and hashes / words > limits[4]:
        return 5, hashes / words
    if dots_meet != NONE:
        ellipses += _count_three_dots(data_B, begin, end)
    if limits[4] != 0 and ellipses / words > limits[4]:
        return 6, ellipses / words
    if limits[5] != 0 and bullets / lines > limits[5]:
        return 7, bullets / lines
    # A line that ends with an ellipsis has one.
    if limits[6] != 0 and ellipses / lines > limits[6]:
        ends = _count_ellipsis_lines(data_B, begin, end)
        if ends / lines > limits[6]:
            return 8, ends / lines
    if limits[7] != 0 and lettered / words < limits[7]:
        return 9, lettered / words
    return 0, 0.0


@numba.njit(cache=True, nogil=True)
def _count_three_dots(data_B, begin, end):  # type: ignore[no-untyped-def]
    """How often three dots stand side by side, none of them counted twice."""
    count = 0
    run = 0
    for at in range(begin, end):
        run = run + 1 if data_B[at] == 0x2E else 0
        if run == 3:
            count += 1
            run = 0
    return count


@numba.njit(cache=True, nogil=True)
def _count_ellipsis_lines(data_B, begin, end):  # type: ignore[no-untyped-def]
    """How many lines end with three dots or with …, white space apart."""
    count = 0
    at = begin
    ended = False
    while at < end:
        code = decode(data_B, at)
        if is_break(code):
            count += ended
            ended = False
        elif not is_space(code):
            three = at >= begin + 2 and data_B[at] == 0x2E and data_B[at - 1] == 0x2E and data_B[at - 2] == 0x2E
            ended = three or code == 0x2026
        at += char_bytes(data_B[at])
    return count + ended


@numba.njit(cache=True, nogil=True)
def _count_stop_words(data_B, begin, end, stop_B, stop_end_S, stop_first, seen_S, stamp, enough):  # type: ignore[no-untyped-def]
    """How many different stop words occur; no more are counted where there are `enough`."""
    found = 0
    last_body, spill = NONE, NONE
    for at in range(begin, end, 64):
        space, spill = spaces(data_B, at, spill)
        body = ~space & first_bits(end - at)
        starts = body & ~(body << ONE | last_body)
        last_body = body >> _TOP_BIT
        while starts != NONE:
            word = at + lowest(starts)
            starts &= starts - ONE
            for s in range(stop_first[data_B[word]], stop_first[data_B[word] + 1]):
                length = stop_end_S[s + 1] - stop_end_S[s]
                if seen_S[s] == stamp or word + length > end:
                    continue
                same = True
                for k in range(length):
                    same &= data_B[word + k] == stop_B[stop_end_S[s] + k]
                if same and (word + length == end or is_space(decode(data_B, word + length))):
                    seen_S[s] = stamp
                    found += 1
                    break
            if found >= enough:
                return found
    return found


@numba.njit(numba.void(BYTES, _I64, _F64, _U8, BYTES, _I64, _I64, _U8, _F64), cache=True, nogil=True)
def _gopher_quality(data_B, offset_N1, limits, kinds, stop_B, stop_end_S, stop_first, broken_N, score_N):  # type: ignore[no-untyped-def]
    seen_S = np.full(len(stop_end_S), -1, np.int64)
    for i in range(len(broken_N)):
        begin, end = offset_N1[i], offset_N1[i + 1]
        broken, score = _broken_by_counts(data_B, begin, end, limits, kinds)
        if broken == 0 and limits[8] != 0:
            found = _count_stop_words(data_B, begin, end, stop_B, stop_end_S, stop_first, seen_S, i, limits[8])
            if found < limits[8]:
                broken, score = 10, np.float64(found)
        broken_N[i] = broken
        score_N[i] = score

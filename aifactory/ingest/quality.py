"""Quality: the published rules of Gopher, FineWeb and C4, to the letter, on the bytes of Arrow's texts.

Gopher    Rae et al. 2021, Scaling language models: methods, analysis & insights from training Gopher (arXiv:2112.11446), A.1.1:
          `gopher_quality`, and by table A1 `gopher_repetition`.
FineWeb   Penedo et al. 2024, The FineWeb datasets (arXiv:2406.17557), 3.6: `fineweb_quality`.
C4        Raffel et al. 2020, Exploring the limits of transfer learning (JMLR 21), 2.2: `c4_quality`.
Law       Rules, their order, comparisons and names are those of the filters of datatrove 0.10 (Penedo et al. 2024, a
          library) with the definitions below, whatever else is in the block. There is one difference: a text without
          words, by whose number of words that divides, breaks `short_doc`.
Word      A run without white space (`str.isspace`), as `str.split` has it. The papers do not say.
Sentence  Ends after each . ? ! that is followed, behind any number of the closing marks " ' ) ] } ’ ” » ›, by white
          space or by the line's end. What is left of the line after the last end is one more, unless it is blank.
Length    In characters, that is code points. What is a letter or white space is what Python's tables of Unicode say.
Off       A threshold of 0 switches its rule off, unless it says otherwise.
Exact     Cheap bounds settle most texts: hashed into a table too coarse to tell all of them apart, n-grams seem to occur more
          often than they do, never less. Where a bound does not keep the rule they are compared byte by byte, so no
          verdict rests on a hash.

Import this module where it is needed: numba takes its time.

Legend   N texts, B bytes of all of them, W words of a text, L lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aifactory.ingest.columns import Verdicts
from aifactory.ingest.words import (
    BYTES,
    NONE,
    ONE,
    SLACK,
    breaks,
    char_bytes,
    copy_16,
    copy_bytes,
    count_chars,
    count_words,
    decode,
    equal_bytes,
    first_bits,
    first_bytes,
    hash_bytes,
    highest,
    is_ascii,
    is_break,
    is_space,
    last_char,
    load_8,
    lowest,
    ones,
    run_on,
    spaces,
    strip_left,
    strip_right,
    total_bytes,
    wide_general,
    with_slack,
    within,
    within_folded,
)

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
"""Of English; Gopher, A.1.1."""
_TERMINAL = (
    "21 2E 3F 589 61D-61F 6D4 700-702 7F9 837 839 83D-83E 964-965 104A-104B 1362 1367-1368 166E 1735-1736 17D4-17D6 "
    "17D9-17DA 1803 1809 1944-1945 1AA8-1AAB 1B5A-1B5B 1B5E-1B5F 1B7D-1B7E 1C3B-1C3C 1C7E-1C7F 203C-203D 2047-2049 2E2E "
    "2E3C 2E53-2E54 3002 A4FF A60E-A60F A6F3 A6F7 A876-A877 A8CE-A8CF A92F A9C8-A9C9 AA5D-AA5F AAF0-AAF1 ABEB FE52 "
    "FE56-FE57 FF01 FF0E FF1F FF61 10A56-10A57 10F55-10F59 10F86-10F89 11047-11048 110BE-110C1 11141-11143 111C5-111C6 "
    "111CD 111DE-111DF 11238-11239 1123B-1123C 112A9 1144B-1144C 115C2-115C3 115C9-115D7 11641-11642 1173C-1173E 11944 "
    "11946 11A42-11A43 11A9B-11A9C 11C41-11C42 11EF7-11EF8 11F43-11F44 16A6E-16A6F 16AF5 16B37-16B38 16B44 16E98 1BC9F 1DA88"
)
_OTHER_PUNCTUATION = (
    "0-8 B-1F 21-2F 3A-40 5B-60 7B-9F AB B4 BB 2013-2014 2019 201C-201E 2026 2236 2501 25BA 3001-3002 3008-300D 3010-3011 "
    "FF01 FF05 FF08-FF09 FF0C FF0E FF11 FF1A-FF1B FF1F FF5E"
)


def _characters(ranges: str) -> str:
    ends = (part.split("-") for part in ranges.split())
    return "".join(chr(code) for end in ends for code in range(int(end[0], 16), int(end[-1], 16) + 1))


TERMINAL_PUNCTUATION = _characters(_TERMINAL)
"""Marks that end a sentence in some script, without quotation marks: Unicode's Sentence_Terminal, but for a few."""
PUNCTUATION = "".join(sorted({*_characters(_OTHER_PUNCTUATION), *TERMINAL_PUNCTUATION}))
"""What a word must have another character than to count as one in `gopher_quality`; CCNet's list (Wenzek et al. 2020,
arXiv:1911.00359, its code), which has control characters too, and TERMINAL_PUNCTUATION."""


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


@dataclass(frozen=True, slots=True)
class FineWebQuality:
    """Thresholds of `fineweb_quality`, of which 0 switches none off."""

    line_punct_thr: float = 0.12
    """Least share of lines that end with one of `stop_chars`."""
    line_punct_exclude_zero: bool = False
    """Whether to keep texts of which no line does."""
    stop_chars: str = TERMINAL_PUNCTUATION
    """The characters that end a line well."""
    short_line_thr: float = 0.67
    """Greatest share of short lines."""
    short_line_length: int = 30
    """Length of the longest short line, characters."""
    char_duplicates_ratio: float = 0.01
    """Greatest share of the text's characters, LF apart, in lines that occurred before in it."""
    new_line_ratio: float = 0.3
    """Greatest number of LF by word."""


@dataclass(frozen=True, slots=True)
class C4Quality:
    """What `c4_quality` drops, of which 0 switches nothing off, but -1 does."""

    remove_citations: bool = True
    """Whether to remove [edit], [citation needed] and brackets around digits, or around nothing."""
    filter_no_terminal_punct: bool = True
    """Whether to drop lines that do not end with one of . ? ! " ' or that end with three dots."""
    min_num_sentences: int = 5
    """Least number of sentences in the lines that are kept; -1 for any."""
    min_words_per_line: int = 3
    """Least number of words, citations included, of a line that is kept; -1 for any."""
    max_word_length: int = 1000
    """Greatest length of a word in a line that is kept, characters; -1 for any."""
    filter_lorem_ipsum: bool = True
    """Whether to reject texts with a line that has "lorem ipsum" in it, in either case."""
    filter_javascript: bool = True
    """Whether to drop lines with "javascript" in them, in either case."""
    filter_curly_bracket: bool = True
    """Whether to reject texts with a line that has { in it."""
    filter_policy: bool = True
    """Whether to drop lines about terms of use, privacy and cookies, in either case."""


_LETTER, _WORDY, _DIGIT = np.uint8(1), np.uint8(2), np.uint8(4)
_LOREM_IPSUM, _JAVASCRIPT, _POLICY = 1, 2, 4
_PHRASES = (
    "cookie policy",
    "javascript",
    "lorem ipsum",
    "privacy policy",
    "terms of use",
    "use cookies",
    "use of cookies",
    "uses cookies",
)
"""Sorted; the second and the third are what they say, the others are policy."""

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
FINEWEB_QUALITY_RULES = ("empty", "line_punct_ratio", "short_line_ratio", "char_dup_ratio", "list_ratio")
C4_QUALITY_RULES = ("lorem_ipsum", "curly_bracket", "too_few_sentences")


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


def gopher_quality(texts: pa.Array, params: GopherQuality) -> Verdicts:
    """Which of GOPHER_QUALITY_RULES each text breaks first.

    The score is the number of words, their mean length in characters, the ratio, or the number of different stop words.
    """
    verdicts = _no_verdicts(texts, GOPHER_QUALITY_RULES)
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
            _kinds(),
            *_joined(stop_words),
            verdicts.broken_N[rows],
            verdicts.score_N[rows],
        )
    return verdicts


def gopher_repetition(texts: pa.Array, params: GopherRepetition) -> Verdicts:
    """Which of `gopher_repetition_rules(params)` each text breaks first; the score is the share that is too great."""
    verdicts = _no_verdicts(texts, gopher_repetition_rules(params))
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


def fineweb_quality(texts: pa.Array, params: FineWebQuality) -> Verdicts:
    """Which of FINEWEB_QUALITY_RULES each text breaks first; the score is the ratio, or 0 of a text without lines."""
    verdicts = _no_verdicts(texts, FINEWEB_QUALITY_RULES)
    limits = np.array(
        [
            params.line_punct_thr,
            params.line_punct_exclude_zero,
            params.short_line_thr,
            params.short_line_length,
            params.char_duplicates_ratio,
            params.new_line_ratio,
        ],
        np.float64,
    )
    for rows, data_B, offset_N1 in with_slack(texts):
        _fineweb_quality(
            data_B, offset_N1, limits, _members(params.stop_chars), verdicts.broken_N[rows], verdicts.score_N[rows]
        )
    return verdicts


def c4_quality(texts: pa.Array, params: C4Quality) -> tuple[pa.Array, Verdicts]:
    """The texts with the lines that are kept, joined by LF, and which of C4_QUALITY_RULES each breaks first.

    A text that breaks a rule stays as it was. The score is the number of sentences, or 1 for the line that was found.
    """
    verdicts = _no_verdicts(texts, C4_QUALITY_RULES)
    options = np.array(
        [
            params.remove_citations,
            params.filter_no_terminal_punct,
            params.min_num_sentences,
            params.min_words_per_line,
            params.max_word_length,
            params.filter_lorem_ipsum,
            params.filter_javascript,
            params.filter_curly_bracket,
            params.filter_policy,
        ],
        np.int64,
    )
    out_B = np.empty(total_bytes(texts) + SLACK, np.uint8)
    out_offset_N1 = np.zeros(len(texts) + 1, np.int64)
    for rows, data_B, offset_N1 in with_slack(texts):
        _c4_quality(
            data_B,
            offset_N1,
            options,
            _kinds(),
            *_joined(_PHRASES),
            out_B,
            out_offset_N1[rows.start : rows.stop + 1],
            verdicts.broken_N[rows],
            verdicts.score_N[rows],
        )
    offset_type = np.int64 if pa.types.is_large_string(texts.type) else np.int32
    offsets = pa.py_buffer(out_offset_N1.astype(offset_type, copy=False))
    kept = pa.Array.from_buffers(texts.type, len(texts), [None, offsets, pa.py_buffer(out_B[: out_offset_N1[-1]])])
    return kept, verdicts


def _no_verdicts(texts: pa.Array, rules: tuple[str, ...]) -> Verdicts:
    return Verdicts(rules, np.zeros(len(texts), np.uint8), np.zeros(len(texts), np.float64))


@lru_cache(maxsize=1)
def _kinds() -> npt.NDArray[np.uint8]:
    """Of each code point: _LETTER, _WORDY (not punctuation) and _DIGIT where it is that."""
    points = np.arange(0x110000, dtype=np.uint32).view("U1")
    letter, digit = np.strings.isalpha(points), np.strings.isdecimal(points)
    return letter * _LETTER | ~_members(PUNCTUATION) * _WORDY | digit * _DIGIT


@lru_cache(maxsize=4)
def _members(characters: str) -> npt.NDArray[np.bool_]:
    """Of each code point whether it is one of these."""
    members = np.zeros(0x110000, np.bool_)
    members[[ord(character) for character in characters]] = True
    return members


@lru_cache(maxsize=4)
def _joined(words: tuple[str, ...]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The bytes of sorted words, where each ends and the next begins, and of each byte which is the first word that it begins.

    The words that byte b begins are those from the b-th up to the (b + 1)-th of the last.
    """
    encoded = [word.encode() for word in words]
    ends = np.cumsum([0, *map(len, encoded)])
    first = np.searchsorted([word[0] for word in encoded], np.arange(257))
    return np.frombuffer(b"".join(encoded), np.uint8), ends.astype(np.int64), first.astype(np.int64)


# ── Gopher, quality ───────────────────────────────────────────────────────────────────────────────────────────────────

_BOOLS = numba.types.Array(numba.boolean, 1, "C")
_U8, _I64, _F64 = numba.uint8[::1], numba.int64[::1], numba.float64[::1]
_TOP_BIT = np.uint64(63)
_TWO = np.uint64(2)
_THREE = np.uint64(3)


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
                letter |= np.uint64(kind & _LETTER) << np.uint64(bit)
                wordy |= np.uint64((kind & _WORDY) >> 1) << np.uint64(bit)
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


# ── Gopher, repetition ────────────────────────────────────────────────────────────────────────────────────────────────

_KEY_BYTES = 16
_MOST_BITS = 30  # of a number in slot_W; a table for bounds may be too small, one for comparisons must not be
_KEY_A = np.uint64(0x9E3779B97F4A7C15)
_KEY_B = np.uint64(0xD6E8FEB86659FD93)
_KEY_C = np.uint64(0xA0761D6478BD642F)
_SIX = np.uint64(6)
_LOW_6 = np.uint64(63)
_HALF = np.uint64(32)
_I32 = numba.int32[::1]
_U64 = numba.uint64[::1]


@numba.njit(cache=True, nogil=True)
def _table_bits(count):  # type: ignore[no-untyped-def]
    """The logarithm of the least power of two that is `count` or more, at least 6."""
    bits = 6
    while (1 << bits) < count:
        bits += 1
    return bits


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
    repeated, repeated_bytes = _bound_repeated(data_B, begin, span_L2, spans, seen)
    if repeated == 0 or (ascii_only and repeated / spans <= limit and repeated_bytes / chars <= char_limit):
        return 0, 0.0
    repeated, repeated_chars = _count_repeated(data_B, begin, span_L2, spans, ascii_only, table)
    if limit != 0 and repeated / spans > limit:
        return 1, repeated / spans
    if char_limit != 0 and repeated_chars / chars > char_limit:
        return 2, repeated_chars / chars
    return 0, 0.0


@numba.njit(cache=True, nogil=True)
def _bound_repeated(data_B, begin, span_L2, spans, seen):  # type: ignore[no-untyped-def]
    """At least as many spans as occurred before, and their bytes."""
    bits = min(_table_bits(64 * spans), _MOST_BITS)
    shift = np.uint64(64 - bits)
    seen[: 1 << (bits - 6)] = NONE
    repeated, repeated_bytes = 0, 0
    for k in range(spans):
        first, last = begin + span_L2[k, 0], begin + span_L2[k, 1]
        length = last - first
        value = NONE
        if length > 0:
            value = load_8(data_B, first) & first_bytes(length)
        value = (value ^ np.uint64(length) * _KEY_A) * _KEY_B
        if length >= 8:
            value = (value ^ (value >> _HALF) ^ load_8(data_B, last - 8)) * _KEY_C
            value = (value ^ (value >> _HALF) ^ load_8(data_B, (first + last) // 2 - 4)) * _KEY_B
        slot = value >> shift
        bit = ONE << (slot & _LOW_6)
        if seen[slot >> _SIX] & bit != NONE:
            repeated += 1
            repeated_bytes += length
        seen[slot >> _SIX] |= bit
    return repeated, repeated_bytes


@numba.njit(cache=True, nogil=True)
def _count_repeated(data_B, begin, span_L2, spans, ascii_only, table):  # type: ignore[no-untyped-def]
    """How many spans occurred before, and their characters."""
    bits = _table_bits(2 * spans)
    shift = np.uint64(64 - bits)
    table[: 1 << bits] = 0
    repeated, repeated_chars = 0, 0
    for k in range(spans):
        first, last = begin + span_L2[k, 0], begin + span_L2[k, 1]
        slot = np.int64(hash_bytes(data_B, first, last) >> shift)
        while table[slot] != 0:
            other = table[slot] - 1
            length = span_L2[other, 1] - span_L2[other, 0]
            if length == last - first and equal_bytes(data_B, begin + span_L2[other, 0], first, length):
                repeated += 1
                repeated_chars += length if ascii_only else count_chars(data_B, first, last)
                break
            slot = (slot + 1) & ((1 << bits) - 1)
        else:
            table[slot] = k + 1
    return repeated, repeated_chars


@numba.njit(cache=True, nogil=True)
def _join_words(data_B, begin, end, ascii_only, edge_W2, joined_B, begin_W1, char_W1):  # type: ignore[no-untyped-def]
    """Writes the words without the white space between them, where each begins in bytes and in characters; how many."""
    edges = 0
    last_body, spill = NONE, NONE
    for at in range(begin, end, 64):
        space, spill = spaces(data_B, at, spill)
        body = ~space & first_bits(end - at)
        turns = body ^ (body << ONE | last_body)
        last_body = body >> _TOP_BIT
        while turns != NONE:
            edge_W2[edges] = at - begin + lowest(turns)
            edges += 1
            turns &= turns - ONE
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

    An n-gram occurs at most as often as the rarest pair of words in it, and a pair at most as often as there are pairs
    in its slot of a table.
    """
    if len(top_n) == 0:
        return 0, 0.0
    most = 0
    for n in top_n:
        most = max(most, n)
    bits = min(_table_bits(4 * words), _MOST_BITS)
    shift = np.uint64(64 - bits)
    table[: 1 << bits] = 0
    last = NONE
    for w in range(words):
        length = begin_W1[w + 1] - begin_W1[w]
        value = load_8(joined_B, begin_W1[w]) & first_bytes(length)
        value = (value ^ np.uint64(length) * _KEY_A) * _KEY_B
        value ^= value >> _HALF
        slot = np.int64(((last << np.uint64(23) | last >> np.uint64(41)) + value) * _KEY_C >> shift)
        last = value
        if w > 0:
            slot_W[w - 1] = slot
            table[slot] += 1
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
    bits = _table_bits(2 * words)
    shift = np.uint64(64 - bits)
    table[: 1 << bits] = 0
    for w in range(words - n + 1):
        count_W[w] = 0
        first, length = begin_W1[w], begin_W1[w + n] - begin_W1[w]
        value = hash_bytes(joined_B, first, first + length)
        for k in range(1, n):
            value = (value ^ np.uint64(begin_W1[w + k] - first)) * _KEY_A
            value ^= value >> _HALF
        slot = np.int64(value * _KEY_B >> shift)
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
    first _KEY_BYTES bytes, or are shorter than that. Those for which neither is so are left out.
    """
    least = words + 1
    for n in dup_n:
        least = min(least, n)
    if least > words:
        return 0, 0.0
    bits = min(_table_bits(64 * words), _MOST_BITS)
    shift = np.uint64(64 - bits)
    seen[: 1 << (bits - 6)] = NONE
    suspects = 0
    for w in range(words - least + 1):
        first = begin_W1[w]
        value = (load_8(joined_B, first) ^ _KEY_A) * _KEY_B
        value = (value ^ (value >> _HALF) ^ load_8(joined_B, first + 8)) * _KEY_C
        slot = value >> shift
        slot_W[w] = np.int64(slot)
        before = seen[slot >> _SIX]
        seen[slot >> _SIX] = before | ONE << (slot & _LOW_6)
        member_W[suspects] = w
        suspects += (before >> (slot & _LOW_6) & ONE != NONE) | (begin_W1[w + least] - first < _KEY_BYTES)
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
                again[slot >> _SIX] |= ONE << (slot & _LOW_6)
            members = 0
            for w in range(words - least + 1):
                slot = np.uint64(slot_W[w])
                member_W[members] = w
                members += (again[slot >> _SIX] >> (slot & _LOW_6) & ONE != NONE) | (
                    begin_W1[w + least] - begin_W1[w] < _KEY_BYTES
                )
        share = _count_duplicated(joined_B, words, n, member_W, members, begin_W1, char_W1, table) / chars
        if share > dup_limit[k]:
            return 1 + k, share
    return 0, 0.0


@numba.njit(cache=True, nogil=True)
def _count_duplicated(joined_B, words, n, member_W, members, begin_W1, char_W1, table):  # type: ignore[no-untyped-def]
    """The characters in n-grams of members that occurred before; after each of these its words begin no other."""
    bits = _table_bits(2 * members)
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
    edge_W2 = np.empty(2 * words + 2, np.int32)
    begin_W1 = np.empty(words + 1, np.int32)
    char_W1 = np.empty(words + 1, np.int32)
    slot_W = np.empty(words + 1, np.int32)
    count_W = np.empty(words + 1, np.int32)
    member_W = np.empty(words + 1, np.int32)
    joined_B = np.empty(longest + SLACK, np.uint8)
    table = np.empty(1 << _table_bits(4 * words), np.int32)
    seen = np.empty(1 << _table_bits(words + 1), np.uint64)
    again = np.empty(1 << _table_bits(words + 1), np.uint64)
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


# ── FineWeb ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@numba.njit(cache=True, nogil=True)
def _broken_by_lines(data_B, begin, end, limits, is_stop, span_L2, table, seen):  # type: ignore[no-untyped-def]
    """The number of the rule that is broken, and its score; lines are the stretches between LF that aren't blank."""
    ascii_only = is_ascii(data_B, begin, end)
    feeds, lines, stopped, short = 0, 0, 0, 0
    line = begin
    at = begin
    while line <= end:
        feed = end
        # The next LF; each block is looked at once for each line in it.
        while at < end:
            found = within(data_B, at, 0x0A, 1) & first_bits(end - at)
            if found != NONE:
                feed = at + lowest(found)
                break
            at += 64
        if strip_left(data_B, line, feed) < feed:
            span_L2[lines, 0], span_L2[lines, 1] = line - begin, feed - begin
            lines += 1
            stopped += is_stop[decode(data_B, last_char(data_B, feed))]
            length = feed - line
            if not ascii_only and length > limits[3]:
                length = count_chars(data_B, line, feed)
            short += length <= limits[3]
        feeds += feed < end
        line = feed + 1
        at = line
    if lines == 0:
        return 1, 0.0
    share = stopped / lines
    if share < limits[0] and not (share == 0 and limits[1] != 0):
        return 2, share
    share = short / lines
    if share > limits[2]:
        return 3, share
    repeated, _ = _bound_repeated(data_B, begin, span_L2, lines, seen)
    if repeated > 0:
        _, repeated_chars = _count_repeated(data_B, begin, span_L2, lines, ascii_only, table)
        chars = end - begin if ascii_only else count_chars(data_B, begin, end)
        share = repeated_chars / (chars - feeds)
        if share > limits[4]:
            return 4, share
    share = feeds / count_words(data_B, begin, end, end - begin)
    if share > limits[5]:
        return 5, share
    return 0, 0.0


@numba.njit(numba.void(BYTES, _I64, _F64, _BOOLS, _U8, _F64), cache=True, nogil=True)
def _fineweb_quality(data_B, offset_N1, limits, is_stop, broken_N, score_N):  # type: ignore[no-untyped-def]
    longest = 0
    for i in range(len(broken_N)):
        longest = max(longest, offset_N1[i + 1] - offset_N1[i])
    span_L2 = np.empty((longest // 2 + 1, 2), np.int32)
    table = np.empty(1 << _table_bits(longest + 2), np.int32)
    seen = np.empty(1 << _table_bits(longest // 2 + 1), np.uint64)
    for i in range(len(broken_N)):
        broken_N[i], score_N[i] = _broken_by_lines(
            data_B, offset_N1[i], offset_N1[i + 1], limits, is_stop, span_L2, table, seen
        )


# ── C4 ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

_EDIT = np.frombuffer(b"[edit]", np.uint8)
_CITATION_NEEDED = np.frombuffer(b"[citation needed]", np.uint8)


@numba.njit(cache=True, nogil=True)
def _keep_lines(  # type: ignore[no-untyped-def]
    data_B, begin, end, options, kinds, phrase_B, phrase_end_P, phrase_first, break_L, out_B, to
):
    """The number of the rule that is broken, its score, and where the lines that are kept end; they are written from `to` on."""
    longest_word = options[4]
    lines = 0
    last_return = NONE
    phrased, curly, bracketed = NONE, NONE, NONE
    run, longest_run = 0, 0  # of bytes without ASCII white space
    for at in range(begin, end, 64):
        valid = first_bits(end - at)
        broke, last_return = breaks(data_B, at, last_return)
        broke &= valid
        while broke != NONE:
            break_L[lines] = at - begin + lowest(broke)
            lines += 1
            broke &= broke - ONE
        phrased |= _may_hold_phrase(data_B, at) & valid
        curly |= within(data_B, at, 0x7B, 1) & valid
        bracketed |= within(data_B, at, 0x5B, 1) & valid
        space = (within(data_B, at, 0x20, 1) | within(data_B, at, 0x09, 5) | within(data_B, at, 0x1C, 4)) & valid
        if space == NONE:
            run += 64
        else:
            longest_run = max(longest_run, run + lowest(space))
            run = 63 - highest(space)
    # A run shorter than a block may lie within it unseen.
    may_be_long = longest_word != -1 and (longest_word < 64 or max(longest_run, run) > longest_word)

    kept, sentences = 0, 0
    stop = to
    line = begin
    for k in range(lines + 1):
        line_end, following = end, end
        if k < lines:
            line_end = begin + break_L[k]
            following = line_end + char_bytes(data_B[line_end])
            if data_B[line_end] == 0x0D and following < end and data_B[following] == 0x0A:
                following += 1
        elif line == end:
            break
        first = strip_left(data_B, line, line_end)
        last = strip_right(data_B, first, line_end)
        line = following
        if may_be_long and _has_long_word(data_B, first, last, longest_word):
            continue
        if options[3] > 0 and count_words(data_B, first, last, options[3]) < options[3]:
            continue
        # A line is judged where it will stand; the next one takes its place if it is dropped.
        place = stop + (kept > 0)
        place_end = -1
        if bracketed != NONE and options[0] != 0:
            place_end = _copy_without_citations(data_B, first, last, kinds, out_B, place)
        is_changed = place_end >= 0
        if not is_changed:
            copy_bytes(out_B, place, data_B, first, last - first)
            place_end = place + last - first
        if options[1] != 0 and not _ends_well(out_B, place, place_end):
            continue
        phrases = 0
        if phrased != NONE or is_changed:
            phrases = _phrases(out_B, place, place_end, phrase_B, phrase_end_P, phrase_first)
        if options[5] != 0 and phrases & _LOREM_IPSUM:
            return 1, 1.0, to
        if options[6] != 0 and phrases & _JAVASCRIPT:
            continue
        if options[7] != 0 and curly != NONE and _has_byte(out_B, place, place_end, 0x7B):
            return 2, 1.0, to
        if options[8] != 0 and phrases & _POLICY:
            continue
        if sentences < options[2]:
            sentences += _count_sentences(out_B, place, place_end, options[2] - sentences)
        if kept > 0:
            out_B[stop] = 0x0A
        kept += 1
        stop = place_end
    if sentences < options[2]:
        return 3, np.float64(sentences), to
    first = strip_left(out_B, to, stop)
    stop = strip_right(out_B, first, stop)
    if first > to:
        for k in range(stop - first):
            out_B[to + k] = out_B[first + k]
    return 0, 0.0, to + stop - first


@numba.njit(cache=True, nogil=True)
def _may_hold_phrase(data_B, at):  # type: ignore[no-untyped-def]
    """Where letters of the phrases stand as they do in them: jav, psu, ms of u, vacy, kie, and the Kelvin sign."""
    s, u = within_folded(data_B, at + 1, 0x73, 1), within_folded(data_B, at + 2, 0x75, 1)
    v, c = within_folded(data_B, at, 0x76, 1), within_folded(data_B, at + 2, 0x63, 1)
    found = within_folded(data_B, at, 0x6A, 1) & within_folded(data_B, at + 2, 0x76, 1)
    found |= within_folded(data_B, at, 0x70, 1) & s & u
    found |= within_folded(data_B, at, 0x6D, 1) & s & within_folded(data_B, at + 6, 0x75, 1)
    found |= v & c & within_folded(data_B, at + 3, 0x79, 1)
    found |= within_folded(data_B, at, 0x6B, 1) & within_folded(data_B, at + 2, 0x65, 1)
    return found | within(data_B, at, 0xE2, 1) & within(data_B, at + 1, 0x84, 1) & within(data_B, at + 2, 0xAA, 1)


@numba.njit(cache=True, nogil=True)
def _phrases(line_B, begin, end, phrase_B, phrase_end_P, phrase_first):  # type: ignore[no-untyped-def]
    """Which of _LOREM_IPSUM, _JAVASCRIPT and _POLICY a line holds, by `str.lower`.

    Beside A to Z the Kelvin sign is the only character whose lower case is a letter of ASCII; that of U+0130 is one with
    a mark behind it, which no phrase has.
    """
    found = 0
    for at in range(begin, end):
        initial = _folded(line_B[at])
        for k in range(phrase_first[initial], phrase_first[initial + 1]):
            reached = at
            same = True
            for q in range(phrase_end_P[k], phrase_end_P[k + 1]):
                wanted = phrase_B[q]
                if reached < end and _folded(line_B[reached]) == wanted:
                    reached += 1
                elif wanted == 0x6B and reached + 3 <= end and decode(line_B, reached) == 0x212A:
                    reached += 3
                else:
                    same = False
                    break
            if same:
                found |= _JAVASCRIPT if k == 1 else _LOREM_IPSUM if k == 2 else _POLICY
    return found


@numba.njit(cache=True, nogil=True)
def _folded(byte):  # type: ignore[no-untyped-def]
    return np.int64(byte) + 0x20 if byte >= 0x41 and byte <= 0x5A else np.int64(byte)


@numba.njit(cache=True, nogil=True)
def _has_byte(line_B, begin, end, byte):  # type: ignore[no-untyped-def]
    found = NONE
    for at in range(begin, end, 64):
        found |= within(line_B, at, byte, 1) & first_bits(end - at)
    return found != NONE


@numba.njit(cache=True, nogil=True)
def _has_long_word(data_B, begin, end, longest):  # type: ignore[no-untyped-def]
    """Whether a word has more characters than `longest`."""
    length = 0
    at = begin
    while at < end:
        length = 0 if is_space(decode(data_B, at)) else length + 1
        if length > longest:
            return True
        at += char_bytes(data_B[at])
    return False


@numba.njit(cache=True, nogil=True)
def _copy_without_citations(data_B, begin, end, kinds, out_B, to):  # type: ignore[no-untyped-def]
    """Writes a line without its citations and says where it ends; -1 if it has none."""
    start = begin  # of what is not written yet
    skipped = False
    at = begin
    while at < end:
        found = within(data_B, at, 0x5B, 1) & first_bits(end - at)
        if found == NONE:
            at += 64
            continue
        at += lowest(found)
        citation_end = _citation_end(data_B, at, end, kinds)
        if citation_end < 0:
            at += 1
            continue
        copy_bytes(out_B, to, data_B, start, at - start)
        to += at - start
        skipped = True
        at = start = citation_end
    if not skipped:
        return -1
    copy_bytes(out_B, to, data_B, start, end - start)
    return to + end - start


@numba.njit(cache=True, nogil=True)
def _citation_end(data_B, bracket, end, kinds):  # type: ignore[no-untyped-def]
    """Where the citation ends that this bracket opens; -1 if it opens none."""
    at = bracket + 1
    while at < end and kinds[decode(data_B, at)] & _DIGIT:
        at += char_bytes(data_B[at])
    if at < end and data_B[at] == 0x5D:
        return at + 1
    for text in (_EDIT, _CITATION_NEEDED):
        if bracket + len(text) <= end:
            same = True
            for k in range(len(text)):
                same &= data_B[bracket + k] == text[k]
            if same:
                return bracket + len(text)
    return -1


@numba.njit(cache=True, nogil=True)
def _ends_well(line_B, begin, end):  # type: ignore[no-untyped-def]
    if begin == end:
        return False
    last = line_B[end - 1]
    if last == 0x2E:
        return end - begin < 3 or line_B[end - 2] != 0x2E or line_B[end - 3] != 0x2E
    return last == 0x3F or last == 0x21 or last == 0x22 or last == 0x27


@numba.njit(cache=True, nogil=True)
def _count_sentences(line_B, begin, end, enough):  # type: ignore[no-untyped-def]
    """The sentences of a line; no more are counted where there are `enough`."""
    count = 0
    rest = begin
    for at in range(begin, end, 64):
        found = within(line_B, at, 0x2E, 1) | within(line_B, at, 0x3F, 1) | within(line_B, at, 0x21, 1)
        found &= first_bits(end - at)
        while found != NONE:
            behind = at + lowest(found) + 1
            found &= found - ONE
            while behind < end and _is_closing(decode(line_B, behind)):
                behind += char_bytes(line_B[behind])
            if behind == end or is_space(decode(line_B, behind)):
                count += 1
                rest = behind
        if count >= enough:
            return count
    return count + (strip_left(line_B, rest, end) < end)


@numba.njit(cache=True, nogil=True)
def _is_closing(code):  # type: ignore[no-untyped-def]
    if code < 0x80:
        return code == 0x22 or code == 0x27 or code == 0x29 or code == 0x5D or code == 0x7D
    return code == 0x2019 or code == 0x201D or code == 0xBB or code == 0x203A


@numba.njit(numba.void(BYTES, _I64, _I64, _U8, BYTES, _I64, _I64, _U8, _I64, _U8, _F64), cache=True, nogil=True)
def _c4_quality(  # type: ignore[no-untyped-def]
    data_B, offset_N1, options, kinds, phrase_B, phrase_end_P, phrase_first, out_B, out_offset_N1, broken_N, score_N
):
    longest = 0
    for i in range(len(broken_N)):
        longest = max(longest, offset_N1[i + 1] - offset_N1[i])
    break_L = np.empty(longest + 1, np.int32)
    for i in range(len(broken_N)):
        begin, end, to = offset_N1[i], offset_N1[i + 1], out_offset_N1[i]
        broken, score, stop = _keep_lines(
            data_B, begin, end, options, kinds, phrase_B, phrase_end_P, phrase_first, break_L, out_B, to
        )
        if broken != 0:
            copy_bytes(out_B, to, data_B, begin, end - begin)
            stop = to + end - begin
        broken_N[i] = broken
        score_N[i] = score
        out_offset_N1[i + 1] = stop

"""C4's rules: `c4_quality` (Raffel et al. 2020, JMLR 21, 2.2)."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aifactory.ingest.columns import Verdicts
from aifactory.ingest.quality.characters import DIGIT, joined, kinds_of_characters
from aifactory.ingest.words import (
    BYTES,
    NONE,
    ONE,
    SLACK,
    breaks,
    char_bytes,
    copy_bytes,
    count_words,
    decode,
    first_bits,
    highest,
    is_space,
    lowest,
    strip_left,
    strip_right,
    total_bytes,
    with_slack,
    within,
    within_folded,
)

C4_QUALITY_RULES = ("lorem_ipsum", "curly_bracket", "too_few_sentences")
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
_EDIT = np.frombuffer(b"[edit]", np.uint8)
_CITATION_NEEDED = np.frombuffer(b"[citation needed]", np.uint8)
_BOOLS = numba.types.Array(numba.boolean, 1, "C")
_U8, _I64, _F64 = numba.uint8[::1], numba.int64[::1], numba.float64[::1]


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


def c4_quality(
    texts: pa.Array, params: C4Quality, *, only_N: npt.NDArray[np.bool_] | None = None
) -> tuple[pa.Array, Verdicts]:
    """The texts with the lines that are kept, joined by LF, and which of C4_QUALITY_RULES each breaks first.

    A text that breaks a rule stays as it was. The score is the number of sentences, or 1 for the line that was found.

    only_N   looks at these texts alone; what it does not look at, and what breaks a rule, comes out empty
    """
    verdicts = Verdicts.none(len(texts), C4_QUALITY_RULES)
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
            kinds_of_characters(),
            *joined(_PHRASES),
            np.ones(rows.stop - rows.start, np.bool_) if only_N is None else only_N[rows],
            only_N is None,
            out_B,
            out_offset_N1[rows.start : rows.stop + 1],
            verdicts.broken_N[rows],
            verdicts.score_N[rows],
        )
    offset_type = np.int64 if pa.types.is_large_string(texts.type) else np.int32
    offsets = pa.py_buffer(out_offset_N1.astype(offset_type, copy=False))
    kept = pa.Array.from_buffers(texts.type, len(texts), [None, offsets, pa.py_buffer(out_B[: out_offset_N1[-1]])])
    return kept, verdicts


# ── kernels ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


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
        if (phrased != NONE or is_changed) and _line_may_hold_phrase(out_B, place, place_end):
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
    found |= (
        within_folded(data_B, at, 0x6B, 1)
        & within_folded(data_B, at + 1, 0x69, 1)
        & within_folded(data_B, at + 2, 0x65, 1)
    )
    return found | within(data_B, at, 0xE2, 1) & within(data_B, at + 1, 0x84, 1) & within(data_B, at + 2, 0xAA, 1)


@numba.njit(cache=True, nogil=True)
def _line_may_hold_phrase(line_B, begin, end):  # type: ignore[no-untyped-def]
    found = NONE
    for at in range(begin, end, 64):
        found |= _may_hold_phrase(line_B, at) & first_bits(end - at)
    return found != NONE


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
    while at < end and kinds[decode(data_B, at)] & DIGIT:
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


@numba.njit(
    numba.void(BYTES, _I64, _I64, _U8, BYTES, _I64, _I64, _BOOLS, numba.boolean, _U8, _I64, _U8, _F64),
    cache=True,
    nogil=True,
)
def _c4_quality(  # type: ignore[no-untyped-def]
    data_B,
    offset_N1,
    options,
    kinds,
    phrase_B,
    phrase_end_P,
    phrase_first,
    only_N,
    writes_broken,
    out_B,
    out_offset_N1,
    broken_N,
    score_N,
):
    longest = 0
    for i in range(len(broken_N)):
        longest = max(longest, offset_N1[i + 1] - offset_N1[i])
    break_L = np.empty(longest + 1, np.int32)
    for i in range(len(broken_N)):
        begin, end, to = offset_N1[i], offset_N1[i + 1], out_offset_N1[i]
        if not only_N[i]:
            out_offset_N1[i + 1] = to
            continue
        broken, score, stop = _keep_lines(
            data_B, begin, end, options, kinds, phrase_B, phrase_end_P, phrase_first, break_L, out_B, to
        )
        if broken != 0 and writes_broken:
            copy_bytes(out_B, to, data_B, begin, end - begin)
            stop = to + end - begin
        broken_N[i] = broken
        score_N[i] = score
        out_offset_N1[i + 1] = stop

"""FineWeb's rules: `fineweb_quality` (Penedo et al. 2024, arXiv:2406.17557, 3.6)."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import pyarrow as pa

from aifactory.ingest.columns import Verdicts
from aifactory.ingest.quality.characters import TERMINAL_PUNCTUATION, members
from aifactory.ingest.quality.spans import bound_repeated, count_repeated, table_bits
from aifactory.ingest.words import (
    BYTES,
    NONE,
    count_chars,
    count_words,
    decode,
    first_bits,
    is_ascii,
    last_char,
    lowest,
    strip_left,
    with_slack,
    within,
)

FINEWEB_QUALITY_RULES = ("empty", "line_punct_ratio", "short_line_ratio", "char_dup_ratio", "list_ratio")
_BOOLS = numba.types.Array(numba.boolean, 1, "C")
_U8, _I64, _F64 = numba.uint8[::1], numba.int64[::1], numba.float64[::1]


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


def fineweb_quality(texts: pa.Array, params: FineWebQuality) -> Verdicts:
    """Which of FINEWEB_QUALITY_RULES each text breaks first; the score is the ratio, or 0 of a text without lines."""
    verdicts = Verdicts.none(len(texts), FINEWEB_QUALITY_RULES)
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
            data_B, offset_N1, limits, members(params.stop_chars), verdicts.broken_N[rows], verdicts.score_N[rows]
        )
    return verdicts


# ── kernels ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


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
    repeated, _ = bound_repeated(data_B, begin, span_L2, lines, seen)
    if repeated > 0:
        _, repeated_chars = count_repeated(data_B, begin, span_L2, lines, ascii_only, table)
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
    table = np.empty(1 << table_bits(longest + 2), np.int32)
    seen = np.empty(1 << table_bits(longest // 2 + 1), np.uint64)
    for i in range(len(broken_N)):
        broken_N[i], score_N[i] = _broken_by_lines(
            data_B, offset_N1[i], offset_N1[i + 1], limits, is_stop, span_L2, table, seen
        )

"""Spans: how many stretches of a text (lines, paragraphs) occurred before in it."""

from __future__ import annotations

import numba
import numpy as np

from aifactory.ingest.words import NONE, ONE, count_chars, equal_bytes, first_bytes, hash_bytes, load_8

MOST_BITS = 30  # of a number in slot_W; a table for bounds may be too small, one for comparisons must not be
KEY_A = np.uint64(0x9E3779B97F4A7C15)
KEY_B = np.uint64(0xD6E8FEB86659FD93)
KEY_C = np.uint64(0xA0761D6478BD642F)
SIX = np.uint64(6)
LOW_6 = np.uint64(63)
HALF = np.uint64(32)


@numba.njit(cache=True, nogil=True)
def table_bits(count):  # type: ignore[no-untyped-def]
    """The logarithm of the least power of two that is `count` or more, at least 6."""
    bits = 6
    while (1 << bits) < count:
        bits += 1
    return bits


@numba.njit(cache=True, nogil=True)
def bound_repeated(data_B, begin, span_L2, spans, seen):  # type: ignore[no-untyped-def]
    """At least as many spans as occurred before, and their bytes."""
    bits = min(table_bits(64 * spans), MOST_BITS)
    shift = np.uint64(64 - bits)
    seen[: 1 << (bits - 6)] = NONE
    repeated, repeated_bytes = 0, 0
    for k in range(spans):
        first, last = begin + span_L2[k, 0], begin + span_L2[k, 1]
        length = last - first
        value = NONE
        if length > 0:
            value = load_8(data_B, first) & first_bytes(length)
        value = (value ^ np.uint64(length) * KEY_A) * KEY_B
        if length >= 8:
            value = (value ^ (value >> HALF) ^ load_8(data_B, last - 8)) * KEY_C
            value = (value ^ (value >> HALF) ^ load_8(data_B, (first + last) // 2 - 4)) * KEY_B
        slot = value >> shift
        bit = ONE << (slot & LOW_6)
        if seen[slot >> SIX] & bit != NONE:
            repeated += 1
            repeated_bytes += length
        seen[slot >> SIX] |= bit
    return repeated, repeated_bytes


@numba.njit(cache=True, nogil=True)
def count_repeated(data_B, begin, span_L2, spans, ascii_only, table):  # type: ignore[no-untyped-def]
    """How many spans occurred before, and their characters."""
    bits = table_bits(2 * spans)
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

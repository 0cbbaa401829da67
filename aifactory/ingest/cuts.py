"""Cuts: where the data of a source is divided, so that a change disturbs only what lies around it.

Both ways are content-defined chunking: whether a place is a border follows from what stands at it and from how far the
last border is, and from nothing else; so after a change the same borders are found again at the next one or two places.
A border is looked for from MIN_BYTES on, is due after MEAN_BYTES more on average, and is forced at MAX_BYTES.

    small files   one after the other in the order of their names; the hash of a name and its file's size decide
    lines         of a large file; a sample of a line's bytes and its length decide

(A. Muthitacharoen, B. Chen, D. Mazieres, A low-bandwidth network file system, SOSP 2001, section 3.1, with a lower and an
upper bound; here borders lie at lines.)

Legend   B bytes, L lines in a window, K samples of a line.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MIN_BYTES = 4 << 20
MEAN_BYTES = 4 << 20
MAX_BYTES = 16 << 20
FILE_WEIGHT = 4096
"""What a file weighs beside its content, bytes: opening it takes about as long as reading so many."""
PACKED_WEIGHT = 4
"""How many bytes one byte of a compressed file weighs."""
_WINDOW_BYTES = 1 << 20
_SAMPLES = 8
_NEWLINE = 0x0A
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xFF51AFD7ED558CCD)


@dataclass(frozen=True, slots=True)
class Cut:
    """A part of a file, a table or a topic."""

    start: int | str
    """Where it begins, inclusive: a byte, a row group, an offset; a key as JSON, exclusive, "" for the first."""
    stop: int | str
    """Where it ends, exclusive; a key inclusive."""
    first_position: int
    """Position of its first row in the whole."""
    num_bytes: int
    sha256: str


def ends_group(name: str, weight: int) -> bool:
    """Whether a group of small files that is long enough ends with this one."""
    drawn = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")
    return drawn < weight * (1 << 64) // MEAN_BYTES


def find_line_cut(data_B: npt.NDArray[np.uint8], *, is_last: bool) -> int:
    """Where a piece of lines ends that begins with `data_B`, bytes; 0 if that is not to be seen in so little.

    `data_B` begins at a line, and holds at least MAX_BYTES unless it is the last of its file.
    """
    cut = _last_line_end(data_B[:MIN_BYTES])
    for start in range(MIN_BYTES, min(len(data_B), MAX_BYTES), _WINDOW_BYTES):
        window_B = data_B[: min(start + _WINDOW_BYTES, MAX_BYTES)]
        ends_L = np.flatnonzero(window_B[start:] == _NEWLINE) + start + 1
        if len(ends_L):
            starts_L = np.concatenate(([cut], ends_L[:-1]))
            found = np.flatnonzero(_is_border(window_B, starts_L, ends_L))
            if len(found):
                return int(ends_L[found[0]])
            cut = int(ends_L[-1])
    if is_last and len(data_B) <= MAX_BYTES:
        return len(data_B)
    return cut  # 0: one line is longer than a piece


def _last_line_end(data_B: npt.NDArray[np.uint8]) -> int:
    return data_B.tobytes().rfind(b"\n") + 1


def _is_border(
    data_B: npt.NDArray[np.uint8], starts_L: npt.NDArray[np.int64], ends_L: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Whether a piece may end after each line; a long line is so much likelier to be a border."""
    lengths_L = ends_L - starts_L
    hash_L = lengths_L.astype(np.uint64) * _PRIME
    words_B = np.ndarray((max(len(data_B) - 7, 0),), np.dtype("<u8"), data_B, strides=(1,))
    reach_L = np.maximum(lengths_L - 8, 0)
    for sample in range(_SAMPLES):
        at_L = starts_L + reach_L * sample // (_SAMPLES - 1)
        # The words of a short line reach into what is beside it: they are left out.
        word_L = np.where(lengths_L >= 8, words_B[np.minimum(at_L, len(words_B) - 1)], np.uint64(0))
        hash_L = (hash_L ^ word_L.astype(np.uint64)) * _PRIME
        hash_L ^= hash_L >> np.uint64(29)
    hash_L = hash_L * _MIX
    hash_L ^= hash_L >> np.uint64(32)
    drawn_L = hash_L.astype(np.float64) / 2.0**64
    is_border: npt.NDArray[np.bool_] = drawn_L < lengths_L / MEAN_BYTES
    return is_border

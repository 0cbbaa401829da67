"""Columns: a block of rows as Arrow holds it, and its texts as the bytes and offsets that kernels read.

Legend   N texts, B bytes of UTF-8 in all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

RAW_SCHEMA = pa.schema(
    [
        ("origin", pa.string()),
        ("position", pa.int64()),
        ("prompt", pa.string()),
        ("text", pa.string()),
        ("messages", pa.string()),
        ("rejected", pa.string()),
        ("label", pa.string()),
        ("user", pa.string()),
        ("timestamp", pa.string()),
        ("weight", pa.float64()),
    ]
)
"""What a source says of a row, before any step; no value is null.

origin     the file (below the source's path) or table, or the completion that was corrected
position   line, record or row in it, from 0
prompt     what was asked; "" for plain text
text       the text, the answer, or the answer that was preferred; valid UTF-8
messages   the turns before the answer, as canonical JSON [{"role": ..., "content": ...}]; "" where there are none
rejected   the answer that was not preferred; "" where there is none
label, user, timestamp   as the source gives them; "" where it gives none
weight     1.0 where the source gives none
"""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Which rule each of N texts breaks first, and what was measured."""

    rules: tuple[str, ...]
    """The names of the rules."""
    broken_N: npt.NDArray[np.uint8]
    """0 where every rule is kept, else 1 + the index of the rule in `rules`."""
    score_N: npt.NDArray[np.float64]
    """What the broken rule measured, in that rule's unit; 0 where none is broken."""


def text_buffers(texts: pa.Array) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """data_B and offsets_N1 without a copy of the data: text i is data_B[offsets_N1[i] : offsets_N1[i + 1]].

    Takes string or large_string without nulls, sliced or not; offsets_N1[0] need not be 0.
    """
    assert texts.null_count == 0, "a column of texts holds no null"
    wide = pa.types.is_large_string(texts.type) or pa.types.is_large_binary(texts.type)
    _, offsets, data = texts.buffers()
    count = len(texts) + 1
    offset_type = np.dtype(np.int64 if wide else np.int32)
    if offsets is None or not len(texts):
        return np.zeros(0, np.uint8), np.zeros(count, np.int64)
    found = np.frombuffer(offsets, offset_type, count, texts.offset * offset_type.itemsize).astype(np.int64)
    return (np.zeros(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)), found


def text_array(data_B: npt.NDArray[np.uint8], offsets_N1: npt.NDArray[np.int64]) -> pa.Array:
    """N texts (string) from their bytes, which must be valid UTF-8, and offsets that begin at 0."""
    offsets = pa.py_buffer(np.ascontiguousarray(offsets_N1, np.int32))
    data = pa.py_buffer(np.ascontiguousarray(data_B))
    return pa.StringArray.from_buffers(len(offsets_N1) - 1, offsets, data)

"""Buffers: a column of texts as the bytes and offsets that kernels read.

Legend   N texts, B bytes of UTF-8 in all of them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa


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

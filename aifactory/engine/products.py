"""Products: vectors by packed matrices, and what is done to a few of their columns while these are at hand.

Whatever the number of vectors and of threads, a row's bits depend on its own vector, the weights and the processor alone.
Weights of bfloat16 lie by pairs of columns, and whoever multiplies by them rounds the vectors likewise (`round_in_place`).

Legend   B vectors, N rows and K columns of a matrix, which may have more of zeros, P panels of PANEL rows, I inner width of an MLP,
         L layers, X adapters, R their rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from aifactory.engine.compilation import kernel
from aifactory.engine.tiles import multiply_tiles
from aifactory.engine.vectors import (
    MOST_VECTORS,
    PANEL,
    PANELS_OF_MANY,
    PANELS_OF_ONE,
    dot_row,
    dot_rows_8,
    panel_of_many,
    panels_of_many,
    panels_of_one,
    silu_times,
)
from aifactory.engine.worksharing import PANELS_AT_LEAST, next_part, wait_for_all


@kernel
def padded(size: int) -> int:
    """The rows of so many in whole panels."""
    return (size + PANEL - 1) // PANEL * PANEL


@kernel
def product_of(
    w_PK: Any,
    x_BK: Any,
    y_BN: Any,
    num_rows: int,
    begin: int,
    end: int,
    is_tiled: bool,
    left: Any,
    right: Any,
    parts: Any,
) -> None:
    """As `product_of_vectors`; where `is_tiled`, of the vectors that are in `left`."""
    if is_tiled:
        multiply_tiles(w_PK, left, right, parts, y_BN, num_rows, begin, end)
    else:
        product_of_vectors(w_PK, x_BK, y_BN, num_rows, begin, end)


_BLOCK = 96
"""So many vectors stay in a processor's own cache while a matrix passes by."""


@kernel
def product_of_vectors(w_PK: Any, x_BK: Any, y_BN: Any, num_rows: int, begin: int, end: int) -> None:
    """The columns of y = x @ w.T that the panels [begin, end) give, for the first `num_rows` rows, without scales."""
    for first in range(0, num_rows, _BLOCK):
        product_block(w_PK, x_BK[first:], y_BN[first:], min(_BLOCK, num_rows - first), begin, end)


@kernel
def product_block(w_PK: Any, x_BK: Any, y_BN: Any, num_rows: int, begin: int, end: int) -> None:
    # Elements of a vector, or pairs of them.
    length = x_BK.shape[1] * PANEL // w_PK.shape[2]
    size = w_PK.shape[1] * w_PK.shape[2]
    x_step, y_step = x_BK.strides[0] // 4, y_BN.strides[0] // 4
    p = begin
    if num_rows == 1:
        while p + PANELS_OF_ONE <= end:
            panels_of_one(w_PK, p * size, size, x_BK, x_step, 1, length, y_BN[0, p * PANEL :], y_step)
            p += PANELS_OF_ONE
    while p + PANELS_OF_MANY <= end:
        b = 0
        while b < num_rows:
            count = _together(num_rows - b)
            panels_of_many(w_PK, p * size, size, x_BK[b:], x_step, count, length, y_BN[b, p * PANEL :], y_step)
            b += count
        p += PANELS_OF_MANY
    while p < end:
        b = 0
        while b < num_rows:
            count = _together(num_rows - b)
            panel_of_many(w_PK, p * size, size, x_BK[b:], x_step, count, length, y_BN[b, p * PANEL :], y_step)
            b += count
        p += 1


@kernel
def _together(num_left: int) -> int:
    """How many vectors go together, of those that are left: six, and the last ones in halves, since few use a processor badly."""
    if num_left >= 2 * MOST_VECTORS:
        return MOST_VECTORS
    return (num_left + 1) // 2 if num_left > MOST_VECTORS else num_left


@kernel
def scale(y_BN: Any, scale_N: Any, bias_N: Any, num_rows: int, begin: int, end: int) -> None:
    """y * scale + bias; either is left out where its array is empty."""
    for b in range(num_rows):
        if len(scale_N):
            for n in range(begin, end):
                y_BN[b, n] *= scale_N[n]
        if len(bias_N):
            for n in range(begin, end):
                y_BN[b, n] += bias_N[n]


@kernel
def product(
    thread: int, num_threads: int, sync: Any, w_PK: Any, scale_N: Any, bias_N: Any, x_BK: Any, y_BN: Any
) -> None:
    """y = x @ w.T * scale + bias: one matrix by itself. y has the columns of whole panels."""
    num_rows = x_BK.shape[0]
    begin, end = next_part(sync, w_PK.shape[0], num_threads, PANELS_AT_LEAST)
    while begin < end:
        product_of_vectors(w_PK, x_BK, y_BN, num_rows, begin, end)
        scale(y_BN, scale_N, bias_N, num_rows, PANEL * begin, PANEL * end)
        begin, end = next_part(sync, w_PK.shape[0], num_threads, PANELS_AT_LEAST)
    wait_for_all(sync, num_threads)


@kernel
def add(x_BH: Any, added_BH: Any, num_rows: int, begin: int, end: int) -> None:
    for b in range(num_rows):
        for h in range(begin, min(end, x_BH.shape[1])):
            x_BH[b, h] += added_BH[b, h]


@kernel
def gate(inner_BI: Any, num_rows: int, num_inner: int, begin: int, end: int) -> None:
    """silu(gate) * up in place of gate, for columns [begin, end); up stands `num_inner` columns on."""
    step = inner_BI.strides[0] // 4
    for b in range(num_rows):
        silu_times(inner_BI, b * step + begin, b * step + num_inner + begin, end - begin)


@kernel
def reduce(thread: int, num_threads: int, a_XLPK: Any, layer: int, x_BK: Any, adapter_B: Any, t_BP: Any) -> None:
    """t = A x of the tokens that have an adapter: P is parts times rank, whole blocks of eight."""
    for b in range(thread, len(adapter_B), num_threads):
        if adapter_B[b] >= 0:
            a_PK = a_XLPK[adapter_B[b], layer]
            for p in range(0, a_PK.shape[0], 8):
                dot_rows_8(a_PK, p * a_PK.shape[1], x_BK[b], a_PK.shape[1], t_BP[b, p:])


@kernel
def expand(
    b_XLNR: Any, layer: int, t_BP: Any, adapter_B: Any, y_BN: Any, begin: int, end: int, second: Any, third: Any
) -> None:
    """y += B t for columns [begin, end); those from `second` and from `third` on belong to the next parts of t."""
    change = np.empty(1, np.float32)
    for b in range(len(adapter_B)):
        if adapter_B[b] >= 0:
            b_NR = b_XLNR[adapter_B[b], layer]
            rank = b_NR.shape[1]
            for n in range(begin, end):
                part = (1 if n >= second else 0) + (1 if n >= third else 0)
                dot_row(b_NR, n * rank, t_BP[b, part * rank :], rank, change)
                y_BN[b, n] += change[0]

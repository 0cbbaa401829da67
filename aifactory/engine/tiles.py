"""Tiles: products by a processor's matrix unit, which multiplies bfloat16 and adds in float32 (Intel's AMX).

A float32 is the sum of three bfloat16, cut off bit by bit: 8 bits of its mantissa each. Of the nine products of two of them six are
made; the others are below its last bit. Weights of int8 are one bfloat16 each, so three products are all there are, and exact.
Weights of bfloat16 lie as tiles already, and vectors are rounded to bfloat16 for them, so nothing is cut and one product is all:
then a single vector goes as fast by tiles as memory gives weights. `benchmarks/engine_kernels.py` has how much faster all that is.

Law      a row's bits depend on that row and the weights alone, not on how many rows there are; they are not those of `products.py`.
Layout   of tiles as in `matrix_unit.py`: those of one place follow each other, term by term. Of weights of bfloat16 sixteen lines of a
         panel are one as they are.
Blocks   some columns of some panels are cut into tiles, then all vectors pass by: 32 of them, as far as these columns go, stay in the
         first cache while they meet panel after panel, and sums wait in float32 for the next columns. Meanwhile the second cache is asked
         for what comes next: a tile that comes from further away is awaited for longer than it is multiplied. Of weights that are
         tiles, up to 32 vectors meet panel after panel as these lie in memory.
Source   the split: Henry, Tang and Heinecke 2019, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
         Computations", ARITH.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from aifactory.engine.compilation import kernel
from aifactory.engine.matrix_unit import (
    DEPTH,
    LINE,
    MOST_PANELS,
    ROWS,
    SUM,
    TERMS,
    TILE,
    TILE_LINES,
    begin_tiles,
    cut_panel,
    cut_vector,
    end_tiles,
    pass_panels,
    sum_tiles,
    take_vector,
    terms_beside,
    terms_of,
)
from aifactory.engine.vectors import PANEL

_MOST_BLOCKS = 8
"""Blocks of DEPTH columns that a thread cuts of MOST_PANELS panels at once."""


@kernel
def _tiles_of(num_rows: int) -> int:
    return (num_rows + ROWS - 1) // ROWS


@kernel
def _blocks_of(length: int) -> int:
    return (length + DEPTH - 1) // DEPTH


def num_left(num_rows: int, length: int) -> int:
    """Elements that the tiles of so many vectors of this length take."""
    return int(_tiles_of(num_rows) * _blocks_of(length) * TERMS * TILE)


NUM_RIGHT = MOST_PANELS * _MOST_BLOCKS * TERMS * TILE
"""Elements that a thread's tiles of weights take."""


def num_parts(num_rows: int) -> int:
    """Elements that a thread's sums of so many vectors take, while they wait for the next columns."""
    return int(_tiles_of(num_rows) * MOST_PANELS * SUM)


@kernel
def cut_row(x_K: Any, b: int, left: Any, terms: int) -> None:
    """Put vector b into its place among the tiles: in TERMS terms, or as one, if it is rounded to bfloat16 already."""
    length = len(x_K)
    blocks = _blocks_of(length)
    start = b // ROWS * blocks * terms * TILE + b % ROWS * DEPTH
    for block in range(length // DEPTH):
        _cut_block(x_K, DEPTH * block, left, start + block * terms * TILE, terms)
    if length % DEPTH:
        rest = np.zeros(DEPTH, np.float32)
        for k in range(length % DEPTH):
            rest[k] = x_K[length // DEPTH * DEPTH + k]
        _cut_block(rest, 0, left, start + (blocks - 1) * terms * TILE, terms)


@kernel
def _cut_block(x_K: Any, at: int, left: Any, to: int, terms: int) -> None:
    if terms == 1:
        take_vector(x_K, at, left, to)
    else:
        cut_vector(x_K, at, left, to)


@kernel
def _cut_panels(w_PK: Any, first: int, count: int, block: int, blocks: int, right: Any) -> None:
    """So many blocks of columns of so many panels; the next panel's tiles are _MOST_BLOCKS blocks further."""
    length = w_PK.shape[1]
    step = terms_of(w_PK) * TILE
    for p in range(count):
        start = (first + p) * length * PANEL
        for b in range(blocks):
            column, to = (block + b) * DEPTH, (p * _MOST_BLOCKS + b) * step
            if column + DEPTH <= length:
                cut_panel(w_PK, start + PANEL * column, right, to)
                continue
            rest = np.zeros((DEPTH, PANEL), w_PK.dtype)
            for k in range(length - column):
                for n in range(PANEL):
                    rest[k, n] = w_PK[first + p, column + k, n]
            cut_panel(rest, 0, right, to)


@kernel
def multiply_tiles(
    w_PK: Any, left: Any, right: Any, parts: Any, y_BN: Any, num_rows: int, begin: int, end: int
) -> None:
    """As `products.py`'s product, of vectors that `cut_row` has put into `left`; `right` and `parts` are this thread's own."""
    begin_tiles()
    if w_PK.itemsize == 2 and num_rows <= 2 * ROWS:
        _pass_by(w_PK, left, parts, y_BN, num_rows, begin, end)
    else:
        _multiply_blocks(w_PK, left, right, parts, y_BN, num_rows, begin, end)
    end_tiles()


@kernel
def _multiply_blocks(
    w_PK: Any, left: Any, right: Any, parts: Any, y_BN: Any, num_rows: int, begin: int, end: int
) -> None:
    """Some columns of some panels after others, all vectors each."""
    is_ready = w_PK.itemsize == 2
    size, terms, terms_of_left = w_PK.shape[1] * w_PK.shape[2], terms_of(w_PK), terms_beside(w_PK)
    blocks = (size // PANEL + DEPTH - 1) // DEPTH
    row, panel = blocks * terms_of_left * TILE, size if is_ready else _MOST_BLOCKS * terms * TILE
    num_tiles, y_step = _tiles_of(num_rows), y_BN.strides[0] // 4
    line, columns_of_lines = LINE // w_PK.itemsize, PANEL * DEPTH * w_PK.itemsize // LINE
    for p in range(begin, end, MOST_PANELS):
        count = min(MOST_PANELS, end - p)
        for first in range(0, blocks, _MOST_BLOCKS):
            some = min(_MOST_BLOCKS, blocks - first)
            is_first, is_last = 1 if first == 0 else 0, first + some == blocks
            if not is_ready:
                _cut_panels(w_PK, p, count, first, some, right)
            # Of the weights these are cut next, and so many of their lines are asked for in each block.
            cut_panel, cut_block = (p + count, 0) if is_last else (p, first + some)
            lines_of_panel = min(_MOST_BLOCKS, blocks - cut_block) * columns_of_lines
            turns = (num_tiles + 1) // 2 * ((count + 1) // 2)
            w_lines = (count * lines_of_panel + turns * some - 1) // (turns * some)
            asked = 0
            for tile in range(0, num_tiles, 2):
                b, at = tile * ROWS, tile * row + first * terms_of_left * TILE
                num_pairs = (count + 1) // 2
                left_lines = (terms_of_left * TILE_LINES + num_pairs - 1) // num_pairs
                has_results = is_last and b + 2 * ROWS <= num_rows
                after = at + 2 * row if tile + 2 < num_tiles else (first + some) * terms_of_left * TILE
                for q in range(0, count, 2):
                    place = (tile * MOST_PANELS + q) * SUM
                    begun = parts[place:]
                    if has_results:
                        y, y_row, y_panel, step = y_BN[b, (p + q) * PANEL :], ROWS * y_step, PANEL, y_step
                    else:
                        y, y_row, y_panel, step = begun, MOST_PANELS * SUM, SUM, PANEL
                    next_panel = min(cut_panel + asked // lines_of_panel, w_PK.shape[0] - 1)
                    next_w = next_panel * size + cut_block * DEPTH * PANEL + asked % lines_of_panel * line
                    next_left = after + q // 2 * some * left_lines * (LINE // 2)
                    asked += some * w_lines
                    sum_tiles(
                        w_PK,
                        min(2, num_tiles - tile),
                        min(2, count - q),
                        left,
                        at,
                        row,
                        right,
                        (p + q) * size + first * TILE if is_ready else q * panel,
                        panel,
                        some,
                        is_first,
                        begun,
                        y,
                        y_row,
                        y_panel,
                        step,
                        next_left,
                        left_lines,
                        next_w,
                        w_lines,
                    )
                if is_last and not has_results:
                    for r in range(min(2, num_tiles - tile)):
                        for q in range(count):
                            part = parts[((tile + r) * MOST_PANELS + q) * SUM :]
                            _put(part, y_BN, (tile + r) * ROWS, num_rows, (p + q) * PANEL)


@kernel
def _pass_by(w_PK: Any, left: Any, parts: Any, y_BN: Any, num_rows: int, begin: int, end: int) -> None:
    """Panel after panel, as they lie in memory, for so few vectors that these stay at hand."""
    size, num_tiles = w_PK.shape[1] * w_PK.shape[2], _tiles_of(num_rows)
    blocks = size // TILE
    p = begin
    while p < end:
        count = min(end - p, 4 if num_tiles == 1 else 2)
        if count == 3:
            count = 2
        pass_panels(w_PK, p * size, size, count, blocks, left, num_tiles, parts)
        for tile in range(num_tiles):
            for q in range(count):
                _put(parts[(count * tile + q) * SUM :], y_BN, tile * ROWS, num_rows, (p + q) * PANEL)
        p += count


@kernel
def _put(sums: Any, y_BN: Any, first: int, num_rows: int, n: int) -> None:
    """A tile of sums into y from its row `first` and column n on; results of vectors that are none have no place."""
    for r in range(min(ROWS, num_rows - first)):
        for i in range(PANEL):
            y_BN[first + r, n + i] = sums[r * PANEL + i]

"""Tiles: products by a processor's matrix unit, which multiplies bfloat16 and adds in float32 (Intel's AMX).

A float32 is the sum of three bfloat16, cut off bit by bit: 8 bits of its mantissa each. Of the nine products of two of them six are
made; the others are below its last bit. Weights of int8 are one bfloat16 each, so three products are all there are, and exact.
Weights of bfloat16 lie as tiles already, and vectors are rounded to bfloat16 for them, so nothing is cut and one product is all:
then a single vector goes as fast by tiles as memory gives weights. `benchmarks/engine_kernels.py` has how much faster all that is.

Law      a row's bits depend on that row and the weights alone, not on how many rows there are; they are not those of `kernels.py`.
Layout   a tile is 16 rows of 64 bytes. Of the vectors ("left") 16 vectors by 32 elements; of the weights ("right") 16 pairs of elements by
         16 rows of a panel: of bfloat16 sixteen lines of a panel as they are. Tiles of one place follow each other, term by term.
Blocks   some columns of some panels are cut into tiles, then all vectors pass by: 32 of them, as far as these columns go, stay in the
         first cache while they meet panel after panel, and sums wait in float32 for the next columns. Meanwhile the second cache is asked
         for what comes next: a tile that comes from further away is awaited for longer than it is multiplied.
Source   the split: Henry, Tang and Heinecke 2019, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
         Computations", ARITH; the instructions: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2 (TDPBF16PS).
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from aifactory.engine.compilation import kernel
from aifactory.engine.vectors import prefetch, size_of

DEPTH = 32
"""Elements of a vector that a tile holds."""
TERMS = 3
ROWS = 16
TILE = ROWS * DEPTH
"""Elements of a tile of bfloat16, held as int16."""
MOST_PANELS = 8
"""Panels that a thread cuts into terms at once."""
_MOST_BLOCKS = 8
"""Blocks of DEPTH columns that it cuts of them at once."""

_FEATURES = binding.get_host_cpu_features()
_HAS_TILES = bool(_FEATURES.get("amx-tile") and _FEATURES.get("amx-bf16") and _FEATURES.get("avx512f"))
_I8, _I16, _I32, _I64 = (ir.IntType(width) for width in (8, 16, 32, 64))
_FLOATS, _INTS, _SHORTS = (ir.VectorType(kind, ROWS) for kind in (ir.FloatType(), _I32, _I16))
_PANEL = 16
_LINE = 64
"""Bytes that a processor reads at once."""
_SUM = ROWS * _PANEL
"""Elements of a tile of sums."""
_TILE_LINES = TILE * 2 // _LINE
_AHEAD = 4
"""Tiles of a panel that passes by."""


@cache
def can_use_tiles() -> bool:
    """Whether this processor has them and Linux lets this process use them, which must be asked for once."""
    if not _HAS_TILES or sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None, use_errno=True).syscall(arch_prctl, request_permission, tile_data) == 0)


# ── machine code ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _further(builder: Any, place: Any, step: Any, times: int) -> Any:
    return builder.add(place, builder.mul(step, _number(times)))


def _load(builder: Any, register: int, data: Any, place: Any) -> None:
    _run(builder, "tileloadd64", ir.Constant(_I8, register), _at(builder, data, place, _I8), _number(_LINE))


def _run(builder: Any, name: str, *args: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [each.type for each in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), args)


def _number(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _all(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [ir.Constant(_I32, value)] * ROWS)


def _at(builder: Any, data: Any, place: Any, kind: Any) -> Any:
    return builder.bitcast(builder.gep(data, [place]), kind.as_pointer())


def _ask_for(builder: Any, data: Any, place: Any, lines: Any, level: int = 2) -> None:
    """Have so many lines from there on brought to the second cache, or with 3 to the first."""
    start = _at(builder, data, place, _I8)
    with cgutils.for_range_slice(builder, _number(0), lines, _number(1), intp=_I64) as (line, _):
        prefetch(builder, builder.gep(start, [builder.mul(line, _number(_LINE))]), level)


def _cut(builder: Any, values: Any, terms: int) -> list[Any]:
    """Of sixteen floats so many terms, the largest first, each in the upper half of an integer. Exact: what is left of a float that is
    cut off is a float."""
    found = []
    for term in range(terms):
        upper = builder.and_(builder.bitcast(values, _INTS), _all(-65536))
        found.append(upper)
        if term + 1 < terms:
            values = builder.fsub(values, builder.bitcast(upper, _FLOATS))
    return found


def _num_terms(kind: Any) -> int:
    """Of weights of this type."""
    return TERMS if kind.dtype == types.float32 else 1


def _num_terms_beside(kind: Any) -> int:
    """Of vectors that are multiplied with weights of this type."""
    return 1 if kind.dtype == types.int16 else TERMS


@intrinsic
def _begin_tiles(typing: Any) -> Any:
    """All eight tiles of this thread have 16 rows of 64 bytes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _HAS_TILES:
            shapes = bytearray(64)
            shapes[0] = 1
            for tile in range(8):
                shapes[16 + 2 * tile], shapes[48 + tile] = 64, ROWS
            kind = ir.ArrayType(_I8, 64)
            slot = cgutils.alloca_once(builder, kind)
            builder.store(ir.Constant(kind, shapes), slot)
            _run(builder, "ldtilecfg", builder.bitcast(slot, _I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _end_tiles(typing: Any) -> Any:
    """The system need not keep them for this thread any more."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _HAS_TILES:
            _run(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


def _vector_cut(terms: int) -> Any:
    """DEPTH floats from x[at] on, as a row of each of so many tiles; the first one's is at left[to]: `cut(x, at, left, to)`."""

    @intrinsic
    def cut(typing: Any, x: Any, at: Any, left: Any, to: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, target = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2))
            for half in range(0, DEPTH, ROWS):
                values = builder.load(_at(builder, source, builder.add(args[1], _number(half)), _FLOATS), align=1)
                for term, upper in enumerate(_cut(builder, values, terms)):
                    short = builder.trunc(builder.lshr(upper, _all(16)), _SHORTS)
                    place = builder.add(args[3], _number(TILE * term + half))
                    builder.store(short, _at(builder, target, place, _SHORTS), align=1)
            return context.get_dummy_value()

        return types.void(x, types.int64, left, types.int64), generate

    return cut


_cut_vector = _vector_cut(TERMS)
_take_vector = _vector_cut(1)
"""Of floats that are bfloat16."""


@intrinsic
def _cut_panel(typing: Any, w: Any, at: Any, right: Any, to: Any) -> Any:
    """DEPTH columns of a panel from w[at] on, as tiles from right[to] on, one for each term. Those of bfloat16 are tiles."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if signature.args[0].dtype == types.int16:
            return context.get_dummy_value()
        source, target = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2))
        element, terms = source.type.pointee, _num_terms(signature.args[0])

        def column(number: int) -> list[Any]:
            kind = ir.VectorType(element, _PANEL)
            place = builder.add(args[1], _number(_PANEL * number))
            values = builder.load(_at(builder, source, place, kind), align=1)
            if element == _I8:
                # Up to 127: a bfloat16 holds it.
                values = builder.sitofp(builder.sext(values, _INTS), _FLOATS)
            return _cut(builder, values, terms)

        for pair in range(DEPTH // 2):
            even, odd = column(2 * pair), column(2 * pair + 1)
            for term in range(terms):
                both = builder.or_(builder.lshr(even[term], _all(16)), odd[term])
                place = builder.add(args[3], _number(TILE * term + 2 * _PANEL * pair))
                builder.store(both, _at(builder, target, place, _INTS), align=1)
        return context.get_dummy_value()

    return types.void(w, types.int64, right, types.int64), generate


@intrinsic
def _sum_tiles(
    typing: Any,
    w: Any,
    row_tiles: Any,
    panels: Any,
    left: Any,
    at: Any,
    row: Any,
    right: Any,
    right_at: Any,
    panel: Any,
    blocks: Any,
    is_first: Any,
    begun: Any,
    y: Any,
    y_row: Any,
    y_panel: Any,
    y_step: Any,
    next_left: Any,
    left_lines: Any,
    next_w: Any,
    w_lines: Any,
) -> Any:
    """The products of one or two tiles of vectors with one or two panels, over some blocks of columns.

    w           the weights, for their type, and for what comes next of them
    left        the vectors' tiles, from `at` on; the next sixteen vectors are `row` further
    right       the panels' tiles, from `right_at` on; the next panel is `panel` further. Of weights that are tiles these themselves.
    is_first    whether sums begin here; else they go on from `begun`, float32: tiles of sixteen by sixteen, MOST_PANELS of them for
                sixteen vectors
    y           float32, where the sums go; the next sixteen vectors are y_row further, the next panel y_panel, the next vector y_step
    next_left   where in `left` lies what comes next: of each tile of vectors so many lines a block; next_w likewise in w
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _HAS_TILES:
            arrays = {
                i: context.make_array(signature.args[i])(context, builder, args[i]).data
                for i in range(len(args))
                if isinstance(signature.args[i], types.Array)
            }
            given = [arrays.get(i, arg) for i, arg in enumerate(args)]
            if signature.args[0].dtype == types.int16:
                given[6] = given[0]
            terms = _num_terms_beside(signature.args[0]), _num_terms(signature.args[0])
            for rows, columns in ((2, 2), (2, 1), (1, 2), (1, 1)):
                is_shape = builder.and_(
                    builder.icmp_signed("==", args[1], _number(rows)),
                    builder.icmp_signed("==", args[2], _number(columns)),
                )
                with builder.if_then(is_shape):
                    _sum_shape(builder, rows, columns, terms, given)
        return context.get_dummy_value()

    i = types.int64
    kinds = (w, i, i, left, i, i, right, i, i, i, i, begun, y, i, i, i, i, i, i, i)
    return types.void(*kinds), generate


_ORDERS: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {
    (TERMS, TERMS): ((0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (0, 0)),
    (TERMS, 1): ((2, 0), (1, 0), (0, 0)),
    (1, 1): ((0, 0),),
}
"""By how many terms vectors and weights have: which are multiplied, the smallest first; neighbours share one."""


def _sum_shape(builder: Any, row_tiles: int, panels: int, terms: tuple[int, int], given: Sequence[Any]) -> None:
    w, _, _, left, at, row, right, right_at, panel, blocks, is_first, begun, y, y_row, y_panel, y_step, *ahead = given
    next_left, left_lines, next_w, w_lines = ahead
    order = _ORDERS[terms]
    by_row = [(r, p) for r in range(row_tiles) for p in range(panels)]
    by_panel = [(r, p) for p in range(panels) for r in range(row_tiles)]
    # Registers are eight.
    total, of_left, of_right = {pair: register for register, pair in enumerate(by_row)}, (4, 5), (6, 7)

    further, load = partial(_further, builder), partial(_load, builder)
    with builder.if_else(builder.icmp_signed("!=", is_first, _number(0))) as (then, otherwise):
        with then:
            for register in total.values():
                _run(builder, "tilezero", ir.Constant(_I8, register))
        with otherwise:
            for (r, p), register in total.items():
                load(register, begun, _number(_SUM * (MOST_PANELS * r + p)))
    with cgutils.for_range_slice(builder, _number(0), blocks, _number(1), intp=_I64) as (block, _):
        left_at, right_of = further(at, block, terms[0] * TILE), further(right_at, block, terms[1] * TILE)

        def load_left(r: int, term: int) -> None:
            load(of_left[r], left, further(further(left_at, row, r), _number(TILE), term))

        def load_right(p: int, term: int) -> None:
            load(of_right[p], right, further(further(right_of, panel, p), _number(TILE), term))

        for r in range(row_tiles):
            load_left(r, order[0][0])
        for p in range(panels):
            load_right(p, order[0][1])
        for number, (one, other) in enumerate(order):
            one_next, other_next = order[min(number + 1, len(order) - 1)]
            turns = by_panel if other_next != other else by_row
            for turn, (r, p) in enumerate(turns):
                registers = (total[r, p], of_left[r], of_right[p])
                _run(builder, "tdpbf16ps", *(ir.Constant(_I8, register) for register in registers))
                # What a register holds next is asked for as soon as nothing needs what it held.
                later = turns[turn + 1 :]
                if one_next != one and all(r != row for row, _ in later):
                    load_left(r, one_next)
                if other_next != other and all(p != column for _, column in later):
                    load_right(p, other_next)
            if number == 0:
                place = further(next_left, builder.mul(block, left_lines), _LINE // 2)
                for r in range(row_tiles):
                    _ask_for(builder, left, further(place, row, r), left_lines)
                _ask_for(builder, w, further(next_w, builder.mul(block, w_lines), _LINE // size_of(w)), w_lines)
    for (r, p), register in total.items():
        address = _at(builder, y, further(further(_number(0), y_row, r), y_panel, p), _I8)
        _run(builder, "tilestored64", ir.Constant(_I8, register), address, builder.mul(y_step, _number(4)))


@intrinsic
def _pass_panels(
    typing: Any, w: Any, at: Any, size: Any, panels: Any, blocks: Any, left: Any, row_tiles: Any, y: Any
) -> Any:
    """The products of up to two tiles of vectors with four panels, two or one, which are tiles and are read once, from memory.

    w, at   the weights, and where in them the first panel begins; they have `size` elements, `blocks` tiles
    left    the vectors' tiles
    y       float32, for tiles of sums: of the first sixteen vectors each panel's, of the others likewise
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _HAS_TILES and signature.args[0].dtype == types.int16:
            weights, vectors, sums = (
                context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 5, 7)
            )
            for rows in (1, 2):
                for columns in (4, 2, 1):
                    is_shape = builder.and_(
                        builder.icmp_signed("==", args[6], _number(rows)),
                        builder.icmp_signed("==", args[3], _number(columns)),
                    )
                    with builder.if_then(is_shape):
                        _pass_shape(builder, rows, columns, weights, args[1], args[2], args[4], vectors, sums)
        return context.get_dummy_value()

    i = types.int64
    return types.void(w, i, i, i, i, left, i, y), generate


def _pass_shape(
    builder: Any, row_tiles: int, panels: int, w: Any, at: Any, size: Any, blocks: Any, left: Any, y: Any
) -> None:
    further, load = partial(_further, builder), partial(_load, builder)
    # Of eight registers; with 2 by 4 sums none is left for weights, so these go in two turns.
    together = min(panels, 4 // row_tiles)
    for first in range(0, panels, together):
        total = {(r, p): together * r + p for r in range(row_tiles) for p in range(together)}
        of_left = 4, 5
        of_right = (6, 7) if row_tiles == 2 else (5, 6, 7, 5)
        for register in total.values():
            _run(builder, "tilezero", ir.Constant(_I8, register))
        start = further(at, size, first)
        # What lies ahead of each panel is asked for; at its end what lies ahead of the one that takes its place.
        over = builder.mul(size, _number(together - 1))
        with cgutils.for_range_slice(builder, _number(0), blocks, _number(1), intp=_I64) as (block, _):
            ahead = builder.add(block, _number(_AHEAD))
            skip = builder.select(builder.icmp_signed("<", ahead, blocks), _number(0), over)
            for r in range(row_tiles):
                load(
                    of_left[r], left, further(builder.mul(block, _number(TILE)), builder.mul(blocks, _number(TILE)), r)
                )
            for p in range(together):
                panel = further(start, size, p)
                load(of_right[p], w, further(panel, block, TILE))
                for r in range(row_tiles):
                    registers = (total[r, p], of_left[r], of_right[p])
                    _run(builder, "tdpbf16ps", *(ir.Constant(_I8, register) for register in registers))
                _ask_for(builder, w, builder.add(further(panel, ahead, TILE), skip), _number(_TILE_LINES), 3)
        for (r, p), register in total.items():
            address = _at(builder, y, _number((panels * r + first + p) * _SUM), _I8)
            _run(builder, "tilestored64", ir.Constant(_I8, register), address, _number(_LINE))


# ── products ──────────────────────────────────────────────────────────────────────────────────────────────────────────


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
    return int(_tiles_of(num_rows) * MOST_PANELS * _SUM)


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
        _take_vector(x_K, at, left, to)
    else:
        _cut_vector(x_K, at, left, to)


@kernel
def terms_beside(w_PK: Any) -> int:
    """How many terms vectors have that are multiplied with such weights."""
    return 1 if w_PK.itemsize == 2 else TERMS


@kernel
def _cut_panels(w_PK: Any, first: int, count: int, block: int, blocks: int, right: Any) -> None:
    """So many blocks of columns of so many panels; the next panel's tiles are _MOST_BLOCKS blocks further."""
    length = w_PK.shape[1]
    step = (TERMS if w_PK.itemsize == 4 else 1) * TILE
    for p in range(count):
        start = (first + p) * length * _PANEL
        for b in range(blocks):
            column, to = (block + b) * DEPTH, (p * _MOST_BLOCKS + b) * step
            if column + DEPTH <= length:
                _cut_panel(w_PK, start + _PANEL * column, right, to)
                continue
            rest = np.zeros((DEPTH, _PANEL), w_PK.dtype)
            for k in range(length - column):
                for n in range(_PANEL):
                    rest[k, n] = w_PK[first + p, column + k, n]
            _cut_panel(rest, 0, right, to)


@kernel
def multiply_tiles(
    w_PK: Any, left: Any, right: Any, parts: Any, y_BN: Any, num_rows: int, begin: int, end: int
) -> None:
    """As `products.py`'s product, of vectors that `cut_row` has put into `left`; `right` and `parts` are this thread's own."""
    _begin_tiles()
    if w_PK.itemsize == 2 and num_rows <= 2 * ROWS:
        _pass_by(w_PK, left, parts, y_BN, num_rows, begin, end)
    else:
        _multiply_blocks(w_PK, left, right, parts, y_BN, num_rows, begin, end)
    _end_tiles()


@kernel
def _multiply_blocks(
    w_PK: Any, left: Any, right: Any, parts: Any, y_BN: Any, num_rows: int, begin: int, end: int
) -> None:
    """Some columns of some panels after others, all vectors each."""
    is_ready = w_PK.itemsize == 2
    size, terms, terms_of_left = w_PK.shape[1] * w_PK.shape[2], TERMS if w_PK.itemsize == 4 else 1, terms_beside(w_PK)
    blocks = (size // _PANEL + DEPTH - 1) // DEPTH
    row, panel = blocks * terms_of_left * TILE, size if is_ready else _MOST_BLOCKS * terms * TILE
    num_tiles, y_step = _tiles_of(num_rows), y_BN.strides[0] // 4
    line, columns_of_lines = _LINE // w_PK.itemsize, _PANEL * DEPTH * w_PK.itemsize // _LINE
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
                left_lines = (terms_of_left * _TILE_LINES + num_pairs - 1) // num_pairs
                has_results = is_last and b + 2 * ROWS <= num_rows
                after = at + 2 * row if tile + 2 < num_tiles else (first + some) * terms_of_left * TILE
                for q in range(0, count, 2):
                    place = (tile * MOST_PANELS + q) * _SUM
                    begun = parts[place:]
                    if has_results:
                        y, y_row, y_panel, step = y_BN[b, (p + q) * _PANEL :], ROWS * y_step, _PANEL, y_step
                    else:
                        y, y_row, y_panel, step = begun, MOST_PANELS * _SUM, _SUM, _PANEL
                    next_panel = min(cut_panel + asked // lines_of_panel, w_PK.shape[0] - 1)
                    next_w = next_panel * size + cut_block * DEPTH * _PANEL + asked % lines_of_panel * line
                    next_left = after + q // 2 * some * left_lines * (_LINE // 2)
                    asked += some * w_lines
                    _sum_tiles(
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
                            part = parts[((tile + r) * MOST_PANELS + q) * _SUM :]
                            _put(part, y_BN, (tile + r) * ROWS, num_rows, (p + q) * _PANEL)


@kernel
def _pass_by(w_PK: Any, left: Any, parts: Any, y_BN: Any, num_rows: int, begin: int, end: int) -> None:
    """Panel after panel, as they lie in memory, for so few vectors that these stay at hand."""
    size, num_tiles = w_PK.shape[1] * w_PK.shape[2], _tiles_of(num_rows)
    blocks = size // TILE
    p = begin
    while p < end:
        count = 4 if end - p >= 4 else 2 if end - p >= 2 else 1
        _pass_panels(w_PK, p * size, size, count, blocks, left, num_tiles, parts)
        for tile in range(num_tiles):
            for q in range(count):
                _put(parts[(count * tile + q) * _SUM :], y_BN, tile * ROWS, num_rows, (p + q) * _PANEL)
        p += count


@kernel
def _put(sums: Any, y_BN: Any, first: int, num_rows: int, n: int) -> None:
    """A tile of sums into y from its row `first` and column n on; results of vectors that are none have no place."""
    for r in range(min(ROWS, num_rows - first)):
        for i in range(_PANEL):
            y_BN[first + r, n + i] = sums[r * _PANEL + i]

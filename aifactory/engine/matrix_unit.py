"""The matrix unit: what kernels have it do that multiplies bfloat16 and adds in float32 (Intel's AMX), in LLVM's words.

Registers   eight tiles of a thread, each of 16 rows of 64 bytes. Of the vectors ("left") 16 vectors by 32 elements; of the weights
            ("right") 16 pairs of elements by 16 rows of a panel; of sums 16 vectors by 16 rows.
Order       TDPBF16PS adds up the even and the odd elements of a tile by themselves, from zero, and both to what there is.
Source      Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2 (LDTILECFG, TILELOADD, TDPBF16PS).
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from aifactory.engine.vectors import PANEL, prefetch, size_of

DEPTH = 32
"""Elements of a vector that a tile holds."""
TERMS = 3
"""Of a float32 that is cut into bfloat16."""
ROWS = 16
TILE = ROWS * DEPTH
"""Elements of a tile of bfloat16, held as int16."""
MOST_PANELS = 8
"""Panels whose tiles and sums a thread has at once."""

_FEATURES = binding.get_host_cpu_features()
_HAS_TILES = bool(_FEATURES.get("amx-tile") and _FEATURES.get("amx-bf16") and _FEATURES.get("avx512f"))
_I8, _I16, _I32, _I64 = (ir.IntType(width) for width in (8, 16, 32, 64))
_FLOATS, _INTS, _SHORTS = (ir.VectorType(kind, ROWS) for kind in (ir.FloatType(), _I32, _I16))
LINE = 64
"""Bytes that a processor reads at once."""
SUM = ROWS * PANEL
"""Elements of a tile of sums."""
TILE_LINES = TILE * 2 // LINE
_AHEAD = 4
"""Tiles of a panel that passes by."""


@cache
def can_use_tiles() -> bool:
    """Whether this processor has them and Linux lets this process use them, which must be asked for once."""
    if not _HAS_TILES or sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None, use_errno=True).syscall(arch_prctl, request_permission, tile_data) == 0)


def _further(builder: Any, place: Any, step: Any, times: int) -> Any:
    return builder.add(place, builder.mul(step, _number(times)))


def _load(builder: Any, register: int, data: Any, place: Any) -> None:
    _run(builder, "tileloadd64", ir.Constant(_I8, register), _at(builder, data, place, _I8), _number(LINE))


def _run(builder: Any, name: str, *args: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [each.type for each in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), args)


def _is_shape(builder: Any, rows: Any, num_rows: int, columns: Any, num_columns: int) -> Any:
    return builder.and_(
        builder.icmp_signed("==", rows, _number(num_rows)), builder.icmp_signed("==", columns, _number(num_columns))
    )


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
        prefetch(builder, builder.gep(start, [builder.mul(line, _number(LINE))]), level)


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
def terms_of(typing: Any, w: Any) -> Any:
    """How many terms these weights have."""
    return types.int64(w), lambda context, builder, signature, args: _number(_num_terms(signature.args[0]))


@intrinsic
def terms_beside(typing: Any, w: Any) -> Any:
    """How many terms vectors have that are multiplied with these weights."""
    return types.int64(w), lambda context, builder, signature, args: _number(_num_terms_beside(signature.args[0]))


@intrinsic
def begin_tiles(typing: Any) -> Any:
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
def end_tiles(typing: Any) -> Any:
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


cut_vector = _vector_cut(TERMS)
take_vector = _vector_cut(1)
"""Of floats that are bfloat16."""


@intrinsic
def cut_panel(typing: Any, w: Any, at: Any, right: Any, to: Any) -> Any:
    """DEPTH columns of a panel from w[at] on, as tiles from right[to] on, one for each term. Those of bfloat16 are tiles."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if signature.args[0].dtype == types.int16:
            return context.get_dummy_value()
        source, target = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2))
        element, terms = source.type.pointee, _num_terms(signature.args[0])

        def column(number: int) -> list[Any]:
            kind = ir.VectorType(element, PANEL)
            place = builder.add(args[1], _number(PANEL * number))
            values = builder.load(_at(builder, source, place, kind), align=1)
            if element == _I8:
                # Up to 127: a bfloat16 holds it.
                values = builder.sitofp(builder.sext(values, _INTS), _FLOATS)
            return _cut(builder, values, terms)

        for pair in range(DEPTH // 2):
            even, odd = column(2 * pair), column(2 * pair + 1)
            for term in range(terms):
                both = builder.or_(builder.lshr(even[term], _all(16)), odd[term])
                place = builder.add(args[3], _number(TILE * term + 2 * PANEL * pair))
                builder.store(both, _at(builder, target, place, _INTS), align=1)
        return context.get_dummy_value()

    return types.void(w, types.int64, right, types.int64), generate


@intrinsic
def sum_tiles(
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
                with builder.if_then(_is_shape(builder, args[1], rows, args[2], columns)):
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
                load(register, begun, _number(SUM * (MOST_PANELS * r + p)))
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
                place = further(next_left, builder.mul(block, left_lines), LINE // 2)
                for r in range(row_tiles):
                    _ask_for(builder, left, further(place, row, r), left_lines)
                _ask_for(builder, w, further(next_w, builder.mul(block, w_lines), LINE // size_of(w)), w_lines)
    for (r, p), register in total.items():
        address = _at(builder, y, further(further(_number(0), y_row, r), y_panel, p), _I8)
        _run(builder, "tilestored64", ir.Constant(_I8, register), address, builder.mul(y_step, _number(4)))


@intrinsic
def pass_panels(
    typing: Any, w: Any, at: Any, size: Any, panels: Any, blocks: Any, left: Any, row_tiles: Any, y: Any
) -> Any:
    """The products of one tile of vectors with four panels, two or one, or of two with two or one; the panels are tiles themselves.

    w, at   the weights, and where in them the first panel begins; they have `size` elements, `blocks` tiles
    left    the vectors' tiles
    y       float32, for tiles of sums: of the first sixteen vectors each panel's, of the others likewise
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _HAS_TILES and signature.args[0].dtype == types.int16:
            weights, vectors, sums = (
                context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 5, 7)
            )
            for rows, columns in ((1, 4), (1, 2), (1, 1), (2, 2), (2, 1)):
                with builder.if_then(_is_shape(builder, args[6], rows, args[3], columns)):
                    _pass_shape(builder, rows, columns, weights, args[1], args[2], args[4], vectors, sums)
        return context.get_dummy_value()

    i = types.int64
    return types.void(w, i, i, i, i, left, i, y), generate


def _pass_shape(
    builder: Any, row_tiles: int, panels: int, w: Any, at: Any, size: Any, blocks: Any, left: Any, y: Any
) -> None:
    further, load = partial(_further, builder), partial(_load, builder)
    # Registers are eight. Of four panels the last one takes that of the first, which is not needed by then.
    total = {(r, p): panels * r + p for r in range(row_tiles) for p in range(panels)}
    of_left, of_right = (4, 5), (6, 7) if panels <= 2 else (5, 6, 7, 5)
    for register in total.values():
        _run(builder, "tilezero", ir.Constant(_I8, register))
    with cgutils.for_range_slice(builder, _number(0), blocks, _number(1), intp=_I64) as (block, _):
        for r in range(row_tiles):
            load(of_left[r], left, builder.mul(further(block, blocks, r), _number(TILE)))
        # What lies ahead of each panel is asked for; at its end what lies ahead of the one that takes its place.
        ahead = builder.add(block, _number(_AHEAD))
        is_over = builder.icmp_signed(">=", ahead, blocks)
        ahead = builder.select(is_over, further(ahead, blocks, panels - 1), ahead)
        for p in range(panels):
            panel = further(at, size, p)
            load(of_right[p], w, further(panel, block, TILE))
            for r in range(row_tiles):
                registers = (total[r, p], of_left[r], of_right[p])
                _run(builder, "tdpbf16ps", *(ir.Constant(_I8, register) for register in registers))
            _ask_for(builder, w, further(panel, ahead, TILE), _number(TILE_LINES), 3)
    for (r, p), register in total.items():
        address = _at(builder, y, _number((panels * r + p) * SUM), _I8)
        _run(builder, "tilestored64", ir.Constant(_I8, register), address, _number(LINE))

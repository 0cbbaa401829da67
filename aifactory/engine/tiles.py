"""Tiles: products in float32 by a processor's matrix unit, which multiplies bfloat16 (Intel's AMX).

A float32 is the sum of three bfloat16, cut off bit by bit: 8 bits of its mantissa each. Of the nine products of two of them six are
made, in sums of float32; the others are below its last bit. Six products of bfloat16 for one of float32 pay where the unit is one's
own, and not on the machine of `benchmarks/results/engine_kernels-2026-11-27.json`. Weights of bfloat16 and int8 are one bfloat16 each,
so three products are all there are, and exact: 1.4 to 1.8 times as fast there.

Law      a row's bits depend on that row and the weights alone, not on how many rows there are; they are not those of `kernels.py`.
Layout   a tile is 16 rows of 64 bytes. Of the vectors ("left") 16 vectors by 32 elements; of the weights ("right") 16 pairs of elements by
         16 rows of a panel. Tiles of one place follow each other, term by term.
Source   the split: Henry, Tang and Heinecke 2019, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
         Computations", ARITH; the instructions: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2 (TDPBF16PS).
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from aifactory.engine.compilation import kernel

DEPTH = 32
"""Elements of a vector that a tile holds."""
TERMS = 3
ROWS = 16
TILE = ROWS * DEPTH
"""Elements of a tile of bfloat16, held as int16."""
MOST_PANELS = 4
"""Panels that a thread cuts into terms at once."""

_FEATURES = binding.get_host_cpu_features()
_HAS_TILES = bool(_FEATURES.get("amx-tile") and _FEATURES.get("amx-bf16") and _FEATURES.get("avx512f"))
_I8, _I16, _I32, _I64 = (ir.IntType(width) for width in (8, 16, 32, 64))
_FLOATS, _INTS, _SHORTS = (ir.VectorType(kind, ROWS) for kind in (ir.FloatType(), _I32, _I16))
_PANEL = 16
_LINE = 32
"""Elements that a processor reads at once."""


@cache
def can_use_tiles() -> bool:
    """Whether this processor has them and Linux lets this process use them, which must be asked for once."""
    if not _HAS_TILES or sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None, use_errno=True).syscall(arch_prctl, request_permission, tile_data) == 0)


# ── machine code ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _run(builder: Any, name: str, *args: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [each.type for each in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), args)


def _number(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _all(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [ir.Constant(_I32, value)] * ROWS)


def _at(builder: Any, data: Any, place: Any, kind: Any) -> Any:
    return builder.bitcast(builder.gep(data, [place]), kind.as_pointer())


def _ask_for(builder: Any, data: Any, place: Any) -> None:
    """Have a line of it brought to all caches."""
    address = _at(builder, data, place, _I8)
    to_read, to_all, of_data = (ir.Constant(_I32, value) for value in (0, 3, 1))
    kind = ir.FunctionType(ir.VoidType(), [address.type, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(function, [address, to_read, to_all, of_data])


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


@intrinsic
def _cut_vector(typing: Any, x: Any, at: Any, left: Any, to: Any) -> Any:
    """DEPTH floats from x[at] on, as a row of each of TERMS tiles; the first one's is at left[to]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2))
        for half in range(0, DEPTH, ROWS):
            values = builder.load(_at(builder, source, builder.add(args[1], _number(half)), _FLOATS), align=1)
            for term, upper in enumerate(_cut(builder, values, TERMS)):
                short = builder.trunc(builder.lshr(upper, _all(16)), _SHORTS)
                place = builder.add(args[3], _number(TILE * term + half))
                builder.store(short, _at(builder, target, place, _SHORTS), align=1)
        return context.get_dummy_value()

    return types.void(x, types.int64, left, types.int64), generate


@intrinsic
def _cut_panel(typing: Any, w: Any, at: Any, right: Any, to: Any) -> Any:
    """DEPTH columns of a panel from w[at] on, as tiles from right[to] on, one for each term."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2))
        element, terms = source.type.pointee, _num_terms(signature.args[0])

        def column(number: int) -> list[Any]:
            kind = ir.VectorType(element, _PANEL)
            place = builder.add(args[1], _number(_PANEL * number))
            values = builder.load(_at(builder, source, place, kind), align=1)
            if element == _I16:
                return [builder.shl(builder.zext(values, _INTS), _all(16))]
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


def _sums(row_tiles: int, panels: int) -> Any:
    """The products of so many tiles of vectors with so many panels: `sums(w, left, at, row, right, panel, blocks, y, y_step)`.

    w       the weights, for their type alone
    left    the vectors' tiles, from `at` on; the next sixteen vectors are `row` further
    right   the panels' tiles; the next panel is `panel` further
    y       float32, where the results go; y_step between vectors
    """

    @intrinsic
    def sums(
        typing: Any, w: Any, left: Any, at: Any, row: Any, right: Any, panel: Any, blocks: Any, y: Any, y_step: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if not _HAS_TILES:
                return context.get_dummy_value()
            lefts, rights, results = (
                context.make_array(signature.args[i])(context, builder, args[i]).data for i in (1, 4, 7)
            )
            terms = _num_terms(signature.args[0])
            # The smallest come first. By (term of the vectors, term of the weights); neighbours share one.
            order = ((0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (0, 0)) if terms == TERMS else ((2, 0), (1, 0), (0, 0))
            total = [[row_tiles * p + r for p in range(panels)] for r in range(row_tiles)]
            first_left = row_tiles * panels
            # Registers are eight: those of the sums, of the vectors' tiles, and what is left of the panels'.
            registers = [first_left + row_tiles + p % (8 - first_left - row_tiles) for p in range(panels)]

            def load(register: int, data: Any, place: Any) -> None:
                _run(builder, "tileloadd64", ir.Constant(_I8, register), _at(builder, data, place, _I8), _number(64))

            for tile in range(first_left):
                _run(builder, "tilezero", ir.Constant(_I8, tile))
            with cgutils.for_range_slice(builder, _number(0), args[6], _number(1), intp=_I64) as (block, _):
                left_at = builder.add(args[2], builder.mul(block, _number(TERMS * TILE)))
                right_at = builder.mul(block, _number(terms * TILE))
                # What comes next of the vectors: their tiles are more than the first cache holds.
                ahead = [
                    builder.add(builder.mul(args[3], _number(r)), _number(TERMS * TILE + line))
                    for r in range(row_tiles)
                    for line in range(0, TERMS * TILE, _LINE)
                ]
                at_once = -(-len(ahead) // (len(order) * panels * row_tiles))
                held: tuple[int | None, int | None] = (None, None)
                for one, other in order:
                    if one != held[0]:
                        for r in range(row_tiles):
                            place = builder.add(left_at, builder.mul(args[3], _number(r)))
                            load(first_left + r, lefts, builder.add(place, _number(TILE * one)))
                    for p in range(panels):
                        if other != held[1] or len(set(registers)) < panels:
                            place = builder.add(right_at, builder.mul(args[5], _number(p)))
                            load(registers[p], rights, builder.add(place, _number(TILE * other)))
                        for r in range(row_tiles):
                            numbers = (total[r][p], first_left + r, registers[p])
                            _run(builder, "tdpbf16ps", *(ir.Constant(_I8, number) for number in numbers))
                            for place in ahead[:at_once]:
                                _ask_for(builder, lefts, builder.add(left_at, place))
                            ahead = ahead[at_once:]
                    held = (one, other)
            for r in range(row_tiles):
                for p in range(panels):
                    place = builder.add(builder.mul(args[8], _number(ROWS * r)), _number(_PANEL * p))
                    address = _at(builder, results, place, _I8)
                    step = builder.mul(args[8], _number(4))
                    _run(builder, "tilestored64", ir.Constant(_I8, total[r][p]), address, step)
            return context.get_dummy_value()

        i = types.int64
        return types.void(w, left, i, i, right, i, i, y, i), generate

    return sums


_sums_2_2, _sums_2_1, _sums_1_4, _sums_1_1 = _sums(2, 2), _sums(2, 1), _sums(1, 4), _sums(1, 1)


# ── products ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def num_left(num_rows: int, length: int) -> int:
    """Elements that the tiles of so many vectors of this length take."""
    return -(-num_rows // ROWS) * -(-length // DEPTH) * TERMS * TILE


def num_right(length: int) -> int:
    """Elements that a thread's tiles of weights take."""
    return MOST_PANELS * -(-length // DEPTH) * TERMS * TILE


@kernel
def cut_row(x_K: Any, b: int, left: Any) -> None:
    """Put vector b into its place among the tiles."""
    length = len(x_K)
    blocks = (length + DEPTH - 1) // DEPTH
    start = b // ROWS * blocks * TERMS * TILE + b % ROWS * DEPTH
    for block in range(length // DEPTH):
        _cut_vector(x_K, DEPTH * block, left, start + block * TERMS * TILE)
    if length % DEPTH:
        rest = np.zeros(DEPTH, np.float32)
        for k in range(length % DEPTH):
            rest[k] = x_K[length // DEPTH * DEPTH + k]
        _cut_vector(rest, 0, left, start + (blocks - 1) * TERMS * TILE)


@kernel
def _cut_panels(w_PK: Any, first: int, count: int, right: Any) -> None:
    length = w_PK.shape[1]
    blocks = (length + DEPTH - 1) // DEPTH
    step = (TERMS if w_PK.itemsize == 4 else 1) * TILE
    for p in range(count):
        start = (first + p) * length * _PANEL
        for block in range(length // DEPTH):
            _cut_panel(w_PK, start + _PANEL * DEPTH * block, right, (p * blocks + block) * step)
        if length % DEPTH:
            rest = np.zeros((DEPTH, _PANEL), w_PK.dtype)
            for k in range(length % DEPTH):
                for n in range(_PANEL):
                    rest[k, n] = w_PK[first + p, length // DEPTH * DEPTH + k, n]
            _cut_panel(rest, 0, right, (p * blocks + blocks - 1) * step)


@kernel
def multiply_tiles(w_PK: Any, left: Any, right: Any, y_BN: Any, num_rows: int, begin: int, end: int) -> None:
    """As `kernels.py`'s product, of vectors that `cut_row` has put into `left`; `right` is this thread's own."""
    blocks = (w_PK.shape[1] + DEPTH - 1) // DEPTH
    panel = blocks * (TERMS if w_PK.itemsize == 4 else 1) * TILE
    row = blocks * TERMS * TILE
    num_tiles = (num_rows + ROWS - 1) // ROWS
    group = MOST_PANELS if num_tiles == 1 else 2
    some = np.empty((2 * ROWS, _PANEL * MOST_PANELS), np.float32)
    some_step, y_step = some.shape[1], y_BN.strides[0] // 4
    _begin_tiles()
    for p in range(begin, end, group):
        count = min(group, end - p)
        _cut_panels(w_PK, p, count, right)
        for tile in range(0, num_tiles, 2):
            b, at = tile * ROWS, tile * row
            if b + 2 * ROWS <= num_rows:
                if count == 2:
                    _sums_2_2(w_PK, left, at, row, right, panel, blocks, y_BN[b, p * _PANEL :], y_step)
                else:
                    _sums_2_1(w_PK, left, at, row, right, panel, blocks, y_BN[b, p * _PANEL :], y_step)
                continue
            # Results of vectors that are none have no place.
            if tile + 2 <= num_tiles and count == 2:
                _sums_2_2(w_PK, left, at, row, right, panel, blocks, some[0], some_step)
            elif tile + 2 <= num_tiles:
                _sums_2_1(w_PK, left, at, row, right, panel, blocks, some[0], some_step)
            elif count == MOST_PANELS:
                _sums_1_4(w_PK, left, at, row, right, panel, blocks, some[0], some_step)
            else:
                for q in range(count):
                    _sums_1_1(w_PK, left, at, row, right[q * panel :], panel, blocks, some[0, q * _PANEL :], some_step)
            for r in range(min(2 * ROWS, num_rows - b)):
                for n in range(count * _PANEL):
                    y_BN[b + r, p * _PANEL + n] = some[r, n]
    _end_tiles()

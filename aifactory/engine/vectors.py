"""Vectors: what kernels have the vector units of a processor do, in LLVM's words.

Order    element k of a sum of products is added by ascending k; of a dot product in lane k % WIDTH, of a softmax in lane k % LANES, and
         the lanes by a fixed tree: bits depend on what is computed and on the processor, not on how many are computed together.
Weights  float32; bfloat16, read as int16; int8. All sums are in float32. Sixteen rows of a matrix are a panel, in which column stands
         beside column: a vector's element is multiplied with all of them at once, so that nothing is summed across lanes, and a
         panel stays in the cache while many vectors pass by. Of bfloat16 two columns stand together, as the matrix unit wants them
         (`tiles.py`): the first sixteen bits of a lane are the even column's.
Source   products of panels: Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34(3).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

LANES = 8
"""Widths that are dot products must be multiples of it."""
_IS_WIDE = bool(binding.get_host_cpu_features().get("avx512f"))
WIDTH = 16 if _IS_WIDE else LANES
"""Lanes of a dot product: as many as the processor's registers have."""

PANEL = 16
"""Rows of a panel."""

_F32 = ir.FloatType()
_VEC = ir.VectorType(_F32, LANES)
_I16 = ir.IntType(16)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_VEC_I32 = ir.VectorType(_I32, LANES)


def _splat(value: float) -> ir.Constant:
    return ir.Constant(_VEC, [ir.Constant(_F32, float(np.float32(value)))] * LANES)


def _splat_int(value: int) -> ir.Constant:
    return ir.Constant(_VEC_I32, [ir.Constant(_I32, value)] * LANES)


def _call(builder: Any, name: str, kind: Any, *args: Any) -> Any:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [a.type for a in args]), name)
    return builder.call(function, args)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, f"llvm.fmuladd.v{c.type.count}f32", c.type, a, b, c)


def _read(builder: Any, data: Any, at: Any, number: int) -> Any:
    """So many elements from `at` on, as float32. `data` points to float32, to bfloat16 as i16, or to i8."""
    element, whole, integers = data.type.pointee, ir.VectorType(_F32, number), ir.VectorType(_I32, number)
    address = builder.bitcast(builder.gep(data, [at]), ir.VectorType(element, number).as_pointer())
    values = builder.load(address, align=1)
    if element != _F32 and element.width == 16:
        values = builder.bitcast(builder.shl(builder.zext(values, integers), _sixteen(number)), whole)
    elif element != _F32:
        values = builder.sitofp(builder.sext(values, integers), whole)
    return values


def _load(builder: Any, data: Any, at: Any, number: int) -> Any:
    """As `_read`, WIDTH of them: those that are wanting are 0."""
    values = _read(builder, data, at, number)
    if number == WIDTH:
        return values
    places = ir.Constant(ir.VectorType(_I32, WIDTH), list(range(WIDTH)))
    return builder.shuffle_vector(values, ir.Constant(values.type, None), places)


def _sixteen(number: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, number), [ir.Constant(_I32, 16)] * number)


def _load_pairs(builder: Any, data: Any, at: Any) -> list[Any]:
    """The even and the odd ones of WIDTH pairs of bfloat16 from `at` on, as WIDTH of float32 each."""
    pairs, whole = ir.VectorType(_I32, WIDTH), ir.VectorType(_F32, WIDTH)
    both = builder.load(builder.bitcast(builder.gep(data, [at]), pairs.as_pointer()), align=1)
    upper = ir.Constant(pairs, [ir.Constant(_I32, -65536)] * WIDTH)
    return [builder.bitcast(each, whole) for each in (builder.shl(both, _sixteen(WIDTH)), builder.and_(both, upper))]


_LINE = 64
"""Bytes that a processor reads at once."""


def size_of(data: Any) -> int:
    """Bytes of what this points to."""
    element = data.type.pointee
    return 4 if element == _F32 else int(element.width) // 8


def prefetch(builder: Any, address: Any, level: int) -> None:
    """Ask for a line, given by a pointer to bytes, to be read: 3 into all caches, 2 into the second."""
    kind = ir.FunctionType(ir.VoidType(), [address.type, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    to_read, of_data = ir.Constant(_I32, 0), ir.Constant(_I32, 1)
    builder.call(function, [address, to_read, ir.Constant(_I32, level), of_data])


def _join_lanes(builder: Any, vectors: list[Any], join: Any) -> Any:
    """Of each vector the first half of its lanes with the second, until there is one; all of them in one vector, which is one lane
    wide where there is one. As many as a power of two, at most as many as lanes."""
    lanes = vectors[0].type.count
    width, together = lanes, 1
    while width > 1:
        # Two vectors go on as one, so that they share the work; the last one is joined with itself.
        pairs = zip(vectors[::2], vectors[1::2], strict=True) if len(vectors) > 1 else [(vectors[0], vectors[0])]
        starts = [lanes * vector + width * part for vector in range(min(2, len(vectors))) for part in range(together)]
        halves = [[start + half + i for start in starts for i in range(width // 2)] for half in (0, width // 2)]
        low, high = (ir.Constant(ir.VectorType(_I32, len(half)), half) for half in halves)
        together *= min(2, len(vectors))
        vectors = [
            join(builder.shuffle_vector(one, other, low), builder.shuffle_vector(one, other, high))
            for one, other in pairs
        ]
        width, lanes = width // 2, len(halves[0])
    return vectors[0]


def _tile(num_rows: int) -> Any:
    """The dot products of so many rows of a matrix with one vector: `tile(w, at, x, length, y)`.

    w, at   an array of float32, and where in it the first row begins; the rows lie `length` apart
    x, y    float32 arrays that begin with the vector, and with where the results go
    """

    @intrinsic
    def tile(typing: Any, w: Any, at: Any, x: Any, length: Any, y: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = [context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2, 4)]
            at_value, length_value = args[1], args[3]
            zero = ir.Constant(ir.VectorType(_F32, WIDTH), None)
            sums = [cgutils.alloca_once_value(builder, zero) for _ in range(num_rows)]
            starts = [builder.add(at_value, builder.mul(length_value, ir.Constant(_I64, r))) for r in range(num_rows)]

            def add(k: Any, number: int) -> None:
                vector = _load(builder, data[1], k, number)
                for start, total in zip(starts, sums, strict=True):
                    row = _load(builder, data[0], builder.add(start, k), number)
                    builder.store(_multiply_add(builder, row, vector, builder.load(total)), total)

            step = ir.Constant(_I64, WIDTH)
            whole = builder.mul(builder.udiv(length_value, step), step)
            with cgutils.for_range_slice(builder, ir.Constant(_I64, 0), whole, step, intp=_I64) as (k, _):
                add(k, WIDTH)
            if WIDTH > LANES:
                with builder.if_then(builder.icmp_unsigned("<", whole, length_value)):
                    add(whole, LANES)
            joined = _join_lanes(builder, [builder.load(total) for total in sums], builder.fadd)
            builder.store(joined, builder.bitcast(data[2], joined.type.as_pointer()), align=1)
            return context.get_dummy_value()

        i = types.int64
        return types.void(w, i, x, i, y), generate

    return tile


dot_rows_8 = _tile(8)
dot_row = _tile(1)

_UNROLLED = 4
_AHEAD = 4096
"""Bytes. Asked to find out by itself what is read next, a processor falls behind."""


def _panels(num_panels: int, most: int, *, ahead: bool = False, beside: bool = False) -> Any:
    """The products of so many panels with up to `most` vectors: `panels(w, at, w_step, x, x_step, count, length, y, y_step)`.

    w, at      an array of weights, and where in it the first panel begins; bfloat16 in pairs of columns, unless they are `beside`
    w_step     how far apart the panels lie, each of whose columns follow one another; or where they lie one `beside` the other, how
               far apart their columns
    x, x_step  a float32 array that begins with `count` vectors, and how far apart they lie; y, y_step likewise the results
    length     elements of a vector; of pairs of columns how many pairs
    ahead      whether to ask for what comes next of each panel
    """
    kind = ir.VectorType(_F32, WIDTH)
    everywhere = ir.Constant(ir.VectorType(_I32, WIDTH), [0] * WIDTH)

    def constant(value: int) -> ir.Constant:
        return ir.Constant(_I64, value)

    def multiply(
        builder: Any, data: Any, at: Any, w_step: Any, x_step: Any, num_columns: int, length: Any, y_step: Any
    ) -> None:
        per = 2 if data[0].type.pointee == _I16 and not beside else 1
        between, column_step = (constant(PANEL), w_step) if beside else (w_step, constant(per * PANEL))
        panels = [builder.add(at, builder.mul(between, constant(p))) for p in range(num_panels)]
        starts = [builder.add(panel, constant(per * first)) for panel in panels for first in range(0, PANEL, WIDTH)]
        columns = [builder.gep(data[1], [builder.mul(x_step, constant(c))]) for c in range(num_columns)]
        zero = ir.Constant(kind, None)
        sums = [[cgutils.alloca_once_value(builder, zero) for _ in starts] for _ in columns]

        def add(k: Any) -> None:
            places = [builder.add(start, builder.mul(k, column_step)) for start in starts]
            loaded = [
                _load_pairs(builder, data[0], place) if per == 2 else [_load(builder, data[0], place, WIDTH)]
                for place in places
            ]
            for one_of, weights in enumerate(zip(*loaded, strict=True)):
                element_at = builder.add(builder.mul(k, constant(per)), constant(one_of))
                for column, totals in zip(columns, sums, strict=True):
                    element = builder.load(builder.gep(column, [element_at]))
                    one = builder.insert_element(ir.Constant(kind, ir.Undefined), element, ir.Constant(_I32, 0))
                    vector = builder.shuffle_vector(one, one, everywhere)
                    for weight, total in zip(weights, totals, strict=True):
                        builder.store(_multiply_add(builder, weight, vector, builder.load(total)), total)

        begin = constant(0)
        for together in (_UNROLLED, 1):
            step = constant(together)
            end = builder.mul(builder.udiv(length, step), step)
            with cgutils.for_range_slice(builder, begin, end, step, intp=_I64) as (first, _):
                for u in range(together):
                    add(builder.add(first, constant(u)))
                size = size_of(data[0])
                for line in range(0, together * per * PANEL if ahead and together > 1 else 0, _LINE // size):
                    for panel in panels:
                        place = builder.add(panel, builder.mul(first, column_step))
                        place = builder.add(place, constant(line + _AHEAD // size))
                        address = builder.bitcast(builder.gep(data[0], [place]), ir.IntType(8).as_pointer())
                        prefetch(builder, address, 3)
            begin = end
        for c, totals in enumerate(sums):
            for part, total in enumerate(totals):
                place = builder.add(builder.mul(y_step, constant(c)), constant(WIDTH * part))
                address = builder.bitcast(builder.gep(data[2], [place]), kind.as_pointer())
                builder.store(builder.load(total), address, align=1)

    @intrinsic
    def panels(
        typing: Any, w: Any, at: Any, w_step: Any, x: Any, x_step: Any, count: Any, length: Any, y: Any, y_step: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = [context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 3, 7)]
            # For each number of vectors code of its own, so that all sums are in registers.
            for num_columns in range(1, most + 1):
                with builder.if_then(builder.icmp_unsigned("==", args[5], constant(num_columns))):
                    multiply(builder, data, args[1], args[2], args[4], num_columns, args[6], args[8])
            return context.get_dummy_value()

        i = types.int64
        return types.void(w, i, i, x, i, i, i, y, i), generate

    return panels


# Sums, weights and an element of a vector fill 32 registers of a wide processor, 16 of another.
MOST_VECTORS = 6
"""Vectors that a panel is multiplied with at once."""
PANELS_OF_ONE, PANELS_OF_MANY = (8, 4) if _IS_WIDE else (4, 1)
panels_of_one = _panels(PANELS_OF_ONE, 1, ahead=True)
panels_of_many = _panels(PANELS_OF_MANY, MOST_VECTORS)
panel_of_many = _panels(1, MOST_VECTORS)
panels_beside = _panels(PANELS_OF_MANY, MOST_VECTORS, beside=True)
panel_beside = _panels(1, MOST_VECTORS, beside=True)


@intrinsic
def round_in_place(typing: Any, array: Any, length: Any) -> Any:
    """The first `length` elements of a float32 array to the nearest bfloat16, of two to the even one; a multiple of LANES. What is no
    number stays none."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        step = ir.Constant(_I64, LANES)
        with cgutils.for_range_slice(builder, ir.Constant(_I64, 0), args[1], step, intp=_I64) as (k, _):
            address = builder.bitcast(builder.gep(data, [k]), _VEC.as_pointer())
            given = builder.load(address, align=1)
            bits = builder.bitcast(given, _VEC_I32)
            is_odd = builder.and_(builder.lshr(bits, _splat_int(16)), _splat_int(1))
            bits = builder.add(builder.add(bits, _splat_int(0x7FFF)), is_odd)
            nearest = builder.bitcast(builder.and_(bits, _splat_int(-65536)), _VEC)
            is_nan = builder.fcmp_unordered("uno", given, given)
            builder.store(builder.select(is_nan, given, nearest), address, align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


def _exp(builder: Any, given: Any) -> Any:
    """Of each of a vector's float32 (Cephes' expf, within 2 ulp)."""
    lanes, kind = given.type.count, given.type
    integers = ir.VectorType(_I32, lanes)

    def all_of(value: float) -> ir.Constant:
        return ir.Constant(kind, [ir.Constant(_F32, float(np.float32(value)))] * lanes)

    def all_ints(value: int) -> ir.Constant:
        return ir.Constant(integers, [ir.Constant(_I32, value)] * lanes)

    x = given
    for name, limit in (("maxnum", -87.0), ("minnum", 88.0)):
        x = _call(builder, f"llvm.{name}.v{lanes}f32", kind, x, all_of(limit))
    power = _call(builder, f"llvm.rint.v{lanes}f32", kind, builder.fmul(x, all_of(1.44269504088896341)))
    rest = _multiply_add(builder, power, all_of(-0.693359375), x)
    rest = _multiply_add(builder, power, all_of(2.12194440e-4), rest)
    value = all_of(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        value = _multiply_add(builder, value, rest, all_of(coefficient))
    value = _multiply_add(builder, value, builder.fmul(rest, rest), builder.fadd(rest, all_of(1.0)))
    exponent = builder.shl(builder.add(builder.fptosi(power, integers), all_ints(127)), all_ints(23))
    value = builder.fmul(value, builder.bitcast(exponent, kind))
    # The limits would make a number of what is none.
    return builder.select(builder.fcmp_unordered("uno", given, given), given, value)


def _everywhere(builder: Any, number: Any) -> Any:
    """A float32 in WIDTH lanes."""
    kind = ir.VectorType(_F32, WIDTH)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, WIDTH), [0] * WIDTH))


@intrinsic
def exp_of(typing: Any, array: Any, length: Any, largest: Any, scaling: Any) -> Any:
    """exp((x - largest) * scaling) in place of the first `length` elements x, rounded up to WIDTH, of a float32 array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        least, factor = (_everywhere(builder, arg) for arg in args[2:])
        step = ir.Constant(_I64, WIDTH)
        with cgutils.for_range_slice(builder, ir.Constant(_I64, 0), args[1], step, intp=_I64) as (k, _):
            address = builder.bitcast(builder.gep(data, [k]), least.type.as_pointer())
            x = builder.fsub(builder.load(address, align=1), least)
            builder.store(_exp(builder, builder.fmul(x, factor)), address, align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.float32, types.float32), generate


@intrinsic
def silu_times(typing: Any, array: Any, at: Any, up: Any, length: Any) -> Any:
    """silu(x) * u in place of so many x from array[at] on, u from array[up] on; float32, a multiple of PANEL of them."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        step, kind = ir.Constant(_I64, WIDTH), ir.VectorType(_F32, WIDTH)
        one = ir.Constant(kind, [ir.Constant(_F32, 1.0)] * WIDTH)
        with cgutils.for_range_slice(builder, ir.Constant(_I64, 0), args[3], step, intp=_I64) as (k, _):
            place, other = (
                builder.bitcast(builder.gep(data, [builder.add(arg, k)]), kind.as_pointer()) for arg in args[1:3]
            )
            x, factor = builder.load(place, align=1), builder.load(other, align=1)
            silu = builder.fdiv(x, builder.fadd(one, _exp(builder, builder.fneg(x))))
            builder.store(builder.fmul(silu, factor), place, align=1)
        return context.get_dummy_value()

    i = types.int64
    return types.void(array, i, i, i), generate


def _over_lanes(name: str, start: float) -> Any:
    """One number of the first `length` elements, rounded up to LANES, of a float32 array: lane by lane, and the lanes by a tree."""

    @intrinsic
    def over(typing: Any, array: Any, length: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            def joined(a: Any, b: Any) -> Any:
                return builder.fadd(a, b) if name == "sum" else _call(builder, f"llvm.{name}.{kind(a)}", a.type, a, b)

            def kind(value: Any) -> str:
                return f"v{value.type.count}f32" if isinstance(value.type, ir.VectorType) else "f32"

            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            total = cgutils.alloca_once_value(builder, _splat(start))
            step = ir.Constant(_I64, LANES)
            with cgutils.for_range_slice(builder, ir.Constant(_I64, 0), args[1], step, intp=_I64) as (k, _):
                address = builder.bitcast(builder.gep(data, [k]), _VEC.as_pointer())
                builder.store(joined(builder.load(total), builder.load(address, align=1)), total)
            last = _join_lanes(builder, [builder.load(total)], joined)
            return builder.extract_element(last, ir.Constant(_I32, 0))

        return types.float32(array, types.int64), generate

    return over


sum_of = _over_lanes("sum", 0.0)
largest_of = _over_lanes("maxnum", -np.inf)


@intrinsic
def weigh(typing: Any, share: Any, length: Any, values: Any, d: Any, width: Any, out: Any) -> Any:
    """out[d : d + LANES] = sum over t of share[t] * values[t, d : d + LANES], by ascending t; rows of `width` numbers."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        shares, rows, result = (
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2, 5)
        )
        total = cgutils.alloca_once_value(builder, _splat(0.0))
        with cgutils.for_range_slice(builder, ir.Constant(_I64, 0), args[1], ir.Constant(_I64, 1), intp=_I64) as (t, _):
            one = builder.insert_element(
                ir.Constant(_VEC, ir.Undefined), builder.load(builder.gep(shares, [t])), ir.Constant(_I32, 0)
            )
            weight = builder.shuffle_vector(one, one, _splat_int(0))
            place = builder.add(builder.mul(t, args[4]), args[3])
            values_L = _read(builder, rows, place, LANES)
            builder.store(_multiply_add(builder, weight, values_L, builder.load(total)), total)
        address = builder.bitcast(builder.gep(result, [args[3]]), _VEC.as_pointer())
        builder.store(builder.load(total), address, align=1)
        return context.get_dummy_value()

    i = types.int64
    return types.void(share, i, values, i, i, out), generate


@intrinsic
def pointer_to(typing: Any, address: Any) -> Any:
    """A pointer, of an address that NumPy gave."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate

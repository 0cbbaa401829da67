"""Kernels: a Llama-like model's forward as one compiled function that several threads run side by side.

Why      At batch 1 a step reads every weight once and does little else: it should take as long as reading them. torch's own
         matrix-vector product moves a third of what memory gives, and the many small operations between products add to it.
Threads  Every thread calls `forward` with its number; each takes some rows of a matrix after others, until none are left, and waits
         for the others at barriers. A thread that waits for long gives its processor away, so that a busy machine costs little.
Order    Element k of a sum of products is added by ascending k; of a norm in lane k % WIDTH, of a softmax in lane k % LANES, and the
         lanes by a fixed tree. Whatever the batch and the number of threads, a row's bits depend on its own tokens, its own
         cache and the processor alone.
Weights  float32; bfloat16, read as int16; int8 with a scale for each row of the matrix. All sums are in float32. Sixteen rows of a
         matrix are a panel, in which column stands beside column: a vector's element is multiplied with all of them at once, so
         that nothing is summed across lanes, and a panel stays in the cache while many vectors pass by.
Source   products of panels: Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34(3).

Tiles    prompts may go through the processor's matrix unit (`tiles.py`), decode steps never: a token's bits then depend on whether it was
         read or written, too.

Import this module where it is needed: numba takes its time.

Legend   B tokens of a step, O of them with logits, L layers, H hidden, N rows and K columns of a matrix, P panels of PANEL rows, D head dim, A heads, G heads_kv, I inner
         width of the MLP, V vocabulary, S slots and T positions of the cache, X adapters.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from aifactory.engine.compilation import kernel
from aifactory.engine.tiles import cut_row, multiply_tiles

LANES = 8
"""Widths that are dot products must be multiples of it."""
_IS_WIDE = bool(binding.get_host_cpu_features().get("avx512f"))
WIDTH = 16 if _IS_WIDE else LANES
"""Lanes of a dot product: as many as the processor's registers have."""

PANEL = 16
"""Rows of a panel."""

_F32 = ir.FloatType()
_VEC = ir.VectorType(_F32, LANES)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_VEC_I32 = ir.VectorType(_I32, LANES)


# ── machine code ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _splat(value: float) -> ir.Constant:
    return ir.Constant(_VEC, [ir.Constant(_F32, float(np.float32(value)))] * LANES)


def _splat_int(value: int) -> ir.Constant:
    return ir.Constant(_VEC_I32, [ir.Constant(_I32, value)] * LANES)


def _call(builder: Any, name: str, kind: Any, *args: Any) -> Any:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [a.type for a in args]), name)
    return builder.call(function, args)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, f"llvm.fmuladd.v{c.type.count}f32", c.type, a, b, c)


def _load(builder: Any, data: Any, at: Any, number: int) -> Any:
    """So many elements from `at` on, as WIDTH of float32: those that are wanting are 0. `data` points to float32, to bfloat16 as
    i16, or to i8."""
    element, whole, integers = data.type.pointee, ir.VectorType(_F32, number), ir.VectorType(_I32, number)
    address = builder.bitcast(builder.gep(data, [at]), ir.VectorType(element, number).as_pointer())
    values = builder.load(address, align=1)
    if element != _F32 and element.width == 16:
        shift = ir.Constant(integers, [ir.Constant(_I32, 16)] * number)
        values = builder.bitcast(builder.shl(builder.zext(values, integers), shift), whole)
    elif element != _F32:
        values = builder.sitofp(builder.sext(values, integers), whole)
    if number == WIDTH:
        return values
    places = ir.Constant(ir.VectorType(_I32, WIDTH), list(range(WIDTH)))
    return builder.shuffle_vector(values, ir.Constant(whole, None), places)


_LINE = 64
"""Bytes that a processor reads at once."""


def _size(data: Any) -> int:
    element = data.type.pointee
    return 4 if element == _F32 else int(element.width) // 8


def _prefetch(builder: Any, data: Any, at: Any) -> None:
    address = builder.bitcast(builder.gep(data, [at]), ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [address.type, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    # To read, to all levels, data.
    builder.call(function, [address, ir.Constant(_I32, 0), ir.Constant(_I32, 3), ir.Constant(_I32, 1)])


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


_tile_8 = _tile(8)
_tile_1 = _tile(1)

_UNROLLED = 4
_AHEAD = 4096
"""Bytes. Asked to find out by itself what is read next, a processor falls behind."""


def _panels(num_panels: int, most: int, *, ahead: bool = False, beside: bool = False) -> Any:
    """The products of so many panels with up to `most` vectors: `panels(w, at, w_step, x, x_step, count, length, y, y_step)`.

    w, at      an array of weights, and where in it the first panel begins
    w_step     how far apart the panels lie, each of whose columns follow one another; or where they lie one `beside` the other, how
               far apart their columns
    x, x_step  a float32 array that begins with `count` vectors, and how far apart they lie; y, y_step likewise the results
    length     elements of a vector
    ahead      whether to ask for what comes next of each panel
    """
    kind = ir.VectorType(_F32, WIDTH)
    everywhere = ir.Constant(ir.VectorType(_I32, WIDTH), [0] * WIDTH)

    def constant(value: int) -> ir.Constant:
        return ir.Constant(_I64, value)

    def multiply(
        builder: Any, data: Any, at: Any, w_step: Any, x_step: Any, num_columns: int, length: Any, y_step: Any
    ) -> None:
        between, column_step = (constant(PANEL), w_step) if beside else (w_step, constant(PANEL))
        panels = [builder.add(at, builder.mul(between, constant(p))) for p in range(num_panels)]
        starts = [builder.add(panel, constant(first)) for panel in panels for first in range(0, PANEL, WIDTH)]
        columns = [builder.gep(data[1], [builder.mul(x_step, constant(c))]) for c in range(num_columns)]
        zero = ir.Constant(kind, None)
        sums = [[cgutils.alloca_once_value(builder, zero) for _ in starts] for _ in columns]

        def add(k: Any) -> None:
            place = builder.mul(k, column_step)
            weights = [_load(builder, data[0], builder.add(start, place), WIDTH) for start in starts]
            for column, totals in zip(columns, sums, strict=True):
                element = builder.load(builder.gep(column, [k]))
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
                size = _size(data[0])
                for line in range(0, together * PANEL if ahead and together > 1 else 0, _LINE // size):
                    for panel in panels:
                        place = builder.add(panel, builder.mul(first, column_step))
                        _prefetch(builder, data[0], builder.add(place, constant(line + _AHEAD // size)))
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
_MOST = 6
MOST_QUERIES = _MOST
"""Whose scores a thread holds at once."""
_PANELS_OF_ONE, _PANELS_OF_MANY = (8, 4) if _IS_WIDE else (4, 1)
_one = _panels(_PANELS_OF_ONE, 1, ahead=True)
_many = _panels(_PANELS_OF_MANY, _MOST)
_last = _panels(1, _MOST)
_many_beside = _panels(_PANELS_OF_MANY, _MOST, beside=True)
_last_beside = _panels(1, _MOST, beside=True)


@intrinsic
def _exp_in_place(typing: Any, array: Any, length: Any) -> Any:
    """exp of the first `length` elements, rounded up to LANES, of a float32 array (Cephes' expf, within 2 ulp)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        with cgutils.for_range_slice(builder, ir.Constant(_I64, 0), args[1], ir.Constant(_I64, LANES), intp=_I64) as (
            k,
            _,
        ):
            address = builder.bitcast(builder.gep(data, [k]), _VEC.as_pointer())
            given = x = builder.load(address, align=1)
            for name, limit in (("maxnum", -87.0), ("minnum", 88.0)):
                x = _call(builder, f"llvm.{name}.v{LANES}f32", _VEC, x, _splat(limit))
            power = _call(builder, f"llvm.rint.v{LANES}f32", _VEC, builder.fmul(x, _splat(1.44269504088896341)))
            rest = _multiply_add(builder, power, _splat(-0.693359375), x)
            rest = _multiply_add(builder, power, _splat(2.12194440e-4), rest)
            value = _splat(1.9875691500e-4)
            for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
                value = _multiply_add(builder, value, rest, _splat(coefficient))
            value = _multiply_add(builder, value, builder.fmul(rest, rest), builder.fadd(rest, _splat(1.0)))
            exponent = builder.shl(builder.add(builder.fptosi(power, _VEC_I32), _splat_int(127)), _splat_int(23))
            value = builder.fmul(value, builder.bitcast(exponent, _VEC))
            # The limits would make a number of what is none.
            is_nan = builder.fcmp_unordered("uno", given, given)
            builder.store(builder.select(is_nan, given, value), address, align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


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


_sum_of = _over_lanes("sum", 0.0)
_largest_of = _over_lanes("maxnum", -np.inf)


@intrinsic
def _weigh(typing: Any, share: Any, length: Any, values: Any, d: Any, width: Any, out: Any) -> Any:
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
            address = builder.bitcast(builder.gep(rows, [place]), _VEC.as_pointer())
            builder.store(_multiply_add(builder, weight, builder.load(address, align=1), builder.load(total)), total)
        address = builder.bitcast(builder.gep(result, [args[3]]), _VEC.as_pointer())
        builder.store(builder.load(total), address, align=1)
        return context.get_dummy_value()

    i = types.int64
    return types.void(share, i, values, i, i, out), generate


@intrinsic
def _matrix_at(typing: Any, address: Any) -> Any:
    """A pointer, of an address that NumPy gave."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def _fetch_add(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Add to an element of an int64 array; what it was before. Atomic."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [args[1]]), args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), generate


_yield_processor = types.ExternalFunction("sched_yield", types.int32())
_SPINS = 2_000
"""About 10 µs; a barrier between threads that all run takes less than one."""


@kernel
def _wait_for_all(sync: Any, num_threads: int) -> None:
    """A barrier: sync[0] counts who is there, sync[8] how often all were, sync[16] what was taken of the work since (on cache lines
    of their own)."""
    if num_threads == 1:
        sync[16] = 0
        return
    turn = _fetch_add(sync, 8, 0)
    if _fetch_add(sync, 0, 1) == num_threads - 1:
        _fetch_add(sync, 0, -num_threads)
        _fetch_add(sync, 16, -_fetch_add(sync, 16, 0))
        _fetch_add(sync, 8, 1)
        return
    spins = 0
    while _fetch_add(sync, 8, 0) == turn:
        spins += 1
        if spins > _SPINS:
            _yield_processor()


# ── products ──────────────────────────────────────────────────────────────────────────────────────────────────────────


SYNC_SIZE = 24
"""Elements of `sync`."""
_PANELS_AT_ONCE = 32


@kernel
def _padded(size: int) -> int:
    """The rows of so many in whole panels."""
    return (size + PANEL - 1) // PANEL * PANEL


@kernel
def _part(size: int, thread: int, num_threads: int) -> tuple[int, int]:
    """The rows of a matrix that are a thread's: whole panels."""
    panels = size // PANEL
    return PANEL * (panels * thread // num_threads), PANEL * (panels * (thread + 1) // num_threads)


@kernel
def _next_part(sync: Any, num_panels: int, num_threads: int) -> tuple[int, int]:
    """The panels of a matrix that whoever asks takes next, until the next barrier: on a machine that others use too a thread that was
    held up takes less. None where all are taken."""
    step = max(4, min(_PANELS_AT_ONCE, num_panels // (4 * num_threads) // 4 * 4))
    begin = min(num_panels, _fetch_add(sync, 16, step))
    return begin, min(num_panels, begin + step)


@kernel
def _next_of(sync: Any) -> int:
    """The number of the next piece of work, likewise."""
    return _fetch_add(sync, 16, 1)


@kernel
def _product_of(
    w_PK: Any,
    x_BK: Any,
    y_BN: Any,
    num_rows: int,
    begin: int,
    end: int,
    is_tiled: bool,
    left: Any,
    right: Any,
) -> None:
    """As `_product`; where `is_tiled`, of the vectors that are in `left`."""
    if is_tiled:
        multiply_tiles(w_PK, left, right, y_BN, num_rows, begin, end)
    else:
        _product(w_PK, x_BK, y_BN, num_rows, begin, end)


_BLOCK = 96
"""So many vectors stay in a processor's own cache while a matrix passes by."""


@kernel
def _product(w_PK: Any, x_BK: Any, y_BN: Any, num_rows: int, begin: int, end: int) -> None:
    """The columns of y = x @ w.T that the panels [begin, end) give, for the first `num_rows` rows, without scales."""
    for first in range(0, num_rows, _BLOCK):
        _product_block(w_PK, x_BK[first:], y_BN[first:], min(_BLOCK, num_rows - first), begin, end)


@kernel
def _product_block(w_PK: Any, x_BK: Any, y_BN: Any, num_rows: int, begin: int, end: int) -> None:
    length = w_PK.shape[1]
    size = length * PANEL
    x_step, y_step = x_BK.strides[0] // 4, y_BN.strides[0] // 4
    p = begin
    if num_rows == 1:
        while p + _PANELS_OF_ONE <= end:
            _one(w_PK, p * size, size, x_BK, x_step, 1, length, y_BN[0, p * PANEL :], y_step)
            p += _PANELS_OF_ONE
    while p + _PANELS_OF_MANY <= end:
        b = 0
        while b < num_rows:
            count = _together(num_rows - b)
            _many(w_PK, p * size, size, x_BK[b:], x_step, count, length, y_BN[b, p * PANEL :], y_step)
            b += count
        p += _PANELS_OF_MANY
    while p < end:
        b = 0
        while b < num_rows:
            count = _together(num_rows - b)
            _last(w_PK, p * size, size, x_BK[b:], x_step, count, length, y_BN[b, p * PANEL :], y_step)
            b += count
        p += 1


@kernel
def _together(num_left: int) -> int:
    """How many vectors go together, of those that are left: six, and the last ones in halves, since few use a processor badly."""
    if num_left >= 2 * _MOST:
        return _MOST
    return (num_left + 1) // 2 if num_left > _MOST else num_left


@kernel
def _scale(y_BN: Any, scale_N: Any, bias_N: Any, num_rows: int, begin: int, end: int) -> None:
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
    begin, end = _next_part(sync, w_PK.shape[0], num_threads)
    while begin < end:
        _product(w_PK, x_BK, y_BN, num_rows, begin, end)
        _scale(y_BN, scale_N, bias_N, num_rows, PANEL * begin, PANEL * end)
        begin, end = _next_part(sync, w_PK.shape[0], num_threads)
    _wait_for_all(sync, num_threads)


@kernel
def _add(x_BH: Any, added_BH: Any, num_rows: int, begin: int, end: int) -> None:
    for b in range(num_rows):
        for h in range(begin, min(end, x_BH.shape[1])):
            x_BH[b, h] += added_BH[b, h]


@kernel
def _gate(inner_BI: Any, num_rows: int, num_inner: int, begin: int, end: int) -> None:
    """silu(gate) * up in place of gate, for columns [begin, end); up stands `num_inner` columns on."""
    exponential = np.empty(end - begin + LANES, np.float32)
    for b in range(num_rows):
        for i in range(begin, end):
            exponential[i - begin] = -inner_BI[b, i]
        _exp_in_place(exponential, end - begin)
        for i in range(begin, end):
            silu = inner_BI[b, i] / (np.float32(1.0) + exponential[i - begin])
            inner_BI[b, i] = silu * inner_BI[b, num_inner + i]


@kernel
def _reduce(thread: int, num_threads: int, a_XLPK: Any, layer: int, x_BK: Any, adapter_B: Any, t_BP: Any) -> None:
    """t = A x of the tokens that have an adapter: P is parts times rank, whole blocks of eight."""
    for b in range(thread, len(adapter_B), num_threads):
        if adapter_B[b] >= 0:
            a_PK = a_XLPK[adapter_B[b], layer]
            for p in range(0, a_PK.shape[0], 8):
                _tile_8(a_PK, p * a_PK.shape[1], x_BK[b], a_PK.shape[1], t_BP[b, p:])


@kernel
def _expand(
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
                _tile_1(b_NR, n * rank, t_BP[b, part * rank :], rank, change)
                y_BN[b, n] += change[0]


# ── the step ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@kernel
def _normalise(x_H: Any, weight_H: Any, epsilon: float, y_H: Any) -> None:
    """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467); y may be x, and must not hold less."""
    width = len(weight_H)
    total = np.empty(1, np.float32)
    _tile_1(x_H, 0, x_H, width, total)
    factor = np.float32(1.0) / np.sqrt(total[0] / np.float32(width) + np.float32(epsilon))
    for h in range(len(weight_H)):
        y_H[h] = weight_H[h] * (x_H[h] * factor)


@kernel
def _rotate(x_D: Any, cos_D: Any, sin_D: Any) -> None:
    """Rotary positions, halves against each other, as Hugging Face lays them out (Su et al. 2021, arXiv:2104.09864)."""
    half = len(x_D) // 2
    for d in range(half):
        low, high = x_D[d], x_D[half + d]
        x_D[d] = low * cos_D[d] - high * sin_D[d]
        x_D[half + d] = high * cos_D[half + d] + low * sin_D[half + d]


@kernel
def _attend(
    q_QD: Any, keys_PD: Any, values_TD: Any, length: int, growth: int, scaling: float, scores_QT: Any, out_QD: Any
) -> None:
    """Softmax attention of up to _MOST queries over the same keys, the first over `length` positions, the next over `growth` more."""
    num_queries, width = q_QD.shape
    longest = length + growth * (num_queries - 1)
    _product_block(keys_PD, q_QD, scores_QT, num_queries, 0, (longest + PANEL - 1) // PANEL)
    for q in range(num_queries):
        scores_T = scores_QT[q]
        end = length + growth * q
        # Up to a whole vector.
        for t in range(end, (end + LANES - 1) // LANES * LANES):
            scores_T[t] = -np.inf
        largest = _largest_of(scores_T, end)
        for t in range(end):
            scores_T[t] = (scores_T[t] - largest) * np.float32(scaling)
        _exp_in_place(scores_T, end)
        # Of what comes after its own position a query takes nothing.
        for t in range(end, max(longest, (end + LANES - 1) // LANES * LANES)):
            scores_T[t] = np.float32(0.0)
    scores_step, out_step = scores_QT.strides[0] // 4, out_QD.strides[0] // 4
    d = 0
    while d + PANEL * _PANELS_OF_MANY <= width:
        _many_beside(values_TD, d, width, scores_QT, scores_step, num_queries, longest, out_QD[0, d:], out_step)
        d += PANEL * _PANELS_OF_MANY
    while d + PANEL <= width:
        _last_beside(values_TD, d, width, scores_QT, scores_step, num_queries, longest, out_QD[0, d:], out_step)
        d += PANEL
    for q in range(num_queries):
        if d < width:
            _weigh(scores_QT[q], longest, values_TD, d, width, out_QD[q])
        total = _sum_of(scores_QT[q], length + growth * q)
        for i in range(width):
            out_QD[q, i] /= total


@kernel
def forward(
    thread: int,
    num_threads: int,
    sync: Any,
    x_BH: Any,
    row_B: Any,
    position_B: Any,
    last_O: Any,
    adapter_B: Any,
    has_adapters: bool,
    low_rank_a: Any,
    low_rank_b: Any,
    address_L2: Any,
    shape: Any,
    weights: Any,
    scales: Any,
    biases: Any,
    norms: Any,
    head: Any,
    rotary: Any,
    buffers: Any,
    is_tiled: bool,
    left: Any,
    rights: Any,
    hidden_OH: Any,
    logits_OV: Any,
) -> None:
    """Tokens of one row or of many, from embeddings to logits; their keys and values are written into the cache.

    x_BH        the embeddings; overwritten
    row_B       of the cache, which each token belongs to; its former tokens are in the cache or in this step
    position_B  in that row
    last_O      which tokens something is wanted of: their hidden states after the last norm, in hidden_OH, and their
                logits, unless logits_OV has no columns
    adapter_B   which of the X adapters each token has, -1 for none; has_adapters whether any has one
    low_rank_a  of each of the four weights (X, L, parts * rank, columns), parts being q, k, v and gate, up; the rank, the
                same for all, is a multiple of eight; low_rank_b (X, L, P * PANEL, rank)
    address_L2  where each layer's keys (S, G, T / PANEL, D, PANEL) and values (S, G, T, D) begin, float32
    shape       (A, G, D, T, whether queries and keys are normalised, epsilon, scaling of scores)
    weights     (L, P, K, PANEL): queries, keys and values, each of whole panels, from H columns; out, of A D; gate and up, each of
                whole panels, of H; down, of I
    scales      of each of them (L, P * PANEL), (L, 0) where there are none; biases likewise
    norms       before attention (L, H), before the MLP (L, H), of queries (L, D) and keys (L, D), the last one (H,)
    head        (P, H, PANEL) with its scale (P * PANEL,) or (0,), and its bias likewise
    rotary      cosines and sines (T, D)
    buffers     of at least B rows: (B, 3 * rank), (B, H), that of queries, keys and values, (B, A D), (B, H), that of gate and up, as
                many columns as their panels have rows; of each thread (_MOST, T)
    is_tiled    whether matrices, but for the head, are multiplied by tiles
    left        room for the tiles of B vectors of the longest kind; rights (threads, room for a thread's tiles of weights)
    logits_OV   likewise
    """
    num_heads, num_heads_kv, width, num_positions, has_head_norms, epsilon, scaling = shape
    w_qkv, w_out, w_up, w_down = weights
    s_qkv, s_out, s_up, s_down = scales
    b_qkv, b_out, b_up, b_down = biases
    norm_attention, norm_mlp, norm_q, norm_k, norm_last = norms
    low, normed, qkv, attended, added, inner, scores = buffers
    never = np.int64(1) << 40
    num_rows, hidden = x_BH.shape
    num_layers, num_inner = w_qkv.shape[0], _padded(w_down.shape[2])
    keys_at = _padded(num_heads * width)
    values_at = keys_at + _padded(num_heads_kv * width)
    group = num_heads // num_heads_kv
    row_size = num_heads_kv * num_positions * width
    cos_TD, sin_TD = rotary
    right = rights[thread]
    # Tokens of a prompt go together, those of a step have keys of their own.
    per_piece = _MOST if num_rows > 1 and row_B[0] == row_B[1] else 1
    num_pieces = (num_rows + per_piece - 1) // per_piece
    for layer in range(num_layers):
        for b in range(thread, num_rows, num_threads):
            _normalise(x_BH[b], norm_attention[layer], epsilon, normed[b])
            if is_tiled:
                cut_row(normed[b], b, left)
        _wait_for_all(sync, num_threads)

        begin, end = _next_part(sync, w_qkv.shape[1], num_threads)
        while begin < end:
            _product_of(w_qkv[layer], normed, qkv, num_rows, begin, end, is_tiled, left, right)
            _scale(qkv, s_qkv[layer], b_qkv[layer], num_rows, PANEL * begin, PANEL * end)
            begin, end = _next_part(sync, w_qkv.shape[1], num_threads)
        if has_adapters:
            _reduce(thread, num_threads, low_rank_a[0], layer, normed, adapter_B, low)
            _wait_for_all(sync, num_threads)
            begin, end = _part(PANEL * w_qkv.shape[1], thread, num_threads)
            _expand(low_rank_b[0], layer, low, adapter_B, qkv, begin, end, keys_at, values_at)
        _wait_for_all(sync, num_threads)

        for pair in range(thread, num_rows * num_heads_kv, num_threads):
            b, g = pair // num_heads_kv, pair % num_heads_kv
            position = position_B[b]
            start = row_B[b] * row_size + g * num_positions * width
            keys_PD = numba.carray(
                _matrix_at(address_L2[layer, 0] + 4 * start), (num_positions // PANEL, width, PANEL), dtype=np.float32
            )
            values_TD = numba.carray(
                _matrix_at(address_L2[layer, 1] + 4 * start), (num_positions, width), dtype=np.float32
            )
            key_D = qkv[b, keys_at + g * width : keys_at + (g + 1) * width]
            if has_head_norms:
                _normalise(key_D, norm_k[layer], epsilon, key_D)
            _rotate(key_D, cos_TD[position], sin_TD[position])
            for d in range(width):
                keys_PD[position // PANEL, d, position % PANEL] = key_D[d]
                values_TD[position, d] = qkv[b, values_at + g * width + d]
        _wait_for_all(sync, num_threads)

        piece = _next_of(sync)
        while piece < num_pieces * num_heads_kv:
            g = piece % num_heads_kv
            b = piece // num_heads_kv * per_piece
            last = min(num_rows, b + per_piece)
            while b < last:
                position, count = position_B[b], 1
                while b + count < last and row_B[b + count] == row_B[b] and position_B[b + count] == position + count:
                    count += 1
                start = row_B[b] * row_size + g * num_positions * width
                keys_PD = numba.carray(
                    _matrix_at(address_L2[layer, 0] + 4 * start),
                    (num_positions // PANEL, width, PANEL),
                    dtype=np.float32,
                )
                values_TD = numba.carray(
                    _matrix_at(address_L2[layer, 1] + 4 * start), (num_positions, width), dtype=np.float32
                )
                for q in range(b, b + count):
                    for a in range(g * group, (g + 1) * group):
                        q_D = qkv[q, a * width : (a + 1) * width]
                        if has_head_norms:
                            _normalise(q_D, norm_q[layer], epsilon, q_D)
                        _rotate(q_D, cos_TD[position + q - b], sin_TD[position + q - b])
                if count == 1:
                    # The heads that share these keys go together.
                    for a in range(g * group, (g + 1) * group, _MOST):
                        shape_QD = min(_MOST, (g + 1) * group - a), width
                        columns = slice(a * width, (a + shape_QD[0]) * width)
                        q_QD, out_QD = qkv[b, columns].reshape(shape_QD), attended[b, columns].reshape(shape_QD)
                        _attend(q_QD, keys_PD, values_TD, position + 1, 0, scaling, scores[thread], out_QD)
                else:
                    for a in range(g * group, (g + 1) * group):
                        rows, columns = slice(b, b + count), slice(a * width, (a + 1) * width)
                        q_QD, out_QD = qkv[rows, columns], attended[rows, columns]
                        _attend(q_QD, keys_PD, values_TD, position + 1, 1, scaling, scores[thread], out_QD)
                b += count
            piece = _next_of(sync)
        _wait_for_all(sync, num_threads)

        if is_tiled:
            for b in range(thread, num_rows, num_threads):
                cut_row(attended[b], b, left)
            _wait_for_all(sync, num_threads)

        begin, end = _next_part(sync, w_out.shape[1], num_threads)
        while begin < end:
            _product_of(w_out[layer], attended, added, num_rows, begin, end, is_tiled, left, right)
            _scale(added, s_out[layer], b_out[layer], num_rows, PANEL * begin, PANEL * end)
            if not has_adapters:
                _add(x_BH, added, num_rows, PANEL * begin, PANEL * end)
            begin, end = _next_part(sync, w_out.shape[1], num_threads)
        if has_adapters:
            _reduce(thread, num_threads, low_rank_a[1], layer, attended, adapter_B, low)
            _wait_for_all(sync, num_threads)
            begin, end = _part(_padded(hidden), thread, num_threads)
            _expand(low_rank_b[1], layer, low, adapter_B, added, begin, end, never, never)
            _add(x_BH, added, num_rows, begin, end)
        _wait_for_all(sync, num_threads)

        for b in range(thread, num_rows, num_threads):
            _normalise(x_BH[b], norm_mlp[layer], epsilon, normed[b])
            if is_tiled:
                cut_row(normed[b], b, left)
        _wait_for_all(sync, num_threads)

        # The same rows of gate and up, so that their product needs no barrier.
        begin, end = _next_part(sync, num_inner // PANEL, num_threads)
        while begin < end:
            for start in (0, num_inner // PANEL):
                _product_of(w_up[layer], normed, inner, num_rows, start + begin, start + end, is_tiled, left, right)
                _scale(inner, s_up[layer], b_up[layer], num_rows, PANEL * (start + begin), PANEL * (start + end))
            if not has_adapters:
                _gate(inner, num_rows, num_inner, PANEL * begin, PANEL * end)
            begin, end = _next_part(sync, num_inner // PANEL, num_threads)
        if has_adapters:
            _reduce(thread, num_threads, low_rank_a[2], layer, normed, adapter_B, low)
            _wait_for_all(sync, num_threads)
            begin, end = _part(num_inner, thread, num_threads)
            for start in (0, num_inner):
                _expand(low_rank_b[2], layer, low, adapter_B, inner, start + begin, start + end, num_inner, never)
            _gate(inner, num_rows, num_inner, begin, end)
        _wait_for_all(sync, num_threads)

        if is_tiled:
            for b in range(thread, num_rows, num_threads):
                cut_row(inner[b, : w_down.shape[2]], b, left)
            _wait_for_all(sync, num_threads)

        begin, end = _next_part(sync, w_down.shape[1], num_threads)
        while begin < end:
            _product_of(w_down[layer], inner, added, num_rows, begin, end, is_tiled, left, right)
            _scale(added, s_down[layer], b_down[layer], num_rows, PANEL * begin, PANEL * end)
            if not has_adapters:
                _add(x_BH, added, num_rows, PANEL * begin, PANEL * end)
            begin, end = _next_part(sync, w_down.shape[1], num_threads)
        if has_adapters:
            _reduce(thread, num_threads, low_rank_a[3], layer, inner, adapter_B, low)
            _wait_for_all(sync, num_threads)
            begin, end = _part(_padded(hidden), thread, num_threads)
            _expand(low_rank_b[3], layer, low, adapter_B, added, begin, end, never, never)
            _add(x_BH, added, num_rows, begin, end)
        _wait_for_all(sync, num_threads)

    for o in range(thread, len(last_O), num_threads):
        _normalise(x_BH[last_O[o]], norm_last, epsilon, hidden_OH[o])
    _wait_for_all(sync, num_threads)
    if logits_OV.shape[1] == 0:
        return
    w_head, s_head, b_head = head
    begin, end = _next_part(sync, w_head.shape[0], num_threads)
    while begin < end:
        _product(w_head, hidden_OH, logits_OV, len(last_O), begin, end)
        _scale(logits_OV, s_head, b_head, len(last_O), PANEL * begin, PANEL * end)
        begin, end = _next_part(sync, w_head.shape[0], num_threads)
    _wait_for_all(sync, num_threads)

"""Words: where the words, lines and characters of UTF-8 texts lie, found 64 bytes at a time.

Block    64 bytes from a place on are compared with a byte at once; bit i of the result stands for the i-th byte. Words and
         lines are then counted by arithmetic on such masks: adding a bit to a run of ones carries it to the run's end
         (Langdale and Lemire 2019, Parsing gigabytes of JSON per second, VLDB Journal 28, section 3.1).
Space    What `str.isspace` calls white space, all of Unicode; a word is a run without it, as `str.split` has it.
Break    What `str.splitlines` ends a line at, CR LF being one.
Slack    A block may begin anywhere in a text, so the kernels read up to SLACK bytes past its end; `with_slack` sees to it that
         they may. What they read there changes no result.
Input    Valid UTF-8, each text shorter than 2 GiB.

Import this module where it is needed: numba takes its time.

Legend   N texts, B bytes of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from aifactory.text.buffers import text_buffers

SLACK = 80
"""A block that begins at a text's last byte, and the two bytes after each of its bytes."""

BYTES = numba.types.Array(numba.uint8, 1, "C", readonly=True)
"""The type of a buffer of Arrow's to the compiler."""

NONE = np.uint64(0)
ONE = np.uint64(1)
ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_TOP = np.uint64(63)
# Odd multipliers of full width (the constants of SplitMix64; Steele, Lea, Flood 2014, OOPSLA).
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)
_HALF = np.uint64(32)


def with_slack(texts: pa.Array) -> Iterator[tuple[slice, npt.NDArray[np.uint8], npt.NDArray[np.int64]]]:
    """Texts one after the other as (which of the N, data_B, offsets_N1), with SLACK bytes behind the last one's end.

    All but the last few lie where Arrow has them; those few are copied. data_B can't be written.
    """
    data_B, offset_N1 = text_buffers(texts)
    inside = int(np.searchsorted(offset_N1, len(data_B) - SLACK, "right")) - 1
    inside = min(max(inside, 0), len(texts))
    if inside:
        data_B = data_B.view()
        data_B.flags.writeable = False
        yield slice(0, inside), data_B, offset_N1[: inside + 1]
    if inside < len(texts):
        rest_N1 = offset_N1[inside:]
        copy_B = np.zeros(rest_N1[-1] - rest_N1[0] + SLACK, np.uint8)
        copy_B[: rest_N1[-1] - rest_N1[0]] = data_B[rest_N1[0] : rest_N1[-1]]
        copy_B.flags.writeable = False
        yield slice(inside, len(texts)), copy_B, rest_N1 - rest_N1[0]


def total_bytes(texts: pa.Array) -> int:
    """How many bytes all texts have."""
    _, offset_N1 = text_buffers(texts)
    return int(offset_N1[-1] - offset_N1[0])


# ── machine words ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _place(context: Any, builder: Any, array_type: Any, array: Any, at: Any) -> Any:
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [at])


@intrinsic  # type: ignore[untyped-decorator]
def within(typing_context, data_B, at, first, count):  # type: ignore[no-untyped-def]
    """The bytes in [first, first + count) of the 64 from `at` on."""
    return _compared(data_B, 0)


@intrinsic  # type: ignore[untyped-decorator]
def within_folded(typing_context, data_B, at, first, count):  # type: ignore[no-untyped-def]
    """`within` after setting bit 0x20 of each byte: for letters, either case."""
    return _compared(data_B, 0x20)


def _compared(data_B: Any, fold: int) -> Any:
    byte = numba.types.uint8
    signature = numba.types.uint64(data_B, numba.types.intp, byte, byte)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, at, first, count = arguments
        vector = ir.VectorType(ir.IntType(8), 64)
        place = _place(context, builder, signature.args[0], array, at)
        block = builder.load(builder.bitcast(place, vector.as_pointer()), align=1)

        def each(value: Any) -> Any:
            one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), 64), None)
            return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), lanes)

        if fold:
            block = builder.or_(block, each(ir.Constant(ir.IntType(8), fold)))
        found = builder.icmp_unsigned("<", builder.sub(block, each(first)), each(count))
        return builder.bitcast(found, ir.IntType(64))

    return signature, generate


@intrinsic  # type: ignore[untyped-decorator]
def load_8(typing_context, data_B, at):  # type: ignore[no-untyped-def]
    """The 8 bytes from `at` on as one number, the first byte lowest on the machines that are usual."""
    signature = numba.types.uint64(data_B, numba.types.intp)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _place(context, builder, signature.args[0], *arguments)
        return builder.load(builder.bitcast(place, ir.IntType(64).as_pointer()), align=1)

    return signature, generate


@intrinsic  # type: ignore[untyped-decorator]
def copy_16(typing_context, target_B, to, data_B, at):  # type: ignore[no-untyped-def]
    """Copies 16 bytes."""
    signature = numba.types.void(target_B, numba.types.intp, data_B, numba.types.intp)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = ir.VectorType(ir.IntType(8), 16).as_pointer()
        source = _place(context, builder, signature.args[2], arguments[2], arguments[3])
        target = _place(context, builder, signature.args[0], arguments[0], arguments[1])
        block = builder.load(builder.bitcast(source, pointer), align=1)
        builder.store(block, builder.bitcast(target, pointer), align=1)
        return context.get_dummy_value()

    return signature, generate


@intrinsic  # type: ignore[untyped-decorator]
def copy_bytes(typing_context, target_B, to, data_B, at, count):  # type: ignore[no-untyped-def]
    """Copies `count` bytes between places that don't overlap."""
    intp = numba.types.intp
    signature = numba.types.void(target_B, intp, data_B, intp, intp)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = _place(context, builder, signature.args[2], arguments[2], arguments[3])
        target = _place(context, builder, signature.args[0], arguments[0], arguments[1])
        cgutils.raw_memcpy(builder, target, source, arguments[4], 1)
        return context.get_dummy_value()

    return signature, generate


@intrinsic  # type: ignore[untyped-decorator]
def ones(typing_context, mask):  # type: ignore[no-untyped-def]
    """How many bits are set."""
    return numba.types.int64(numba.types.uint64), lambda _c, builder, _s, arguments: builder.ctpop(arguments[0])


@intrinsic  # type: ignore[untyped-decorator]
def lowest(typing_context, mask):  # type: ignore[no-untyped-def]
    """The lowest bit that is set, 64 where none is."""
    no = ir.Constant(ir.IntType(1), 0)
    return numba.types.int64(numba.types.uint64), lambda _c, builder, _s, arguments: builder.cttz(arguments[0], no)


@intrinsic  # type: ignore[untyped-decorator]
def highest(typing_context, mask):  # type: ignore[no-untyped-def]
    """The highest bit that is set, -1 where none is."""
    no, top = ir.Constant(ir.IntType(1), 0), ir.Constant(ir.IntType(64), 63)
    return (
        numba.types.int64(numba.types.uint64),
        lambda _c, builder, _s, arguments: builder.sub(top, builder.ctlz(arguments[0], no)),
    )


# ── masks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@numba.njit(cache=True, nogil=True)
def first_bits(count):  # type: ignore[no-untyped-def]
    """The lowest `count` bits, or all of 64; count is at least 0."""
    return ALL if count >= 64 else (ONE << np.uint64(count)) - ONE


@numba.njit(cache=True, nogil=True)
def run_on(starts, through, carry):  # type: ignore[no-untyped-def]
    """Lets each start run on through a run of ones, and says where each first meets a zero; and the carry to the next block.

    A start in a run of ones is the run's first bit or has none before it in that run.
    """
    total = through + (starts & through)
    over = total < through
    carried = total + carry
    over |= carried < total
    return (starts | carried) & ~through, ONE if over else NONE


@numba.njit(cache=True, nogil=True)
def wide_general(data_B, at, first, count):  # type: ignore[no-untyped-def]
    """Where characters from U+2000 + first to U+2000 + first + count begin, which are E2 80 and a third byte of 80 to BF."""
    return within(data_B, at, 0xE2, 1) & within(data_B, at + 1, 0x80, 1) & within(data_B, at + 2, 0x80 + first, count)


@numba.njit(cache=True, nogil=True)
def spaces(data_B, at, spill):  # type: ignore[no-untyped-def]
    """The bytes of white space in a block; and those of a character in it that lie in the next, which is given that `spill`."""
    mask = within(data_B, at, 0x20, 1) | within(data_B, at, 0x09, 5) | within(data_B, at, 0x1C, 4) | spill
    after = NONE
    if within(data_B, at, 0x80, 0x80) != NONE:
        # U+0085, U+00A0; U+1680; U+3000; U+2000 to U+200A, U+2028, U+2029, U+202F; U+205F.
        two = within(data_B, at, 0xC2, 1) & (within(data_B, at + 1, 0x85, 1) | within(data_B, at + 1, 0xA0, 1))
        middle = within(data_B, at + 1, 0x80, 1)
        last = within(data_B, at + 2, 0x80, 1)
        three = within(data_B, at, 0xE1, 1) & within(data_B, at + 1, 0x9A, 1) & last
        three |= within(data_B, at, 0xE3, 1) & middle & last
        three |= (
            wide_general(data_B, at, 0x00, 11) | wide_general(data_B, at, 0x28, 2) | wide_general(data_B, at, 0x2F, 1)
        )
        three |= within(data_B, at, 0xE2, 1) & within(data_B, at + 1, 0x81, 1) & within(data_B, at + 2, 0x9F, 1)
        mask |= two | two << ONE | three | three << ONE | three << np.uint64(2)
        after = two >> _TOP | three >> _TOP | three >> np.uint64(62)
    return mask, after


@numba.njit(cache=True, nogil=True)
def breaks(data_B, at, after_return):  # type: ignore[no-untyped-def]
    """Where line breaks begin in a block; and whether it ends in CR, with which an LF at the next one's beginning is one break.

    after_return   1 where the block before ends in CR.
    """
    mask = within(data_B, at, 0x0A, 4) | within(data_B, at, 0x1C, 3)
    returns = within(data_B, at, 0x0D, 1)
    mask &= ~(within(data_B, at, 0x0A, 1) & (returns << ONE | after_return))
    if within(data_B, at, 0x80, 0x80) != NONE:
        mask |= within(data_B, at, 0xC2, 1) & within(data_B, at + 1, 0x85, 1)
        mask |= wide_general(data_B, at, 0x28, 2)
    return mask, returns >> _TOP


# ── characters ────────────────────────────────────────────────────────────────────────────────────────────────────────


@numba.njit(cache=True, nogil=True)
def is_ascii(data_B, begin, end):  # type: ignore[no-untyped-def]
    wide = NONE
    for at in range(begin, end, 64):
        wide |= within(data_B, at, 0x80, 0x80) & first_bits(end - at)
    return wide == NONE


@numba.njit(cache=True, nogil=True)
def count_chars(data_B, begin, end):  # type: ignore[no-untyped-def]
    """How many characters begin in [begin, end)."""
    count = 0
    for at in range(begin, end, 64):
        count += ones(~within(data_B, at, 0x80, 0x40) & first_bits(end - at))
    return count


@numba.njit(cache=True, nogil=True)
def decode(data_B, at):  # type: ignore[no-untyped-def]
    """The code point of the character that begins at `at`."""
    lead = np.int64(data_B[at])
    if lead < 0x80:
        return lead
    second = np.int64(data_B[at + 1]) & 0x3F
    if lead < 0xE0:
        return (lead & 0x1F) << 6 | second
    third = np.int64(data_B[at + 2]) & 0x3F
    if lead < 0xF0:
        return (lead & 0x0F) << 12 | second << 6 | third
    return (lead & 0x07) << 18 | second << 12 | third << 6 | np.int64(data_B[at + 3]) & 0x3F


@numba.njit(cache=True, nogil=True)
def is_space(code):  # type: ignore[no-untyped-def]
    if code <= 0x20:
        return code == 0x20 or (code >= 0x09 and code <= 0x0D) or (code >= 0x1C and code <= 0x1F)
    if code < 0x1680:
        return code == 0x85 or code == 0xA0
    if code >= 0x2000 and code <= 0x205F:
        return code <= 0x200A or code == 0x2028 or code == 0x2029 or code == 0x202F or code == 0x205F
    return code == 0x1680 or code == 0x3000


@numba.njit(cache=True, nogil=True)
def is_break(code):  # type: ignore[no-untyped-def]
    return (
        (code >= 0x0A and code <= 0x0D)
        or (code >= 0x1C and code <= 0x1E)
        or code == 0x85
        or code == 0x2028
        or code == 0x2029
    )


@numba.njit(cache=True, nogil=True)
def char_bytes(lead):  # type: ignore[no-untyped-def]
    """The bytes of the character that begins with this one."""
    return 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4


@numba.njit(cache=True, nogil=True)
def last_char(data_B, end):  # type: ignore[no-untyped-def]
    """Where the character begins that ends before `end`."""
    at = end - 1
    while data_B[at] & 0xC0 == 0x80:
        at -= 1
    return at


@numba.njit(cache=True, nogil=True)
def strip_left(data_B, begin, end):  # type: ignore[no-untyped-def]
    """Where a text begins without the white space before it; `end` if there is nothing else."""
    while begin < end and is_space(decode(data_B, begin)):
        begin += char_bytes(data_B[begin])
    return begin


@numba.njit(cache=True, nogil=True)
def strip_right(data_B, begin, end):  # type: ignore[no-untyped-def]
    """Where a text ends without the white space behind it; `begin` if there is nothing else."""
    while begin < end:
        at = last_char(data_B, end)
        if not is_space(decode(data_B, at)):
            break
        end = at
    return end


@numba.njit(cache=True, nogil=True)
def count_words(data_B, begin, end, enough):  # type: ignore[no-untyped-def]
    """The words in [begin, end); no more are counted where there are `enough`."""
    count = 0
    before = NONE
    spill = NONE
    for at in range(begin, end, 64):
        space, spill = spaces(data_B, at, spill)
        body = ~space & first_bits(end - at)
        count += ones(body & ~(body << ONE | before))
        before = body >> _TOP
        if count >= enough:
            break
    return count


# ── equality ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@numba.njit(cache=True, nogil=True)
def first_bytes(count):  # type: ignore[no-untyped-def]
    """A mask for as many bytes of a number that `load_8` gave, at most 8 and at least 1."""
    return ALL >> np.uint64(64 - 8 * min(count, 8))


@numba.njit(cache=True, nogil=True)
def hash_bytes(data_B, begin, end):  # type: ignore[no-untyped-def]
    """64 bits of which the upper ones depend on all bytes. Equal hashes are never taken for equal bytes."""
    value = np.uint64(end - begin) * _MIX_A
    while end - begin >= 8:
        value = (value ^ load_8(data_B, begin)) * _MIX_B
        value ^= value >> _HALF
        begin += 8
    if begin < end:
        value = (value ^ (load_8(data_B, begin) & first_bytes(end - begin))) * _MIX_B
        value ^= value >> _HALF
    return value * _MIX_A


@numba.njit(cache=True, nogil=True)
def equal_bytes(data_B, left, right, count):  # type: ignore[no-untyped-def]
    """Whether the `count` bytes from `left` on are those from `right` on."""
    while count >= 8:
        if load_8(data_B, left) != load_8(data_B, right):
            return False
        left += 8
        right += 8
        count -= 8
    return count == 0 or (load_8(data_B, left) ^ load_8(data_B, right)) & first_bytes(count) == NONE

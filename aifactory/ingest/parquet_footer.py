"""The footer of a Parquet file: its columns, and where the chunks of each row group lie.

Decoded here, since Arrow's own accessors of a footer end the process where a damaged one makes no sense to them.
(Apache Parquet format 2.11, parquet.thrift: FileMetaData; Apache Thrift, compact protocol.)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import IO, Any

_MAGIC = b"PAR1"
_MAX_FOOTER_BYTES = 256 << 20
_MAX_DEPTH = 32
_BYTE_ARRAY = 6


@dataclass(frozen=True, slots=True)
class Chunk:
    """A column of a row group."""

    path: tuple[str, ...]
    start: int
    """Where its pages begin, byte."""
    num_bytes: int
    num_bytes_unpacked: int
    """As the file says."""
    num_values: int
    is_text: bool
    """Whether its values are byte arrays."""
    has_dictionary: bool
    identity: tuple[object, ...]
    """How its bytes are to be read: type, codec, number of values."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A part of a file that can be read by itself."""

    num_rows: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Footer:
    """What the footer says."""

    columns: tuple[tuple[str, str], ...]
    """Each column's name, and its type as text."""
    row_groups: tuple[RowGroup, ...]


def read_footer(file: IO[bytes], num_bytes: int) -> Footer:
    """The footer of a file.

    Raises   ValueError if there is none, or none that makes sense; OSError if it can't be read.
    """
    if num_bytes < 12:
        raise ValueError(f"{num_bytes} bytes are no Parquet file")
    file.seek(num_bytes - 8)
    tail = _exactly(file, 8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or not 0 < length <= min(num_bytes - 12, _MAX_FOOTER_BYTES):
        raise ValueError("no footer at the end")
    file.seek(num_bytes - 8 - length)
    try:
        told = _Decoder(_exactly(file, length)).struct()
        footer = Footer(_columns(told[2]), tuple(_row_group(group, num_bytes) for group in told.get(4, ())))
    except (KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"a footer that makes no sense: {type(error).__name__}: {error}") from error
    return footer


def _exactly(file: IO[bytes], size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = file.read(size - len(data))
        if not more:
            raise ValueError("the file ends in its footer")
        data += more
    return data


def _columns(elements: list[dict[int, Any]]) -> tuple[tuple[str, str], ...]:
    """The children of the root, which is the first of the elements; each is followed by its own."""

    def end_of(at: int) -> int:
        """Where the elements end that begin with one at `at`."""
        waiting = 1
        while waiting:
            waiting += int(elements[at].get(5, 0)) - 1
            at += 1
        return at

    found = []
    at = 1
    for _ in range(int(elements[0][5])):
        end = end_of(at)
        name = elements[at][4].decode()
        found.append((name, repr([sorted(element.items()) for element in elements[at:end]])))
        at = end
    return tuple(found)


def _row_group(group: dict[int, Any], num_bytes: int) -> RowGroup:
    return RowGroup(int(group[3]), tuple(_chunk(chunk[3], num_bytes) for chunk in group[1]))


def _chunk(told: dict[int, Any], num_bytes: int) -> Chunk:
    start, length, dictionary = int(told[9]), int(told[7]), told.get(11)
    if dictionary:  # some writers say 0 where there is none
        start = min(start, int(dictionary))
    if start < 0 or length < 0 or start + length > num_bytes:
        raise ValueError("a column lies outside the file")
    return Chunk(
        path=tuple(part.decode() for part in told[3]),
        start=start,
        num_bytes=length,
        num_bytes_unpacked=max(0, int(told[6])),
        num_values=int(told[5]),
        is_text=told[1] == _BYTE_ARRAY,
        has_dictionary=bool(dictionary),
        identity=(int(told[1]), int(told[4]), int(told[5])),
    )


class _Decoder:
    """Thrift's compact protocol: a structure becomes a dict from the numbers of its fields to their values."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._depth = 0

    def struct(self) -> dict[int, Any]:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ValueError("a footer that is nested too deep")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            kind = head & 0x0F
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind)
        self._depth -= 1
        return fields

    def _value(self, kind: int) -> Any:
        match kind:
            case 1 | 2:  # in a list a truth value takes a byte
                return self._byte() == 1
            case 3:
                return self._byte()
            case 4 | 5 | 6:
                return self._zigzag()
            case 7:
                return struct.unpack("<d", self._bytes(8))[0]
            case 8:
                return self._bytes(self._varint())
            case 9 | 10:
                head = self._byte()
                count = head >> 4 if head >> 4 != 15 else self._varint()
                self._check(count)
                return [self._value(head & 0x0F) for _ in range(count)]
            case 11:
                count = self._varint()
                self._check(count)
                kinds = self._byte() if count else 0
                return [(self._value(kinds >> 4), self._value(kinds & 0x0F)) for _ in range(count)]
            case 12:
                return self.struct()
        raise ValueError(f"a footer with a value of kind {kind}")

    def _check(self, count: int) -> None:
        if count > len(self._data) - self._at:
            raise ValueError("a footer with more values than bytes")

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _bytes(self, size: int) -> bytes:
        self._check(size)
        self._at += size
        return self._data[self._at - size : self._at]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a footer with a number of more than 64 bits")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

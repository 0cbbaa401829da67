"""Streams: rows from the messages of a Kafka topic, between two offsets.

A partition is cut into ranges of offsets that begin at multiples of RANGE_OFFSETS, so messages that come later make new
ranges and change at most the last one. A range's identity is that of its messages; since a log is only ever added to,
a range whose last message is the one that was seen before is not read again when it is listed.

    origin     topic/partition        position   the offset        timestamp   the row's own, or the message's

`read_messages` and `bounds_of` work on any consumer with the methods of kafka-python's that `Consumer` names.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

from aifactory.config.sources import KafkaSource
from aifactory.errors import ConfigError, StorageError
from aifactory.ingest.blocks import BlockBuilder, Problem, Raw
from aifactory.ingest.json_lines import values_of_line
from aifactory.ingest.places import expand_options
from aifactory.ingest.reach import check_address
from aifactory.ingest.shapes import Shape

RANGE_OFFSETS = 10_000
_POLL_MS = 1000
_MAX_EMPTY_POLLS = 30


class Message(NamedTuple):
    """A message of a topic."""

    partition: int
    offset: int
    timestamp_ms: int
    """When it was made or appended, ms since 1970; negative where that is not known."""
    value: bytes | None


class Consumer(Protocol):
    """What is asked of a consumer."""

    def partitions_for_topic(self, topic: str, /) -> set[int] | None: ...
    def beginning_offsets(self, partitions: list[Any], /) -> Mapping[Any, int]: ...
    def end_offsets(self, partitions: list[Any], /) -> Mapping[Any, int]: ...
    def assign(self, partitions: list[Any], /) -> None: ...
    def seek(self, partition: Any, offset: int, /) -> None: ...
    def position(self, partition: Any, /) -> int: ...
    def poll(self, timeout_ms: int = 0, max_records: int | None = None) -> Mapping[Any, list[Any]]: ...
    def close(self) -> None: ...


OpenConsumer = Callable[[KafkaSource], Consumer]


def open_consumer(section: KafkaSource) -> Consumer:
    """A consumer of kafka-python that belongs to no group and commits nothing.

    Raises   ConfigError if the extra `kafka` is not installed, or if no broker may be reached or answers.
    """
    try:
        import kafka
    except ImportError as error:
        raise ConfigError(
            "expected kafka-python for a source of kind kafka, found none; install aifactory[kafka]."
        ) from error
    for server in section.bootstrap_servers.split(","):
        host, _, port = server.strip().rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(f"expected host:port at ingest source {section.name!r}, found {server!r}; correct it.")
        check_address(host.strip("[]"), int(port), source=section.name, allow_private=section.allow_private)
    try:
        consumer: Consumer = kafka.KafkaConsumer(
            bootstrap_servers=[server.strip() for server in section.bootstrap_servers.split(",")],
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="none",  # an offset that is gone is an error, not another offset
            **expand_options(section.options, section.name),
        )
    except (kafka.errors.KafkaError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"expected a broker at ingest source {section.name!r}, found {type(error).__name__}: {error}; correct "
            "bootstrap_servers or options."
        ) from error
    return consumer


def bounds_of(consumer: Consumer, section: KafkaSource) -> list[tuple[int, int, int]]:
    """Each partition with its first and its last offset, exclusive.

    Raises   ConfigError if there is no such topic.
    """
    numbers = sorted(consumer.partitions_for_topic(section.topic) or ())
    if not numbers:
        raise ConfigError(
            f"expected the topic {section.topic!r} at ingest source {section.name!r}, found none of that name; correct it."
        )
    partitions = [_partition(section, number) for number in numbers]
    first, last = consumer.beginning_offsets(partitions), consumer.end_offsets(partitions)
    found = []
    for partition in partitions:
        start = first[partition] if section.start == "earliest" else max(section.start, first[partition])
        stop = last[partition] if section.end == "latest" else min(section.end, last[partition])
        found.append((partition.partition, start, max(start, stop)))
    return found


def ranges_of(start: int, stop: int) -> list[tuple[int, int]]:
    """The ranges of offsets into which a partition is cut."""
    borders = [start, *range((start // RANGE_OFFSETS + 1) * RANGE_OFFSETS, stop, RANGE_OFFSETS), stop]
    return [(a, b) for a, b in pairwise(borders) if a < b]


def read_messages(consumer: Consumer, section: KafkaSource, partition: int, start: int, stop: int) -> Iterator[Message]:
    """The messages of a range of offsets. Offsets that hold none (compacted, or marks of transactions) are passed over.

    Raises   StorageError if the broker stays silent, or does not have them any more.
    """
    import kafka

    where = _partition(section, partition)
    silent = 0
    try:
        consumer.assign([where])
        consumer.seek(where, start)
        while consumer.position(where) < stop:
            records = consumer.poll(timeout_ms=_POLL_MS).get(where, [])
            silent = 0 if records else silent + 1
            if silent > _MAX_EMPTY_POLLS:
                raise StorageError(
                    f"expected messages of {section.topic}/{partition} up to offset {stop}, found none for "
                    f"{_MAX_EMPTY_POLLS * _POLL_MS // 1000} s after {consumer.position(where)}; run the same command "
                    "again."
                )
            for record in records:
                if record.offset >= stop:
                    return
                yield Message(partition, record.offset, record.timestamp, record.value)
    except kafka.errors.KafkaError as error:
        raise StorageError(
            f"expected the offsets {start} to {stop} of {section.topic}/{partition}, found {type(error).__name__}: "
            f"{error}; run the same command again to read what is there now."
        ) from error


def digest_of_messages(messages: Iterable[Message]) -> tuple[str, int, str]:
    """SHA-256 of some messages, their bytes, and the SHA-256 of the last one ("" where there is none)."""
    state = hashlib.sha256()
    size, last = 0, ""
    for message in messages:
        one = hashlib.sha256(f"{message.partition}/{message.offset}@{message.timestamp_ms}:".encode())
        one.update(b"" if message.value is None else b"=" + message.value)
        state.update(one.digest())
        size += len(message.value or b"")
        last = one.hexdigest()
    return state.hexdigest(), size, last


def add_messages(messages: Iterable[Message], section: KafkaSource, builder: BlockBuilder) -> Iterator[None]:
    """Add the rows that some messages are."""
    shape = Shape(section.columns)
    for message in messages:
        origin = f"{section.topic}/{message.partition}"
        row = _row_of(message, section, shape)
        if isinstance(row, Problem):
            text = (message.value or b"").decode("utf-8", "backslashreplace")
            builder.reject(origin, message.offset, row, text)
        else:
            builder.add_row(origin, message.offset, row)
        yield


def _partition(section: KafkaSource, number: int) -> Any:
    from kafka import TopicPartition

    return TopicPartition(section.topic, number)


def _row_of(message: Message, section: KafkaSource, shape: Shape) -> Raw | Problem:
    if message.value is None:
        return Problem("wrong_type", 1.0, "expected a value, found none (the key was deleted)")
    if section.value == "text":
        try:
            row: Raw | Problem = Raw(text=message.value.decode())
        except UnicodeDecodeError as error:
            return Problem("invalid_utf8", float(error.start), f"{error.reason} at byte {error.start}")
    else:
        values = values_of_line(message.value, shape.columns.asked)
        row = values if isinstance(values, Problem) else shape.row(values)
    if isinstance(row, Raw) and not row.timestamp and message.timestamp_ms >= 0:
        return row._replace(timestamp=_iso(message.timestamp_ms))
    return row


def _iso(timestamp_ms: int) -> str:
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    try:
        return (epoch + datetime.timedelta(milliseconds=timestamp_ms)).isoformat()
    except OverflowError:
        return ""

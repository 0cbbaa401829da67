"""HttpLoad: the clients of a completions endpoint: a closed loop, an open loop, and one that asks for next to nothing.

They speak HTTP/1.1 over asyncio's streams, each connection for one request at a time and kept for the next, and read just
enough of an answer to count its tokens: what a client computes is taken from the server, which has the same two processors.

    closed_loop   so many connections, each of which sends its next prompt when an answer ends
    open_loop     requests at given moments, however many are under way; times count from those moments, so that a
                  server that falls behind is not asked less
    no_ops        GETs of one path, one after the other on so many connections
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

from moments import Seen, token_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Who is asked."""

    url: str
    model: str
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of a request, which only this server knows."""

    def completion(self, prompt: Sequence[int], answer_tokens: int) -> bytes:
        """A request for a greedy streamed answer."""
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": answer_tokens,
            "temperature": 0,
            "stream": True,
        }
        return self.request("POST", "/v1/completions", json.dumps(body | self.extra).encode())

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The bytes of a request."""
        head = f"{method} {path} HTTP/1.1\r\nHost: {urlsplit(self.url).netloc}\r\n"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return f"{head}\r\n".encode() + body


class Connection:
    """One kept connection, for one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, target: Target) -> Self:
        """Connect to a server."""
        split = urlsplit(target.url)
        return cls(*await asyncio.open_connection(split.hostname, split.port))

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of an answer."""
        status, parts = await self.send(request)
        return status, b"".join([part async for part in parts])

    async def events(self, request: bytes) -> AsyncIterator[bytes]:
        """The data of each server-sent event of an answer. Raises RuntimeError where the status is not 200."""
        status, parts = await self.send(request)
        if status != 200:
            raise RuntimeError(f"{status} {b''.join([part async for part in parts])[:300]!r}")
        async for data in self.events_of(parts):
            yield data

    @staticmethod
    async def events_of(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The data of each server-sent event of a body."""
        rest = b""
        async for part in parts:
            *events, rest = (rest + part).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: "):
                    yield event[6:]

    def close(self) -> None:
        self._writer.close()

    @property
    def is_open(self) -> bool:
        """Whether the server has not closed it; servers do so with what has been idle for some seconds."""
        return not self._reader.at_eof()

    async def send(self, request: bytes) -> tuple[int, AsyncIterator[bytes]]:
        """Status of an answer, and its body as it comes."""
        self._writer.write(request)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = None
        for line in head.split(b"\r\n")[1:]:
            if line.startswith(b"content-length:"):
                length = int(line[15:])
        return int(head[9:12]), self._body(length)

    async def _body(self, length: int | None) -> AsyncIterator[bytes]:
        """As it comes, in one part or in the sender's chunks."""
        if length is not None:
            yield await self._reader.readexactly(length)
            return
        while size := int(await self._reader.readline(), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readline()


Told = Callable[[int, str, int, float], None]
"""Told of every event with text: the number of the request, the model that answers, how many tokens, and when."""


async def _answer(
    connection: Connection, request: bytes, index: int, begin: float, seen: Seen, answer_tokens: int, told: Told | None
) -> None:
    last, ids = begin, []
    try:
        async for data in connection.events(request):
            now = time.perf_counter()
            if data == b"[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(str(event["error"])[:300])
            if event["choices"] and (text := event["choices"][0]["text"]):
                seen.add(len(text), seconds=now - last, first=not ids)
                ids += [token_of(letter) for letter in text]
                last = now
                if told is not None:
                    told(index, event["model"], len(text), now)
        if len(ids) != answer_tokens:
            raise RuntimeError(f"expected an answer of {answer_tokens} tokens, found {len(ids)}")
        seen.answers[index] = ids
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        seen.failed.append(f"{type(error).__name__}: {error}")
        raise


async def _timed(work: Callable[[Seen], Awaitable[None]]) -> Seen:
    seen, started, cpu = Seen(), time.perf_counter(), time.process_time()
    await work(seen)
    seen.seconds = time.perf_counter() - started
    seen.client_cpu = (time.process_time() - cpu) / seen.seconds
    return seen


async def closed_loop(
    target: Target,
    prompts: Sequence[Sequence[int]],
    *,
    concurrency: int,
    answer_tokens: int,
    until: Callable[[], bool] | None = None,
    told: Told | None = None,
    apart_s: float = 0.0,
) -> Seen:
    """Send each prompt once; with `until` all of them again and again, until it is true.

    apart_s   connections begin so many seconds one after the other, so that answers that take alike do not end together
    A request that fails is counted, and its connection replaced.
    """
    numbers = itertools.count() if until is not None else iter(range(len(prompts)))
    requests = [target.completion(prompt, answer_tokens) for prompt in prompts]

    async def client(seen: Seen, place: int) -> None:
        await asyncio.sleep(apart_s * place)
        connection = await Connection.open(target)
        for number in numbers:
            if until is not None and until():
                break
            request = requests[number % len(requests)]
            try:
                await _answer(connection, request, number, time.perf_counter(), seen, answer_tokens, told)
            except (RuntimeError, OSError, EOFError, ValueError):
                connection.close()
                connection = await Connection.open(target)
        connection.close()

    async def work(seen: Seen) -> None:
        await asyncio.gather(*(client(seen, place) for place in range(concurrency)))

    return await _timed(work)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request of an open loop."""

    at_s: float
    """From the begin of the run."""
    prompt: Sequence[int]
    answer_tokens: int


async def open_loop(target: Target, arrivals: Sequence[Arrival]) -> Seen:
    """Send each request at its moment, over a connection that is free or a new one."""
    requests = [target.completion(arrival.prompt, arrival.answer_tokens) for arrival in arrivals]
    free: list[Connection] = []

    async def work(seen: Seen) -> None:
        started = time.perf_counter()

        async def one(index: int, arrival: Arrival) -> None:
            due = started + arrival.at_s
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            try:
                connection = await _idle(free) or await Connection.open(target)
                await _answer(connection, requests[index], index, due, seen, arrival.answer_tokens, None)
            except (RuntimeError, OSError, EOFError, ValueError):
                return
            free.append(connection)

        await asyncio.gather(*(one(index, arrival) for index, arrival in enumerate(arrivals)))

    seen = await _timed(work)
    for connection in free:
        connection.close()
    return seen


async def _idle(free: list[Connection]) -> Connection | None:
    while free:
        connection = free.pop()
        # Let the loop hear of an end that has come meanwhile.
        await asyncio.sleep(0)
        if connection.is_open:
            return connection
        connection.close()
    return None


async def no_ops(target: Target, path: str, *, concurrency: int, seconds: float) -> tuple[float, float]:
    """Answers per second, and the client's own CPU share. Raises RuntimeError where the status is not 200."""
    request, count = target.request("GET", path), 0

    async def client(end: float) -> None:
        nonlocal count
        connection = await Connection.open(target)
        while time.perf_counter() < end:
            status, body = await connection.ask(request)
            if status != 200:
                raise RuntimeError(f"expected {path} to be answered, found {status} {body[:300]!r}")
            count += 1
        connection.close()

    async def work(_: Seen) -> None:
        await asyncio.gather(*(client(time.perf_counter() + seconds) for _ in range(concurrency)))

    seen = await _timed(work)
    return count / seen.seconds, seen.client_cpu

"""Batches: the lines of uploaded files, answered as requests in the background, by whichever replica holds the job.

    claim ─▶ read and check the file ─▶ each line that has no result: ask, keep ─▶ write the files, end the job

What a line gets is what the same body would get over HTTP. A replica that is killed is followed by another, or by itself
when it is back, as soon as its hold runs out; lines that have a result are not asked again, and the one that it was at is
kept under the same id, so its answer is in the log once too.
Source   OpenAI API reference, "Batch" (2026-11).
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from aifactory.errors import BadRequestError, FencedError
from aifactory.observe.events import log_event
from aifactory.records.batch_jobs import LEASE_S, BatchJob, BatchQueue
from aifactory.records.identity import hash_parts
from aifactory.serve.wire import read_json

MAX_LINES = 50_000
"""Most requests of a file (OpenAI's limit)."""
_MOST_PROBLEMS = 20
_AGAIN = (429, 503)
"""Statuses that say nothing about the line: it is asked again."""
_PAUSE_S = 1.0

Ask = Callable[[str, bytes, str, str], Awaitable[tuple[int, Any]]]
"""Path, body and id of a request, and whose it is, to its status and answer, in the background."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One request of a file."""

    number: int
    custom_id: str
    body: bytes


class Batches:
    """Answers the batch jobs of a factory, one after another, several lines at once."""

    def __init__(self, queue: BatchQueue, ask: Ask, *, concurrency: int) -> None:
        self._queue = queue
        self._ask = ask
        self._concurrency = concurrency
        self._holder = secrets.token_hex(8)
        self._asking = False

    async def run(self, poll_s: float) -> None:
        """Look for jobs, for ever."""
        while True:
            try:
                worked = await self.work()
            except Exception as error:  # a database or a storage that is away for a while must not end it
                log_event("batch_failed", error=f"{type(error).__name__}: {error}")
                worked = False
            if not worked:
                await asyncio.sleep(poll_s)

    async def work(self) -> bool:
        """Answer one job to its end; False where there is none to be had."""
        job = await asyncio.to_thread(self._queue.claim, self._holder)
        if job is None:
            return False
        working = asyncio.create_task(self._answer(job))
        try:
            # Hold it while it is worked at; what was cancelled or is too old ends.
            while not working.done():
                await asyncio.wait([working], timeout=min(LEASE_S / 3, _PAUSE_S))
                if not working.done():
                    state = await asyncio.to_thread(self._queue.hold, job.id, self._holder)
                    if self._asking and (state == "cancelling" or self._queue.journal.clock() >= job.expires_at):
                        working.cancel()
            with suppress(asyncio.CancelledError):
                await working
        except FencedError:
            if not working.done() or working.exception() is not None:
                log_event("batch_taken_over", batch=job.id)
            return True
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            with suppress(Exception):
                await asyncio.to_thread(self._queue.let_go, job.id, self._holder)
        return True

    async def _answer(self, job: BatchJob) -> None:
        data = await asyncio.to_thread(self._queue.read_file, job.input_file)
        lines: list[Line] = []
        problems = [_problem("the input file is gone", None)]
        if data is not None:  # it may be 100 MB, and others are answered meanwhile
            lines, problems = await asyncio.to_thread(_read, data, job)
        if problems:
            await asyncio.to_thread(self._queue.fail, job.id, self._holder, problems)
            return
        if job.state == "validating":
            await asyncio.to_thread(self._queue.begin, job.id, self._holder, total=len(lines))
        state = "completed"
        if job.state == "cancelling" or self._queue.journal.clock() >= job.expires_at:
            state = "cancelled" if job.state == "cancelling" else "expired"
        else:
            try:
                await self._answer_lines(job, lines)
            except asyncio.CancelledError:
                current = await asyncio.to_thread(self._queue.job, job.id)
                late = self._queue.journal.clock() >= job.expires_at
                if current is None or not (late or current.state == "cancelling"):
                    raise  # the replica is going: another goes on from here
                state = "cancelled" if current.state == "cancelling" else "expired"
        await asyncio.to_thread(self._finish, job, lines, state)

    async def _answer_lines(self, job: BatchJob, lines: list[Line]) -> None:
        done = await asyncio.to_thread(self._queue.done_lines, job.id)
        waiting = iter([line for line in lines if line.number not in done])

        async def take() -> None:
            for line in waiting:
                status, answer = await self._ask_until_it_is_heard(job, line)
                result = _result(
                    line, response={"status_code": status, "request_id": _id_of(job, line), "body": answer}
                )
                await asyncio.to_thread(
                    self._queue.add_line, job.id, self._holder, line.number, status=status, result=result
                )

        self._asking = True
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._concurrency, len(lines))):
                    group.create_task(take())
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from failed
        finally:
            self._asking = False

    async def _ask_until_it_is_heard(self, job: BatchJob, line: Line) -> tuple[int, Any]:
        while True:
            status, answer = await self._ask(job.endpoint, line.body, _id_of(job, line), job.key_id)
            if status not in _AGAIN:
                return status, answer
            await asyncio.sleep(_PAUSE_S)

    def _finish(self, job: BatchJob, lines: list[Line], state: str) -> None:
        done = self._queue.done_lines(job.id)
        results = self._queue.results(job.id)
        code = "batch_expired" if state == "expired" else "batch_cancelled"
        left = [
            _result(line, error={"code": code, "message": f"The batch has {state} before this request was answered."})
            for line in lines
            if line.number not in done
        ]
        self._queue.finish(
            job.id,
            self._holder,
            state=state,
            output=[result for status, result in results if status == 200],
            errors=[result for status, result in results if status != 200] + left,
        )


def _read(data: bytes, job: BatchJob) -> tuple[list[Line], list[dict[str, Any]]]:
    """The requests of a file, and what is wrong with it."""
    lines: list[Line] = []
    problems: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, text in _texts(data):
        line = _line(number, text, job.endpoint, seen)
        if isinstance(line, Line):
            lines.append(line)
        else:
            problems.append(_problem(line, number))
        if len(problems) == _MOST_PROBLEMS:
            break
    if not lines and not problems:
        problems.append(_problem("expected at least one request, found an empty file", None))
    if len(lines) > MAX_LINES:
        problems.append(_problem(f"expected at most {MAX_LINES} requests, found {len(lines)}", None))
    return lines, problems


def _texts(data: bytes) -> Iterator[tuple[int, bytes]]:
    return ((number, text) for number, text in enumerate(data.split(b"\n"), start=1) if text.strip())


def _line(number: int, text: bytes, endpoint: str, seen: set[str]) -> Line | str:
    """A request, or what is wrong with its line."""
    try:
        value = read_json(text)
    except BadRequestError as error:
        return str(error)
    if not isinstance(value, dict) or set(value) - {"custom_id", "method", "url", "body"}:
        return "expected an object of custom_id, method, url and body"
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or custom_id in seen:
        return f"expected a custom_id of its own, found {str(custom_id)[:60]!r}"
    seen.add(custom_id)
    if value.get("method") != "POST" or value.get("url") != endpoint:
        return f"expected POST and {endpoint}, found {str(value.get('method'))[:10]} and {str(value.get('url'))[:60]}"
    body = value.get("body")
    if not isinstance(body, dict):
        return f"expected an object as the body, found a {type(body).__name__}"
    return Line(number=number, custom_id=custom_id, body=json.dumps(body).encode())


def _problem(message: str, line: int | None) -> dict[str, Any]:
    return {"code": "invalid_request", "message": message, "param": None, "line": line}


def _result(line: Line, *, response: Mapping[str, Any] | None = None, error: Mapping[str, Any] | None = None) -> str:
    identity = f"batch_req_{hash_parts(line.custom_id, str(line.number))[:24]}"
    return json.dumps({"id": identity, "custom_id": line.custom_id, "response": response, "error": error})


def _id_of(job: BatchJob, line: Line) -> str:
    """What tells the answer of a line from all others: the same each time that it is asked."""
    return hash_parts(job.id, str(line.number))[:24]

"""The front: a hop before the replicas that loses no answer with one of them. It holds no model, and knows no Ray.

    client ◀──▶ Front ──Call──▶ a replica          lost before it told anything: asked again, of another
                      ◀──parts── ✝                  lost in the middle of a stream: another goes on from the tokens told
                ──Call──▶ another replica

What is asked again has the id, the moment and the seed that it had, so it is kept once and answered as it would have been.
A stream goes on by the release by which it began, or ends with an error that says so. What would be done twice (an upload, a
batch) is asked once. A request with which three replicas were lost is given up: it may be what they die of.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from aifactory.config import Config
from aifactory.observe import metrics
from aifactory.observe.events import logger
from aifactory.serve.event_stream import DONE, EventStream, watch_client
from aifactory.serve.progress import Call, Head, Part, Progress, Told
from aifactory.serve.proxy import LOST
from aifactory.serve.wire import ALWAYS, Incoming, StatusError, error_body, event, path_of, shutting_down

Ask = Callable[[Call], AsyncGenerator[Part, None]]
"""Has some replica answer; closing it is going away."""
Put = Callable[[Head | bytes], None]

_MOST_LOST = 3
_BUSY_PAUSE_S = 0.25
"""Between two tries to go on with an answer where the other replicas have no room."""
_SLACK_S = 5.0
"""What a replica may take beyond a request's time to say that it is up."""
_ONCE = {("POST", "/v1/files"), ("POST", "/v1/batches")}
_RETRY_AFTER = {429: "1", 503: "1"}


class Front:
    """Answers requests through replicas that may be lost."""

    def __init__(self, config: Config, ask: Ask, *, lost: tuple[type[Exception], ...]) -> None:
        """`lost` are the errors of `ask` that say that a replica is gone, and nothing about the request."""
        self._recipe, self._endpoint = config.serve, config.runtime.endpoint
        self._ask = ask
        self._lost = lost
        self._open: set[_Answer] = set()
        self.is_draining = False
        """Whether it takes no more requests; those that it has go on."""

    @property
    def num_open(self) -> int:
        """Requests whose answers have not been sent to their ends."""
        return len(self._open)

    async def handle(self, request: Request) -> Response:
        """Answer one request; whatever is wrong with it comes back in OpenAI's envelope."""
        incoming = Incoming(request.receive)
        try:
            path = path_of(request.scope)
            if path not in ALWAYS:
                self._require_room()
            elif self.is_draining and path == "/readyz":
                raise shutting_down()
            call = await self._read(Request(request.scope, incoming))
        except StatusError as error:
            await incoming.read_on()
            return _refusal(error)
        except ClientDisconnect:
            return Response(status_code=499)
        answer = _Answer(lambda put: self._run(call, put), Request(request.scope, incoming), self._open)
        try:
            head = await answer.head()
            if head is None:
                # Whoever cancels a request may have ended what it asked before it ends this.
                answer.close()
                return Response(status_code=499)
            response: Response
            if head.stream:
                response = EventStream(answer.events())
            else:
                response = Response(await answer.body(), status_code=head.status)
            response.raw_headers = list(head.headers)
            return response
        except StatusError as error:
            answer.close()
            return _refusal(error)
        except BaseException:
            answer.close()
            raise

    def _require_room(self) -> None:
        """Raises StatusError."""
        if self.is_draining:
            raise shutting_down()
        most = self._endpoint.most_open * self._endpoint.most_replicas
        if self.num_open >= most:
            raise StatusError(
                429,
                f"Expected at most {most} open requests, found that many. Send it again later.",
                kind="rate_limit_error",
                code="queue_full",
            )

    async def _read(self, request: Request) -> Call:
        """The request, whole. Raises StatusError if it is too large, ClientDisconnect."""
        path = path_of(request.scope)
        limit = self._recipe.max_file_bytes if path == "/v1/files" else self._recipe.max_body_bytes
        data = bytearray()
        async for piece in request.stream():
            data += piece
            if len(data) > limit:
                raise StatusError(413, f"Expected a body of at most {limit} bytes.", kind="invalid_request_error")
        return Call(
            method=request.method,
            path=path,
            query=bytes(request.scope.get("query_string", b"")),
            headers=[(bytes(name), bytes(value)) for name, value in request.scope["headers"]],
            body=bytes(data),
            progress=Progress(identity=secrets.token_hex(12), created=int(time.time()), seed=secrets.randbits(63)),
        )

    async def _run(self, call: Call, put: Put) -> None:
        """Have it answered, by as many replicas as it takes. Raises StatusError."""
        longest_s = self._endpoint.request_timeout_s
        began = time.monotonic()
        try:
            async with asyncio.timeout(None if longest_s is None else longest_s + _SLACK_S):
                while True:
                    call.progress.spent_s = time.monotonic() - began
                    try:
                        if await self._ask_once(call, put):
                            return
                    except StatusError as error:
                        if error.status != 429 or not call.progress.attempt:
                            raise
                    except self._lost as error:
                        call.progress.attempt += 1
                        metrics.SERVE_LOST.add()
                        told = sum(len(each.token_ids) for each in call.progress.told.values())
                        logger.warning(
                            "replica_lost request=%s told_tokens=%d: %s", call.progress.identity, told, error
                        )
                        if (call.method, call.path) in _ONCE or call.progress.attempt >= _MOST_LOST:
                            raise _given_up(call.progress.attempt) from error
                        continue
                    await asyncio.sleep(_BUSY_PAUSE_S)
        except TimeoutError as error:
            raise StatusError(
                504,
                f"Expected an answer within {longest_s:g} s, found the time up: there may be no replica. Ask again later.",
                kind="timeout_error",
                code="deadline_exceeded",
            ) from error

    async def _ask_once(self, call: Call, put: Put) -> bool:
        """Ask one replica. False if it had no room to go on with what another one had begun."""
        progress = call.progress
        async with aclosing(self._ask(call)) as parts:
            head = await anext(parts)
            assert isinstance(head, Head)
            if not head.stream:
                body = b"".join([part.data async for part in parts if not isinstance(part, Head)])
                if head.status == 429 and progress.attempt:
                    return False
                if not progress.headed:
                    put(head)
                # After the head of a stream an error can be an event alone.
                put(event(body.decode()) if progress.headed else body)
                return True
            if not progress.headed:
                put(head)
                progress.headed = True
            is_whole = False
            try:
                async for part in parts:
                    assert not isinstance(part, Head)
                    progress.release, progress.fingerprint = head.release, head.fingerprint
                    for index, told in part.told.items():
                        progress.told.setdefault(index, Told()).add(told)
                    put(part.data)
                    is_whole = part.data.endswith(DONE)
            except self._lost:
                if not is_whole:
                    raise
        return True


class _Answer:
    """An answer on its way: it is fetched at its own pace, and read at the client's."""

    def __init__(self, fetch: Callable[[Put], Awaitable[None]], request: Request, among: set[_Answer]) -> None:
        """It is `among` the others until it is closed."""
        self._arrived: asyncio.Queue[Head | bytes | StatusError | None] = asyncio.Queue()
        self._among = among
        among.add(self)
        self._task = asyncio.create_task(self._fetch(fetch))
        self._watch = asyncio.create_task(watch_client(request, lambda _: self.close()))

    async def _fetch(self, fetch: Callable[[Put], Awaitable[None]]) -> None:
        end: StatusError | None = None
        try:
            await fetch(self._arrived.put_nowait)
        except StatusError as error:
            end = error
        except Exception:
            logger.exception("failed request")
            end = StatusError(500, "The server failed; its log says why.", kind="server_error")
        finally:
            if end is not None:
                self._arrived.put_nowait(end)
            self._arrived.put_nowait(None)

    async def head(self) -> Head | None:
        """None if the client has gone. Raises StatusError."""
        first = await self._arrived.get()
        if isinstance(first, StatusError):
            raise first
        assert not isinstance(first, bytes)
        return first

    async def body(self) -> bytes:
        """All of it. Raises StatusError."""
        data = bytearray()
        while (part := await self._arrived.get()) is not None:
            if isinstance(part, StatusError):
                raise part
            assert isinstance(part, bytes)
            data += part
        self.close()
        return bytes(data)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Its events, those together that came while the client read; an error is an event as well."""
        try:
            while True:
                data, is_last = bytearray(), False
                part = await self._arrived.get()
                while True:
                    if isinstance(part, StatusError):
                        data += event(error_body(str(part), kind=part.kind, code=part.code))
                    elif part is None:
                        is_last = True
                    else:
                        assert isinstance(part, bytes)
                        data += part
                    if is_last or self._arrived.empty():
                        break
                    part = self._arrived.get_nowait()
                if data:
                    yield bytes(data)
                if is_last:
                    return
        finally:
            self.close()

    def close(self) -> None:
        """Nobody reads it any more."""
        self._among.discard(self)
        self._task.cancel()
        self._watch.cancel()


def _given_up(times: int) -> StatusError:
    message = (
        "The replica was lost before it said anything; whether it did what was asked is not known."
        if times < _MOST_LOST
        else f"{times} replicas were lost with this request; it is asked of no other."
    )
    return StatusError(502, f"{message} Ask again.", kind="server_error", code=LOST)


def _refusal(error: StatusError) -> Response:
    payload: dict[str, Any] = error_body(str(error), kind=error.kind, code=error.code, field=error.field)
    response = Response(json.dumps(payload), status_code=error.status, media_type="application/json")
    if error.status in _RETRY_AFTER:
        response.headers["Retry-After"] = _RETRY_AFTER[error.status]
    return response

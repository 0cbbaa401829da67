"""Outside: requests that another endpoint of OpenAI's form answers.

It is sent the body as it came, with its own name for the model, without `user` and `timeout`, which are ours, and with the longest
answer named. What it says is passed on as it comes. It has failed where it can't be reached, is too slow, refuses the key, or says
429 or 5xx before its first word; any other 4xx is about the request, and is passed on.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Any

import aiohttp
from starlette.requests import Request
from starlette.responses import Response

from aifactory.config.routing import OUTSIDE, Outside
from aifactory.config.runtime import expand_environment
from aifactory.observe.events import logger
from aifactory.serve.event_stream import EventStream, watch_client
from aifactory.serve.limiting import Grant
from aifactory.serve.wire import StatusError, error_body, event, json_response

_OURS = ("user", "timeout")
_PASSED_ON = range(400, 500)
_ITS_OWN = (401, 403, 404, 408, 429)
"""Statuses that tell of the endpoint, not of the request."""
_MOST_BYTES = 64_000_000
_FAILURES = (aiohttp.ClientError, TimeoutError, OSError, ValueError)


class OutsideEndpoints:
    """The endpoints elsewhere that one replica asks."""

    def __init__(self, known: Mapping[str, Outside]) -> None:
        self._known = known
        self._session: aiohttp.ClientSession | None = None

    async def answer(
        self,
        request: Request,
        name: str,
        asked: Mapping[str, Any],
        *,
        chat: bool,
        longest: int,
        wants_usage: bool,
        most_prompt_tokens: int,
        most_answer_tokens: int,
        grant: Grant,
        whole: bool,
    ) -> Response:
        """What the endpoint answers; streamed where that was asked for, and then for as long as the client reads.

        name     `outside:` and its name
        asked    the body as it came
        longest  tokens of each answer at most
        whole    a stream is read to its end first
        Raises   StatusError where it has failed before its first word.
        """
        endpoint = self._known[name.removeprefix(OUTSIDE)]
        body = {field: value for field, value in asked.items() if field not in _OURS} | {"model": endpoint.model}
        body["max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"] = longest
        streams = bool(asked.get("stream"))
        if streams:
            body["stream_options"] = {"include_usage": True}
        used = {"prompt_tokens": 0, "answer_tokens": 0}
        response: aiohttp.ClientResponse | None = None
        handed_on = False
        try:
            response = await self._post(endpoint, body, chat=chat)
            self._require_answer(name, response)
            # Where it does not say what it took, it is what it may have taken.
            used = {"prompt_tokens": most_prompt_tokens, "answer_tokens": most_answer_tokens}
            if response.status in _PASSED_ON:
                used = {"prompt_tokens": 0, "answer_tokens": 0}
                return _named(json_response(json.loads(await _read(response)), status=response.status), name)
            if not streams:
                said = json.loads(await _read(response))
                used = _used(said) or used
                return _named(json_response(said), name)
            events = self._events(request, name, response, grant, used, wants_usage=wants_usage)
            handed_on = True
            first = await anext(events, None)
            if first is None:
                raise _failed(name, "a stream of nothing")
            if whole:
                events = _after(b"".join([first, *[data async for data in events]]))
                first = b""
            return _named(EventStream(_after(first, events), source=events), name)
        except _FAILURES as error:
            raise _failed(name, f"{type(error).__name__}: {error}") from error
        finally:
            if not handed_on:
                if response is not None:
                    response.release()
                await grant.end(**used)

    async def close(self) -> None:
        """Close its connections."""
        if self._session is not None:
            await self._session.close()

    # ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _post(self, endpoint: Outside, body: Mapping[str, Any], *, chat: bool) -> aiohttp.ClientResponse:
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        key = expand_environment(endpoint.api_key)
        return await self._session.post(
            f"{endpoint.url.rstrip('/')}/{'chat/completions' if chat else 'completions'}",
            json=body,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=endpoint.timeout_s, sock_read=endpoint.timeout_s),
            allow_redirects=False,
        )

    def _require_answer(self, name: str, response: aiohttp.ClientResponse) -> None:
        status = response.status
        if status != 200 and (status in _ITS_OWN or status not in _PASSED_ON):
            raise _failed(name, f"status {status}")

    async def _events(
        self,
        request: Request,
        name: str,
        response: aiohttp.ClientResponse,
        grant: Grant,
        used: dict[str, int],
        *,
        wants_usage: bool,
    ) -> AsyncGenerator[bytes, None]:
        watch = asyncio.create_task(watch_client(request, lambda _: response.close()))
        try:
            async for line in response.content:
                if not line.startswith(b"data:"):
                    continue
                text = line[5:].strip().decode()
                with suppress(ValueError):
                    said = json.loads(text)
                    used = _used(said) or used
                    if not wants_usage and _used(said) and not said.get("choices"):
                        continue
                yield event(text)
        except _FAILURES as error:
            logger.warning("failed outside=%s: %s: %s", name, type(error).__name__, error)
            message = f"The endpoint {name} broke off; what it said so far is all there is of it. Ask again."
            yield event(error_body(message, kind="server_error", code="outside_failed"))
        finally:
            watch.cancel()
            response.close()
            await grant.end(**used)


async def _read(response: aiohttp.ClientResponse) -> bytes:
    data = bytearray()
    async for piece in response.content.iter_any():
        data += piece
        if len(data) > _MOST_BYTES:
            raise ValueError(f"an answer of more than {_MOST_BYTES} bytes")
    return bytes(data)


async def _after(first: bytes, following: AsyncGenerator[bytes, None] | None = None) -> AsyncGenerator[bytes, None]:
    if first:
        yield first
    if following is not None:
        async with aclosing(following):
            async for data in following:
                yield data


def _used(said: Any) -> dict[str, int] | None:
    usage = said.get("usage") if isinstance(said, dict) else None
    if not isinstance(usage, dict):
        return None
    names = {"prompt_tokens": "prompt_tokens", "answer_tokens": "completion_tokens"}
    found = {ours: usage.get(theirs, 0) for ours, theirs in names.items()}
    return found if all(isinstance(value, int) and value >= 0 for value in found.values()) else None


def _named(response: Response, name: str) -> Response:
    response.headers["X-Answered-By"] = name
    return response


def _failed(name: str, why: str) -> StatusError:
    logger.warning("failed outside=%s: %s", name, why)
    return StatusError(
        502,
        f"Expected the endpoint {name} to answer, found that it does not; the server's log says why. Ask again later.",
        kind="server_error",
        code="outside_failed",
    )

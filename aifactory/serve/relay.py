"""The replica's end of the way from a front: a whole request in, its answer out in parts that say what they tell."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.types import Message

from aifactory.serve.answers import Choice
from aifactory.serve.event_stream import EventStream
from aifactory.serve.gateway import Gateway
from aifactory.serve.progress import Call, Head, Part, Said, Told, scope_of


async def relay(gateway: Gateway, call: Call) -> AsyncGenerator[Part, None]:
    """The answer of a gateway: its head first. Whoever closes it is a client that has gone away."""
    body: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]
    gone = asyncio.Event()

    async def receive() -> Message:
        if body:
            return body.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    try:
        response = await gateway.handle(Request(scope_of(call), receive))
        headers = list(response.raw_headers)
        if not isinstance(response, EventStream):
            yield Head(status=response.status_code, headers=headers)
            yield Said(bytes(response.body))
            return
        question = response.question
        if question is None:  # by an endpoint elsewhere, which nobody goes on with: it comes whole
            yield Head(status=response.status_code, headers=headers, stream=True)
            yield Said(b"".join([data async for data in response.events]))
            return
        yield Head(
            status=response.status_code,
            headers=headers,
            stream=True,
            release=question.served.release.number,
            fingerprint=question.fingerprint,
        )
        news = _News(response.choices)
        async with aclosing(response.events) as events:
            async for data in events:
                yield Said(data, news.take())
    finally:
        gone.set()


class _News:
    """What has come to the choices of a stream since it was last asked."""

    def __init__(self, choices: Sequence[Choice]) -> None:
        self._choices = choices
        self._told: list[Any] = [_state(choice) for choice in choices]

    def take(self) -> dict[int, Told]:
        told = {}
        for choice, before in zip(self._choices, self._told, strict=True):
            now = _state(choice)
            if now != before:
                text, tokens, _, _ = before
                self._told[choice.index] = now
                told[choice.index] = Told(
                    text=choice.text[text:], token_ids=choice.token_ids[tokens:], opened=now[2], ended=now[3]
                )
        return told


def _state(choice: Choice) -> tuple[int, int, bool, bool]:
    return len(choice.text), len(choice.token_ids), choice.opened, choice.ended

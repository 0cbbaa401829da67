"""Event streams: answers that go out as they come, and clients that go away meanwhile."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from aifactory.serve.wire import event

if TYPE_CHECKING:
    from aifactory.serve.answers import Choice
    from aifactory.serve.questions import Question

DONE = event("[DONE]")
"""The end of a stream that is whole."""


class EventStream(Response):
    """Server-sent events. Unlike Starlette's own, it closes where they come from however it ends."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        question: Question | None = None,
        choices: Sequence[Choice] = (),
        source: AsyncGenerator[object, None] | None = None,
    ) -> None:
        """`choices` are as far as the last event tells; `source` is what the events are made of, where that has begun before they do."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["Content-Length"]
        self.events = events
        self.question = question
        self.choices = choices
        self.source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with AsyncExitStack() as stack:
            # Events that nobody began to read close nothing behind them.
            if self.source is not None:
                await stack.enter_async_context(aclosing(self.source))
            events = await stack.enter_async_context(aclosing(self.events))
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for data in events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_its_end(events: AsyncGenerator[bytes, None], ended: Callable[[], None]) -> AsyncGenerator[bytes, None]:
    """The same events; `ended` is called when there are no more, or nobody reads on."""
    try:
        async with aclosing(events):
            async for data in events:
                yield data
    finally:
        ended()


async def watch_client(request: Request, stop: Callable[[Exception | None], None]) -> None:
    """Stop the engine when the client goes away: servers say so here, and end no one's work themselves."""
    with suppress(Exception):  # a connection that can't be read is gone too
        while (await request.receive())["type"] != "http.disconnect":
            pass
    stop(ClientDisconnect())

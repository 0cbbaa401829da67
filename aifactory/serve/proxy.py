"""What Serve's proxy says of answers that nobody ends: a replica was lost, or there was none. Runs in the proxy's process.

Serve's own proxy (Ray 2.60) answers 500 in plain text where a replica was lost before it said anything, and breaks the
connection off where it had begun. A client of OpenAI's interface is told in its own terms:

    nothing was sent yet        502 in OpenAI's envelope, code `replica_lost`
    a stream of events          an event with the envelope, and a proper end; no `[DONE]`
    Serve's own 429, 503, 408   the same status in the envelope
    anything else that began    stays broken off: its length was promised

What other applications of the same cluster say stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aifactory.serve.wire import error_body, event

LOST = "replica_lost"
"""The code of the error."""
_OURS = "aifactory-"
_EVENTS = b"text/event-stream"
_KEPT = (b"retry-after", b"x-request-id")
_SERVES_OWN = {408: "timeout_error", 429: "rate_limit_error", 503: "server_error"}


def middlewares() -> list[Middleware]:
    """What Serve puts around its proxy, which is told to call this by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""
    return [Middleware(Proxied)]


class Proxied:
    """Serve's proxy as an ASGI application that ends every answer of ours that can still be ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._router = _router_of(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._is_ours(scope):
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        await self._app(scope, receive, answer.send)
        await answer.end()

    def _is_ours(self, scope: Scope) -> bool:
        # Without a router to ask there is nobody else's application to be told apart.
        found = None if self._router is None else self._router.match_route(scope["path"])
        return self._router is None or (found is not None and str(found[1].app_name).startswith(_OURS))


class _Answer:
    """One answer on its way to the client."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._head: Message | None = None
        self._said: bytearray | None = None
        """Of an error of Serve's own, what it says; None for what is passed on as it comes."""
        self._ended = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._head = message
            if message["status"] in _SERVES_OWN and _kind(message).startswith(b"text/plain"):
                self._said = bytearray()
                return
        elif message["type"] == "http.response.body":
            self._ended = not message.get("more_body", False)
            if self._said is not None:
                self._said += message.get("body", b"")
                if self._ended:
                    await self._put_into_envelope()
                return
        await self._send(message)

    async def end(self) -> None:
        """Say what is wrong, if the answer has not come to its end. To a client that has gone, nothing is sent."""
        if self._ended:
            return
        if self._head is None:
            message = (
                "The replica was lost before it said anything; whether it did what was asked is not known. Ask again."
            )
            await self._respond(502, error_body(message, kind="server_error", code=LOST))
        elif self._said is None and _kind(self._head).startswith(_EVENTS):
            message = "The replica was lost while it answered; what it said so far is all there is of it. Ask again."
            data = event(error_body(message, kind="server_error", code=LOST))
            await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def _put_into_envelope(self) -> None:
        assert self._head is not None and self._said is not None
        status = int(self._head["status"])
        said = self._said.decode(errors="replace")
        headers = [(name, value) for name, value in self._head["headers"] if name.lower() in _KEPT]
        await self._respond(status, error_body(said, kind=_SERVES_OWN[status]), headers)

    async def _respond(
        self, status: int, payload: Mapping[str, Any], headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        body = json.dumps(payload).encode()
        own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def _kind(head: Message) -> bytes:
    """The content type."""
    return next((bytes(value) for name, value in head.get("headers", ()) if name.lower() == b"content-type"), b"")


def _router_of(app: Any) -> Any:
    """Who knows which application a path belongs to: Serve's, below what else is put around its proxy."""
    while app is not None and not hasattr(app, "proxy_router"):
        # Starlette's word for what a middleware is around, and that of Serve's own.
        app = getattr(app, "app", None) or getattr(app, "_app", None)
    return None if app is None else app.proxy_router

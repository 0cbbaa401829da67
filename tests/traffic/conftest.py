"""A small HTTP server that answers as a served factory does, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from aiohttp import web

from aifactory.observe.progress import Progress

Reply = Callable[[dict[str, Any]], Awaitable[web.StreamResponse | None]]


class Server:
    """Answers every question, and keeps what it was told. `reply` may answer in its place, or raise."""

    def __init__(self) -> None:
        self.model = "small-r1"
        self.asked: list[dict[str, Any]] = []
        self.feedback: dict[str, dict[str, Any]] = {}
        self.most_at_once = 0
        self.tokens: set[str] = set()
        """What came as Authorization."""
        self.reply: Reply | None = None
        self.on_feedback: Callable[[dict[str, Any]], None] = lambda body: None
        self.url = ""
        self._at_once = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        """Go away: who asks now finds nobody, who waits is cut off."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ended.set)
            self._thread.join(10)

    def stop_soon(self) -> None:
        """As `stop`, from within an answer."""
        self._ended.set()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._ended = asyncio.Event()
        app = web.Application()
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/feedback", self._feedback)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        await self._ended.wait()
        await runner.cleanup()

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.tokens.add(request.headers.get("Authorization", ""))
        self.asked.append(body)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            special = None if self.reply is None else await self.reply(body)
        finally:
            self._at_once -= 1
        return special or web.json_response({"id": f"cmpl-{len(self.asked)}", "model": self.model})

    async def _feedback(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.tokens.add(request.headers.get("Authorization", ""))
        assert body["idempotency_key"] not in self.feedback
        self.feedback[body["idempotency_key"]] = body
        self.on_feedback(body)
        return web.json_response({"counted": True})


class Shown(Progress):
    """Where the users say how far they are."""

    def __init__(self) -> None:
        self.updates: list[float] = []

    def update(self, done: float, **figures: float) -> None:
        self.updates.append(done)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    made.start()
    yield made
    made.stop()


@pytest.fixture
def shown() -> Shown:
    return Shown()

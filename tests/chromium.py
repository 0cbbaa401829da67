"""A browser for tests: Debian's Chromium without a window, which is told what to do over its DevTools protocol.

    from chromium import chromium  # in a conftest.py

`chromium` is where the browser lies. Where there is none such tests are skipped, or fail if
AIFACTORY_REQUIRE_CHROMIUM=1.

Source   Chrome DevTools Protocol, domains Emulation, Input, Log, Network, Page, Runtime.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest

INSTALL = "apt-get update && apt-get install -y --no-install-recommends chromium"
_FLAGS = (
    "--headless",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
)
Result = TypeVar("Result")
_HEARD = {"Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"}


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's program."""
    found = shutil.which("chromium")
    if found is None:
        reason = f"expected the browser chromium on PATH, found none; install Debian's package: {INSTALL}"
        if os.environ.get("AIFACTORY_REQUIRE_CHROMIUM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How a page is looked at."""

    width: int
    """CSS pixels."""
    scheme: str = "light"
    """light or dark: what the reader prefers."""


@dataclass(slots=True, kw_only=True)
class Seen:
    """What a page did and was."""

    values: list[Any] = field(default_factory=list)
    """What the expression gave, by view."""
    complaints: list[Any] = field(default_factory=list)
    """Whatever the console was told."""
    requests: list[str] = field(default_factory=list)
    """What was asked for, by URL, beside data in the page itself."""


def look(program: str, url: str, views: Sequence[View], expression: str) -> Seen:
    """Open a page in each view and work out a JavaScript expression in it."""

    async def see(tab: Tab) -> Seen:
        seen = Seen()
        for view in views:
            await tab.go(url, view)
            seen.values.append(await tab.value(expression))
            seen.complaints += tab.complaints
            seen.requests += tab.requests
        return seen

    return browse(program, see, timeout_s=60)


def browse(program: str, what: Callable[[Tab], Awaitable[Result]], *, timeout_s: float) -> Result:
    """Start the browser, do something in a tab of it, and end it."""

    async def run() -> Result:
        async with _tab(program) as tab:
            return await what(tab)

    return asyncio.run(asyncio.wait_for(run(), timeout=timeout_s))


@asynccontextmanager
async def _tab(program: str) -> AsyncIterator[Tab]:
    folder = tempfile.mkdtemp(prefix="aifactory-chromium-")
    flags = [*_FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else []), f"--user-data-dir={folder}"]
    process = await asyncio.create_subprocess_exec(
        program,
        *flags,
        "about:blank",
        stdout=subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        async with aiohttp.ClientSession() as session:
            targets = f"http://{await _address(process)}/json"
            async with session.get(targets) as answer:
                page = next(target for target in await answer.json() if target["type"] == "page")
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = Tab(socket)
                for domain in ("Log", "Network", "Page", "Runtime"):
                    await tab.call(f"{domain}.enable")
                yield tab
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        shutil.rmtree(Path(folder), ignore_errors=True)


async def _address(process: asyncio.subprocess.Process) -> str:
    """Host and port, which the browser writes to its standard error."""
    assert process.stderr is not None
    said = ""
    async for line in process.stderr:
        said += line.decode(errors="replace")
        if found := re.search(r"DevTools listening on ws://([^/]+)/", said):
            return found[1]
    raise AssertionError(f"expected the browser to listen, found: {said[-2000:]}")


class Tab:
    """A connection to a page: calls, and what happened meanwhile."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self.events: list[dict[str, Any]] = []
        """Since the page was opened."""

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while (message := await self._socket.receive_json()).get("id") != self._number:
            self.events.append(message)
        assert "result" in message, (method, message)
        result: dict[str, Any] = message["result"]
        return result

    async def wait_for(self, method: str) -> None:
        while all(event["method"] != method for event in self.events):
            self.events.append(await self._socket.receive_json())

    async def go(self, url: str, view: View) -> None:
        """Open a page as the view has it."""
        self.events.clear()
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": view.scheme}])
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=view.width,
            height=900,
            deviceScaleFactor=1,
            mobile=view.width < 500,
        )
        await self.call("Page.navigate", url=url)
        await self.wait_for("Page.loadEventFired")

    async def value(self, expression: str, *, is_promise: bool = False) -> Any:
        """What a JavaScript expression gives."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=is_promise)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, expression: str, *, timeout_s: float) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + timeout_s
        while not await self.value(expression):
            assert time.monotonic() < deadline, f"expected {expression} within {timeout_s:g} s"
            await asyncio.sleep(0.1)

    async def press(self, key: str) -> None:
        """A key of the keyboard, such as Tab or Enter."""
        codes = {"Tab": 9, "Enter": 13}
        named = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **named, **text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    async def picture(self, file: Path) -> None:
        """The whole page as a PNG file."""
        shot = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    @property
    def complaints(self) -> list[Any]:
        """Whatever the console was told since the page was opened."""
        return [event for event in self.events if event["method"] in _HEARD]

    @property
    def requests(self) -> list[str]:
        """What was asked for since, by URL, beside data in the page itself."""
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [each for each in asked if not each.startswith("data:")]

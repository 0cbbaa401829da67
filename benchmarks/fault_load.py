"""FaultLoad: requests at a constant rate, whatever becomes of them (open loop), and what each came to.

Every other one is streamed, every other pair is drawn by a seed; the answers of each release are known before, so that one that
is not what it must be is found. A request is `ok`, `differs`, or failed as its kind says:
    status N          an HTTP error in OpenAI's envelope; `status N, no envelope` where it was not in it
    event CODE        a stream that ended with an error event, by its code
    broken            a connection that broke off, or a stream that ended without an end
    refused           nobody listened
    timeout           nothing for a minute
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import torch

from aifactory.engine.engine import TorchEngine
from aifactory.engine.load import load_model
from aifactory.engine.protocol import Delta, GenerationRequest, Sampling
from aifactory.text.documents import prompt_tokens
from aifactory.text.tokenizer import load_tokenizer

PROMPTS = ("the quick ", "a bird in ", "lazy dogs and ", "two bushes ")
MAX_TOKENS = 64
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Seen:
    """One request."""

    sent: float
    """Seconds since the load began."""
    seconds: float
    """From sending to its end."""
    kind: str
    streamed: bool


@dataclass(slots=True)
class FaultLoad:
    """Runs in a thread of its own from `start` to `stop`."""

    url: str
    rate: float
    """Requests a second."""
    expected: dict[str, Mapping[tuple[int, bool], str]]
    """By the name of a release, the text by prompt and whether it is drawn."""
    seen: list[Seen] = field(default_factory=list)
    began: float = 0.0
    leaving: int = 0
    """Clients that went away in the middle, as they were asked to."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _leave: int = 0
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self.began = time.monotonic()
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(),), daemon=True)
        self._thread.start()

    def stop(self) -> list[Seen]:
        """Send no more, wait for what is open; all that was seen."""
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        return self.seen

    def now(self) -> float:
        """Seconds since the load began."""
        return time.monotonic() - self.began

    def leave(self, count: int) -> None:
        """Send so many more streams at once, whose clients go away after their first text."""
        self._leave = count

    async def _run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as client:
            open_requests: set[asyncio.Task[None]] = set()
            number = 0
            while not self._stop.is_set():
                await asyncio.sleep(max(0.0, number / self.rate - self.now()))
                open_requests.add(asyncio.create_task(self._ask(client, number)))
                number += 1
                leave, self._leave = self._leave, 0
                for each in range(leave):
                    open_requests.add(asyncio.create_task(self._go_away(client, each)))
                open_requests = {task for task in open_requests if not task.done()}
            await asyncio.gather(*open_requests)

    async def _ask(self, client: aiohttp.ClientSession, number: int) -> None:
        prompt, streamed, drawn = number // 4 % len(PROMPTS), number % 2 == 0, number % 4 < 2
        sent, began = self.now(), time.monotonic()
        try:
            kind = await self._kind_of(client, prompt, streamed=streamed, drawn=drawn)
        except aiohttp.ClientConnectorError:
            kind = "refused"
        except TimeoutError:
            kind = "timeout"
        except (aiohttp.ClientError, OSError):
            kind = "broken"
        self.seen.append(Seen(sent, time.monotonic() - began, kind, streamed))

    async def _kind_of(self, client: aiohttp.ClientSession, prompt: int, *, streamed: bool, drawn: bool) -> str:
        async with client.post(f"{self.url}/v1/completions", json=body_of(prompt, streamed, drawn)) as response:
            if response.status != 200:
                said = await response.text()
                try:
                    json.loads(said)["error"]["message"]
                except (ValueError, LookupError, TypeError):
                    return f"status {response.status}, no envelope"
                return f"status {response.status}"
            if not streamed:
                answer = await response.json()
                return self._judge(answer["model"], prompt, drawn, answer["choices"][0]["text"])
            text, model, ended = "", "", False
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    ended = True
                    continue
                chunk: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
                if "error" in chunk:
                    return f"event {chunk['error']['code']}"
                model = chunk["model"]
                text += chunk["choices"][0]["text"]
            return self._judge(model, prompt, drawn, text) if ended else "broken"

    def _judge(self, model: str, prompt: int, drawn: bool, text: str) -> str:
        known = self.expected.get(model)
        if known is None:
            return f"answered by {model}"
        return "ok" if known[prompt, drawn] == text else "differs"

    async def _go_away(self, client: aiohttp.ClientSession, number: int) -> None:
        body = body_of(number % len(PROMPTS), True, False)
        try:
            async with client.post(f"{self.url}/v1/completions", json=body) as response:
                await response.content.readline()
        except (aiohttp.ClientError, OSError, TimeoutError):
            return
        self.leaving += 1


def body_of(prompt: int, streamed: bool, drawn: bool) -> dict[str, Any]:
    """A request."""
    body = {"model": "faults", "prompt": PROMPTS[prompt], "max_tokens": MAX_TOKENS, "stream": streamed}
    return body | ({"temperature": 1.0, "seed": prompt} if drawn else {"temperature": 0})


def texts_of(folder: Path) -> dict[tuple[int, bool], str]:
    """What a model answers, by an engine in this process."""
    model, tokenizer = load_model(folder, device="cpu", dtype=torch.float32), load_tokenizer(folder)
    engine = TorchEngine(model, tokenizer, num_slots=8, num_threads=1)
    texts: dict[tuple[int, bool], str] = {}
    ended = threading.Semaphore(0)
    try:
        for prompt, words in enumerate(PROMPTS):
            for drawn in (False, True):
                texts[prompt, drawn] = ""

                def on_delta(delta: Delta, key: tuple[int, bool] = (prompt, drawn)) -> None:
                    texts[key] += delta.text
                    if delta.finish_reason is not None:
                        ended.release()

                sampling = Sampling(max_tokens=MAX_TOKENS, temperature=float(drawn), seed=prompt)
                ids = tuple(prompt_tokens(tokenizer, words))
                engine.submit(GenerationRequest(id=f"{prompt}{drawn}", prompt_ids=ids, sampling=sampling), on_delta)
        for _ in texts:
            ended.acquire()
    finally:
        engine.close(0.0)
    return texts

"""FaultLoad: requests at a constant rate, whatever becomes of them (an open loop), and what each came to.

Every other one is streamed, every other pair is drawn by a seed. Each has a connection of its own, by the client of `http_load`.
A request that got no whole answer has failed, as its kind says:
    502 CODE          an HTTP error in OpenAI's envelope, with its code where there is one
    502 no envelope   one that is not in it
    event CODE        a stream that ended with an error event
    cut               a connection that broke off, or a stream without an end
    refused           nobody listened
    timeout           no whole answer within a minute
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from http_load import Connection, Target

from aifactory.engine.engine import TorchEngine
from aifactory.engine.load import load_model
from aifactory.engine.protocol import Delta, GenerationRequest, Sampling
from aifactory.text.documents import prompt_tokens
from aifactory.text.tokenizer import load_tokenizer

MODEL = "faults"
PROMPTS = ("the quick ", "a bird in ", "lazy dogs and ", "two bushes ")
MAX_TOKENS = 96
_TIMEOUT_S = 60.0
_LONGEST_STAY_S = 1.0
"""Of a client that goes away before its answer begins, seconds."""

Texts = Mapping[tuple[int, bool], str]
"""What a release answers, by prompt and whether it is drawn."""


@dataclass(slots=True)
class Seen:
    """One request."""

    prompt: int
    drawn: bool
    streamed: bool
    sent: float
    """Seconds since the load began."""
    ended: float = 0.0
    failed: str | None = None
    """Its kind; None for a whole answer."""
    model: str = ""
    """Who says that it answers; empty where nobody did."""
    text: str = ""
    """What came of the answer."""

    def is_as(self, known: Mapping[str, Texts]) -> bool:
        """Whether what came is what the release that is named in it answers, or the beginning of that where it failed."""
        if not self.model:
            return not self.text
        wanted = known.get(self.model, {}).get((self.prompt, self.drawn))
        if wanted is None:
            return False
        return wanted.startswith(self.text) if self.failed else self.text == wanted


@dataclass(slots=True)
class FaultLoad:
    """Runs in a thread of its own from `start` to `stop`."""

    url: str
    rate: float
    """Requests a second."""
    seen: list[Seen] = field(default_factory=list)
    """Those that have ended."""
    num_left: int = 0
    """Clients that went away, as they were asked to."""
    _began: float = 0.0
    _open: int = 0
    _more: int = 0
    _leave: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Send, until `stop`."""
        self._began = time.monotonic()
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
        return time.monotonic() - self._began

    @property
    def num_open(self) -> int:
        """Requests under way, those that are going away apart."""
        return self._open

    def send_more(self, count: int) -> None:
        """Send so many requests more at once."""
        self._more = count

    def leave(self, count: int) -> None:
        """Send so many more streams at once, whose clients go away: half of them when their first text has come, the
        others at any moment of a second."""
        self._leave = count

    async def _run(self) -> None:
        target = Target(url=self.url, model=MODEL)
        tasks: set[asyncio.Task[None]] = set()
        number = count = 0
        while not self._stop.is_set():
            await asyncio.sleep(max(0.0, number / self.rate - self.now()))
            more, self._more = 1 + self._more, 0
            tasks |= {asyncio.create_task(self._ask(target, count + each)) for each in range(more)}
            count += more
            number += 1
            leave, self._leave = self._leave, 0
            tasks |= {asyncio.create_task(self._go_away(target, each)) for each in range(leave)}
            tasks = {task for task in tasks if not task.done()}
        await asyncio.gather(*tasks)

    async def _ask(self, target: Target, number: int) -> None:
        one = Seen(number // 4 % len(PROMPTS), number % 4 < 2, number % 2 == 0, self.now())
        self._open += 1
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                one.failed = await _outcome(target, one)
        except TimeoutError:
            one.failed = "timeout"
        except ConnectionRefusedError:
            one.failed = "refused"
        except (OSError, EOFError, ValueError):
            one.failed = "cut"
        self._open -= 1
        one.ended = self.now()
        self.seen.append(one)

    async def _go_away(self, target: Target, number: int) -> None:
        request = request_of(target, number % len(PROMPTS), streamed=True, drawn=False)
        connection = await Connection.open(target)
        try:
            if number % 2:
                async for _ in connection.events(request):
                    break
            else:
                async with asyncio.timeout(random.Random(number).uniform(0, _LONGEST_STAY_S)):
                    async for _ in connection.events(request):
                        pass
        except (TimeoutError, RuntimeError, OSError, EOFError, ValueError):
            pass
        finally:
            connection.close()
        self.num_left += 1


async def _outcome(target: Target, one: Seen) -> str | None:
    """What a request came to; what came of its answer is written into it."""
    connection = await Connection.open(target)
    try:
        status, parts = await connection.send(request_of(target, one.prompt, one.streamed, one.drawn))
        if status != 200:
            return f"{status} {_code(b''.join([part async for part in parts]))}".strip()
        if not one.streamed:
            answer = json.loads(b"".join([part async for part in parts]))
            one.model, one.text = answer["model"], answer["choices"][0]["text"]
            return None
        async for data in connection.events_of(parts):
            if data == b"[DONE]":
                return None
            event: dict[str, Any] = json.loads(data)
            if "error" in event:
                return f"event {_code(data)}".strip()
            one.model = event["model"]
            one.text += "".join(choice["text"] for choice in event["choices"])
        return "cut"
    finally:
        connection.close()


def _code(body: bytes) -> str:
    """The code of an error in OpenAI's envelope."""
    try:
        error = json.loads(body)["error"]
        return str(error["code"] or "") if error["message"] and error["type"] else "no envelope"
    except (ValueError, LookupError, TypeError):
        return "no envelope"


def request_of(target: Target, prompt: int, streamed: bool, drawn: bool) -> bytes:
    """The bytes of a request."""
    body = {"model": MODEL, "prompt": PROMPTS[prompt], "max_tokens": MAX_TOKENS, "stream": streamed}
    body |= {"temperature": 1.0, "seed": prompt} if drawn else {"temperature": 0}
    return target.request("POST", "/v1/completions", json.dumps(body).encode())


def texts_of(folder: Path) -> Texts:
    """What a model answers, by an engine in this process that nobody disturbs, one request after the other."""
    model, tokenizer = load_model(folder, device="cpu", dtype=torch.float32), load_tokenizer(folder)
    engine = TorchEngine(model, tokenizer, num_slots=1, num_threads=1)
    texts: dict[tuple[int, bool], str] = {}
    try:
        for prompt, words in enumerate(PROMPTS):
            for drawn in (False, True):
                sampling = Sampling(max_tokens=MAX_TOKENS, temperature=float(drawn), seed=prompt)
                ids = tuple(prompt_tokens(tokenizer, words))
                texts[prompt, drawn] = _text(engine, GenerationRequest(id="one", prompt_ids=ids, sampling=sampling))
    finally:
        engine.close(0.0)
    return texts


def _text(engine: TorchEngine, request: GenerationRequest) -> str:
    pieces: list[str] = []
    ended = threading.Event()

    def on_delta(delta: Delta) -> None:
        pieces.append(delta.text)
        if delta.finish_reason is not None:
            ended.set()

    engine.submit(request, on_delta)
    ended.wait()
    return "".join(pieces)

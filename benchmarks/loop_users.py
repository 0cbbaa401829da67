"""Simulated users of the loop's benchmark, in a process of their own: `loop_users.py URL MODEL QUESTIONS LOG`.

They ask over HTTP at a constant rate, however long an answer takes, and correct some of the answers that are wrong; some of
their corrections are wrong too. QUESTIONS is a file of JSON lines (`prompt`, `intent`); LOG gets a line for each request, with
the idempotency key of the feedback once the server has acknowledged it. Feedback that was not acknowledged is sent again.
A line of JSON on standard input is the `Phase` that holds from then on; the end of the input is the end.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

USERS = 200
_ANSWER_TOKENS = 16
_TIMEOUT_S = 30.0
_SEND_AGAIN_S = 1.0
_MOST_OPEN = 64
"""Requests under way at once: those that would come on top of them while nobody answers are not sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """How users behave for a while."""

    name: str
    per_s: float
    """Questions a second."""
    intents: Sequence[str]
    """What they ask about, each as often as the others."""
    corrects: float
    """Share of the wrong answers that they correct."""
    mistakes: float
    """Share of their corrections that name another intent than the right one."""
    are_liars: bool = False
    """They correct right answers too, and all that they say is wrong."""


class Users:
    """Who asks what, and what they say of the answer; by a seed."""

    def __init__(self, questions: Sequence[dict[str, str]], *, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._of: dict[str, list[str]] = {}
        for question in questions:
            self._of.setdefault(question["intent"], []).append(question["prompt"])
        self._left: dict[str, list[str]] = {intent: [] for intent in self._of}
        self._names = sorted(self._of)

    def question(self, phase: Phase) -> tuple[str, str]:
        """A prompt and its intent. What was asked comes again only when all of its intent was asked."""
        intent = self._random.choice(phase.intents)
        left = self._left[intent]
        if not left:
            left += self._random.sample(self._of[intent], len(self._of[intent]))
        return left.pop(), intent

    def user(self) -> str:
        """Who asks."""
        return f"user-{self._random.randrange(USERS)}"

    def correction(self, phase: Phase, intent: str, answer: str) -> str | None:
        """What they say that the answer should have been; None where they say nothing."""
        if (answer == intent and not phase.are_liars) or self._random.random() >= phase.corrects:
            return None
        if phase.are_liars or self._random.random() < phase.mistakes:
            return self._random.choice([name for name in self._names if name not in (intent, answer)])
        return intent


async def _ask(
    session: aiohttp.ClientSession, url: str, model: str, users: Users, phase: Phase, key: str
) -> dict[str, Any]:
    prompt, intent = users.question(phase)
    user = users.user()
    line: dict[str, Any] = {"at": time.time(), "phase": phase.name, "intent": intent}
    body = {"model": model, "prompt": prompt, "max_tokens": _ANSWER_TOKENS, "temperature": 0, "user": user}
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            found = await response.json(content_type=None)
            if response.status != 200:
                return line | {"failed": f"{response.status} {json.dumps(found)[:200]}"}
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        return line | {"failed": f"{type(error).__name__}: {error}"[:200]}
    answer = found["choices"][0]["text"].strip()
    line |= {"release": found["model"], "answer": answer, "seconds": time.time() - line["at"]}
    correction = users.correction(phase, intent, answer)
    if correction is None:
        return line
    told = {"completion": found["id"], "correction": correction, "user": user, "idempotency_key": key}
    while True:
        try:
            async with session.post(f"{url}/v1/feedback", json=told) as response:
                if response.status == 200:
                    return line | {"said": correction, "key": key}
                if response.status < 500 and response.status != 429:
                    return line | {"failed": f"feedback: {response.status} {await response.text()}"[:200]}
        except (aiohttp.ClientError, OSError, TimeoutError):
            pass
        await asyncio.sleep(_SEND_AGAIN_S)


async def _run(url: str, model: str, users: Users, log: Path, phases: list[Phase], ended: threading.Event) -> None:
    pending: set[asyncio.Task[None]] = set()
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    with log.open("a", encoding="utf-8") as file:

        async def ask(phase: Phase, key: str) -> None:
            line = await _ask(session, url, model, users, phase, key)
            file.write(json.dumps(line) + "\n")
            file.flush()

        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            # Whoever takes the place of users that were killed says things of their own.
            number, due, first = 0, time.monotonic(), time.time_ns()
            while not ended.is_set():
                if phases and len(pending) < _MOST_OPEN:
                    task = asyncio.create_task(ask(phases[-1], f"said-{first}-{number}"))
                    pending.add(task)
                    task.add_done_callback(pending.discard)
                    number += 1
                due = max(due + 1 / (phases[-1].per_s if phases else 10.0), time.monotonic() - 1)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            if pending:
                await asyncio.wait(pending, timeout=_TIMEOUT_S)


def main(url: str, model: str, questions: str, log: str) -> None:
    asked = [json.loads(line) for line in Path(questions).read_text(encoding="utf-8").splitlines()]
    phases: list[Phase] = []
    ended = threading.Event()

    def listen() -> None:
        phases.extend(Phase(**json.loads(line)) for line in sys.stdin)  # one by one, as they come
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    asyncio.run(_run(url, model, Users(asked), Path(log), phases, ended))


if __name__ == "__main__":
    main(*sys.argv[1:])

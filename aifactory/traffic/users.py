"""Simulated users: they ask a served model about texts that they know, and correct its answers.

Every file of a source is one user, who asks the tasks that are cut from it. A correction carries an idempotency key made
of its number, so users that are killed and start again are counted once. They speak HTTP as anybody does.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import aiohttp

from aifactory.config import Evaluate, Traffic
from aifactory.errors import AIFactoryError
from aifactory.observe.progress import Progress
from aifactory.records.identity import hash_parts
from aifactory.text.tasks import cut_tasks

_TIMEOUT_S = 120.0
# Also what is no answer: a body that is no JSON, or JSON without what an answer has.
_FAILURES = (aiohttp.ClientError, OSError, TimeoutError, AIFactoryError, ValueError, KeyError, TypeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One question, what should be answered, and who asks."""

    key: str
    user: str
    prompt: str
    correction: str


@dataclass(slots=True)
class Seen:
    """What users saw."""

    answered: Counter[str] = field(default_factory=Counter)
    """Answers by the release that gave them."""
    failed: list[str] = field(default_factory=list)
    """What went wrong, a line each."""
    acknowledged: list[str] = field(default_factory=list)
    """Idempotency keys of the feedback that the server said it has."""


def questions(texts: Sequence[tuple[str, str]], traffic: Traffic, evaluate: Evaluate, *, factory: str) -> list[Asked]:
    """The questions of all users, in an order that depends on the texts alone.

    `texts` are pairs of a user and the text that this user knows.
    """
    tasks = [
        (user, task)
        for user, text in texts
        for task in cut_tasks(
            text, prompt_bytes=evaluate.prompt_bytes, answer_bytes=evaluate.answer_bytes, max_tasks=10**9
        )
    ]
    random.Random(0).shuffle(tasks)
    tasks = tasks[: traffic.requests]
    answers = [task.answer for _, task in tasks]
    if traffic.shuffle_corrections:
        random.Random(1).shuffle(answers)
    return [
        # What is asked is in the key: other questions are never taken for these.
        Asked(
            key=f"{factory}-traffic-{i}-{hash_parts(user, task.prompt, answer)[:16]}",
            user=user,
            prompt=task.prompt,
            correction=answer,
        )
        for i, ((user, task), answer) in enumerate(zip(tasks, answers, strict=True))
    ]


def ask_and_correct(
    url: str,
    model: str,
    asked: Sequence[Asked],
    traffic: Traffic,
    *,
    done: Collection[str],
    shown: Progress,
    token: str | None = None,
) -> Seen:
    """Ask every question whose feedback is not `done` yet and correct each answer; `concurrency` at once, by the API key
    `token`."""
    seen = Seen()

    async def run() -> None:
        waiting = iter([question for question in asked if question.key not in done])
        async with _session(token) as session:

            async def user() -> None:
                for question in waiting:
                    await _ask_and_correct(session, url, model, question, traffic, seen)
                    shown.update(len(done) + len(seen.acknowledged), failed=len(seen.failed))

            await asyncio.gather(*(user() for _ in range(traffic.concurrency)))

    asyncio.run(run())
    return seen


@contextmanager
def steady_requests(
    url: str, model: str, asked: Sequence[Asked], traffic: Traffic, *, token: str | None = None
) -> Iterator[Seen]:
    """Ask at a constant rate, without feedback, for as long as the block runs."""
    seen = Seen()
    ended = asyncio.Event()
    loop = asyncio.new_event_loop()

    async def run() -> None:
        pending: set[asyncio.Task[None]] = set()
        number = 0
        start = loop.time()
        async with _session(token) as session:
            while not ended.is_set():
                question = asked[number % len(asked)]
                # Open loop: a slow answer does not hold the next question up.
                task = asyncio.create_task(_count(session, url, model, question, traffic, number, seen))
                pending.add(task)
                task.add_done_callback(pending.discard)
                number += 1
                with suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), start + number / traffic.steady_per_s - loop.time())
            if pending:
                await asyncio.wait(pending)

    def ask() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(run())

    thread = threading.Thread(target=ask, name="steady-requests", daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        with suppress(RuntimeError):  # it has ended by itself
            loop.call_soon_threadsafe(ended.set)
        thread.join()


def _session(token: str | None) -> aiohttp.ClientSession:
    # No limit of the client's own: how many ask at once is the users' matter.
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S),
        connector=aiohttp.TCPConnector(limit=0),
        headers={} if token is None else {"Authorization": f"Bearer {token}"},
    )


async def _ask_and_correct(
    session: aiohttp.ClientSession, url: str, model: str, question: Asked, traffic: Traffic, seen: Seen
) -> None:
    try:
        completion = await _ask(session, url, model, question, traffic, seed=0)
        release = completion["model"]
        body = {
            "completion": completion["id"],
            "correction": question.correction,
            "user": question.user,
            "idempotency_key": question.key,
        }
        async with session.post(f"{url}/v1/feedback", json=body) as response:
            if response.status != 200:
                raise AIFactoryError(f"feedback: {response.status} {await response.text()}")
    except _FAILURES as error:
        seen.failed.append(f"{question.key}: {type(error).__name__}: {error}")
        return
    seen.answered[release] += 1
    seen.acknowledged.append(question.key)


async def _count(
    session: aiohttp.ClientSession, url: str, model: str, question: Asked, traffic: Traffic, number: int, seen: Seen
) -> None:
    try:
        completion = await _ask(session, url, model, question, traffic, seed=number)
        release = completion["model"]
    except _FAILURES as error:
        seen.failed.append(f"steady {number}: {type(error).__name__}: {error}")
        return
    seen.answered[release] += 1


async def _ask(
    session: aiohttp.ClientSession, url: str, model: str, question: Asked, traffic: Traffic, *, seed: int
) -> dict[str, str]:
    body = {
        "model": model,
        "prompt": question.prompt,
        "max_tokens": traffic.max_tokens,
        "temperature": 0.7,
        "seed": seed,
        "user": question.user,
    }
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise AIFactoryError(f"answer: {response.status} {await response.text()}")
        return dict(await response.json())

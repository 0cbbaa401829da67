"""Laws under hostile requests, against the real gateway and a real engine: whatever comes, nothing fails, hangs or leaks, and
who asks beside it gets the same answers.

The seed is printed. AIFACTORY_FUZZ_SEED and AIFACTORY_FUZZ_REQUESTS set seed and number (`make test-fuzz`); an attack that found
something is told by seed and number, and `Attacks(seed).make(number)` makes it again.
"""

from __future__ import annotations

import asyncio
import collections
import ctypes
import gc
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx
import psutil
import pytest
from chat_templates import RESPONSES, TEMPLATE
from hostile import Attack, Attacks, send, status_of
from postgres import postgres_server, postgres_url  # noqa: F401

from aifactory.serve.releases import Releases
from aifactory.text.tokenizer import TextTokenizer

WITNESS = {"authorization": "Bearer witness"}
ASKED = [
    ("/v1/completions", {"prompt": "the quick ", "max_tokens": 24, "temperature": 0, "logprobs": 2, "echo": True}),
    ("/v1/completions", {"prompt": ["the lazy ", "a bird "], "max_tokens": 16, "seed": 11, "n": 2, "logprobs": 0}),
    ("/v1/completions", {"prompt": "fox", "max_tokens": 30, "seed": 5, "top_p": 0.9, "stream": True}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a bird"}], "max_tokens": 16, "seed": 3}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "dog"}], "temperature": 0, "stream": True}),
    ("/v1/embeddings", {"input": ["the hand", "the bush"], "encoding_format": "base64"}),
]
"""What the other client asks all the while, greedily and by seeds."""
STEADY = 10_000
"""From so many requests on the memory of the process says something."""
MOST_GROWTH_BYTES = 48 * 2**20
"""What the process may grow by after its first fifth: caches that have a bound fill up until then."""


@dataclass
class Findings:
    """What an attack has come to."""

    statuses: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    witnessed: int = 0
    memory: list[int] = field(default_factory=list)


class Errors(logging.Handler):
    """What was logged as an error, whoever logged it."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(logging.Formatter().format(record)[-3_000:])


@pytest.fixture
def errors(attacked) -> Iterator[Errors]:
    """What is logged as an error from the start of the gateway on, which sets up its loggers itself."""
    handler = Errors()
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in ("aifactory", "uvicorn.error", "asyncio"))]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.fixture
def attacked(tmp_path, make_small, answer_on, load, request) -> Iterator[Callable]:
    """Starts the gateway over a database, on an engine whose tokenizer has a chat template and reads calls."""
    state_url = getattr(request, "param", None)
    if state_url is not None:
        state_url = request.getfixturevalue(state_url)

    def with_tools(folder):
        engine, plain = load(folder)
        return engine, TextTokenizer(plain.tokenizer_json, chat_template=TEMPLATE, response_template=RESPONSES)

    factory = make_small(tmp_path, state_url=state_url, slots=8, max_queued=64)
    factory.promote(factory.publish(1))
    releases = Releases(factory.books, with_tools)
    releases.load_first()
    with answer_on(factory, releases) as endpoint:
        yield endpoint


def ask(client: httpx.Client, path: str, body: dict) -> str:
    """An answer, but for what is its own: its id and its time; of a stream the text of it all."""
    answer = client.post(path, json={"model": "alpha", **body})
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        return re.sub(r'"id": "[a-z]+-[0-9a-f]+"|"created": \d+', "", answer.text)
    chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    texts = [choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices]
    return "".join(texts) + str(choices[-1]["finish_reason"])


def judge(attack: Attack, answer: bytes) -> str | None:
    """What is wrong with how a request was answered."""
    status = status_of(answer)
    if status is None:
        # Who goes away before the end, or speaks no HTTP, may get no answer; an answer that has begun is no answer yet.
        return "no answer" if attack.is_whole and attack.going == "stays" else None
    # Whoever asks for too little time is told so. Nothing here takes as long as the endpoint itself allows.
    if status >= 500 and (status != 504 or b"within 600 s" in answer):
        return f"status {status}"
    if b'"type": "server_error"' in answer:
        return "a stream that the server broke off"
    if attack.going == "stays" and status == 200 and b"event-stream" in answer and b"data: [DONE]" not in answer:
        ended = b"deadline_exceeded" in answer or b"invalid_request_error" in answer
        return None if ended else "a stream without its end"
    return None


async def attack_with(
    endpoint, attacks: Attacks, numbers: range, findings: Findings, *, clients: int = 8, samples: int = 0
) -> None:
    host, port = endpoint.url.removeprefix("http://").split(":")
    left = iter(numbers)

    async def client() -> None:
        for number in left:
            attack = attacks.make(number)
            try:
                answer = await send(host, int(port), attack)
                wrong = judge(attack, answer)
            except (OSError, TimeoutError) as error:  # refused, or without an end
                answer, wrong = b"", f"{type(error).__name__}: {error}"
            findings.statuses[str(status_of(answer) or attack.going)] += 1
            if wrong is not None:
                findings.wrong.append(
                    f"{wrong}: seed {attacks.seed} number {number} {attack.kind}, client {attack.going}\n"
                    f"{b''.join(attack.parts)[:1_500]!r}\n{answer[-600:]!r}"
                )
            if samples and (number - numbers.start) % (len(numbers) // samples) == 0:
                findings.memory.append(resident_bytes())

    await asyncio.gather(*(client() for _ in range(clients)))


async def witness(endpoint, expected: list[str], findings: Findings, ended: asyncio.Event) -> None:
    with httpx.Client(base_url=endpoint.url, headers=WITNESS, timeout=120) as client:
        turn = 0
        while not ended.is_set() or turn < len(ASKED):
            path, body = ASKED[turn % len(ASKED)]
            try:
                answer = await asyncio.to_thread(ask, client, path, body)
            except (AssertionError, httpx.HTTPError) as error:
                answer = f"{type(error).__name__}: {error}"
            if answer != expected[turn % len(ASKED)]:
                findings.wrong.append(f"another client's answer has changed: {path} {body}: {answer[:1_000]}")
            turn += 1
            findings.witnessed = turn
            await asyncio.sleep(0.02)


def resident_bytes() -> int:
    """Memory of this process, without what is free in it."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


def held(endpoint) -> dict[str, int]:
    """What requests hold while they are there."""
    engine, admission = endpoint.engine, endpoint.gateway.admission
    return {
        "unfinished requests": engine.num_unfinished,
        "reserved tokens": engine.cache_use.num_reserved,
        "tokens in slots": engine.cache_use.num_used,
        "waiting answers": admission.waiting,
        "running answers": admission.running,
        "tasks": len(asyncio.all_tasks(endpoint.loop)),
        "open files": psutil.Process().num_fds(),
    }


def run(endpoint, errors: Errors, wait_until, *, seed: int, number: int, samples: int = 0) -> Findings:
    """Attack, with another client beside; then nothing is held that was not before, and nothing went wrong."""
    print(f"AIFACTORY_FUZZ_SEED={seed} AIFACTORY_FUZZ_REQUESTS={number}")
    findings = Findings()
    with httpx.Client(base_url=endpoint.url, headers=WITNESS, timeout=120) as client:
        expected = [ask(client, path, body) for path, body in ASKED]
        several = client.post("/v1/completions", json={"model": "alpha", "prompt": "x", "n": 2, "max_tokens": 2}).json()
        single = client.post("/v1/completions", json={"model": "alpha", "prompt": "x", "max_tokens": 2}).json()
        form = {"files": {"file": ("a.jsonl", b"{}")}, "data": {"purpose": "batch"}}
        file = client.post("/v1/files", **form).json()
    ids = [single["id"], several["id"], f"{several['id']}-0", f"{several['id']}-1", "cmpl-0"]
    attacks = Attacks(seed, answers=ids, files=[file["id"], "file-1"])

    async def attack_all() -> None:
        # Before what is held is counted, whoever has threads and files of its own has them.
        await attack_with(endpoint, attacks, range(number, number + 32), findings)
        ended = asyncio.Event()
        beside = asyncio.create_task(witness(endpoint, expected, findings, ended))
        await attack_with(endpoint, attacks, range(number), findings, samples=samples)
        ended.set()
        await beside

    before = held(endpoint)
    asyncio.run(attack_all())
    # A connection that was cut off is noticed soon, and its answer with it.
    few = {"tasks": 4, "open files": 40}

    def is_empty() -> bool:
        return all(value <= before[name] + few.get(name, 0) for name, value in held(endpoint).items())

    try:
        wait_until(is_empty, timeout_s=60)
    except AssertionError:
        findings.wrong.append(f"something is held: {held(endpoint)}, before: {before}")
    cache = endpoint.engine.cache_use
    assert cache.num_kept <= cache.max_kept
    print(f"{sum(findings.statuses.values())} requests: {dict(findings.statuses.most_common())}")
    print(f"{findings.witnessed} answers beside them compared; memory MiB: {[each >> 20 for each in findings.memory]}")
    findings.wrong += [f"an error in the log:\n{error}" for error in errors.found]
    assert not findings.wrong, f"{len(findings.wrong)} findings\n" + "\n\n".join(findings.wrong[:20])
    assert findings.witnessed >= len(ASKED)
    return findings


BOTH = pytest.mark.parametrize("attacked", [None, "postgres_url"], ids=["sqlite", "postgresql"], indirect=True)


@BOTH
def test_a_nul_is_refused_by_either_database(attacked):
    batch = {"endpoint": "/v1/completions", "completion_window": "24h"}
    for method, path, body, status in (
        ("POST", "/v1/feedback", {"completion": "a\0", "score": 1}, 400),
        ("POST", "/v1/feedback", {"completion": "a\0", "preferred": 0}, 400),
        ("POST", "/v1/feedback", {"preferred": "a\0", "rejected": "b"}, 400),
        ("POST", "/v1/feedback", {"preferred": "a", "rejected": "b\0"}, 400),
        ("POST", "/v1/feedback", {"completion": "a", "comment": "b\0"}, 400),
        ("POST", "/v1/batches", {"input_file_id": "a\0", **batch}, 400),
        ("GET", "/v1/files/%00", None, 404),
        ("GET", "/v1/files/a%00/content", None, 404),
        ("DELETE", "/v1/files/%00", None, 404),
        ("GET", "/v1/batches/%00", None, 404),
        ("POST", "/v1/batches/%00/cancel", None, 404),
    ):
        answer = httpx.request(method, attacked.url + path, json=body, timeout=60)

        assert answer.status_code == status, (path, body, answer.text)
        assert answer.json()["error"]["type"] == "invalid_request_error"


@BOTH
def test_some_hundred_hostile_requests_harm_nobody(attacked, errors, wait_until):
    findings = run(attacked, errors, wait_until, seed=20261125, number=400)

    # They were no plain requests, and not all of them were refused: the engine was at work.
    assert findings.statuses["200"] > 40
    assert findings.statuses["400"] > 40


@pytest.mark.fuzz
def test_very_many_hostile_requests_harm_nobody_and_leak_nothing(attacked, errors, wait_until):
    seed = int(os.environ.get("AIFACTORY_FUZZ_SEED") or time.time())
    number = int(os.environ.get("AIFACTORY_FUZZ_REQUESTS") or 50_000)

    findings = run(attacked, errors, wait_until, seed=seed, number=number, samples=10)

    if number >= STEADY:
        steady = findings.memory[2:]
        assert steady[-1] - steady[0] <= MOST_GROWTH_BYTES, f"memory grows: {findings.memory}"

"""Laws of streams and of clients that go away, on an engine whose every word is told by the test."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import aclosing

import httpx
import openai
import pytest
from starlette.requests import Request

from aifactory.serve.event_stream import EventStream
from aifactory.serve.gateway import Gateway
from aifactory.serve.releases import Releases
from aifactory.text.tokenizer import load_tokenizer

COMPLETE = {"model": "alpha", "prompt": "hello"}
CHAT = {"model": "alpha", "messages": [{"role": "user", "content": "hello"}]}
PATHS = [("/v1/completions", COMPLETE), ("/v1/chat/completions", CHAT)]
PIECES = ["naïve ", "你好", " 🙂", "\u2028\u2029\u0085\x0b\x0c\x1c", '"\\\n\r\n\ndata: [DONE]\n\n', "\ufffd", "end"]


def speak(engine, pieces, *, to=0, reason="stop"):
    for piece in pieces:
        engine.say(piece, to=to)
    engine.say("", reason, to=to)


def lines_of(endpoint, path, body, on_text=lambda: None):
    """The lines of a stream; `on_text` is called at each chunk of text."""
    lines = []
    with httpx.stream("POST", f"{endpoint.url}{path}", json={**body, "stream": True}, timeout=20) as response:
        for line in response.iter_lines():
            lines.append(line)
            if line.startswith("data: {") and '"finish_reason": null' in line and '"role"' not in line:
                on_text()
    return response, lines


def test_the_events_of_a_chat_are_those_of_openai(fake, pool):
    endpoint, engine = fake
    rest = iter([("two", None), ("", "stop")])
    body = {**CHAT, "stream_options": {"include_usage": True}}
    asked = pool.submit(lines_of, endpoint, "/v1/chat/completions", body, lambda: engine.say(*next(rest)))
    engine.say("one")

    response, lines = asked.result()

    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert "content-length" not in response.headers
    assert lines[1::2] == [""] * (len(lines) // 2)
    assert lines[-2] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2:2]]
    assert all(set(chunk) >= {"id", "object", "created", "model", "system_fingerprint", "usage"} for chunk in chunks)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    choices = [chunk["choices"] for chunk in chunks]
    nothing = {"index": 0, "finish_reason": None, "logprobs": None}
    assert choices == [
        [nothing | {"delta": {"role": "assistant", "content": "", "refusal": None}}],
        [nothing | {"delta": {"content": "one"}}],
        [nothing | {"delta": {"content": "two"}}],
        [nothing | {"delta": {}, "finish_reason": "stop"}],
        [],
    ]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 4
    assert chunks[-1]["usage"]["completion_tokens"] == 3


def test_a_reason_comes_apart_from_the_last_text(fake, pool):
    endpoint, engine = fake
    asked = pool.submit(lambda: list(endpoint.client.completions.create(**COMPLETE, stream=True)))
    engine.say("only", "length")

    chunks = asked.result()

    assert [(c.choices[0].text, c.choices[0].finish_reason) for c in chunks] == [("only", None), ("", "length")]
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


@pytest.mark.parametrize(("path", "body"), PATHS)
def test_any_text_comes_through_a_stream_as_it_is(fake, pool, path, body):
    endpoint, engine = fake
    asked = pool.submit(lines_of, endpoint, path, body)
    speak(engine, PIECES)

    _, lines = asked.result()

    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"]
    texts = [c["choices"][0].get("text") or c["choices"][0].get("delta", {}).get("content") or "" for c in chunks]
    assert "".join(texts) == "".join(PIECES)
    assert lines.count("data: [DONE]") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_reads_any_text(fake, factory, pool, stream):
    endpoint, engine = fake

    def ask():
        if not stream:
            return endpoint.client.chat.completions.create(**CHAT).choices[0].message.content
        chunks = endpoint.client.chat.completions.create(**CHAT, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    asked = pool.submit(ask)
    speak(engine, PIECES)

    assert asked.result() == "".join(PIECES)
    assert factory.books.feedback.completion(engine.asked[0]).answer == "".join(PIECES)


def test_each_piece_is_sent_when_it_is_there(fake, pool):
    endpoint, engine = fake
    asked = pool.submit(endpoint.client.completions.create, **COMPLETE, stream=True)
    engine.say("one")
    stream = asked.result()

    assert next(stream).choices[0].text == "one"
    engine.say("two")
    assert next(stream).choices[0].text == "two"
    engine.say("", "stop")
    assert next(stream).choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("reason", "status"), [("error", 500), ("cancelled", 503)])
def test_an_answer_that_fails_before_its_first_word_has_a_status(fake, pool, stream, reason, status):
    endpoint, engine = fake
    asked = pool.submit(endpoint.client.completions.create, **COMPLETE, stream=stream)
    engine.say("", reason, error="out of memory")

    with pytest.raises(openai.InternalServerError) as failed:
        asked.result()

    assert failed.value.status_code == status
    assert failed.value.type == "server_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_can_be_followed_no_further_is_the_requests_own_fault(fake, pool, stream):
    endpoint, engine = fake
    asked = {**COMPLETE, "extra_body": {"structured_outputs": {"regex": "a+"}}, "stream": stream}
    first = pool.submit(endpoint.client.completions.create, **asked)
    engine.say("", "error", error="too complex", fault="grammar")
    later = pool.submit(lambda: list(endpoint.client.completions.create(**asked)))
    engine.say("one", to=1)
    engine.say("", "error", to=1, error="too complex", fault="grammar")

    with pytest.raises(openai.BadRequestError, match="too complex") as refused:
        first.result()
    with pytest.raises(openai.APIError, match="too complex") as broken:
        later.result()

    for error in (refused.value, broken.value):
        assert (error.type, error.param) == ("invalid_request_error", "structured_outputs")


def test_an_answer_that_fails_in_the_middle_says_so_in_the_stream(fake, factory, pool):
    endpoint, engine = fake
    asked = pool.submit(lambda: list(endpoint.client.completions.create(**COMPLETE, stream=True)))
    engine.say("one")
    engine.say("", "error", error="out of memory")

    with pytest.raises(openai.APIError, match="out of memory"):
        asked.result()

    assert factory.books.feedback.counts()["completions"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_cannot_be_kept_is_not_given(fake, factory, pool, stream):
    endpoint, engine = fake

    def ask():
        answer = endpoint.client.completions.create(**COMPLETE, stream=stream)
        return [chunk.choices[0].finish_reason for chunk in answer] if stream else answer

    asked = pool.submit(ask)
    engine.say("one")
    with factory.books.database.write() as connection:
        connection.exec_driver_sql("ALTER TABLE completions RENAME TO gone")
    engine.say("", "stop")

    with pytest.raises(openai.APIError, match="its log says why"):
        asked.result()


def test_a_full_queue_is_429_with_retry_after_and_others_go_on(fake, pool, wait_until):
    endpoint, engine = fake
    others = [pool.submit(endpoint.client.completions.create, **COMPLETE) for _ in range(4)]
    wait_until(lambda: len(engine.asked) == 4)

    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as refused:
            endpoint.client.completions.create(**COMPLETE, stream=stream)
        assert refused.value.response.headers["retry-after"] == "1"
        assert refused.value.code == "queue_full"

    for index in range(4):
        engine.say("fine", "stop", to=index)
    assert {other.result().choices[0].text for other in others} == {"fine"}


def test_openais_client_tries_again_by_itself_when_the_queue_was_full(fake, pool, wait_until):
    endpoint, engine = fake
    others = [pool.submit(endpoint.client.completions.create, **COMPLETE) for _ in range(4)]
    wait_until(lambda: len(engine.asked) == 4)
    patient = endpoint.client.with_options(max_retries=2)
    asked = pool.submit(patient.completions.create, **COMPLETE)

    for index in range(4):
        engine.say("fine", "stop", to=index)
    engine.say("later", "stop", to=4)

    assert asked.result().choices[0].text == "later"
    assert [other.result().choices[0].text for other in others] == ["fine"] * 4


@pytest.mark.parametrize(("path", "body"), PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_before_the_first_word_frees_the_engine(fake, wait_until, path, body, stream):
    endpoint, engine = fake

    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{endpoint.url}{path}", json={**body, "stream": stream}, timeout=httpx.Timeout(5, read=0.2))

    wait_until(lambda: engine.num_unfinished == 0)
    assert engine.cancelled == engine.asked


def test_a_client_that_goes_away_in_the_middle_of_a_stream_frees_the_engine(fake, pool, wait_until, factory):
    endpoint, engine = fake
    asked = pool.submit(endpoint.client.completions.create, **COMPLETE, stream=True)
    engine.say("one")
    stream = asked.result()
    next(stream)

    stream.close()

    wait_until(lambda: engine.num_unfinished == 0)
    assert engine.cancelled == engine.asked
    assert factory.books.feedback.counts()["completions"] == 0


def test_a_client_that_goes_away_harms_no_other(fake, pool, wait_until):
    endpoint, engine = fake
    stays = pool.submit(endpoint.client.completions.create, **COMPLETE)
    wait_until(lambda: len(engine.asked) == 1)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{endpoint.url}/v1/completions", json=COMPLETE, timeout=httpx.Timeout(5, read=0.2))

    wait_until(lambda: engine.num_unfinished == 1)
    engine.say("fine", "stop")

    assert stays.result().choices[0].text == "fine"
    assert engine.cancelled == engine.asked[1:]


def test_an_answer_that_was_read_whole_is_not_cancelled(fake, pool):
    endpoint, engine = fake
    for index, stream in enumerate([False, True, False, True]):
        asked = pool.submit(lambda stream=stream: list(endpoint.client.completions.create(**COMPLETE, stream=stream)))
        engine.say("fine", "stop", to=index)
        asked.result()

    assert engine.cancelled == []


def test_a_request_that_is_cancelled_by_the_server_frees_the_engine(fake, factory, wait_until):
    _, engine = fake
    releases = Releases(factory.books, lambda folder: (engine, load_tokenizer(folder)))
    releases.load_first()
    gateway = Gateway(factory.books, releases, factory.books.config.serve)

    async def serve_and_cancel(stream):
        body = json.dumps({**COMPLETE, "stream": stream}).encode()
        inbox = asyncio.Queue()
        inbox.put_nowait({"type": "http.request", "body": body, "more_body": False})
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
        sent = asyncio.Event()

        async def send(message):
            sent.set()
            await asyncio.sleep(3600)  # a client that reads nothing

        async def serve():
            response = await gateway.handle(Request(scope, inbox.get))
            await response(scope, inbox.get, send)

        task = asyncio.create_task(serve())
        await asyncio.to_thread(wait_until, lambda: engine.num_unfinished == 1)
        if stream:
            engine.say("one", to=len(engine.asked) - 1)
            await sent.wait()
        task.cancel()
        await asyncio.wait([task])
        await asyncio.to_thread(wait_until, lambda: engine.num_unfinished == 0)

    asyncio.run(serve_and_cancel(False))
    asyncio.run(serve_and_cancel(True))

    assert len(engine.cancelled) == 2


def test_what_came_while_the_reader_was_behind_goes_on_together(fake, pool):
    endpoint, engine = fake
    asked = pool.submit(lambda: list(endpoint.client.completions.create(**COMPLETE, stream=True)))
    engine.say("0 ")
    blocked = threading.Event()
    endpoint.loop.call_soon_threadsafe(blocked.wait, 10)
    for number in range(1, 1000):
        engine.say(f"{number} ")
    engine.say("", "length")
    blocked.set()

    chunks = asked.result()

    assert "".join(chunk.choices[0].text for chunk in chunks) == "".join(f"{number} " for number in range(1000))
    assert len(chunks) <= 4
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_stalled_reader_holds_up_no_other(fake, pool, wait_until):
    endpoint, engine = fake
    asked = pool.submit(endpoint.client.completions.create, **COMPLETE, stream=True)
    engine.say("x" * 1000)
    stalled = asked.result()
    done = threading.Event()

    def flood():
        for _ in range(3000):
            engine.say("x" * 1000)
        engine.say("", "stop")
        done.set()

    pool.submit(flood)
    for index in range(1, 4):
        other = pool.submit(endpoint.client.completions.create, **COMPLETE)
        engine.say("fine", "stop", to=index)
        assert other.result().choices[0].text == "fine"

    assert done.wait(20)
    assert len("".join(chunk.choices[0].text for chunk in stalled)) == 3_001_000


@pytest.mark.parametrize("gone_at", ["http.response.start", "http.response.body"])
def test_what_an_answer_comes_from_is_closed_when_its_client_is_gone_before_anything_was_sent(gone_at):
    closed = []

    async def deltas():
        try:
            while True:
                yield b"data"
        finally:
            closed.append("source")

    async def events(first, source):
        async with aclosing(source):
            yield first
            async for data in source:
                yield data

    async def send(message):
        if message["type"] == gone_at:
            raise OSError("gone")

    async def run():
        source = deltas()
        stream = EventStream(events(await anext(source), source), source=source)
        with pytest.raises(OSError, match="gone"):
            await stream({}, None, send)
        assert closed == ["source"]

    asyncio.run(run())

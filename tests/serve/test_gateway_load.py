"""Laws under load: turns between users, deadlines that end the work, and limits, on an engine that the test tells what to say."""

from __future__ import annotations

import contextlib
import json
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from aifactory.serve.releases import Releases
from aifactory.text.tokenizer import load_tokenizer

COMPLETE = {"model": "alpha", "prompt": "hello"}
PATHS = [
    ("/v1/completions", COMPLETE),
    ("/v1/chat/completions", {"model": "alpha", "messages": [{"role": "user", "content": "x"}]}),
]


@pytest.fixture
def narrow(tmp_path, exported, answer_on, fake_engine, make_small):
    """An endpoint with one slot and room for 6 that wait, over a fake engine."""
    factory = make_small(tmp_path, slots=1, max_queued=6)
    engine = fake_engine()
    factory.promote(factory.publish(1))
    releases = Releases(factory.books, lambda folder: (engine, load_tokenizer(folder)))
    releases.load_first()
    with answer_on(factory, releases) as endpoint:
        yield endpoint, engine


def test_users_of_one_key_come_in_turn(narrow, pool, wait_until):
    endpoint, engine = narrow

    def ask(user):
        return pool.submit(endpoint.client.completions.create, **COMPLETE, user=user)

    first = [ask("ann") for _ in range(2)]  # both in the engine: one decodes, one is at hand
    wait_until(lambda: len(engine.asked) == 2)
    waiting = []
    for number in range(5):
        waiting.append(ask("ann"))
        wait_until(lambda number=number: endpoint.waiting == number + 1)
    last = ask("bob")
    wait_until(lambda: endpoint.waiting == 6)
    for number in range(8):
        engine.say(str(number), "stop", to=number)

    assert sorted(each.result().choices[0].text for each in first) == ["0", "1"]
    assert last.result().choices[0].text == "3"
    assert sorted(each.result().choices[0].text for each in waiting) == ["2", "4", "5", "6", "7"]


def test_a_full_queue_is_429_for_the_one_who_filled_it_alone(narrow, pool, wait_until):
    endpoint, engine = narrow
    asked = [pool.submit(endpoint.client.completions.create, **COMPLETE, user="ann") for _ in range(8)]
    wait_until(lambda: endpoint.waiting == 6)

    with pytest.raises(openai.RateLimitError) as refused:
        endpoint.client.completions.create(**COMPLETE, user="ann")
    other = pool.submit(endpoint.client.completions.create, **COMPLETE, user="bob")
    wait_until(lambda: any(each.done() for each in asked))
    for number in range(8):
        engine.say("fine", "stop", to=number)

    assert refused.value.response.headers["retry-after"] == "1"
    assert other.result().choices[0].text == "fine"
    ends = [each.exception() for each in asked]
    assert [type(end) for end in ends if end is not None] == [openai.RateLimitError]


def test_who_goes_away_while_waiting_leaves_the_queue(narrow, pool, wait_until):
    endpoint, engine = narrow
    asked = [pool.submit(endpoint.client.completions.create, **COMPLETE) for _ in range(2)]
    wait_until(lambda: len(engine.asked) == 2)

    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{endpoint.url}/v1/completions", json=COMPLETE, timeout=httpx.Timeout(5, read=0.2))

    wait_until(lambda: endpoint.waiting == 0)
    for number in range(2):
        engine.say("fine", "stop", to=number)
    assert [each.result().choices[0].text for each in asked] == ["fine", "fine"]
    assert len(engine.asked) == 2


@pytest.mark.parametrize("where", ["body", "header"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_the_work(fake, wait_until, where, stream):
    endpoint, engine = fake
    body = COMPLETE | {"stream": stream} | ({"timeout": 0.2} if where == "body" else {})
    headers = {"X-Request-Timeout": "0.2"} if where == "header" else {}

    answer = httpx.post(f"{endpoint.url}/v1/completions", json=body, headers=headers, timeout=20)

    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    wait_until(lambda: engine.num_unfinished == 0)
    assert engine.cancelled == engine.asked


def test_a_deadline_counts_the_time_in_the_queue(narrow, pool, wait_until):
    endpoint, engine = narrow
    asked = [pool.submit(endpoint.client.completions.create, **COMPLETE) for _ in range(2)]
    wait_until(lambda: len(engine.asked) == 2)

    answer = httpx.post(f"{endpoint.url}/v1/completions", json=COMPLETE | {"timeout": 0.1}, timeout=20)

    assert answer.status_code == 504
    assert endpoint.waiting == 0
    for number in range(2):
        engine.say("fine", "stop", to=number)
    assert {each.result().choices[0].text for each in asked} == {"fine"}


def test_a_deadline_in_the_middle_of_a_stream_says_so(fake, pool):
    endpoint, engine = fake
    stream = pool.submit(endpoint.client.completions.create, **COMPLETE, stream=True, extra_body={"timeout": 1.5})
    engine.say("one")

    with pytest.raises(openai.APIError, match="time up"):
        list(stream.result())

    assert engine.cancelled == engine.asked


def test_the_endpoints_own_limit_of_time_holds(tmp_path, exported, answer_on, fake_engine, make_small):
    factory = make_small(tmp_path, request_timeout_s=0.2)
    engine = fake_engine()
    factory.promote(factory.publish(1))
    releases = Releases(factory.books, lambda folder: (engine, load_tokenizer(folder)))
    releases.load_first()
    with answer_on(factory, releases) as endpoint:
        answer = httpx.post(f"{endpoint.url}/v1/completions", json=COMPLETE | {"timeout": 50}, timeout=20)

    assert answer.status_code == 504


@pytest.mark.parametrize(("path", "body"), PATHS)
@pytest.mark.parametrize("seconds", [0, -1, 1e9, "5", "soon"])
def test_a_wrong_timeout_is_named(fake, path, body, seconds):
    endpoint, _ = fake
    asked = httpx.post(f"{endpoint.url}{path}", json=body | {"timeout": seconds})
    header = httpx.post(f"{endpoint.url}{path}", json=body, headers={"X-Request-Timeout": "soon"})

    assert (asked.status_code, asked.json()["error"]["param"]) == (400, "timeout")
    assert (header.status_code, header.json()["error"]["param"]) == (400, "timeout")


# ── what is open, and the end ─────────────────────────────────────────────────────────────────────────────────────────


def test_who_reads_slowly_takes_a_place_and_leaves_none_behind(
    tmp_path, answer_on, fake_engine, make_small, wait_until
):
    factory = make_small(tmp_path, slots=1, max_queued=1)
    engine = fake_engine()
    factory.promote(factory.publish(1))
    releases = Releases(factory.books, lambda folder: (engine, load_tokenizer(folder)))
    releases.load_first()
    body = json.dumps(COMPLETE | {"stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with answer_on(factory, releases) as endpoint, contextlib.ExitStack() as sockets:
        most = factory.books.config.runtime.endpoint.most_open
        for number in range(most):
            slow = sockets.enter_context(socket.socket())
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", int(endpoint.url.rpartition(":")[2])))
            slow.sendall(head + body)
            # More than all buffers on its way hold.
            engine.say("x" * 16_000_000, to=number)
            engine.say("", "stop", to=number)
        wait_until(lambda: endpoint.gateway.num_open == most)

        refused = httpx.post(f"{endpoint.url}/v1/completions", json=COMPLETE)
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        assert f"at most {most} open" in refused.json()["error"]["message"]
        assert httpx.get(f"{endpoint.url}/readyz").status_code == 200
        sockets.close()
        wait_until(lambda: endpoint.gateway.num_open == 0)
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(endpoint.client.completions.create, **COMPLETE)
            engine.say("fine", "stop", to=most)
            assert asked.result().choices[0].text == "fine"


def test_what_requests_hold_is_told_until_the_last_has_ended(narrow, pool, wait_until):
    endpoint, engine = narrow
    asked = [pool.submit(endpoint.client.completions.create, **COMPLETE) for _ in range(4)]
    wait_until(lambda: endpoint.waiting == 2)
    cache = {"cache_used": 0, "cache_reserved": 0}
    assert endpoint.gateway.held == {"open": 4, "waiting": 2, "running": 2, "answers": 2, **cache}
    for number in range(4):
        engine.say("fine", "stop", to=number)
    assert [each.result().choices[0].text for each in asked] == ["fine"] * 4
    wait_until(lambda: not any(endpoint.gateway.held.values()))


@pytest.mark.parametrize("stream", [False, True])
def test_while_it_shuts_down_what_has_begun_ends_and_what_comes_is_told(narrow, pool, wait_until, stream):
    endpoint, engine = narrow
    begun = pool.submit(endpoint.client.completions.create, **COMPLETE, stream=stream)
    engine.say("one ")
    waiting = [pool.submit(endpoint.client.completions.create, **COMPLETE) for _ in range(3)]
    wait_until(lambda: endpoint.gateway.num_open == 4)

    endpoint.gateway.is_draining = True

    with pytest.raises(openai.InternalServerError, match="shutting down") as told:
        endpoint.client.completions.create(**COMPLETE)
    assert (told.value.status_code, told.value.code) == (503, "shutting_down")
    assert told.value.response.headers["Retry-After"] == "1"
    ready = httpx.get(f"{endpoint.url}/readyz")
    assert (ready.status_code, ready.json()["status"]) == (503, "shutting down")
    assert httpx.get(f"{endpoint.url}/healthz").status_code == 200
    engine.say("two", "stop")
    for number in range(1, 4):
        engine.say("waited", "stop", to=number)
    answer = begun.result()
    chunks = list(answer) if stream else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "one two"
    assert [each.result().choices[0].text for each in waiting] == ["waited"] * 3
    wait_until(lambda: endpoint.gateway.num_open == 0)

"""Laws of limits over HTTP: several gateways over one database let in what one would, say when to come back, and count what was used."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter

import httpx
import pytest

from aifactory.config import Gateway as GatewayOptions
from aifactory.errors import StateError
from aifactory.records.limits import Limits, Subject
from aifactory.serve.access import Caller
from aifactory.serve.limiting import Limiter
from aifactory.serve.releases import Releases
from aifactory.serve.wire import StatusError
from aifactory.text.tokenizer import load_tokenizer

BODY = {"model": "alpha", "prompt": "hello", "max_tokens": 5}
REFRESH_S = 0.05


@pytest.fixture
def replicas(tmp_path, exported, answer_on, fake_engine, make_small):
    """Three gateways over one database, whose engines say two tokens at once."""

    class QuickEngine(fake_engine):
        def submit(self, request, on_delta):
            super().submit(request, on_delta)
            if request.pooling is None and request.sampling.max_tokens > 1:
                self.say("ab", "stop", to=len(self.asked) - 1, token_ids=(1, 2))

    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(3):
            gateway = {"keys": "required", "keys_refresh_s": REFRESH_S, "price_per_million_answer_tokens": 1e6}
            factory = make_small(tmp_path, gateway=gateway)
            if not found:
                factory.promote(factory.publish(1))
            engine = QuickEngine(capacity=10_000)
            releases = Releases(factory.books, lambda folder, engine=engine: (engine, load_tokenizer(folder)))
            releases.load_first()
            endpoint = stack.enter_context(answer_on(factory, releases))
            endpoint.books = factory.books
            found.append(endpoint)
        yield found


def ask_all(replicas, tokens, number, *, at_once=30, body=BODY, path="/v1/completions"):
    """So many requests, over all replicas in turn; the answers, in no order."""

    async def run():
        gate = asyncio.Semaphore(at_once)
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=at_once)) as client:

            async def one(n):
                async with gate:
                    headers = {"Authorization": f"Bearer {tokens[n % len(tokens)]}"}
                    url = f"{replicas[n % len(replicas)].url}{path}"
                    return await client.post(url, json=body, headers=headers)

            return await asyncio.gather(*(one(n) for n in range(number)))

    return asyncio.run(run())


def test_replicas_together_let_in_exactly_as_many_as_the_limit_says(replicas):
    keys = replicas[0].books.keys
    tokens = [keys.create(f"key {n}", team="red", limited=Limits(requests_per_minute=70)).token for n in range(2)]
    keys.limit("team", "red", Limits(requests_per_minute=100))

    answers = ask_all(replicas, tokens, 330)

    assert Counter(each.status_code for each in answers) == {200: 100, 429: 230}
    for each in answers:
        if each.status_code == 429:
            assert each.json()["error"]["code"] == "rate_limit_exceeded"
            assert each.json()["error"]["type"] == "rate_limit_error"
            assert 1 <= int(each.headers["retry-after"]) <= 61


def test_open_requests_are_counted_over_all_replicas(replicas, wait_until):
    keys = replicas[0].books.keys
    token = keys.create("app", limited=Limits(concurrent=3)).token
    waits = BODY | {"max_tokens": 1}  # its engine says nothing by itself

    async def settle():
        headers = {"Authorization": f"Bearer {token}"}
        async with httpx.AsyncClient(timeout=60, headers=headers) as client:
            tasks = [
                asyncio.create_task(client.post(f"{replicas[n % 3].url}/v1/completions", json=waits)) for n in range(9)
            ]
            done: set = set()
            while len(done) < 6:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.sleep(0.01)
            statuses = [each.result().status_code for each in done]
            for endpoint in replicas:
                for to, _ in enumerate(endpoint.engine.asked):
                    endpoint.engine.say("ab", "stop", to=to)
            finished = await asyncio.gather(*tasks)
            # An answer that the client has seen to its end counts no more.
            again = [await client.post(f"{replicas[n].url}/v1/completions", json=BODY) for n in range(3)]
            return statuses, [each.status_code for each in finished], [each.status_code for each in again]

    statuses, finished, again = asyncio.run(settle())
    assert statuses == [429] * 6
    assert Counter(finished) == {200: 3, 429: 6}
    assert again == [200] * 3


def test_one_after_another_fits_whoever_may_have_one_open_on_whatever_replica(replicas):
    key = replicas[0].books.keys.create("app", limited=Limits(concurrent=1))

    for stream in (False, True):
        answers = ask_all(replicas, [key.token], 30, at_once=1, body=BODY | {"stream": stream})
        assert {each.status_code for each in answers} == {200}


def test_a_budget_of_tokens_is_not_passed_and_an_empty_one_is_402(replicas):
    key = replicas[0].books.keys.create("app", limited=Limits(budget_tokens=100, budget_window="day"))

    answers = ask_all(replicas, [key.token], 60)

    used = sum(each.json()["usage"]["total_tokens"] for each in answers if each.status_code == 200)
    refused = [each for each in answers if each.status_code != 200]
    assert {each.status_code for each in refused} == {402}
    assert {each.json()["error"]["code"] for each in refused} == {"budget_empty"}
    assert 100 - (used + 6) < 6, "one more request would not have fitted"
    assert used <= 100
    spent = replicas[1].books.allowances.spent("day")[Subject("key", key.key.id)]
    assert spent.tokens == used
    assert spent.requests == len(answers) - len(refused)
    assert spent.money == spent.answer_tokens


def test_money_and_tokens_a_minute_are_limits_over_http(replicas):
    keys = replicas[0].books.keys
    poor = keys.create("poor", limited=Limits(budget_money=12.0)).token
    slow = keys.create("slow", limited=Limits(tokens_per_minute=30)).token
    tiny = keys.create("tiny", limited=Limits(tokens_per_minute=3)).token

    bought = ask_all(replicas, [poor], 12, at_once=1)
    assert Counter(each.status_code for each in bought) == {200: 4, 402: 8}, "5 reserved, 2 used: 2, 4, 6, 8 of 12"
    statuses = Counter(each.status_code for each in ask_all(replicas, [slow], 30, at_once=1))
    (answer,) = ask_all(replicas, [tiny], 1)
    each = bought[0].json()["usage"]
    assert statuses[200] == (30 - 5 - each["prompt_tokens"]) // each["total_tokens"] + 1
    assert statuses[429] == 30 - statuses[200]
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "request_too_large")


def test_feedback_counts_as_a_request(replicas):
    token = replicas[0].books.keys.create("app", limited=Limits(requests_per_minute=3)).token
    (answer,) = ask_all(replicas, [token], 1)
    said = {"completion": answer.json()["id"], "score": 1}

    statuses = [each.status_code for each in ask_all(replicas, [token], 4, at_once=1, body=said, path="/v1/feedback")]
    assert Counter(statuses) == {200: 2, 429: 2}


def test_what_was_refused_or_broken_off_gives_back_what_it_had_reserved(replicas, wait_until):
    books = replicas[0].books
    key = books.keys.create("app", limited=Limits(budget_tokens=50, concurrent=1))
    waits = BODY | {"max_tokens": 1, "stream": True}
    headers = {"Authorization": f"Bearer {key.token}"}

    async def leave():
        async with httpx.AsyncClient(timeout=60) as client:
            sent = asyncio.create_task(client.post(f"{replicas[0].url}/v1/completions", json=waits, headers=headers))
            while not replicas[0].engine.asked:
                await asyncio.sleep(0.005)
            sent.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sent

    asyncio.run(leave())
    wait_until(lambda: books.allowances.spent("day") != {})
    assert books.allowances.spent("day")[Subject("key", key.key.id)].tokens == 0
    too_long = BODY | {"max_tokens": 1_000}
    assert {each.status_code for each in ask_all(replicas, [key.token], 3, body=too_long, at_once=1)} == {400}
    assert {each.status_code for each in ask_all(replicas, [key.token], 2, at_once=1)} == {200}


def test_what_keys_without_limits_use_is_known_too(replicas, wait_until):
    books = replicas[0].books
    key = books.keys.create("app", team="red")
    answers = ask_all(replicas, [key.token], 9)
    used = sum(each.json()["usage"]["total_tokens"] for each in answers)

    def known():
        spent = books.allowances.spent("month")
        return [
            spent[each].tokens if each in spent else 0 for each in (Subject("key", key.key.id), Subject("team", "red"))
        ]

    wait_until(lambda: known() == [used, used])


# ── without HTTP ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_requests_that_come_together_take_few_transactions(factory):
    books = factory.books
    key = books.keys.create("app", limited=Limits(requests_per_minute=150))
    caller = Caller(key_id=key.key.id, is_limited=True)
    turns = []

    class Counted:
        def turn(self, asks, uses=(), **more):
            turns.append(len(asks))
            return books.allowances.turn(asks, uses, **more)

    async def run():
        limiter = Limiter(Counted(), GatewayOptions(), holder="a")

        async def one(n):
            try:
                grant = await limiter.admit(caller, f"r{n}")
            except StatusError as error:
                return error.status
            await grant.end()
            return 200

        found = await asyncio.gather(*(one(n) for n in range(200)))
        limiter.close()
        return found

    assert Counter(asyncio.run(run())) == {200: 150, 429: 50}
    assert sum(turns) == 200
    assert len(turns) <= 5
    books.close()


def test_while_the_database_is_away_those_with_limits_are_503_and_what_was_used_is_told_later(factory):
    books = factory.books
    key = books.keys.create("app", limited=Limits(budget_tokens=100))
    caller, free = Caller(key_id=key.key.id, is_limited=True), Caller(key_id="anonymous")
    away = [False]

    class Flaky:
        def turn(self, asks, uses=(), **more):
            if away[0]:
                raise StateError("away")
            return books.allowances.turn(asks, uses, **more)

    async def run():
        limiter = Limiter(Flaky(), GatewayOptions(), holder="a")
        grant = await limiter.admit(caller, "r1", answer_tokens=10)
        away[0] = True
        await grant.end(answer_tokens=7)
        assert (await limiter.admit(free, "r2")) is not None
        with pytest.raises(StatusError) as error:
            await limiter.admit(caller, "r3")
        assert (error.value.status, error.value.code) == (503, "limits_unavailable")
        away[0] = False
        limiter.close()

    asyncio.run(run())
    assert books.allowances.spent("day")[Subject("key", key.key.id)].tokens == 7
    books.close()


def test_what_is_told_to_those_who_are_refused_is_json_in_openais_envelope(replicas):
    token = replicas[0].books.keys.create("app", limited=Limits(budget_tokens=1)).token
    (answer,) = ask_all(replicas, [token], 1)

    error = json.loads(answer.text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "insufficient_quota"
    assert "the next month begins" in error["message"]

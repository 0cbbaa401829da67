"""Laws of clients that go away: by the hundred, at any moment, they leave nothing behind and change no other's answer."""

from __future__ import annotations

import asyncio
import gc
import random

import httpx

from aifactory.engine.answer import Answer
from aifactory.serve.admission import Entry
from aifactory.serve.answers import Choice
from aifactory.serve.questions import Question
from aifactory.serve.releases import Releases

PROMPT = "the quick "
LEAVING = 200


def test_hundreds_of_clients_that_go_away_leave_nothing_behind(tmp_path, make_small, load, answer_on, says, wait_until):
    # More than fit: many go while they wait for their turn.
    factory = make_small(tmp_path, slots=4, max_queued=300)
    factory.promote(factory.publish(1))
    releases = Releases(factory.books, load)
    releases.load_first()
    rng, expected = random.Random(3), says(1, PROMPT, 40)
    plans = [(rng.choice(["stream", "plain", "chat", "embed"]), rng.random() ** 3 * 0.3) for _ in range(LEAVING)]
    with answer_on(factory, releases) as endpoint:

        async def leave(client, kind, after_s):
            path = {"chat": "/v1/chat/completions", "embed": "/v1/embeddings"}.get(kind, "/v1/completions")
            body = {"model": "alpha", "prompt": PROMPT, "max_tokens": 100, "stream": kind == "stream"}
            if kind == "embed":
                body = {"model": "alpha", "input": [PROMPT] * 8}
            elif kind == "chat":
                body = {"model": "alpha", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 90}
            try:
                async with asyncio.timeout(after_s), client.stream("POST", endpoint.url + path, json=body) as response:
                    async for _ in response.aiter_bytes():
                        pass
            except TimeoutError:
                return True
            return False

        async def stay(client):
            body = {"model": "alpha", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
            answer = await client.post(f"{endpoint.url}/v1/completions", json=body)
            return answer.json()["choices"][0]["text"]

        async def all_at_once():
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            async with httpx.AsyncClient(timeout=60, limits=limits) as client:
                leaving = asyncio.gather(*[leave(client, *plan) for plan in plans])
                staying = asyncio.gather(*[stay(client) for _ in range(12)])
                return await leaving, await staying

        left, stayed = asyncio.run(all_at_once())

        assert sum(left) > LEAVING // 2
        assert stayed == [expected] * 12
        wait_until(lambda: endpoint.gateway.num_open == 0 and endpoint.engine.num_unfinished == 0)
        wait_until(lambda: endpoint.engine.cache_use.num_used == 0)
        use = endpoint.engine.cache_use
        assert (use.num_reserved, endpoint.waiting) == (0, 0)
        assert set(endpoint.gateway.held.values()) == {0}
        assert use.num_kept <= use.max_kept

        def left_over():
            gc.collect()
            return [each for each in gc.get_objects() if isinstance(each, Answer | Choice | Entry | Question)]

        wait_until(lambda: not left_over())
        assert endpoint.client.completions.create(
            model="alpha", prompt=PROMPT, max_tokens=40, temperature=0
        ).choices[0].text == expected  # fmt: skip

"""Laws of keys and limits on Ray Serve: whatever replica answers, at load a limit is passed by nobody, and a key that is revoked is no
good on any of them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import httpx
import pytest

from aifactory.records.limits import Limits, Subject

pytestmark = pytest.mark.slow
BODY = {"model": "alpha", "prompt": "the quick ", "max_tokens": 4, "temperature": 0}
LIMIT, REQUESTS, AT_ONCE = 200, 500, 24
REFRESH_S = 0.5


@pytest.fixture(scope="module")
def served(ray_session, module_factory, tmp_path_factory):
    """Three replicas that require keys."""
    from aifactory.serve.app import start, stop

    gateway = {"keys": "required", "keys_refresh_s": REFRESH_S}
    factory = module_factory(
        tmp_path_factory.mktemp("limited"), gateway=gateway, port=0, poll_s=0.2, replicas=3, cpus_per_replica=0.05
    )
    factory.promote(factory.publish(1))
    factory.url = start(factory.books).url
    yield factory
    stop(factory.books.config.name, drain_timeout_s=0.0)
    factory.books.close()


def ask_all(url, token, number, *, at_once=AT_ONCE):
    async def run():
        gate = asyncio.Semaphore(at_once)
        limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:

            async def one():
                async with gate:
                    headers = {"Authorization": f"Bearer {token}"}
                    return await client.post(f"{url}/v1/completions", json=BODY, headers=headers)

            return await asyncio.gather(*(one() for _ in range(number)))

    return asyncio.run(run())


def test_at_load_on_three_replicas_no_limit_is_passed_and_each_use_is_known(served, wait_until):
    names = set()
    wait_until(
        lambda: names.add(httpx.get(f"{served.url}/readyz").json().get("replica")) or len(names - {None}) == 3,
        timeout_s=120,
    )
    keys, allowances = served.books.keys, served.books.allowances
    assert ask_all(served.url, "none", 1)[0].status_code == 401
    by_rate = keys.create("rate", team="red", limited=Limits(requests_per_minute=LIMIT))
    begun = time.monotonic()
    answers = ask_all(served.url, by_rate.token, REQUESTS)
    took = time.monotonic() - begun

    counts = Counter(each.status_code for each in answers)
    print(f"{REQUESTS} requests in {took:.1f} s on 3 replicas, limit {LIMIT} a minute: {dict(counts)}")
    # Each begun minute lets so many in.
    windows = 1 + int(took // 60)
    assert LIMIT <= counts[200] <= LIMIT * windows * 1.01
    assert counts[200] + counts[429] == REQUESTS
    assert all(1 <= int(each.headers["retry-after"]) <= 61 for each in answers if each.status_code == 429)
    used = sum(each.json()["usage"]["total_tokens"] for each in answers if each.status_code == 200)
    assert allowances.spent("total")[Subject("team", "red")].tokens == used

    by_budget = keys.create("budget", limited=Limits(budget_tokens=1_000, budget_window="total"))
    answers = ask_all(served.url, by_budget.token, 200)
    used = sum(each.json()["usage"]["total_tokens"] for each in answers if each.status_code == 200)
    print(f"budget 1,000 tokens, used {used}: {dict(Counter(each.status_code for each in answers))}")
    assert {each.status_code for each in answers} == {200, 402}
    assert 950 <= used <= 1_000

    by_place = keys.create("place", limited=Limits(concurrent=2))
    answers = ask_all(served.url, by_place.token, 60, at_once=2)
    assert {each.status_code for each in answers} == {200}, "two at once fit, on whatever replica"
    statuses = Counter(each.status_code for each in ask_all(served.url, by_place.token, 60, at_once=12))
    assert set(statuses) == {200, 429}


def test_a_revoked_key_is_no_good_on_any_replica_after_the_stated_time(served):
    issued = served.books.keys.create("leaked")
    assert {each.status_code for each in ask_all(served.url, issued.token, 30)} == {200}

    served.books.keys.revoke("leaked")
    time.sleep(REFRESH_S)

    assert {each.status_code for each in ask_all(served.url, issued.token, 30)} == {401}

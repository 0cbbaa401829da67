"""Laws of trials on Ray Serve: two replicas follow a canary together, its share moves and it is promoted with no request lost."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from endpoint_on_ray import PROMPT

from aifactory.records.identity import hash_parts, hash_text

pytestmark = pytest.mark.slow


def test_no_request_fails_while_two_replicas_try_a_release_and_promote_it(serve, says, wait_until):
    served = serve(replicas=2, slots=2)
    factory, journal = served.factory, served.factory.books.journal
    factory.promote(factory.publish(2))
    factory.books.registry.rollback(reason="test")
    expected = {f"alpha-r{seed}": says(seed, PROMPT, 20) for seed in (1, 2)}
    ended, seen, wrong = threading.Event(), Counter(), []

    def ask(index):
        number = 0
        while not ended.is_set():
            number += 1
            user = f"user-{index}-{number % 20}"
            try:
                answer = served.ask(user=user, max_tokens=20)
            except openai.APIError as error:
                wrong.append(error)
                continue
            seen[answer.model] += 1
            if answer.choices[0].text != expected[answer.model]:
                wrong.append((answer.model, answer.choices[0].text))

    def tried(share):
        factory.books.registry.try_out(2, "canary", share=share, reason={"reason": "test"})

    def some_by(name):
        count = seen[name]
        wait_until(lambda: seen[name] >= count + 10, timeout_s=120)

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, index) for index in range(4)]
        try:
            some_by("alpha-r1")
            tried(0.3)
            wait_until(lambda: len(journal.events(event="trial_loaded")) == 2, timeout_s=120)
            for share in (0.6, 0.2, 0.9):
                tried(share)
                some_by("alpha-r2")
            trial = factory.books.registry.trial()
            time.sleep(1.0)  # both replicas have looked
            sides = {
                user: {served.ask(user=user, max_tokens=20).model for _ in range(6)} for user in map(str, range(8))
            }
            factory.books.registry.promote_trial(reason={"reason": "test"})
            wait_until(
                lambda: httpx.get(f"{served.url}/readyz", timeout=60).json()["model"] == "alpha-r2", timeout_s=120
            )
            some_by("alpha-r2")
        finally:
            ended.set()
        for one in asking:
            one.result()

    assert wrong == []
    key = hash_text("Bearer none")
    assert sides == {u: {"alpha-r2" if trial.takes(hash_parts(key, u)) else "alpha-r1"} for u in sides}
    assert {event.detail["replica"] for event in journal.events(event="trial_loaded")} == {
        event.detail["replica"] for event in journal.events(event="swapped") if event.subject == "alpha-r2"
    }
    found = factory.books.registry.trial_log.outcomes(since=trial.begun)
    assert {outcome.release for outcome in found} == {1, 2}
    assert not any(outcome.failed for outcome in found)

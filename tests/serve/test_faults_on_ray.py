"""Laws of the endpoint on Ray when something is killed: who asked is told, or notices nothing, by the mode that was chosen."""

from __future__ import annotations

import threading

import openai
import pytest
from endpoint_on_ray import PROMPT, TOKENS, kill, processes, replicas

pytestmark = pytest.mark.slow


def test_direct_says_of_each_answer_that_its_replica_died(serve, says, wait_until):
    served = serve(replicas=1, slots=4)
    expected = says(1, PROMPT, TOKENS)
    requests = [{"stream": number % 2 == 0} for number in range(24)]
    wait_until(lambda: served.ask(max_tokens=1) is not None, timeout_s=60)
    (replica,) = replicas()

    answers = served.ask_many(requests, when_begun=lambda: kill(replica))

    whole = [text for text, error in answers if error is None]
    lost = [(text, error) for text, error in answers if error is not None]
    streams = [text for (text, error), request in zip(answers, requests, strict=True) if error and request["stream"]]
    assert set(whole) <= {expected}
    assert {type(error) for _, error in lost} <= {openai.APIError, openai.InternalServerError}
    assert {error.code for _, error in lost} == {"replica_lost"}
    assert {error.status_code for _, error in lost if isinstance(error, openai.APIStatusError)} == {502}
    assert all(expected.startswith(text) for text, _ in lost)
    assert any(streams), "a stream was cut"
    assert any(isinstance(error, openai.APIStatusError) for _, error in lost), "one had sent nothing"
    # Another replica takes its place.
    wait_until(lambda: replicas() not in ([], [replica]), timeout_s=120)
    assert served.ask().choices[0].text == expected


def test_resilient_ends_every_answer_as_if_no_replica_had_been_killed(serve, says, wait_until):
    served = serve(replicas=2, slots=4, mode="resilient", max_queued=200)
    expected = says(1, PROMPT, TOKENS)
    seeded = {"temperature": 1.1, "seed": 3, "stop": ["quick fox"], "presence_penalty": 0.4}
    wait_until(lambda: len(replicas()) == 2 and len(replicas("front")) == 2, timeout_s=120)
    wait_until(lambda: served.ask(max_tokens=1) is not None, timeout_s=60)
    uncut = served.ask(**seeded).choices[0].text
    requests = [{"stream": number % 2 == 0, **(seeded if number % 4 < 2 else {})} for number in range(48)]
    killed, others = replicas()

    answers = served.ask_many(requests, when_begun=lambda: kill(killed))

    assert [error for _, error in answers] == [None] * len(requests)
    for (text, _), request in zip(answers, requests, strict=True):
        assert text == (uncut if "seed" in request else expected)
    assert others in replicas()
    counts = served.factory.books.feedback.counts()
    assert counts["completions"] == len(requests) + 2
    wait_until(lambda: len(replicas()) == 2, timeout_s=120)
    assert served.ask().choices[0].text == expected


def test_resilient_tells_what_is_new_at_its_end_and_answers_what_has_begun(serve, says, wait_until):
    from aifactory.serve.app import is_running, stop

    served = serve(replicas=1, slots=2, mode="resilient", fronts=1)
    expected = says(1, PROMPT, TOKENS)
    wait_until(lambda: served.ask(max_tokens=1) is not None, timeout_s=60)
    requests = [{"stream": number % 2 == 0} for number in range(12)]
    ending = threading.Thread(target=stop, args=("alpha",), kwargs={"drain_timeout_s": 60.0})

    answers = served.ask_many(requests, when_begun=ending.start)
    ending.join(120)

    assert answers == [(expected, None)] * len(requests)
    assert not is_running("alpha")


def test_a_killed_proxy_is_replaced_by_one_that_still_says_what_became_of_a_replica(serve, says, wait_until):
    served = serve(replicas=1, slots=4)
    expected = says(1, PROMPT, TOKENS)
    wait_until(lambda: served.ask(max_tokens=1) is not None, timeout_s=60)
    (proxy,), (replica,) = processes("ProxyActor"), replicas()

    kill(proxy)
    wait_until(lambda: processes("ProxyActor") not in ([], [proxy]), timeout_s=60)

    def answers():
        try:
            return served.ask().choices[0].text == expected
        except openai.APIConnectionError:
            return False

    wait_until(answers, timeout_s=60)
    lost = served.ask_many([{"stream": False}] * 24, when_begun=lambda: kill(replica))
    assert {error.code for _, error in lost if error is not None} == {"replica_lost"}
    assert {text for text, error in lost if error is None} == {expected}


def test_all_replicas_tell_what_requests_hold_of_them(serve, wait_until):
    from ray.serve import get_deployment_handle

    served = serve(replicas=1, slots=2, mode="resilient", fronts=2)
    wait_until(lambda: served.ask(max_tokens=1) is not None and len(replicas("front")) == 2, timeout_s=120)
    handles = {name: get_deployment_handle(name, "aifactory-alpha") for name in ("front", "replica")}

    def held(name):
        return handles[name].broadcast("held").results(timeout_s=60)

    during = []
    served.ask_many([{"stream": True}] * 12, when_begun=lambda: during.append((held("front"), held("replica"))))
    ((fronts, (replica,)),) = during
    assert len(fronts) == 2 and sum(front["open"] for front in fronts) > 2
    assert replica["answers"] >= 2 and replica["waiting"] > 0 and replica["cache_used"] > 0
    wait_until(lambda: not any(sum(each.values()) for each in [*held("front"), *held("replica")]), timeout_s=60)

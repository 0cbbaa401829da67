"""Simulated users over real HTTP."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from aiohttp import web

from aifactory.config import Evaluate, Traffic
from aifactory.traffic.users import Asked, ask_and_correct, questions, steady_requests

CUT = Evaluate(prompt_bytes=20, answer_bytes=20)
TEXTS = [(f"user-{n}", "".join(f"text {n} line {i:03d} of it\n" for i in range(10))) for n in range(6)]


def traffic(**values: Any) -> Traffic:
    source = {"name": "users", "kind": "text", "path": "nowhere"}
    return Traffic.model_validate({"source": source, "requests": 20, "concurrency": 4, **values})


def asked_by(values: Traffic) -> list[Asked]:
    return questions(TEXTS, values, CUT, factory="small")


def test_the_questions_depend_on_the_texts_alone_and_each_has_a_key_of_its_own() -> None:
    first = asked_by(traffic())

    assert asked_by(traffic(concurrency=1, steady_per_s=9, timeout_s=1)) == first
    assert len(first) == 20
    assert len({question.key for question in first}) == 20
    other = questions([(user, text.upper()) for user, text in TEXTS], traffic(), CUT, factory="small")
    assert not {question.key for question in first} & {question.key for question in other}
    assert max(len(question.key) for question in first) <= 128


def test_shuffled_corrections_are_a_permutation() -> None:
    plain, shuffled = asked_by(traffic()), asked_by(traffic(shuffle_corrections=True))

    assert [q.prompt for q in shuffled] == [q.prompt for q in plain]
    assert sorted(q.correction for q in shuffled) == sorted(q.correction for q in plain)
    assert sum(a.correction != b.correction for a, b in zip(plain, shuffled, strict=True)) > 15


def test_every_question_is_asked_and_corrected_once_at_most_so_many_at_once(server: Any, shown: Any) -> None:
    async def slowly(_: dict[str, Any]) -> None:
        await asyncio.sleep(0.02)

    server.reply = slowly
    asked = asked_by(traffic())

    seen = ask_and_correct(server.url, "small", asked, traffic(), done=(), shown=shown)

    assert sorted(body["prompt"] for body in server.asked) == sorted(q.prompt for q in asked)
    assert {key: body["correction"] for key, body in server.feedback.items()} == {q.key: q.correction for q in asked}
    assert {body["user"] for body in server.feedback.values()} <= {user for user, _ in TEXTS}
    assert seen.answered == {"small-r1": 20}
    assert sorted(seen.acknowledged) == sorted(q.key for q in asked)
    assert seen.failed == []
    assert server.most_at_once == 4
    assert shown.updates[-1] == 20


def test_users_that_start_again_ask_only_what_is_missing(server: Any, shown: Any) -> None:
    asked = asked_by(traffic())
    done = {question.key for question in asked[:13]}

    seen = ask_and_correct(server.url, "small", asked, traffic(), done=done, shown=shown)

    assert set(server.feedback) == {question.key for question in asked[13:]} == set(seen.acknowledged)
    assert shown.updates[-1] == 20


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (lambda: web.Response(status=429, text="queue full"), "answer: 429 queue full"),
        (lambda: web.Response(text="not json", content_type="application/json"), "JSONDecodeError"),
        (lambda: web.Response(text="<html>"), "ContentTypeError"),
        (lambda: web.json_response({"model": "small-r1"}), "KeyError: 'id'"),
        (lambda: web.json_response([1]), "TypeError"),
    ],
)
def test_failed_requests_are_counted_with_their_reason_and_stop_no_other(
    reply: Any, reason: str, server: Any, shown: Any
) -> None:
    asked = asked_by(traffic())
    bad = {asked[3].prompt, asked[7].prompt}

    async def sometimes(body: dict[str, Any]) -> web.Response | None:
        return reply() if body["prompt"] in bad else None

    server.reply = sometimes
    seen = ask_and_correct(server.url, "small", asked, traffic(), done=(), shown=shown)

    assert len(seen.acknowledged) == 18
    assert sorted(line.split(":")[0] for line in seen.failed) == sorted([asked[3].key, asked[7].key])
    assert all(reason in line for line in seen.failed)


def test_a_server_that_goes_away_fails_the_rest_and_who_starts_again_asks_it(server: Any, shown: Any) -> None:
    asked = asked_by(traffic())

    def goes_away(_: Any) -> None:
        if len(server.feedback) == 8:
            server.stop_soon()

    server.on_feedback = goes_away
    seen = ask_and_correct(server.url, "small", asked, traffic(), done=(), shown=shown)

    assert len(seen.acknowledged) + len(seen.failed) == 20
    assert len(seen.acknowledged) <= len(server.feedback) <= 12
    assert any("Connect" in line or "Disconnected" in line for line in seen.failed)


def test_steady_requests_keep_their_rate_while_answers_are_slow_and_all_are_counted(server: Any) -> None:
    async def slowly(_: dict[str, Any]) -> None:
        await asyncio.sleep(0.6)

    server.reply = slowly
    values = traffic(steady_per_s=40)

    with steady_requests(server.url, "small", asked_by(values), values) as seen:
        time.sleep(1.0)

    assert 30 <= len(server.asked) <= 45
    assert seen.answered == {"small-r1": len(server.asked)}
    assert server.most_at_once >= 15
    assert server.feedback == {}
    assert len({body["seed"] for body in server.asked}) == len(server.asked)


def test_steady_requests_end_at_once_however_low_their_rate(server: Any) -> None:
    values = traffic(steady_per_s=0.01)
    start = time.monotonic()

    with steady_requests(server.url, "small", asked_by(values), values) as seen:
        while not seen.answered:
            time.sleep(0.01)

    assert time.monotonic() - start < 5


def test_steady_requests_go_on_when_nobody_answers_and_say_why(server: Any) -> None:
    values = traffic(steady_per_s=50)
    server.stop()

    with steady_requests(server.url, "small", asked_by(values), values) as seen:
        time.sleep(0.3)

    assert len(seen.failed) >= 5
    assert "ClientConnectorError" in seen.failed[0]

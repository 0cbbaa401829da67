"""Laws of feedback: acknowledged when it is kept, counted once, never about something unknown."""

from __future__ import annotations

import json

import httpx
import pytest
import sqlalchemy as sa

from aifactory.records.tables import choices, feedback


@pytest.fixture
def completion(endpoint):
    return endpoint.client.completions.create(model="alpha", prompt="hello", max_tokens=2).id


def send(endpoint, headers=None, **body):
    return httpx.post(f"{endpoint.url}/v1/feedback", json=body, headers=headers)


def test_feedback_is_kept_when_it_is_acknowledged(endpoint, lasting_factory, completion):
    log = lasting_factory.books.feedback

    response = send(endpoint, completion=completion, score=0.5, correction="你好 🙂", comment="why", user="ann")

    assert response.status_code == 200
    assert response.json()["counted"] is True
    kept = log.corrections()[-1]
    assert (kept.completion, kept.correction, kept.user) == (completion, "你好 🙂", "ann")
    assert response.json()["idempotency_key"] in log.feedback_keys()


@pytest.mark.parametrize("where", ["header", "body", "derived"])
def test_feedback_that_is_repeated_is_counted_once(endpoint, lasting_factory, completion, where):
    key = f"key-{completion}"
    headers = {"Idempotency-Key": key} if where == "header" else None
    body = {"completion": completion, "score": 1} | ({"idempotency_key": key} if where == "body" else {})
    before = lasting_factory.books.feedback.counts()["feedback"]

    answers = [send(endpoint, headers, **body).json() for _ in range(3)]

    assert [answer["counted"] for answer in answers] == [True, False, False]
    assert len({answer["idempotency_key"] for answer in answers}) == 1
    assert lasting_factory.books.feedback.counts()["feedback"] == before + 1
    if where != "derived":
        assert answers[0]["idempotency_key"] == key


def test_another_opinion_is_counted_too(endpoint, completion):
    opinions = [{"score": 1}, {"score": 0}, {"score": 1, "user": "ann"}, {"score": 1, "comment": "x"}]

    counted = [send(endpoint, completion=completion, **opinion).json()["counted"] for opinion in opinions]

    assert counted == [True] * 4


def test_a_key_belongs_to_one_answer(endpoint, completion):
    other = endpoint.client.completions.create(model="alpha", prompt="hello", max_tokens=2).id
    send(endpoint, completion=completion, score=1, idempotency_key=f"one-{completion}")

    response = send(endpoint, completion=other, score=1, idempotency_key=f"one-{completion}")

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "idempotency_key"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"completion": "cmpl-unknown", "score": 1}, "completion"),
        ({"completion": "x" * 65, "score": 1}, "completion"),
        ({"completion": 5, "score": 1}, "completion"),
        ({"score": 1.01}, "score"),
        ({"score": -1}, "score"),
        ({"score": "good"}, "score"),
        ({"score": True}, "score"),
        ({}, "score"),
        ({"correction": ""}, "correction"),
        ({"correction": "a\0b"}, "correction"),
        ({"correction": "half \ud83d"}, "correction"),
        ({"comment": "a\0b"}, "comment"),
        ({"score": 1, "user": "x" * 257}, "user"),
        ({"score": 1, "idempotency_key": ""}, "idempotency_key"),
        ({"score": 1, "idempotency_key": "x" * 129}, "idempotency_key"),
        ({"score": 1, "rating": 5}, "rating"),
    ],
)
def test_wrong_feedback_is_named_and_not_kept(endpoint, lasting_factory, completion, body, field):
    before = lasting_factory.books.feedback.counts()["feedback"]
    content = {"completion": completion, **body}

    response = httpx.post(f"{endpoint.url}/v1/feedback", content=json.dumps(content).encode())

    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
    assert lasting_factory.books.feedback.counts()["feedback"] == before


def test_a_key_in_the_header_that_is_too_long_is_named(endpoint, completion):
    response = send(endpoint, {"Idempotency-Key": "x" * 129}, completion=completion, score=1)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "idempotency_key"


# ── choices ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def several(endpoint):
    """The id of three answers to one prompt and three to another."""
    options = {"prompt": ["hello", "good "], "n": 3, "temperature": 1, "max_tokens": 2}
    return endpoint.client.completions.create(model="alpha", **options).id


@pytest.fixture
def pairs(lasting_factory):
    """The choices that were kept: of each preferred answer, the others."""

    def read():
        query = sa.select(feedback.c.completion, choices.c.rejected).join(choices, choices.c.feedback == feedback.c.seq)
        found = {}
        with lasting_factory.books.database.read() as connection:
            for preferred, other in connection.execute(query.order_by(choices.c.rejected)):
                found.setdefault(preferred, []).append(other)
        return found

    return read


def test_a_choice_by_index_is_against_all_others_to_the_same_prompt(endpoint, several, pairs):
    response = send(endpoint, completion=several, preferred=4)

    assert response.json()["counted"] is True
    assert pairs()[f"{several}-4"] == [f"{several}-3", f"{several}-5"]


def test_a_choice_may_name_the_other(endpoint, several, pairs):
    one, two = (endpoint.client.completions.create(model="alpha", prompt="hello", max_tokens=2).id for _ in range(2))

    send(endpoint, completion=several, preferred=0, rejected=2)
    send(endpoint, preferred=one, rejected=two)

    assert pairs()[f"{several}-0"] == [f"{several}-2"]
    assert pairs()[one] == [two]


def test_a_choice_that_is_repeated_is_counted_once(endpoint, several, pairs):
    answers = [send(endpoint, completion=several, preferred=1).json() for _ in range(2)]

    assert [answer["counted"] for answer in answers] == [True, False]
    assert len(pairs()[f"{several}-1"]) == 2
    assert send(endpoint, completion=several, preferred=2).json()["counted"] is True


def test_one_of_several_is_scored_by_its_index(endpoint, lasting_factory, several):
    send(endpoint, completion=several, index=3, correction="better")

    assert lasting_factory.books.feedback.corrections()[-1].completion == f"{several}-3"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"preferred": 6}, "preferred"),
        ({"preferred": -1}, "preferred"),
        ({"preferred": True}, "preferred"),
        ({"preferred": 0, "rejected": 9}, "rejected"),
        ({"preferred": 0, "rejected": 0}, "rejected"),
        ({"preferred": 0, "rejected": 5}, "rejected"),
        ({"preferred": 0, "index": 1}, "index"),
        ({"preferred": "cmpl-x"}, "preferred"),
        ({"rejected": 0}, "preferred"),
        ({"score": 1}, "index"),
        ({"score": 1, "index": 9}, "completion"),
        ({"score": 1, "index": 128}, "index"),
        ({"completion": None, "preferred": "cmpl-x"}, "rejected"),
        ({"completion": None, "preferred": "cmpl-x", "rejected": "cmpl-y"}, "completion"),
        ({"completion": None, "preferred": 0}, "completion"),
    ],
)
def test_a_wrong_choice_is_named_and_not_kept(endpoint, lasting_factory, several, body, field):
    before = lasting_factory.books.feedback.counts()["feedback"]

    response = send(endpoint, **{"completion": several, **body})

    assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    assert lasting_factory.books.feedback.counts()["feedback"] == before

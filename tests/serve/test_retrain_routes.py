"""Laws of retrains that are asked for over HTTP: on disk before it is acknowledged, and once for who repeats himself."""

from __future__ import annotations

import httpx
import pytest


def ask(endpoint, headers=None, **body):
    return httpx.post(f"{endpoint.url}/v1/retrains", json=body, headers=headers)


def test_a_retrain_that_was_acknowledged_is_open_and_in_the_audit(endpoint, lasting_factory):
    response = ask(endpoint, reason="new products", despite_cooldown=True)

    told = response.json()
    assert response.status_code == 202
    kept = lasting_factory.books.retrain_requests.named(told["id"])
    assert (kept.reason, kept.despite_cooldown, kept.state) == ("new products", True, "open")
    assert told["state"] == "open"
    assert told["id"] in {line.subject for line in lasting_factory.books.journal.audited().lines}
    assert httpx.get(f"{endpoint.url}/v1/retrains/{told['id']}").json() == told


@pytest.mark.parametrize("where", ["header", "body"])
def test_who_repeats_himself_has_asked_once(endpoint, lasting_factory, where):
    key = f"a key in the {where}"
    headers = {"Idempotency-Key": key} if where == "header" else None
    body = {"idempotency_key": key} if where == "body" else {}
    before = len(lasting_factory.books.retrain_requests.all())

    answers = [ask(endpoint, headers, **body).json() for _ in range(3)]

    assert [answer["id"] for answer in answers] == [answers[0]["id"]] * 3
    assert len(lasting_factory.books.retrain_requests.all()) == before + 1
    other = ask(endpoint, headers, reason="something else", **body)
    assert (other.status_code, other.json()["error"]["param"]) == (400, "idempotency_key")
    assert ask(endpoint).json()["id"] != ask(endpoint).json()["id"]


def test_what_became_of_a_request_is_shown(endpoint, lasting_factory):
    requests = lasting_factory.books.retrain_requests
    name = ask(endpoint).json()["id"]
    requests.withdraw(reason="by nobody's wish")

    assert httpx.get(f"{endpoint.url}/v1/retrains/{name}").json()["state"] == "withdrawn"
    unknown = httpx.get(f"{endpoint.url}/v1/retrains/retrain-0")
    assert unknown.status_code == 404
    assert "retrain-0" in unknown.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"reason": ""}, "reason"),
        ({"reason": "x" * 501}, "reason"),
        ({"despite_cooldown": "yes"}, "despite_cooldown"),
        ({"why": "so"}, "why"),
    ],
)
def test_a_body_that_says_something_else_is_refused_by_its_field(endpoint, body, field):
    response = ask(endpoint, **body)

    assert (response.status_code, response.json()["error"]["param"]) == (400, field)

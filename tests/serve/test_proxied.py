"""Laws of what Serve's proxy says of answers that nobody ends: in OpenAI's envelope, where anything can still be said."""

from __future__ import annotations

import asyncio
import json

import pytest

from aifactory.serve.proxy import Proxied, middlewares
from aifactory.serve.wire import event

STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]
JSON = [(b"content-type", b"application/json"), (b"content-length", b"20")]
PLAIN = [(b"content-type", b"text/plain; charset=utf-8"), (b"retry-after", b"1"), (b"x-request-id", b"r1")]


def start(headers, status=200):
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(data, more=False):
    return {"type": "http.response.body", "body": data, "more_body": more}


def sent_by(*messages, app_name="aifactory-alpha", scope=None):
    """What a client gets of an application that sends these messages and returns."""

    class Router:
        def match_route(self, path):
            handle = type("Handle", (), {"app_name": app_name})
            return ("/", handle, False) if path.startswith("/v1") else None

    class App:
        proxy_router = Router()

        async def __call__(self, scope, receive, send):
            for message in messages:
                await send(message)

    class Around:
        """As Serve's own middleware stands between."""

        def __init__(self):
            self._app = App()

        async def __call__(self, scope, receive, send):
            await self._app(scope, receive, send)

    sent = []

    async def send(message):
        sent.append(message)

    (middleware,) = middlewares()
    assert middleware.cls is Proxied
    asyncio.run(Proxied(Around())(scope or {"type": "http", "path": "/v1/completions"}, None, send))
    return sent


def error_of(data):
    return json.loads(data.removeprefix(b"data: "))["error"]


def test_an_answer_that_ends_is_passed_on_message_by_message():
    whole = [start(STREAM), body(b"data: 1\n\n", more=True), body(b"")]
    refused = [start(JSON, 503), body(b'{"error": {"x": 1}}')]

    assert sent_by(*whole) == whole
    assert sent_by(*refused) == refused


def test_where_nothing_was_said_the_client_is_told_so_in_the_envelope():
    head, said = sent_by()

    assert head["status"] == 502
    assert dict(head["headers"])[b"content-length"] == str(len(said["body"])).encode()
    assert (error_of(said["body"])["type"], error_of(said["body"])["code"]) == ("server_error", "replica_lost")
    assert not said["more_body"]


def test_a_stream_that_breaks_off_ends_with_an_event_that_says_so_and_without_done():
    *before, last = sent_by(start(STREAM), body(event({"text": "the"}), more=True))

    assert before == [start(STREAM), body(event({"text": "the"}), more=True)]
    assert error_of(last["body"])["code"] == "replica_lost"
    assert last["body"].endswith(b"\n\n") and b"[DONE]" not in last["body"]
    assert not last["more_body"]


def test_an_answer_whose_length_was_promised_stays_broken_off():
    begun = [start(JSON), body(b'{"a":', more=True)]

    assert sent_by(*begun) == begun


@pytest.mark.parametrize(("status", "kind"), [(429, "rate_limit_error"), (503, "server_error"), (408, "timeout_error")])
def test_what_serve_says_itself_keeps_its_status_and_gets_the_envelope(status, kind):
    head, said = sent_by(start(PLAIN, status), body(b"no room", more=True), body(b" here"))

    assert head["status"] == status
    assert (error_of(said["body"])["message"], error_of(said["body"])["type"]) == ("no room here", kind)
    assert dict(head["headers"]) == {
        b"content-type": b"application/json",
        b"content-length": str(len(said["body"])).encode(),
        b"retry-after": b"1",
        b"x-request-id": b"r1",
    }


def test_what_other_applications_say_stays_as_it_is():
    for messages in ([], [start(STREAM), body(b"data: 1\n\n", more=True)], [start(PLAIN, 503), body(b"no")]):
        assert sent_by(*messages, app_name="somebody") == messages
        assert sent_by(*messages, scope={"type": "http", "path": "/elsewhere"}) == messages

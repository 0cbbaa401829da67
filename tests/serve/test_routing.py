"""Laws of routing, with real endpoints elsewhere: who answers what, who takes over, and what that costs whom."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import openai
import pydantic
import pytest

from aifactory.config import Gateway as GatewayOptions
from aifactory.config import Route
from aifactory.records.limits import Limits, Subject
from aifactory.serve.bodies import ChatBody, CompletionBody
from aifactory.serve.releases import Releases
from aifactory.serve.routing import prompt_bytes, targets
from aifactory.text.tokenizer import load_tokenizer

ASK = {"max_tokens": 5, "prompt": "hello"}


class Elsewhere(BaseHTTPRequestHandler):
    """Answers whatever its server is told to."""

    def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers.get("Authorization"), json.loads(data)))
        status, body = self.server.says
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def elsewhere():
    """A server that says 500 until it is told to say something else."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    server.asked, server.says = [], (500, b"oh")
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def serving(tmp_path, answer_on, quick, make_small):
    """Serve an engine that says a text, with these options of the gateway."""
    with contextlib.ExitStack() as stack:

        def serve(text, folder="here", **gateway):
            factory = make_small(
                tmp_path / folder, gateway={name: json.dumps(value) for name, value in gateway.items()}
            )
            factory.promote(factory.publish(1))
            engine = quick(text)
            releases = Releases(factory.books, lambda path: (engine, load_tokenizer(path)))
            releases.load_first()
            endpoint = stack.enter_context(answer_on(factory, releases))
            endpoint.books, endpoint.quick = factory.books, engine
            return endpoint

        yield serve


def route(model, *to, **more):
    return {"model": model, "to": [{"model": name} for name in to], **more}


# ── who is asked ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_first_route_of_a_name_and_a_size_is_taken_and_weights_are_shares():
    routes = [
        Route.model_validate(route("fast", "small", max_prompt_bytes=5)),
        Route.model_validate(
            {
                "model": "fast",
                "to": [{"model": "a", "weight": 3}, {"model": "b"}],
                "fallback": ["c", "a"],
                "max_prompt_bytes": 100,
            }
        ),
    ]

    def asked(model, prompt, identity="x"):
        return targets(routes, CompletionBody(model=model, prompt=prompt), identity)

    assert asked("fast", "12345") == ["small"]
    assert asked("fast", "x" * 101) == ["fast"]
    assert asked("other", "hi") == ["other"]
    drawn = [asked("fast", "x" * 50, f"r{n}") for n in range(2_000)]
    firsts = Counter(each[0] for each in drawn)
    assert set(firsts) == {"a", "b"}
    assert 0.70 < firsts["a"] / 2_000 < 0.80
    assert {tuple(each) for each in drawn} == {("a", "c"), ("b", "c", "a")}
    assert drawn == [asked("fast", "x" * 50, f"r{n}") for n in range(2_000)]


def test_sizes_are_bytes_of_all_texts_and_token_ids_count_four():
    assert prompt_bytes(CompletionBody(model="m", prompt="größe")) == 7
    assert prompt_bytes(CompletionBody(model="m", prompt=["ab", "c"])) == 3
    assert prompt_bytes(CompletionBody(model="m", prompt=[1, 2, 3])) == 12
    parts = [{"type": "text", "text": "abc"}, {"type": "text", "text": "d"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "ef"}]
    assert prompt_bytes(ChatBody(model="m", messages=messages)) == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"routes": [route("a", "outside:x")]}, r"expected a name in outside \(none\), found 'outside:x'"),
        ({"outside": {"x": {"url": "https://x/v1", "model": "m"}}}, "found none to 'outside:x'"),
        (
            {
                "outside": {"x": {"url": "https://x/v1", "model": "m"}},
                "routes": [route("a", "b", fallback=["outside:x"])],
                "mask_answers": True,
            },
            "expected answer_guards and mask_answers without routes to outside",
        ),
        ({"routes": [route("a", "b", min_prompt_bytes=5, max_prompt_bytes=4)]}, "turn them round"),
    ],
)
def test_routes_that_lead_nowhere_are_refused(options, said):
    with pytest.raises(pydantic.ValidationError, match=said):
        GatewayOptions.model_validate(options)


# ── over HTTP ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_name_leads_to_a_model_here_and_one_that_is_not_here_is_passed_over(serving):
    endpoint = serving("abcdef", routes=[route("fast", "gone", fallback=["alpha"]), route("never", "gone")])
    client = endpoint.client

    answer = client.completions.create(model="fast", **ASK)
    assert (answer.model, answer.choices[0].text) == ("alpha-r1", "abcdef")
    assert endpoint.books.feedback.completion(answer.id) is not None
    with pytest.raises(openai.NotFoundError, match="'gone'"):
        client.completions.create(model="never", **ASK)
    names = [model.id for model in client.models.list()]
    assert names == ["alpha", "alpha-r1", "fast", "never"]
    assert client.models.retrieve("fast").id == "fast"


def test_an_endpoint_elsewhere_answers_whole_streamed_and_chats_and_is_told_nothing_of_ours(serving, elsewhere):
    other = serving("elsewhere!", folder="there")
    outside = {"big": {"url": f"{other.url}/v1", "model": "alpha", "api_key": "secret-of-ours"}}
    routes = [route("big", "outside:big")]
    endpoint = serving("here", outside=outside, routes=routes)
    client = endpoint.client

    raw = client.completions.with_raw_response.create(model="big", user="ann", **ASK)
    assert raw.headers["x-answered-by"] == "outside:big"
    answer = raw.parse()
    assert answer.choices[0].text == "elsewhere!"
    kept = other.books.feedback.completion(answer.id)
    assert (kept.user, json.loads(kept.request)["max_tokens"]) == (None, 5)
    assert endpoint.books.feedback.completion(answer.id) is None
    for usage in (False, True):
        options = {"stream_options": {"include_usage": True}} if usage else {}
        chunks = list(client.completions.create(model="big", stream=True, **options, **ASK))
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "elsewhere!"
        assert [chunk.usage is not None for chunk in chunks if not chunk.choices] == [True] * usage
    chat = client.chat.completions.create(model="big", messages=[{"role": "user", "content": "x"}], max_tokens=5)
    assert chat.choices[0].message.content == "elsewhere!"
    assert endpoint.quick.asked == []


def test_one_that_fails_before_its_first_word_is_passed_over_and_the_client_sees_nothing_of_it(serving, elsewhere):
    outside = {
        "broken": {"url": elsewhere.url, "model": "m", "timeout_s": 5},
        "away": {"url": "http://127.0.0.1:9/v1", "model": "m"},
    }
    routes = [
        route("safe", "outside:broken", fallback=["outside:away", "alpha"]),
        route("alpha", "alpha", fallback=["outside:broken"]),
        route("lost", "outside:away"),
    ]
    endpoint = serving("abcdef", outside=outside, routes=routes)
    ask = endpoint.client.completions
    for says in ((500, b"oh"), (429, b"{}"), (401, b"{}"), (200, b"no json")):
        elsewhere.says = says
        assert ask.create(model="safe", **ASK).choices[0].text == "abcdef"
        chunks = ask.create(model="safe", stream=True, **ASK)
        assert "".join(chunk.choices[0].text for chunk in chunks) == "abcdef"
    with pytest.raises(openai.APIStatusError) as error:
        ask.create(model="lost", **ASK)
    assert (error.value.status_code, error.value.code) == (502, "outside_failed")

    # What is wrong with the request is not mended elsewhere.
    elsewhere.says = (
        400,
        json.dumps({"error": {"message": "too hot", "type": "x", "param": None, "code": None}}).encode(),
    )
    with pytest.raises(openai.BadRequestError, match="too hot"):
        ask.create(model="safe", **ASK)
    # A prompt that is too long here is asked elsewhere.
    said = {"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": []}
    elsewhere.says = (200, json.dumps(said).encode())
    long = httpx.post(
        f"{endpoint.url}/v1/completions", json={"model": "alpha", "prompt": "word " * 400, "max_tokens": 5}, timeout=20
    )
    assert long.headers["x-answered-by"] == "outside:broken"
    assert elsewhere.asked[-1][2]["model"] == "m"


def test_what_is_answered_elsewhere_is_paid_by_the_key_that_asked(serving, elsewhere, monkeypatch):
    monkeypatch.setenv("KEY_OF_OURS", "s3cret")
    outside = {"big": {"url": elsewhere.url, "model": "m", "api_key": "${KEY_OF_OURS}"}}
    endpoint = serving("here", outside=outside, routes=[route("big", "outside:big")])
    key = endpoint.books.keys.create("app", limited=Limits(budget_tokens=100))
    client = endpoint.client.with_options(api_key=key.token)
    usage = {"prompt_tokens": 30, "completion_tokens": 40, "total_tokens": 70}
    said = {"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": [], "usage": usage}
    elsewhere.says = (200, json.dumps(said).encode())

    client.completions.create(model="big", **ASK)
    spent = endpoint.books.allowances.spent("month")[Subject("key", key.key.id)]
    assert (spent.prompt_tokens, spent.answer_tokens) == (30, 40)
    client.completions.create(model="big", **ASK)
    with pytest.raises(openai.APIStatusError) as error:
        client.completions.create(model="big", **ASK)
    assert error.value.status_code == 402
    path, authorization, _ = elsewhere.asked[0]
    assert (path, authorization, len(elsewhere.asked)) == ("/v1/completions", "Bearer s3cret", 2)
    assert key.token not in str(elsewhere.asked)


def test_whoever_leaves_a_stream_from_elsewhere_ends_it_there_too(
    serving, fake_engine, answer_on, make_small, tmp_path, wait_until
):
    there = make_small(tmp_path / "slow")
    there.promote(there.publish(1))
    engine = fake_engine()
    releases = Releases(there.books, lambda path: (engine, load_tokenizer(path)))
    releases.load_first()
    with answer_on(there, releases) as other:
        outside = {"slow": {"url": f"{other.url}/v1", "model": "alpha"}}
        endpoint = serving("here", outside=outside, routes=[route("slow", "outside:slow")])
        key = endpoint.books.keys.create("app", limited=Limits(concurrent=1))
        client = endpoint.client.with_options(api_key=key.token)
        asked = threading.Timer(0.1, lambda: engine.say("so ", to=0))
        asked.start()
        stream = client.completions.create(model="slow", stream=True, **ASK)
        assert next(iter(stream)).choices[0].text == "so "

        stream.close()

        wait_until(lambda: engine.cancelled == engine.asked)
        wait_until(lambda: endpoint.books.allowances.spent("month") != {})
        assert endpoint.books.allowances.spent("month")[Subject("key", key.key.id)].requests == 1

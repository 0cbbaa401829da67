"""Laws of what is refused: OpenAI's envelope, the right status, the field by name, and nobody else is harmed."""

from __future__ import annotations

import json
import re
import socket
import threading

import httpx
import openai
import pytest

from aifactory.serve.releases import Releases

MESSAGES = [{"role": "user", "content": "hello"}]
COMPLETE = {"model": "alpha", "prompt": "hello", "max_tokens": 2}
CHAT = {"model": "alpha", "messages": MESSAGES, "max_tokens": 2}


def post(endpoint, path, body, **options):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{endpoint.url}{path}", content=content, timeout=20, **options)


def error_of(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


WRONG_VALUES = [
    ("n", 0),
    ("n", 129),
    ("n", True),
    ("logprobs", 21),
    ("logprobs", "yes"),
    ("best_of", 2),
    ("suffix", "x"),
    ("logit_bias", {"5": 101}),
    ("logit_bias", {"five": 1}),
    ("logit_bias", {"05": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"9" * 5000: 1}),
    ("logit_bias", {"100000": 1}),
    ("logit_bias", {str(i): 1 for i in range(1025)}),
    ("logit_bias", [5]),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("min_p", 1.5),
    ("top_k", -2),
    ("top_k", 1.5),
    ("stop_token_ids", [100_000]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [1] * 65),
    ("stop_token_ids", 5),
    ("tools", [{"type": "function"}]),
    ("functions", [{}]),
    ("response_format", {"type": "xml"}),
    ("response_format", {"type": "json_schema"}),
    ("response_format", {"type": "json_object", "json_schema": {"name": "x", "schema": {}}}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "more": 1}}),
    ("structured_outputs", {}),
    ("structured_outputs", {"regex": "("}),
    ("structured_outputs", {"regex": "a", "json": {}}),
    ("structured_outputs", {"choice": ["a"]}),
    ("guided_json", {}),
    ("temprature", 0.5),
    ("temperature", -0.1),
    ("temperature", "hot"),
    ("temperature", True),
    ("top_p", 0),
    ("top_p", 1.5),
    ("seed", 1.5),
    ("seed", 2**70),
    ("stop", ["a", 5]),
    ("stop", ""),
    ("stop", ["x"] * 17),
    ("stop", ["x" * 1025]),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 101),
    ("max_tokens", 2.0),
    ("max_tokens", "2"),
    ("user", "x" * 257),
    ("user", "a\0b"),
    ("user", 5),
    ("model", 5),
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(("name", "value"), WRONG_VALUES)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_supported_is_refused_by_name(endpoint, path, name, value, stream):
    body = {**(COMPLETE if path == "/v1/completions" else CHAT), "stream": stream, name: value}
    if name == "stream_options":
        body["stream"] = False

    error = error_of(post(endpoint, path, body), 400)

    assert error["type"] == "invalid_request_error"
    assert re.split(r"[\[.]", error["param"])[0] == name
    assert name in error["message"]


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (5, "prompt"),
        (None, "prompt"),
        ({}, "prompt"),
        ([], "prompt"),
        ([1, "a"], "prompt[1]"),
        ([1, True], "prompt[1]"),
        ([-1], "prompt"),
        ([100_000], "prompt"),
        (["one", 5], "prompt[1]"),
        ([[1], [2, "a"]], "prompt[1][1]"),
        ([[1], 5], "prompt[1]"),
        ([[1], []], "prompt[1]"),
        ([[1], [100_000]], "prompt[1]"),
        (["x"] * 129, "prompt"),
        (["short", "word " * 1000], "prompt"),
        ("half \ud83d", "prompt"),
        ("word " * 1000, "prompt"),
        ([5] * 160, "prompt"),
        ([5] * 159, "max_tokens"),
    ],
)
def test_a_wrong_prompt_is_named(endpoint, prompt, field):
    error = error_of(post(endpoint, "/v1/completions", {**COMPLETE, "prompt": prompt}), 400)

    assert error["param"] == field


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("hello", "messages"),
        (["hello"], "messages[0]"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([*MESSAGES, {"role": "user"}], "messages[1].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": "half \udc00"}], "messages"),
        ([{"role": "user", "content": "word " * 1000}], "messages"),
        ([{"role": "assistant", "content": None, "tool_calls": 5}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "messages[0].tool_calls[0]"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_wrong_messages_are_named(endpoint, messages, field):
    error = error_of(post(endpoint, "/v1/chat/completions", {**CHAT, "messages": messages}), 400)

    assert error["param"] == field


@pytest.mark.parametrize(
    ("path", "options", "field"),
    [
        ("/v1/completions", {"n": 2, "best_of": 3}, "best_of"),
        ("/v1/completions", {"logprobs": True}, "logprobs"),
        ("/v1/completions", {"echo": "yes"}, "echo"),
        ("/v1/completions", {"echo": True, "max_tokens": -1}, "max_tokens"),
        ("/v1/completions", {"prompt": ["x"] * 65, "n": 2}, "prompt"),
        ("/v1/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", {"logprobs": 2}, "logprobs"),
        ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("/v1/chat/completions", {"echo": True}, "echo"),
        ("/v1/chat/completions", {"best_of": 2}, "best_of"),
        ("/v1/chat/completions", {"tool_choice": "auto"}, "tool_choice"),
        ("/v1/chat/completions", {"tool_choice": "required"}, "tool_choice"),
        ("/v1/chat/completions", {"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ("/v1/chat/completions", {"parallel_tool_calls": False}, "parallel_tool_calls"),
        ("/v1/chat/completions", {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ],
)
def test_what_belongs_to_one_of_the_two_or_to_another_option_is_named(endpoint, path, options, field):
    body = {**(COMPLETE if path == "/v1/completions" else CHAT), **options}

    assert error_of(post(endpoint, path, body), 400)["param"] == field


def test_a_missing_field_is_named(endpoint):
    assert error_of(post(endpoint, "/v1/completions", {"model": "alpha"}), 400)["param"] == "prompt"
    assert error_of(post(endpoint, "/v1/completions", {"prompt": "x"}), 400)["param"] == "model"
    assert error_of(post(endpoint, "/v1/chat/completions", {"model": "alpha"}), 400)["param"] == "messages"
    assert error_of(post(endpoint, "/v1/feedback", {"score": 1}), 400)["param"] == "completion"


def test_an_unknown_field_inside_an_option_is_named_with_its_place(endpoint):
    body = {**COMPLETE, "stream": True, "stream_options": {"include_obfuscation": True}}

    error = error_of(post(endpoint, "/v1/completions", body), 400)

    assert error["param"] == "stream_options.include_obfuscation"
    assert "(include_usage)" in error["message"]


def test_the_newer_name_of_the_length_is_the_one_that_is_named(endpoint):
    body = {"model": "alpha", "messages": MESSAGES, "max_completion_tokens": 101}

    assert error_of(post(endpoint, "/v1/chat/completions", body), 400)["param"] == "max_completion_tokens"


def test_a_prompt_beyond_the_context_has_openais_code(endpoint):
    with pytest.raises(openai.BadRequestError) as refused:
        endpoint.client.chat.completions.create(
            model="alpha", messages=[{"role": "user", "content": "word " * 1000}], max_tokens=5
        )

    assert refused.value.code == "context_length_exceeded"
    assert "160" in refused.value.message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"5",
        b'{"model": "alpha", "prompt": "\xff\xfe"}',
        '{"model": "alpha", "prompt": "x"}'.encode("utf-16"),
        b'{"model": "alpha", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "alpha", "prompt": "x", "temperature": NaN}',
        b'{"model": "alpha", "prompt": "x", "temperature": Infinity}',
        b'{"model": "alpha", "prompt": "x", "top_p": 1e999}',
        b'{"model": "alpha", "prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}",
        b'{"model": "alpha", "prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"model": "alpha", "messages": [' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"]}",
        b'{"model": "alpha", "prompt": "x", "\\ud800": 1}',
        b'{"\\udc00": "\\ud800"}',
        b'{"a": "\\ud800", "b": ' + b"[" * 900 + b"]" * 900 + b"}",
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/feedback"])
def test_a_malformed_body_is_refused(endpoint, path, body):
    assert error_of(post(endpoint, path, body), 400)["type"] == "invalid_request_error"


def test_whatever_is_nested_within_itself_is_answered_or_refused_by_its_levels(endpoint):
    def nested(depth):
        return '{"a":' * depth + "1" + "}" * depth

    fields = {
        "/v1/completions": ('"prompt": "x", "structured_outputs": {"json": %s}', '"prompt": "x", "logit_bias": %s'),
        "/v1/chat/completions": (
            '"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema", "json_schema": '
            '{"name": "n", "schema": %s}}',
            '"messages": [{"role": "user", "content": "x", "name": %s}]',
        ),
        "/tokenize": ('"messages": [{"role": "user", "content": "x"}], "tools": [%s]',),
    }
    for path, bodies in fields.items():
        for body in bodies:
            for depth in (1, 60, 96, 100, 300, *range(900, 1_000, 12)):
                answer = post(endpoint, path, ('{"model": "alpha", ' + body % nested(depth) + "}").encode())
                assert answer.status_code in (200, 400)
                assert depth < 100 or "100 levels" in error_of(answer, 400)["message"]


def test_a_deeply_nested_message_breaks_no_template(lasting_factory, answer_on, load, tmp_path):
    def with_template(folder):
        engine, tokenizer = load(folder)
        template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
        return engine, type(tokenizer)(tokenizer.__reduce__()[1][0], chat_template=template)

    releases = Releases(lasting_factory.books, with_template)
    releases.load_first()
    with answer_on(lasting_factory, releases) as endpoint:
        said = endpoint.client.chat.completions.create(model="alpha", messages=MESSAGES, max_tokens=2)
        for depth in (100, 300, 450, 900):
            message = b'{"role": "user", "content": "x", "name": ' + b"[" * depth + b"]" * depth + b"}"
            response = post(
                endpoint, "/v1/chat/completions", b'{"model": "alpha", "max_tokens": 2, "messages": [%s]}' % message
            )
            assert response.status_code in (200, 400), response.text

    assert lasting_factory.books.feedback.completion(said.id).prompt == "hello<|endoftext|>"


def test_a_body_that_is_too_large_is_refused_with_413(endpoint):
    error_of(post(endpoint, "/v1/completions", {**COMPLETE, "prompt": "x" * 30_000}), 413)

    with pytest.raises(openai.APIStatusError) as refused:
        endpoint.client.completions.create(model="alpha", prompt="x" * 3_000_000)

    assert refused.value.status_code == 413


def test_an_unknown_model_is_404_by_its_name(endpoint):
    with pytest.raises(openai.NotFoundError) as refused:
        endpoint.client.completions.create(model="gpt-5", prompt="x")

    assert refused.value.code == "model_not_found"
    assert refused.value.param == "model"
    assert "gpt-5" in refused.value.message


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/images", "/v2/completions", "/healthzz", "/v1/models/a/b", "/%ff"])
def test_an_unknown_path_is_404(endpoint, path):
    error_of(httpx.get(f"{endpoint.url}{path}"), 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/completions", "POST"),
        ("PUT", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/models/alpha-r1", "GET"),
        ("OPTIONS", "/v1/feedback", "POST"),
        ("POST", "/healthz", "GET"),
    ],
)
def test_another_method_is_405_and_says_which_is_allowed(endpoint, method, path, allowed):
    response = httpx.request(method, f"{endpoint.url}{path}")

    error_of(response, 405)
    assert response.headers["allow"] == allowed


def test_health_answers_get_and_head_and_a_slash_at_the_end(endpoint):
    assert httpx.get(f"{endpoint.url}/readyz").json() == {"status": "ok", "model": "alpha-r1"}
    assert httpx.get(f"{endpoint.url}/healthz").json() == {"status": "ok"}
    assert httpx.head(f"{endpoint.url}/healthz").status_code == 200
    assert httpx.get(f"{endpoint.url}/v1/models/").status_code == 200


def test_a_malformed_host_harms_nothing(endpoint):
    host, port = endpoint.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: [::bad\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(4096), b""))

    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"POST /v1/completions", 413),
        (b"POST /v1/nothing", 404),
        (b"PUT /v1/completions", 405),
        (b"POST /v1/files", 400),
    ],
)
def test_a_refusal_comes_also_to_who_is_still_sending(endpoint, line, status):
    host, port = endpoint.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(line + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 8000000\r\n\r\n")
        for _ in range(80):
            connection.sendall(b"x" * 100_000)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))

    assert answer.startswith(b"HTTP/1.1 %d" % status)
    assert b"invalid_request_error" in answer


def test_who_sends_no_more_after_a_refusal_is_answered_all_the_same(endpoint, wait_until):
    host, port = endpoint.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"POST /v1/nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nx")

        assert connection.recv(4096).startswith(b"HTTP/1.1 404")


def test_without_a_release_it_is_alive_and_all_else_is_503(factory, answer_on, load):
    releases = Releases(factory.books, load)
    releases.load_first()
    with answer_on(factory, releases) as endpoint:
        assert httpx.get(f"{endpoint.url}/healthz").status_code == 200
        assert httpx.get(f"{endpoint.url}/readyz").status_code == 503
        assert httpx.post(f"{endpoint.url}/tokenize", json={"prompt": "x"}).status_code == 503
        with pytest.raises(openai.InternalServerError) as refused:
            endpoint.client.models.list()
        with pytest.raises(openai.InternalServerError):
            endpoint.client.completions.create(model="alpha", prompt="x", stream=True)

    assert refused.value.status_code == 503


@pytest.mark.parametrize("prefix", ["/alpha", "/a/b"])
def test_below_a_prefix_it_is_the_same(factory, answer_on, load, prefix):
    factory.promote(factory.publish(1))
    releases = Releases(factory.books, load)
    releases.load_first()
    with answer_on(factory, releases, prefix=prefix) as endpoint:
        assert endpoint.client.completions.create(model="alpha", prompt="x").model == "alpha-r1"
        assert endpoint.client.models.retrieve("alpha").id == "alpha"
        assert httpx.get(f"{endpoint.url}/healthz").status_code == 200
        error = error_of(httpx.get(f"{endpoint.url}/v1/nothing"), 404)

    assert prefix not in error["message"]


def test_no_malformed_request_harms_an_answer_beside_it(endpoint):
    ask = {"model": "alpha", "prompt": "the lazy ", "max_tokens": 90, "temperature": 0, "stop": ["never"]}
    expected = endpoint.client.completions.create(**ask).choices[0].text
    ended = threading.Event()
    statuses = set()

    def misbehave():
        while not ended.is_set():
            for name, value in (("n", 0), ("prompt", "word " * 1000), ("prompt", [[]]), ("max_tokens", 0)):
                statuses.add(post(endpoint, "/v1/completions", {**COMPLETE, name: value}).status_code)
            statuses.add(post(endpoint, "/v1/chat/completions", b"{").status_code)

    troublemaker = threading.Thread(target=misbehave)
    troublemaker.start()
    try:
        texts = set()
        for _ in range(8):
            texts.add(endpoint.client.completions.create(**ask).choices[0].text)
            texts.add("".join(c.choices[0].text for c in endpoint.client.completions.create(**ask, stream=True)))
    finally:
        ended.set()
        troublemaker.join()

    assert texts == {expected}
    assert statuses == {400}
    assert endpoint.engine.num_unfinished == 0


def test_while_an_engine_that_has_failed_is_replaced_who_asks_is_told_to_come_back(fake):
    endpoint, engine = fake
    assert httpx.get(f"{endpoint.url}/readyz").status_code == 200
    engine.failure = "its process has ended"
    ready = httpx.get(f"{endpoint.url}/readyz")
    assert (ready.status_code, ready.json()["status"]) == (503, "its process has ended")
    for path, body in (("/v1/completions", COMPLETE), ("/v1/chat/completions", CHAT)):
        response = post(endpoint, path, body)
        error = error_of(response, 503)
        assert (error["code"], response.headers["Retry-After"]) == ("engine_failed", "1")
        assert "its process has ended" in error["message"]
    assert httpx.get(f"{endpoint.url}/healthz").status_code == 200
    assert not engine.asked


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", COMPLETE), ("/v1/chat/completions", CHAT)])
@pytest.mark.parametrize("stream", [False, True])
def test_whose_answer_had_not_begun_when_the_engine_failed_is_told_to_come_back(
    fake, pool, wait_until, path, body, stream
):
    endpoint, engine = fake
    asked = pool.submit(post, endpoint, path, {**body, "stream": stream})
    wait_until(lambda: engine.asked)
    engine.failure = "its process has ended"
    engine.say("", "error", error="EngineDeadError")

    error = error_of(asked.result(), 503)
    assert (error["code"], asked.result().headers["Retry-After"]) == ("engine_failed", "1")
    assert "ended by the server: EngineDeadError" in error["message"]

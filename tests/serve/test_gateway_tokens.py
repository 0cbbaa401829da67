"""Laws of what is not an answer: tokens, embeddings, grammars, and the description of the interface."""

from __future__ import annotations

import base64
import json
import re

import httpx
import jsonschema
import numpy as np
import pytest
from openapi_spec_validator import validate

PROMPT = "the quick brown "
MESSAGES = [{"role": "user", "content": "naïve 你好 🙂?"}]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


def post(endpoint, path, **body):
    return httpx.post(f"{endpoint.url}{path}", json=body, timeout=20)


# ── tokens ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tokens_are_those_that_a_request_is_read_as(endpoint):
    answer = post(endpoint, "/tokenize", model="alpha", prompt=PROMPT).json()
    chat = post(endpoint, "/tokenize", messages=MESSAGES).json()

    asked = endpoint.client.completions.create(model="alpha", prompt=PROMPT, max_tokens=1)
    said = endpoint.client.chat.completions.create(model="alpha", messages=MESSAGES, max_tokens=1)
    assert answer["count"] == len(answer["tokens"]) == asked.usage.prompt_tokens
    assert chat["count"] == said.usage.prompt_tokens
    assert answer["max_model_len"] == 160
    assert answer["token_strs"] is None
    greedy = {"model": "alpha", "max_tokens": 8, "temperature": 0}
    texts = [endpoint.client.completions.create(prompt=p, **greedy).choices[0].text for p in (PROMPT, answer["tokens"])]
    assert texts[0] == texts[1]


def test_tokens_and_text_are_one_another(endpoint):
    tokens = post(endpoint, "/tokenize", prompt="naïve 🙂", add_special_tokens=False, return_token_strs=True).json()

    assert post(endpoint, "/detokenize", tokens=tokens["tokens"]).json() == {"prompt": "naïve 🙂"}
    assert len(tokens["token_strs"]) == tokens["count"]
    bare = post(endpoint, "/tokenize", messages=MESSAGES, add_generation_prompt=False, add_special_tokens=False).json()
    assert post(endpoint, "/detokenize", tokens=bare["tokens"]).json()["prompt"] == "user:\nnaïve 你好 🙂?\n\n"


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": ["x"]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": MESSAGES, "tools": [{}]}, "tools"),
        ("/tokenize", {"prompt": "x", "model": "beta"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [100_000]}, "tokens"),
        ("/v1/embeddings", {"model": "alpha"}, "input"),
        ("/v1/embeddings", {"model": "alpha", "input": []}, "input"),
        ("/v1/embeddings", {"model": "alpha", "input": ["x", []]}, "input[1]"),
        ("/v1/embeddings", {"model": "alpha", "input": ["x"] * 129}, "input"),
        ("/v1/embeddings", {"model": "alpha", "input": "word " * 1000}, "input"),
        ("/v1/embeddings", {"model": "alpha", "input": "x", "dimensions": 8}, "dimensions"),
        ("/v1/embeddings", {"model": "alpha", "input": "x", "encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_what_is_wrong_is_named(endpoint, path, body, field):
    error = post(endpoint, path, **body).json()["error"]

    assert error["param"] == field


# ── embeddings ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_embeddings_have_length_one_and_depend_on_their_text_alone(endpoint):
    texts = ["the quick fox", "a bird in the hand", "the quick fox"]

    listed = endpoint.client.embeddings.create(model="alpha", input=texts)
    floats = post(endpoint, "/v1/embeddings", model="alpha", input=texts[1], encoding_format="float").json()

    vectors = np.array([each.embedding for each in listed.data])
    assert [each.index for each in listed.data] == [0, 1, 2]
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)
    assert vectors[0] == pytest.approx(vectors[2])
    assert vectors[1] == pytest.approx(floats["data"][0]["embedding"], abs=1e-6)
    assert abs(vectors[0] @ vectors[1]) < 0.999
    assert listed.usage.total_tokens == sum(post(endpoint, "/tokenize", prompt=t).json()["count"] for t in texts)


def test_embeddings_come_in_base64_where_it_is_asked_for(endpoint):
    body = {"model": "alpha", "input": "x"}
    coded = post(endpoint, "/v1/embeddings", **body, encoding_format="base64").json()["data"][0]["embedding"]
    plain = post(endpoint, "/v1/embeddings", **body).json()["data"][0]["embedding"]

    assert np.frombuffer(base64.b64decode(coded), "<f4").tolist() == pytest.approx(plain)


# ── grammars ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def chat_text(endpoint, **options):
    values = {"model": "alpha", "messages": MESSAGES, "max_tokens": 60, "temperature": 1, "seed": 3, **options}
    choice = endpoint.client.chat.completions.create(**values).choices[0]
    return choice.message.content, choice.finish_reason


def test_an_answer_matches_its_schema(endpoint):
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}

    text, reason = chat_text(endpoint, response_format=wanted, logit_bias={"0": 0})

    if reason == "stop":
        jsonschema.validate(json.loads(text), SCHEMA)
    assert re.match(r'\{"n": ?-?\d', text)


def test_an_answer_is_an_object_where_any_is_asked_for(endpoint):
    text, _ = chat_text(endpoint, response_format={"type": "json_object"})

    assert text.startswith("{")


def test_an_answer_matches_its_expression(endpoint):
    asked = {"structured_outputs": {"regex": "(yes|no)( [a-c]{2})?"}}
    answers = [chat_text(endpoint, extra_body=asked, seed=seed) for seed in range(4)]

    assert all(re.fullmatch("(yes|no)( [a-c]{2})?", text) for text, _ in answers)
    assert {reason for _, reason in answers} == {"stop"}


# ── the description ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_description_is_openapi_and_holds_every_path(endpoint):
    described = httpx.get(f"{endpoint.url}/openapi.json").json()

    validate(described)
    assert {
        "/healthz",
        "/readyz",
        "/v1/models",
        "/v1/models/{model}",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/feedback",
        "/tokenize",
        "/detokenize",
    } <= set(described["paths"])
    body = described["components"]["schemas"]["CompletionBody"]
    assert body["required"] == ["model", "prompt"]
    assert all(field.get("description") for field in body["properties"].values())
    for good in ({"prompt": "x"}, {"prompt": ["x", "y"], "n": 2}, {"prompt": [1, 2]}, {"prompt": [[1]], "stop": ["a"]}):
        jsonschema.Draft202012Validator({**described, **body}).validate({"model": "alpha", **good})


def test_the_page_of_it_loads_nothing(endpoint):
    answer = httpx.get(f"{endpoint.url}/docs")

    assert answer.headers["content-type"].startswith("text/html")
    assert "POST /v1/chat/completions" in answer.text
    assert "min_p" in answer.text
    assert "stream_options.include_usage" in answer.text
    assert not re.search(r"<script|<link|<img|src=|https?://", answer.text)

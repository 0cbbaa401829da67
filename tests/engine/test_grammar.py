"""Laws of grammars: whatever the model says, its answer matches; neighbours, and wrong grammars, harm nobody."""

from __future__ import annotations

import json
import re
import threading

import jsonschema
import pytest
from conformance import TIMEOUT_S

from aifactory.engine.protocol import Grammar
from aifactory.errors import BadRequestError

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "kind": {"enum": ["bird", "dog", "löwe"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "kind", "age", "tags"],
    "additionalProperties": False,
}
REGEX = r"(the|a) [a-c]{2,4}( 😀|!)?"


def schema(value):
    return Grammar(kind="json_schema", text=json.dumps(value))


@pytest.fixture(params=[False, True], ids=["plain", "compiled"])
def engine(request, model, start):
    return start(model, num_slots=6, compiled=request.param)


def test_answers_of_a_random_model_match_beside_others_that_are_free(engine, make_request, collected):
    asked = []
    for index in range(12):
        options = {"temperature": 0.0 if index < 3 else 1.2, "seed": index}
        grammar = (schema(SCHEMA), Grammar(kind="regex", text=REGEX), None)[index % 3]
        answer = collected()
        engine.submit(make_request(f"r{index}", [index + 1, 7], max_tokens=120, grammar=grammar, **options), answer)
        asked.append((grammar, answer))
    free = collected()
    for grammar, answer in asked:
        text = answer.wait().text
        if grammar is None:
            continue
        assert answer.reason == "stop"
        if grammar.kind == "regex":
            assert re.fullmatch(REGEX, text)
        else:
            jsonschema.validate(json.loads(text), SCHEMA)
    engine.submit(make_request("free", [3, 7], max_tokens=120, temperature=0.0, seed=2), free)
    assert free.wait().ids == asked[2][1].ids


def test_an_answer_ends_where_nothing_may_follow_and_a_short_one_is_a_beginning(engine, make_request, collected):
    whole, cut, many = collected(), collected(), []
    fixed = Grammar(kind="regex", text="the quick brown fox")
    engine.submit(make_request("whole", [1], max_tokens=50, grammar=fixed), whole)
    engine.submit(make_request("cut", [1], max_tokens=2, temperature=0.0, grammar=schema(SCHEMA)), cut)
    assert whole.wait().text == "the quick brown fox"
    assert whole.reason == "stop"
    assert (cut.wait().reason, len(cut.ids)) == ("length", 2)

    ended = threading.Event()

    def take(delta):
        many.append(delta)
        if sum(each.finish_reason is not None for each in many) == 3:
            ended.set()

    engine.submit(
        make_request(
            "many", [1], max_tokens=60, n=3, seed=1, temperature=1.5, grammar=Grammar(kind="regex", text="[a-f]{4}")
        ),
        take,
    )
    assert ended.wait(TIMEOUT_S)
    for index in range(3):
        assert re.fullmatch("[a-f]{4}", "".join(delta.text for delta in many if delta.index == index))


def test_scores_are_the_models_own_under_a_grammar(engine, make_request, collected):
    answer = collected()
    engine.submit(
        make_request("a", [1], max_tokens=5, logprobs=3, grammar=Grammar(kind="regex", text="zzzzzzzzzzzz")), answer
    )
    scores = [score for delta in answer.wait().deltas for score in delta.scores]
    assert any(token_id != score.token_id for score in scores for token_id, _ in score.top)
    assert all(score.logprob > float("-inf") for score in scores)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "(unclosed"),
        ("json_schema", "{not json"),
        ("json_schema", '{"type": "no such type"}'),
        ("json_schema", '{"$ref": "#/nowhere"}'),
        ("json_schema", "[1]"),
        ("json_schema", "[" * 60_000),
        ("json_schema", '{"$ref": "#"}'),
        ("regex", "a{1000}{1000}"),
        ("regex", r"[^\x00-\x{10FFFF}]"),
    ],
)
def test_a_grammar_that_is_none_is_refused_at_submit(engine, make_request, collected, kind, text):
    with pytest.raises(BadRequestError) as refused:
        engine.submit(make_request("bad", [1], grammar=Grammar(kind=kind, text=text)), collected())
    assert refused.value.field == "grammar"
    assert engine.num_unfinished == 0


@pytest.mark.parametrize(
    ("kind", "text"), [("lark", "start: /a/"), ("regex", ""), ("regex", "a" * 70_000), ("regex", 3)]
)
def test_a_grammar_out_of_bounds_is_refused(kind, text):
    with pytest.raises(BadRequestError) as refused:
        Grammar(kind=kind, text=text)
    assert refused.value.field == "grammar"


def test_a_grammar_that_grows_beyond_the_limits_ends_its_own_request_only(engine, make_request, collected):
    hungry, other = collected(), collected()
    wide = {"type": "array", "items": {"type": "string", "pattern": "^(a|b|ab|ba){1,900}c$"}, "minItems": 50}
    engine.submit(make_request("other", [1, 2], max_tokens=30, temperature=0.0), other)
    try:
        engine.submit(make_request("hungry", [1], max_tokens=100, grammar=schema(wide)), hungry)
    except BadRequestError:
        pass
    else:
        assert hungry.wait().reason in ("length", "error")
    assert other.wait().reason in ("length", "stop")

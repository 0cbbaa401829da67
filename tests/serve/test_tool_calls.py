"""Laws of tools: shown by the model's own template, calls read as its tokenizer says, refused by name where it doesn't."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from chat_templates import RESPONSES, TEMPLATE

from aifactory.serve.releases import Releases
from aifactory.serve.tool_calls import MessageReader
from aifactory.text.tokenizer import TextTokenizer, load_tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of <|endoftext|> a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
SAID = 'I look. <call>{"name": "weather", "arguments": {"city": "Bern 🙂"}}</call>'
ASK = {"model": "alpha", "messages": [{"role": "user", "content": "how is it?"}], "tools": [TOOL]}


@pytest.fixture(scope="module")
def tokenizer(exported):
    plain = load_tokenizer(exported(1))
    return TextTokenizer(plain.tokenizer_json, chat_template=TEMPLATE, response_template=RESPONSES)


@pytest.fixture
def asked(factory, fake_engine, answer_on, tokenizer):
    """An endpoint whose tokenizer knows tools, and its engine."""
    engine = fake_engine()
    engine.context_length = 1_000
    factory.promote(factory.publish(1))
    releases = Releases(factory.books, lambda folder: (engine, tokenizer))
    releases.load_first()
    with answer_on(factory, releases) as endpoint:
        yield endpoint, engine


def answer_with(asked, tokenizer, text, **options):
    """What a client gets of an answer whose tokens come one by one."""
    endpoint, engine = asked
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(lambda: list_if(endpoint.client.chat.completions.create(**ASK, **options), options))
        for token_id in tokenizer.encode(text):
            engine.say("", token_ids=[token_id])
        engine.say(text, "stop", token_ids=[tokenizer.eos_id])
        return answer.result()


def list_if(answer, options):
    return list(answer) if options.get("stream") else answer


def test_a_call_is_read_out_of_the_answer(asked, tokenizer):
    choice = answer_with(asked, tokenizer, SAID).choices[0]

    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look. "
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Bern 🙂"}
    assert call.id.startswith("call_")


def test_a_streamed_call_is_the_same(asked, tokenizer):
    chunks = answer_with(asked, tokenizer, SAID, stream=True)

    deltas = [chunk.choices[0].delta for chunk in chunks]
    (call,) = [call for delta in deltas for call in delta.tool_calls or []]
    assert "".join(delta.content or "" for delta in deltas) == "I look. "
    assert (call.index, call.function.name, json.loads(call.function.arguments)) == (0, "weather", {"city": "Bern 🙂"})
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_tools_are_in_the_prompt_and_their_text_stays_text(asked, tokenizer):
    answer_with(asked, tokenizer, "no")

    (request,) = asked[1].requests
    prompt = tokenizer.decode(request.prompt_ids)
    assert prompt.startswith("tools: [")
    assert "of <|endoftext|> a city" in prompt
    assert request.prompt_ids.count(tokenizer.eos_id) == 1  # the bos, which is the same token


def test_without_a_choice_of_tools_none_are_shown(asked, tokenizer):
    choice = answer_with(asked, tokenizer, SAID, tool_choice="none").choices[0]

    assert choice.message.content == SAID
    assert not tokenizer.decode(asked[1].requests[0].prompt_ids).startswith("tools")


def test_calls_and_their_results_go_back_into_the_prompt(asked, tokenizer):
    endpoint, engine = asked
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    messages = [
        *ASK["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(endpoint.client.chat.completions.create, model="alpha", messages=messages)
        engine.say("so", "stop")
        answer.result()

    assert "assistant: <call>Bern</call>\ntool: rain\nassistant: " in tokenizer.decode(engine.requests[0].prompt_ids)


@pytest.mark.parametrize("end", ['<call>{"name": "wea', '<call>{"name": nothing}</call> and on', "<call>5</call>"])
def test_a_call_that_is_none_comes_as_it_was_written(tokenizer, end):
    reader = MessageReader(tokenizer, prompt="user: x\nassistant: ", tools=[TOOL])

    deltas = reader.feed(tokenizer.encode("Well. " + end)) + reader.finish()

    assert not reader.has_calls
    written = "".join(delta.get("content", "") for delta in deltas)
    assert written == reader.message["content"]
    assert written == "Well. " + end.removeprefix("<call>").replace("</call>", "")


@pytest.mark.parametrize(
    ("template", "responses", "message"),
    [
        ("{{ messages[0].content }}", RESPONSES, "chat template"),
        (TEMPLATE, None, "response_template"),
        (TEMPLATE, {"fields": {"content": {}}}, "response_template"),
        (TEMPLATE, {"fields": {"tool_calls": {}}}, "start_anchor"),
    ],
)
def test_tools_are_refused_where_they_cannot_be_shown_or_read(
    factory, fake_engine, answer_on, tokenizer, template, responses, message
):
    other = TextTokenizer(tokenizer.tokenizer_json, chat_template=template, response_template=responses)
    factory.promote(factory.publish(1))
    engine = fake_engine()
    engine.context_length = 1_000
    releases = Releases(factory.books, lambda folder: (engine, other))
    releases.load_first()
    with answer_on(factory, releases) as endpoint:
        error = httpx.post(f"{endpoint.url}/v1/chat/completions", json=ASK).json()["error"]

    assert error["param"] == "tools"
    assert message in error["message"]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"tools": [{"type": "retrieval"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 129}, "tools"),
        ({"stop": "x"}, "stop"),
    ],
)
def test_wrong_tools_are_named(asked, options, field):
    error = httpx.post(f"{asked[0].url}/v1/chat/completions", json={**ASK, **options}).json()["error"]

    assert error["param"] == field

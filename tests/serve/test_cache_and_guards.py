"""Laws of what stands between the client and the model: answers are repeated only where they would be the same, and what guards refuse or
masks hide reaches neither the client nor, where that is asked for, the log."""

from __future__ import annotations

import json

import openai
import pytest

from aifactory.config import Gateway as GatewayOptions
from aifactory.errors import ConfigError
from aifactory.records.feedback import Completion
from aifactory.serve.answer_cache import AnswerCache
from aifactory.serve.guards import Guards
from aifactory.serve.releases import Releases
from aifactory.text.tokenizer import load_tokenizer

GREEDY = {"model": "alpha", "prompt": "hello", "max_tokens": 5, "temperature": 0}
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
def serving(tmp_path, answer_on, quick, make_small):
    """Serve engines that say this, with these options of the gateway; the endpoint, and the engines by release."""
    stack = []

    def serve(*texts, mask=None, **gateway):
        factory = make_small(tmp_path, gateway=gateway)
        engines = [quick(text) for text in texts]
        made = iter(engines)
        factory.promote(factory.publish(1))
        releases = Releases(factory.books, lambda folder: (next(made), load_tokenizer(folder)))
        releases.load_first()
        context = answer_on(factory, releases, poll_s=0.02, mask=mask)
        endpoint = context.__enter__()
        stack.append(context)
        endpoint.factory = factory
        return endpoint, engines

    yield serve
    for context in stack:
        context.__exit__(None, None, None)


# ── the cache ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_always_answered_alike_is_asked_of_the_engine_once_and_each_answer_is_one_of_its_own(serving):
    endpoint, (engine,) = serving("abcdef", cache_bytes=100_000)
    ask = endpoint.client.completions
    first, again = ask.create(**GREEDY, user="ann"), ask.create(**GREEDY, user="bob")
    assert [each.choices[0].text for each in (first, again)] == ["abcdef"] * 2
    assert first.usage == again.usage
    assert len(engine.asked) == 1
    raw = ask.with_raw_response.create(**GREEDY)
    assert raw.headers["x-cache"] == "hit"

    assert first.id != again.id
    feedback = endpoint.factory.books.feedback
    assert [feedback.completion(each.id).user for each in (first, again)] == ["ann", "bob"]
    assert feedback.completion(again.id).answer == "abcdef"

    seeded = GREEDY | {"temperature": 1.0, "seed": 3}
    assert ask.create(**seeded).choices[0].text == ask.create(**seeded).choices[0].text
    assert len(engine.asked) == 2
    several = endpoint.client.chat.completions
    asked = {"model": "alpha", "messages": MESSAGES, "temperature": 0, "n": 2}
    pairs = [several.create(**asked) for _ in range(2)]
    assert len(engine.asked) == 3
    assert [len({f"{pair.id}-{n}" for n in range(2)}) for pair in pairs] == [2, 2]
    assert all(feedback.completion(f"{pair.id}-1") is not None for pair in pairs)


@pytest.mark.parametrize(
    "other",
    [
        {"temperature": 1.0},
        {"prompt": "hello!"},
        {"max_tokens": 6},
        {"stop": "x"},
        {"echo": True},
        {"logit_bias": {"7": 1}},
        {"stream": True},
    ],
)
def test_anything_else_is_asked_anew(serving, other):
    endpoint, (engine,) = serving("abcdef", cache_bytes=100_000)
    endpoint.client.completions.create(**GREEDY)

    for _ in range(2 if "temperature" in other or "stream" in other else 1):
        answer = endpoint.client.completions.create(**GREEDY | other)
        if other.get("stream"):
            list(answer)

    assert len(engine.asked) == (3 if "temperature" in other or "stream" in other else 2)


def test_a_release_that_is_swapped_in_answers_for_itself(serving, wait_until):
    endpoint, engines = serving("old answer", "new answer", cache_bytes=100_000)
    ask = endpoint.client.completions
    assert [ask.create(**GREEDY).choices[0].text for _ in range(3)] == ["old answer"] * 3

    endpoint.factory.promote(endpoint.factory.publish(2))
    wait_until(lambda: endpoint.releases.current.release.number == 2)

    answers = [ask.create(**GREEDY) for _ in range(3)]
    assert [(each.model, each.choices[0].text) for each in answers] == [("alpha-r2", "new answer")] * 3
    assert [len(engine.asked) for engine in engines] == [1, 1]


def test_nobody_is_given_what_another_key_was_answered_but_keys_of_one_team_are(serving):
    endpoint, (engine,) = serving("abcdef", cache_bytes=100_000)
    keys = endpoint.factory.books.keys
    made = [keys.create("a"), keys.create("b"), keys.create("c", team="red"), keys.create("d", team="red")]

    for key in made:
        answer = endpoint.client.with_options(api_key=key.token).completions.create(**GREEDY)
        assert endpoint.factory.books.feedback.completion(answer.id).key_id == key.key.id

    assert len(engine.asked) == 3


def test_it_holds_no_more_than_it_may_and_forgets_the_least_lately_used_and_what_is_old():
    now = [0.0]
    cache = AnswerCache(max_bytes=2_000, max_age_s=10.0, clock=lambda: now[0])
    entry = Completion(
        id="x",
        release=1,
        prompt="p",
        answer="a" * 100,
        request="{}",
        finish_reason="stop",
        prompt_tokens=1,
        answer_tokens=1,
    )
    for name in "abcdefgh":
        cache.keep(name, {"text": "a" * 100}, [entry])
        assert cache.find("a") is not None, "it is used all the while"
        assert cache.num_bytes <= 2_000
    kept = [name for name in "abcdefgh" if cache.find(name) is not None]
    assert kept[0] == "a"
    assert kept[1:] == list("abcdefgh")[-len(kept) + 1 :]
    assert 2 < len(kept) < 8

    cache.keep("huge", {"text": "a" * 5_000}, [entry])
    assert cache.find("huge") is None
    now[0] = 10.1
    assert [name for name in "abcdefgh" if cache.find(name) is not None] == []
    assert cache.num_bytes == 0


# ── guards and masks ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """A module of the user's."""
    (tmp_path / "my_guards.py").write_text(
        "seen = []\n"
        "def no_bombs(text, asked):\n"
        "    seen.append((text, dict(asked)))\n"
        "    return 'Expected no bombs.' if 'bomb' in text else None\n"
        "def broken(text, asked):\n"
        "    raise RuntimeError('oh')\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_guards"
    import sys

    sys.modules.pop("my_guards", None)


def test_a_prompt_that_a_guard_refuses_is_400_with_its_reason_and_reaches_no_engine(serving, functions):
    endpoint, (engine,) = serving("abcdef", prompt_guards=json.dumps([f"{functions}:no_bombs"]))

    with pytest.raises(openai.BadRequestError) as error:
        endpoint.client.completions.create(**GREEDY | {"prompt": ["fine", "a bomb"]})
    assert (error.value.code, error.value.param) == ("content_filter", "prompt")
    assert "no bombs" in str(error.value)
    with pytest.raises(openai.BadRequestError):
        endpoint.client.chat.completions.create(
            model="alpha", messages=[{"role": "user", "content": "bomb"}], stream=True
        )
    assert engine.asked == []
    endpoint.client.completions.create(**GREEDY, user="ann")
    import my_guards

    assert my_guards.seen[-1] == ("hello", {"key_id": "anonymous", "team": None, "user": "ann"})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_an_answer_that_a_guard_refuses_is_sent_and_kept_without_its_text(serving, functions, stream, chat):
    endpoint, (engine,) = serving("a bomb", answer_guards=json.dumps([f"{functions}:no_bombs"]))
    client = endpoint.client
    asked = {"model": "alpha", "max_tokens": 5, "stream": stream}
    answer = (
        client.chat.completions.create(**asked, messages=MESSAGES)
        if chat
        else client.completions.create(**asked, prompt="hello")
    )
    if stream:
        chunks = [chunk for chunk in answer if chunk.choices]
        text = "".join((chunk.choices[0].delta.content if chat else chunk.choices[0].text) or "" for chunk in chunks)
        reason, answer_id = chunks[-1].choices[0].finish_reason, chunks[0].id
    else:
        text = answer.choices[0].message.content if chat else answer.choices[0].text
        reason, answer_id = answer.choices[0].finish_reason, answer.id
    assert (text, reason) == ("", "content_filter")
    kept = endpoint.factory.books.feedback.completion(answer_id)
    assert (kept.answer, kept.finish_reason, kept.answer_tokens) == ("", "content_filter", 2)
    engine.text = "a flower"
    assert client.completions.create(model="alpha", prompt="x", max_tokens=5).choices[0].text == "a flower"


def test_a_guard_that_fails_lets_nothing_pass(serving, functions):
    endpoint, (engine,) = serving("abcdef", prompt_guards=json.dumps([f"{functions}:broken"]))

    with pytest.raises(openai.InternalServerError, match="my_guards:broken failed"):
        endpoint.client.completions.create(**GREEDY)
    assert engine.asked == []


def test_a_guard_that_is_not_there_keeps_the_endpoint_from_starting(factory, functions):
    for name, said in (
        ("my_guards:missing", "has no attribute 'missing'"),
        ("no_such_module:guard", "No module named 'no_such_module'"),
        ("my_guards:number", "found a int"),
    ):
        with pytest.raises(ConfigError, match=f"runtime.gateway.answer_guards: {name}, .*{said}"):
            Guards.of(GatewayOptions(answer_guards=(name,)), None)


def hide(text):
    return text.replace("ann@example.org", "<EMAIL>")


@pytest.mark.parametrize("stream", [False, True])
def test_personal_data_is_masked_in_answers_where_that_is_asked_for(serving, stream):
    endpoint, _ = serving("to ann@example.org now", mask=hide, mask_answers="true")
    answer = endpoint.client.completions.create(**GREEDY | {"prompt": "ann@example.org"}, stream=stream)
    if stream:
        chunks = [chunk for chunk in answer if chunk.choices]
        text, answer_id = "".join(chunk.choices[0].text for chunk in chunks), chunks[0].id
    else:
        text, answer_id = answer.choices[0].text, answer.id

    assert text == "to <EMAIL> now"
    kept = endpoint.factory.books.feedback.completion(answer_id)
    assert (kept.prompt, kept.answer) == ("ann@example.org", "to <EMAIL> now")


def test_personal_data_is_masked_in_the_log_alone_where_that_is_asked_for(serving):
    endpoint, _ = serving("to ann@example.org now", mask=hide, mask_log="true", cache_bytes=100_000)
    messages = [{"role": "user", "content": "I am ann@example.org"}]
    for _ in range(2):  # the second time from the cache
        answer = endpoint.client.chat.completions.create(model="alpha", messages=messages, temperature=0)
        assert answer.choices[0].message.content == "to ann@example.org now"
        kept = endpoint.factory.books.feedback.completion(answer.id)
        assert "ann@example.org" not in kept.prompt + kept.answer + kept.messages
        assert kept.prompt.count("<EMAIL>") == kept.answer.count("<EMAIL>") == kept.messages.count("<EMAIL>") == 1


def test_the_masks_of_the_factory_hide_what_ingestion_hides():
    from aifactory.workshop.masking import mask_text

    assert mask_text("write to ann@example.org or +49 30 901820, \ud800") == "write to <EMAIL> or <PHONE>, ?"

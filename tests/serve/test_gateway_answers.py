"""Laws of the answers that OpenAI's own client gets from a real engine."""

from __future__ import annotations

import openai
import pytest

PROMPT = "the quick brown "
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "naïve 你好 🙂?"}]


def complete(endpoint, **options):
    return endpoint.client.completions.create(
        **{"model": "alpha", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, **options}
    )


def chat(endpoint, **options):
    return endpoint.client.chat.completions.create(
        **{"model": "alpha", "messages": MESSAGES, "max_completion_tokens": 24, "temperature": 0, **options}
    )


def test_the_models_are_the_factory_and_its_release(endpoint):
    listed = endpoint.client.models.list()

    assert [model.id for model in listed] == ["alpha", "alpha-r1"]
    assert endpoint.client.models.retrieve("alpha-r1").id == "alpha-r1"
    with pytest.raises(openai.NotFoundError):
        endpoint.client.models.retrieve("beta")


def test_a_greedy_answer_equals_generate_from_text_and_from_token_ids(endpoint, says):
    tokenizer = endpoint.releases.current.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]

    answers = [complete(endpoint, prompt=prompt) for prompt in (PROMPT, [PROMPT], ids, [ids])]

    assert {answer.choices[0].text for answer in answers} == {says(1, PROMPT, 24)}
    assert {answer.usage.prompt_tokens for answer in answers} == {len(ids)}


def test_every_answer_has_the_form_of_openai_and_names_its_release(endpoint):
    release = endpoint.releases.current.release

    answer, said = complete(endpoint), chat(endpoint)

    assert (answer.object, said.object) == ("text_completion", "chat.completion")
    for one in (answer, said):
        assert one.model == release.name
        assert one.system_fingerprint == release.fingerprint
        assert one.created > 1_700_000_000
        assert one.choices[0].index == 0
        assert one.choices[0].finish_reason in ("stop", "length")
        assert one.usage.total_tokens == one.usage.prompt_tokens + one.usage.completion_tokens
        assert 1 <= one.usage.completion_tokens <= 24
    assert said.choices[0].message.role == "assistant"
    assert answer.id.startswith("cmpl-")
    assert said.id.startswith("chatcmpl-")


def test_the_release_may_be_asked_for_by_its_name(endpoint):
    assert complete(endpoint, model="alpha-r1").choices[0].text == complete(endpoint).choices[0].text


@pytest.mark.parametrize("temperature", [0, 1])
def test_streamed_text_equals_unstreamed(endpoint, temperature):
    whole = complete(endpoint, temperature=temperature, seed=3)
    chunks = list(complete(endpoint, temperature=temperature, seed=3, stream=True))
    said = chat(endpoint, temperature=temperature, seed=3)
    parts = list(chat(endpoint, temperature=temperature, seed=3, stream=True))

    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert "".join(part.choices[0].delta.content or "" for part in parts) == said.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert parts[-1].choices[0].finish_reason == said.choices[0].finish_reason
    assert {chunk.system_fingerprint for chunk in [*chunks, *parts]} == {whole.system_fingerprint}
    assert {chunk.model for chunk in [*chunks, *parts]} == {"alpha-r1"}


def test_a_stream_ends_with_its_usage_where_it_is_asked_for(endpoint):
    whole, said = complete(endpoint), chat(endpoint)

    chunks = list(complete(endpoint, stream=True, stream_options={"include_usage": True}))
    parts = list(chat(endpoint, stream=True, stream_options={"include_usage": True}))

    assert chunks[-1].usage == whole.usage
    assert parts[-1].usage == said.usage
    assert chunks[-1].choices == parts[-1].choices == []
    assert all(chunk.usage is None for chunk in [*chunks[:-1], *parts[:-1]])


def test_the_clients_own_stream_helper_reads_the_answer(endpoint):
    text = chat(endpoint).choices[0].message.content
    stop = text[6:8]

    with endpoint.client.chat.completions.stream(
        model="alpha", messages=MESSAGES, max_completion_tokens=24, temperature=0, stop=stop
    ) as stream:
        final = stream.get_final_completion()

    assert final.choices[0].message.content == text[: text.index(stop)]
    assert final.choices[0].message.role == "assistant"


def test_the_same_seed_repeats_and_another_does_not(endpoint):
    texts = [complete(endpoint, temperature=1, seed=seed).choices[0].text for seed in (5, 5, 6)]

    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_string(endpoint, stream):
    text = complete(endpoint).choices[0].text
    stop = text[4:6]

    if stream:
        chunks = list(complete(endpoint, stop=stop, stream=True))
        found, reason = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
    else:
        choice = complete(endpoint, stop=[stop, "never"]).choices[0]
        found, reason = choice.text, choice.finish_reason

    assert found == text[: text.index(stop)]
    assert reason == "stop"


def test_usage_counts_the_tokens_of_the_answer(endpoint):
    answer = complete(endpoint, max_tokens=7)

    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 7


def test_an_answer_without_a_named_length_fits_into_the_context(endpoint):
    tokenizer = endpoint.releases.current.tokenizer
    ids = [tokenizer.bos_id, *[5] * 154]
    words = [{"role": "user", "content": "?" * 120}]

    short = endpoint.client.completions.create(model="alpha", prompt=ids, temperature=0)
    said = endpoint.client.chat.completions.create(model="alpha", messages=words, temperature=0)

    assert short.usage.total_tokens <= 160
    assert said.usage.total_tokens <= 160
    assert endpoint.client.completions.create(model="alpha", prompt=PROMPT).usage.completion_tokens <= 16


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", [complete, chat])
def test_an_answer_is_kept_before_the_client_sees_its_end(endpoint, lasting_factory, ask, stream):
    log = lasting_factory.books.feedback

    if stream:
        text = ""
        for chunk in ask(endpoint, stream=True, user="ann"):
            kept = log.completion(chunk.id)
            choice = chunk.choices[0]
            text += (choice.text if ask is complete else choice.delta.content) or ""
            if choice.finish_reason is not None:
                break
    else:
        answer = ask(endpoint, user="ann")
        kept = log.completion(answer.id)
        text = answer.choices[0].text if ask is complete else answer.choices[0].message.content

    assert kept.release == 1
    assert kept.user == "ann"
    assert kept.answer == text
    assert kept.prompt == (PROMPT if ask is complete else "system:\nBe brief.\n\nuser:\nnaïve 你好 🙂?\n\nassistant:\n")


def test_values_that_ask_for_nothing_are_let_pass(endpoint):
    plain = complete(endpoint).choices[0].text

    asked = complete(
        endpoint, n=1, best_of=1, echo=False, logprobs=None, logit_bias={}, presence_penalty=0, suffix=None, stop=None
    )

    assert asked.choices[0].text == plain
    chat(endpoint, n=1, tools=[], response_format={"type": "text"}, frequency_penalty=0.0, logprobs=False)


def test_a_prompt_of_control_token_text_stays_text(endpoint):
    answer = complete(endpoint, prompt="<|endoftext|>", max_tokens=1)

    assert answer.usage.prompt_tokens > 2

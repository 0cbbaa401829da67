"""Laws of several answers at once and of scores: every option of the engine reaches it, and comes back in OpenAI's forms."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from aifactory.engine.load import load_model

PROMPT = "the quick brown "
MESSAGES = [{"role": "user", "content": "naïve 你好 🙂?"}]


def complete(endpoint, **options):
    values = {"model": "alpha", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **options}
    return endpoint.client.completions.create(**values)


def chat(endpoint, **options):
    values = {"model": "alpha", "messages": MESSAGES, "max_completion_tokens": 12, "temperature": 0, **options}
    return endpoint.client.chat.completions.create(**values)


@pytest.fixture(scope="module")
def log_probs(exported):
    """The model's log-probabilities of each token of a text's ids after those before it, and of all at each place."""
    model = load_model(exported(1), device="cpu", dtype=torch.float32)

    def compute(ids):
        with torch.inference_mode():
            rows = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        return [None, *(float(rows[i, token]) for i, token in enumerate(ids[1:]))], rows

    return compute


# ── several answers ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_prompt_has_its_answers_in_order(endpoint):
    prompts = ["the quick ", "a bird in ", "lazy "]

    together = complete(endpoint, prompt=prompts)

    assert [choice.index for choice in together.choices] == [0, 1, 2]
    alone = [complete(endpoint, prompt=prompt) for prompt in prompts]
    assert [choice.text for choice in together.choices] == [answer.choices[0].text for answer in alone]
    assert together.usage.prompt_tokens == sum(answer.usage.prompt_tokens for answer in alone)
    assert together.usage.completion_tokens == sum(answer.usage.completion_tokens for answer in alone)


@pytest.mark.parametrize("ask", [complete, chat])
def test_n_answers_stream_as_they_come_whole(endpoint, ask):
    options = {"n": 3, "temperature": 1, "seed": 5}
    whole = ask(endpoint, **options)

    chunks = list(ask(endpoint, **options, stream=True, stream_options={"include_usage": True}))

    texts, reasons = {}, {}
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        text = choice.text if ask is complete else choice.delta.content
        texts[choice.index] = texts.get(choice.index, "") + (text or "")
        if choice.finish_reason is not None:
            assert choice.index not in reasons
            reasons[choice.index] = choice.finish_reason
    said = [choice.text if ask is complete else choice.message.content for choice in whole.choices]
    assert [texts[index] for index in range(3)] == said
    assert [reasons[index] for index in range(3)] == [choice.finish_reason for choice in whole.choices]
    assert len(set(said)) == 3
    assert chunks[-1].usage == whole.usage


def test_the_first_of_n_answers_is_the_one_that_comes_alone(endpoint):
    several = complete(endpoint, n=2, temperature=1, seed=7)

    assert several.choices[0].text == complete(endpoint, temperature=1, seed=7).choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_each_of_several_answers_is_kept_under_an_id_of_its_own(endpoint, lasting_factory, stream):
    answer = complete(endpoint, prompt=["one ", "two "], n=2, temperature=1, seed=3, stream=stream)
    if stream:
        chunks = list(answer)
        texts = ["".join(c.choices[0].text for c in chunks if c.choices[0].index == i) for i in range(4)]
        answer_id = chunks[0].id
    else:
        texts, answer_id = [choice.text for choice in answer.choices], answer.id

    kept = [lasting_factory.books.feedback.completion(f"{answer_id}-{index}") for index in range(4)]

    assert [each.answer for each in kept] == texts
    assert [each.prompt for each in kept] == ["one ", "one ", "two ", "two "]
    assert lasting_factory.books.feedback.completion(answer_id) is None


def test_one_of_several_that_fails_fails_the_request_and_stops_the_others(fake, factory, wait_until):
    endpoint, engine = fake
    with ThreadPoolExecutor() as pool:
        body = {"model": "alpha", "prompt": ["a", "b"], "n": 2}
        asked = pool.submit(httpx.post, f"{endpoint.url}/v1/completions", json=body)
        wait_until(lambda: len(engine.asked) == 2)
        engine.say("fine", "stop", to=0, index=1)
        engine.say("", "error", to=1, index=0, error="out of memory")

        assert asked.result().status_code == 500

    wait_until(lambda: engine.num_unfinished == 0)
    assert factory.books.feedback.counts()["completions"] == 0


def test_where_there_is_no_room_for_all_prompts_none_is_worked_on(fake, wait_until):
    endpoint, engine = fake

    answer = httpx.post(f"{endpoint.url}/v1/completions", json={"model": "alpha", "prompt": ["a"] * 5})

    assert answer.status_code == 429
    assert engine.num_unfinished == 0


# ── options ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_option_reaches_the_engine(fake, factory, path):
    endpoint, engine = fake
    options = {
        "temperature": 0.5,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": -0.4,
        "seed": 11,
        "n": 1,
    }
    lists = {"top_k": 7, "logit_bias": {"5": -100, "17": 2.5}, "stop_token_ids": [3, 4], "stop": ["x", "y"]}
    what = {"prompt": "a"} if path == "/v1/completions" else {"messages": MESSAGES}
    with ThreadPoolExecutor() as pool:
        body = {"model": "alpha", "max_tokens": 9, **what, **options, **lists}
        asked = pool.submit(httpx.post, f"{endpoint.url}{path}", json=body)
        engine.say("fine", "stop")
        answer = asked.result().json()

    (request,) = engine.requests
    sampling = request.sampling
    assert {name: getattr(sampling, name) for name in options} == options
    assert (sampling.top_k, sampling.stop_token_ids, sampling.stop, sampling.max_tokens) == (7, (3, 4), ("x", "y"), 9)
    assert dict(sampling.logit_bias) == {5: -100, 17: 2.5}
    kept = json.loads(factory.books.feedback.completion(answer["id"]).request)
    assert kept["min_p"] == 0.1
    assert kept["logit_bias"] == {"5": -100, "17": 2.5}


@pytest.mark.parametrize("top_k", [0, -1, None])
def test_no_limit_of_top_k_is_written_in_three_ways(endpoint, top_k):
    plain = complete(endpoint, temperature=1, seed=3).choices[0].text

    assert complete(endpoint, temperature=1, seed=3, extra_body={"top_k": top_k}).choices[0].text == plain


def test_a_bias_forces_a_token_and_a_stop_token_ends_the_answer(endpoint):
    token = endpoint.releases.current.tokenizer.encode("z")[0]

    forced = complete(endpoint, logit_bias={str(token): 100}, max_tokens=5)
    stopped = complete(endpoint, logit_bias={str(token): 100}, extra_body={"stop_token_ids": [token]})

    assert forced.choices[0].text == "zzzzz"
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("", "stop")


# ── scores ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_scores_of_a_completion_are_the_models_log_probabilities(endpoint, log_probs):
    tokenizer = endpoint.releases.current.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]

    choice = complete(endpoint, prompt=ids, logprobs=3).choices[0]

    scores = choice.logprobs
    ids_by_name = {tokenizer.name_of(token): token for token in range(tokenizer.vocab_size)}
    answer = [ids_by_name[name] for name in scores.tokens]
    assert tokenizer.decode(answer) == choice.text
    begins = zip(scores.tokens, scores.text_offset, strict=True)
    assert all(choice.text[offset:].startswith(name) for name, offset in begins if not name.startswith("bytes:"))
    expected, rows = log_probs([*ids, *answer])
    assert scores.token_logprobs == pytest.approx(expected[len(ids) :], abs=1e-4)
    for place, top in enumerate(scores.top_logprobs):
        assert len(top) == 3
        best = rows[len(ids) - 1 + place].topk(3)
        assert sorted(top.values(), reverse=True) == pytest.approx(best.values.tolist(), abs=1e-4)
        assert list(top) == [tokenizer.name_of(token) for token in best.indices.tolist()]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_the_prompts_as_lm_eval_reads_them(endpoint, log_probs, max_tokens):
    tokenizer = endpoint.releases.current.tokenizer
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in (PROMPT, "a bird in the hand", "你好")]

    answer = complete(endpoint, prompt=prompts, max_tokens=max_tokens, logprobs=1, echo=True, seed=1234)

    for ids, choice in zip(prompts, answer.choices, strict=True):
        scores = choice.logprobs
        assert len(scores.tokens) == len(ids) + max_tokens
        expected, rows = log_probs(ids)
        assert scores.token_logprobs[0] is None
        assert scores.top_logprobs[0] is None
        assert scores.token_logprobs[1 : len(ids)] == pytest.approx(expected[1:], abs=1e-4)
        greedy = [
            max(top.values()) == value
            for top, value in zip(scores.top_logprobs[1:], scores.token_logprobs[1:], strict=True)
        ]
        assert greedy[: len(ids) - 1] == [int(rows[i].argmax()) == token for i, token in enumerate(ids[1:])]
        assert choice.text.startswith(tokenizer.decode(ids))
        assert answer.usage.completion_tokens == 3 * max_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_an_echoed_prompt_is_no_part_of_what_is_kept(endpoint, lasting_factory, stream):
    plain = complete(endpoint).choices[0].text

    answer = complete(endpoint, echo=True, stream=stream)
    chunks = list(answer) if stream else [answer]

    assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT + plain
    assert lasting_factory.books.feedback.completion(chunks[0].id).answer == plain


def test_the_chosen_token_is_among_its_alternatives(endpoint):
    options = {"temperature": 1, "seed": 9, "n": 4}
    scores = [choice.logprobs for choice in complete(endpoint, **options, logprobs=1).choices]

    assert all(t in top for each in scores for t, top in zip(each.tokens, each.top_logprobs, strict=True))
    # One where the most probable token was drawn, two where another was.
    assert {len(top) for each in scores for top in each.top_logprobs} == {1, 2}
    bare = [choice.logprobs for choice in complete(endpoint, **options, logprobs=0).choices]
    assert [each.token_logprobs for each in bare] == [each.token_logprobs for each in scores]
    assert {len(top) for each in bare for top in each.top_logprobs} == {1}


def test_scores_of_a_chat_have_texts_and_bytes(endpoint):
    choice = chat(endpoint, logprobs=True, top_logprobs=2, temperature=1, seed=2).choices[0]

    content = choice.logprobs.content
    assert (
        bytes(byte for token in content for byte in token.bytes or []).decode(errors="replace")
        == choice.message.content
    )
    assert {len(token.top_logprobs) for token in content} == {2}
    assert all(token.logprob <= token.top_logprobs[0].logprob <= 0 for token in content)
    assert choice.logprobs.refusal is None


@pytest.mark.parametrize(("ask", "asked"), [(complete, {"logprobs": 1}), (chat, {"logprobs": True, "top_logprobs": 1})])
def test_streamed_scores_are_those_of_the_whole_answer(endpoint, ask, asked):
    options = {**asked, "temperature": 1, "seed": 4, "n": 2}
    whole = ask(endpoint, **options)

    chunks = list(ask(endpoint, **options, stream=True))

    for choice in whole.choices:
        mine = [c.choices[0].logprobs for c in chunks if c.choices[0].index == choice.index and c.choices[0].logprobs]
        if ask is complete:
            for column in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                joined = [value for scores in mine for value in getattr(scores, column)]
                assert joined == getattr(choice.logprobs, column)
        else:
            assert [token for scores in mine for token in scores.content] == choice.logprobs.content


def test_a_token_that_is_no_character_is_written_in_bytes(endpoint):
    tokenizer = endpoint.releases.current.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode("é🙂")]

    scores = complete(endpoint, prompt=ids, max_tokens=0, echo=True, logprobs=0).choices[0].logprobs

    assert scores.tokens[0] == "<|endoftext|>"
    assert scores.tokens[1] == "bytes:\\xc3"
    assert scores.text_offset == [0, 0, 0, 1, 1, 1, 1]

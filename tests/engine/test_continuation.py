"""Laws of answers that go on from a part of them: from any token on they are what they would have been in one piece."""

from __future__ import annotations

import threading

import pytest

from aifactory.engine.protocol import Grammar
from aifactory.errors import BadRequestError

PROMPT = [5, 9, 33, 2, 17, 60, 61]
SEEDED = {"temperature": 1.3, "seed": 11}


def parts_of(answer):
    """After how many tokens which text has been told, and the tokens and scores."""
    ids = [token_id for delta in answer.deltas for token_id in delta.token_ids]
    scores = [score for delta in answer.deltas for score in delta.scores]
    told, count, text = {0: ""}, 0, ""
    for delta in answer.deltas:
        count, text = count + len(delta.token_ids), text + delta.text
        told[count] = text
    return ids, scores, told, text, answer.reason


def begun(request, *ids):
    return type(request)(
        id=request.id, prompt_ids=request.prompt_ids, sampling=request.sampling, begun=tuple(map(tuple, ids))
    )


def check_every_beginning(engine, whole, request_of, collected):
    ids, scores, told, text, reason = parts_of(whole)
    assert len(ids) > 3
    rests = [collected() for _ in range(len(ids) + 1)]
    for count, rest in enumerate(rests):
        engine.submit(begun(request_of(f"from-{count}"), ids[:count]), rest)
    for count, rest in enumerate(rests):
        rest_ids, rest_scores, _, rest_text, rest_reason = parts_of(rest.wait())
        before = told[max(each for each in told if each <= count)]
        assert rest_ids == ids[count:], count
        assert (before + rest_text, rest_reason) == (text, reason), count
        assert rest_scores == scores[count:], count


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 3},
        SEEDED,
        {**SEEDED, "logprobs": 2, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
        {
            **SEEDED,
            "repetition_penalty": 1.3,
            "frequency_penalty": 0.6,
            "presence_penalty": 0.5,
            "logit_bias": {7: 3.0},
        },
        {**SEEDED, "grammar": Grammar(kind="regex", text="(the |quick |fox 😀|[0-9]){5,9}!")},
        {**SEEDED, "grammar": Grammar(kind="json_schema", text='{"enum": ["the quick", "brown", "fox"]}')},
        {**SEEDED, "echo": True, "logprobs": 1},
    ],
    ids=["greedy", "greedy scores", "seeded", "truncated", "penalised", "regex", "schema", "echo"],
)
def test_from_any_token_on_an_answer_is_the_same_to_the_bit(model, start, make_request, collected, options):
    engine = start(model, compiled=True, num_slots=8)
    whole = collected()

    def request_of(name):
        return make_request(name, PROMPT, max_tokens=40, **options)

    engine.submit(request_of("whole"), whole)
    whole.wait()
    if options.get("echo"):
        # The prompt comes before an answer that has not begun, and before no other.
        prompt = whole.deltas[0].text
        rests = [collected(), collected()]
        engine.submit(begun(request_of("none"), []), rests[0])
        engine.submit(begun(request_of("one"), whole.ids[:2]), rests[1])
        assert rests[0].wait().deltas[0].prompt_scores == whole.deltas[0].prompt_scores
        assert rests[0].text == whole.text
        assert rests[1].wait().deltas[0].prompt_scores == ()
        assert not rests[1].text.startswith(prompt)
        assert rests[1].ids == whole.ids[2:]
    check_every_beginning(engine, whole, request_of, collected)


@pytest.mark.parametrize("tiles", [True, False])
def test_an_answer_to_a_long_prompt_is_the_same_to_the_bit(model, start, make_request, collected, tiles):
    engine = start(model, compiled=True, num_slots=8, tiles=tiles)
    whole = collected()

    def request_of(name):
        return make_request(name, PROMPT * 12, max_tokens=20, logprobs=2, **SEEDED)

    engine.submit(request_of("whole"), whole)
    check_every_beginning(engine, whole.wait(), request_of, collected)


def test_a_stop_string_that_the_cut_goes_through_is_found(model, start, make_request, collected):
    engine = start(model, compiled=True, num_slots=8)
    plain, whole = collected(), collected()
    engine.submit(make_request("plain", PROMPT, max_tokens=40, **SEEDED), plain)
    text = plain.wait().text
    # From the middle of the answer, over several tokens.
    stop = (text[20:28], "\0never")

    def request_of(name):
        return make_request(name, PROMPT, max_tokens=40, stop=stop, **SEEDED)

    engine.submit(request_of("whole"), whole)
    assert whole.wait().reason == "stop"
    assert len(whole.deltas[-1].token_ids) > 3, "the last tokens were held back"
    check_every_beginning(engine, whole, request_of, collected)


def test_the_model_s_own_forward_goes_on_with_the_same_tokens(any_model, start, make_request, collected):
    engine = start(any_model, num_slots=4)
    for number, options in enumerate(({"temperature": 0.0}, SEEDED)):
        whole = collected()
        engine.submit(make_request(f"w{number}", PROMPT, max_tokens=30, **options), whole)
        ids = whole.wait().ids
        for count in range(0, len(ids) + 1, 3):
            rest = collected()
            engine.submit(
                begun(make_request(f"r{number}.{count}", PROMPT, max_tokens=30, **options), ids[:count]), rest
            )
            assert rest.wait().ids == ids[count:]
            assert rest.reason == whole.reason


def test_each_of_several_answers_goes_on_by_its_own_draws(model, start, make_request):
    engine = start(model, compiled=True, num_slots=3)

    def ask(name, *beginnings):
        answers, ended = {index: [] for index in range(4)}, threading.Event()
        open_answers = set(answers)

        def on_delta(delta):
            answers[delta.index] += delta.token_ids
            if delta.finish_reason is not None:
                open_answers.discard(delta.index)
            if not open_answers:
                ended.set()

        engine.submit(begun(make_request(name, PROMPT, max_tokens=20, n=4, **SEEDED), *beginnings), on_delta)
        assert ended.wait(60)
        return [answers[index] for index in range(4)]

    whole = ask("whole")
    cuts = (5, 0, len(whole[2]))
    rest = ask("rest", *[ids[:cut] for ids, cut in zip(whole, cuts, strict=False)])

    assert rest == [whole[0][5:], whole[1], [], whole[3]]


def test_what_had_ended_ends_at_once_and_draws_nothing(model, start, make_request, collected):
    engine = start(model, num_slots=1)
    whole = collected()
    engine.submit(make_request("whole", PROMPT, max_tokens=4, temperature=0.0), whole)
    before = engine.cache_use.num_reused
    again = collected()
    engine.submit(begun(make_request("again", PROMPT, max_tokens=4, temperature=0.0), whole.wait().ids), again)

    (only,) = again.wait().deltas
    assert (only.text, only.token_ids, only.finish_reason) == ("", (), "length")
    assert engine.cache_use.num_reused == before
    engine.close(10.0)
    assert engine.num_unfinished == 0


def test_a_beginning_that_the_request_can_t_have_is_refused_by_name(model, tokenizer, start, make_request, collected):
    engine = start(model)

    def refused(*beginnings, **options):
        with pytest.raises(BadRequestError) as error:
            engine.submit(begun(make_request("a", PROMPT, max_tokens=4, **options), *beginnings), collected())
        assert error.value.field == "begun"
        return str(error.value)

    assert "found 5 tokens" in refused([4] * 5)
    assert "at most 1 answers" in refused([4], [5])
    assert f"found {10**6}" in refused([10**6])
    # Nothing comes after an end token, and what the grammar does not allow was not drawn.
    assert "ends at token 1 of 2" in refused([tokenizer.eos_id, 4])
    letter = tokenizer.encode("x")[0]
    assert "ends at token 1 of 1" in refused([letter], grammar=Grammar(kind="regex", text="[0-9]+"))
    assert engine.num_unfinished == 0

"""Laws of answers: no part of a stop string leaves, wherever tokens are cut; settings are checked by field."""

from __future__ import annotations

import random

import pytest

from aifactory.engine.answer import Answer, StopFilter
from aifactory.engine.protocol import Sampling, TokenScore
from aifactory.errors import BadRequestError


@pytest.mark.parametrize("stop", [("END",), ("ab", "abc"), ("aab",), ("aa", "b"), ("\n\n", "User:"), ()])
def test_what_leaves_is_the_text_before_the_first_stop_string_however_it_is_cut(stop):
    rng = random.Random(3)
    for _ in range(300):
        text = "".join(rng.choice(["a", "b", "c", "E", "N", "END", "\n", "User:"]) for _ in range(rng.randrange(12)))
        stops = StopFilter(stop)
        pieces, rest = [], text
        while rest:
            cut = rng.randrange(1, 4)
            pieces.append(stops.feed(rest[:cut]))
            rest = rest[cut:]
            # What has left so far never reaches into a stop string.
            sent = "".join(pieces)
            assert not any(string in sent for string in stop)
        pieces.append(stops.flush())

        begins = [text.find(string) for string in stop if string in text]
        assert "".join(pieces) == (text[: min(begins)] if begins else text)
        assert stops.found == bool(begins)


def test_stop_string_split_across_tokens_and_characters(tokenizer, make_request):
    byte_ids = [tokenizer.encode(character)[0] for character in "xx"]
    emoji = tokenizer.encode("😀")
    assert len(emoji) > 1
    deltas = []
    answer = Answer(make_request("a", [1], max_tokens=50, stop=("x😀",)), deltas.append, tokenizer, {tokenizer.eos_id})

    pushed = [answer.push(token_id) for token_id in [*byte_ids, *emoji]]

    assert [delta.text if delta else None for delta in pushed] == [None, "x", *[None] * (len(emoji) - 1), ""]
    assert pushed[-1].finish_reason == "stop"
    assert [token_id for delta in pushed if delta for token_id in delta.token_ids] == [*byte_ids, *emoji]


def test_a_held_back_beginning_is_released_at_the_end(tokenizer, make_request):
    ids = tokenizer.encode("the E")
    for last, reason in ((tokenizer.eos_id, "stop"), (tokenizer.encode("N")[0], "length")):
        request = make_request("a", [1], max_tokens=len(ids) + 1, stop=("END",))
        answer = Answer(request, print, tokenizer, {tokenizer.eos_id})
        texts = [delta.text for token_id in [*ids, last] if (delta := answer.push(token_id))]

        assert "".join(texts) == ("the E" if reason == "stop" else "the EN")
        assert answer.finished


def test_half_a_character_at_the_length_limit_is_replaced(tokenizer, make_request):
    first = tokenizer.encode("😀")[0]
    answer = Answer(make_request("a", [1], max_tokens=1), print, tokenizer, {tokenizer.eos_id})

    assert answer.push(first).text == "�"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", True),
        ("max_tokens", 2.0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("seed", 1.5),
        ("seed", 2**64),
        ("stop", "END"),
        ("stop", ("a",) * 17),
        ("stop", (3,)),
    ],
)
def test_sampling_names_the_field_that_is_wrong(field, value):
    with pytest.raises(BadRequestError) as refused:
        Sampling(**{field: value})
    assert refused.value.field == field


def test_an_empty_stop_string_is_named_by_its_place():
    with pytest.raises(BadRequestError) as refused:
        Sampling(stop=("a", ""))
    assert refused.value.field == "stop[1]"


def test_deltas_joined_are_what_they_were_one_after_the_other(tokenizer, make_request):
    ids = tokenizer.encode("the quick")
    answer = Answer(make_request("a", [1], max_tokens=len(ids), logprobs=0), print, tokenizer, {0}, index=3)
    scores = [TokenScore(token_id=token_id, logprob=-1.0) for token_id in ids]
    answer.take_prompt_scores((TokenScore(token_id=1, logprob=None),))
    first, *rest = [
        delta for token_id, score in zip(ids, scores, strict=True) if (delta := answer.push(token_id, score))
    ]
    for delta in rest:
        first = first.then(delta)

    assert (first.text, first.token_ids, first.scores) == ("the quick", tuple(ids), tuple(scores))
    assert (first.finish_reason, first.index, len(first.prompt_scores)) == ("length", 3, 1)


def test_a_grammar_that_can_be_followed_no_further_is_the_requests_own_fault(tokenizer, make_request):
    class Broken:
        is_complete = False

        def take(self, token_id):
            return "too complex" if token_id == 6 else None

    answer = Answer(make_request("a", [1], max_tokens=9), print, tokenizer, {tokenizer.eos_id}, matcher=Broken())

    assert answer.push(5).finish_reason is None
    last = answer.push(6)
    assert (last.finish_reason, last.error, last.fault) == ("error", "too complex", "grammar")

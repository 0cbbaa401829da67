"""Laws of the options of a request: what transformers computes by other code, and what OpenAI's page says in a formula."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from aifactory.engine.edits import LogitEdits
from aifactory.engine.protocol import Sampling
from aifactory.engine.sampling import Draws, SamplingBatch
from aifactory.errors import BadRequestError

VOCAB = 60


def random_ids(rng, count):
    return [rng.randrange(VOCAB) for _ in range(count)]


@pytest.mark.parametrize(
    "settings",
    [
        {"min_p": 0.2},
        {"temperature": 0.7, "min_p": 0.05},
        {"top_k": 7, "min_p": 0.3},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
        {"top_p": 0.5},
    ],
)
def test_the_tokens_that_may_be_drawn_and_their_shares_are_those_of_transformers_warpers(settings):
    torch.manual_seed(1)
    logits_1V = torch.randn(1, VOCAB) * 2
    sampling = Sampling(**settings)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    warpers.append(TopPLogitsWarper(sampling.top_p))
    warpers.append(MinPLogitsWarper(sampling.min_p))
    expected_V = warpers(torch.zeros(1, 1, dtype=torch.long), logits_1V.clone())[0].softmax(-1)

    rows = 200
    batch = SamplingBatch([sampling] * rows, [Draws(seed) for seed in range(rows)], device="cpu")
    ids = torch.cat([batch.choose(logits_1V.expand(rows, -1)) for _ in range(60)])
    found_V = torch.bincount(ids, minlength=VOCAB) / len(ids)

    assert bool((found_V[expected_V == 0] == 0).all())
    assert torch.allclose(found_V, expected_V, atol=0.02)


def test_repetition_penalty_and_bias_are_those_of_transformers():
    rng = random.Random(2)
    torch.manual_seed(2)
    samplings = [
        Sampling(repetition_penalty=p, logit_bias=b) for p, b in ((1.3, {}), (0.7, {3: -9.5, 8: 2.0}), (2.0, {1: 5}))
    ]
    prompts = [random_ids(rng, 9) for _ in samplings]
    answers = [random_ids(rng, length) for length in (0, 4, 30)]
    edits = LogitEdits(samplings, prompts, answers, vocab_size=VOCAB, device="cpu")
    for _ in range(4):
        logits_BV = torch.randn(3, VOCAB) * 3
        edited_BV = edits.apply(logits_BV)
        for row, sampling in enumerate(samplings):
            processors = [RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
            if sampling.logit_bias:
                processors.append(
                    SequenceBiasLogitsProcessor([[[i], float(b)] for i, b in sampling.logit_bias.items()])
                )
            seen_1T = torch.tensor([prompts[row] + answers[row]])
            expected = LogitsProcessorList(processors)(seen_1T, logits_BV[row : row + 1].clone())[0]
            assert torch.equal(edited_BV[row], expected)
        taken = random_ids(rng, 3)
        edits.took(torch.tensor(taken))
        for answer, token_id in zip(answers, taken, strict=True):
            answer.append(token_id)


def test_frequency_and_presence_count_the_answer_alone_by_the_published_formula():
    rng = random.Random(3)
    torch.manual_seed(3)
    sampling = Sampling(frequency_penalty=0.7, presence_penalty=-1.1)
    prompt, answer = random_ids(rng, 40), random_ids(rng, 50)
    logits_1V = torch.randn(1, VOCAB)

    edited_V = LogitEdits([sampling], [prompt], [answer], vocab_size=VOCAB, device="cpu").apply(logits_1V)[0]

    for token_id in range(VOCAB):
        count = answer.count(token_id)
        expected = float(logits_1V[0, token_id]) - count * 0.7 - (count > 0) * -1.1
        assert float(edited_V[token_id]) == pytest.approx(expected, abs=1e-5)


def test_a_row_without_edits_keeps_its_bits_beside_one_with_them():
    torch.manual_seed(4)
    logits_BV = torch.randn(3, VOCAB)
    samplings = [Sampling(), Sampling(presence_penalty=1.0), Sampling(logit_bias={5: 100.0})]
    before = logits_BV.clone()

    edited_BV = LogitEdits(samplings, [[1], [2], [3]], [[], [7], []], vocab_size=VOCAB, device="cpu").apply(logits_BV)

    assert torch.equal(edited_BV[0], before[0])
    assert torch.equal(logits_BV, before)
    assert edited_BV[2].argmax() == 5


@torch.inference_mode()
def log_probs_of(model, ids):
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)


def test_scores_are_the_models_own_whatever_else_is_asked(any_model, tokenizer, start, make_request, collected):
    prompt = [5, 9, 33, 2, 17]
    engine = start(any_model)
    wanted = [
        {"temperature": 0.0, "logprobs": 0},
        {"temperature": 0.0, "logprobs": 5, "presence_penalty": 2.0},
        {"temperature": 1.5, "seed": 3, "logprobs": 20, "top_k": 4, "logit_bias": {7: 50}},
        {"temperature": 1.0, "seed": 4},
    ]
    answers = [collected() for _ in wanted]
    for index, options in enumerate(wanted):
        engine.submit(make_request(f"r{index}", prompt, max_tokens=12, **options), answers[index])

    for options, answer in zip(wanted, answers, strict=True):
        scores = [score for delta in answer.wait().deltas for score in delta.scores]
        if "logprobs" not in options:
            assert scores == []
            continue
        assert all(len(delta.scores) == len(delta.token_ids) for delta in answer.deltas)
        assert [score.token_id for score in scores] == answer.ids
        log_probs = log_probs_of(any_model, prompt + answer.ids)[len(prompt) - 1 :]
        for place, score in enumerate(scores):
            assert score.logprob == pytest.approx(float(log_probs[place, score.token_id]), abs=1e-4)
            best = log_probs[place].topk(options["logprobs"] or 1)
            assert len(score.top) == options["logprobs"]
            assert [value for _, value in score.top] == pytest.approx(best.values.tolist()[: len(score.top)], abs=1e-4)


@pytest.mark.parametrize("chunk", [3, 256])
def test_echo_gives_the_prompt_and_its_scores_and_with_no_tokens_nothing_else(
    model, tokenizer, start, make_request, collected, chunk
):
    prompt = tokenizer.encode("the quick brown 😀 bird")
    engine = start(model, prefill_chunk=chunk)
    scored, alone, half, wordless = (collected() for _ in range(4))
    engine.submit(
        make_request("scored", prompt, max_tokens=4, temperature=0.0, echo=True, logprobs=2, stop=("quick",)), scored
    )
    engine.submit(make_request("alone", prompt, max_tokens=0, echo=True, logprobs=0), alone)
    # The prompt ends inside a character, which the answer can't complete: the model knows nothing of it.
    cut = tokenizer.encode("a😀")[:-1]
    engine.submit(make_request("half", cut, max_tokens=0, echo=True), half)
    engine.submit(make_request("wordless", prompt, max_tokens=4, temperature=0.0), wordless)

    # A stop string in the prompt ends nothing.
    assert scored.wait().text == "the quick brown 😀 bird" + wordless.wait().text
    assert scored.ids == wordless.ids
    log_probs = log_probs_of(model, prompt)
    for answer in (scored, alone.wait()):
        scores = answer.deltas[0].prompt_scores
        assert [score.token_id for score in scores] == prompt
        assert scores[0].logprob is None
        for place in range(1, len(prompt)):
            assert scores[place].logprob == pytest.approx(float(log_probs[place - 1, prompt[place]]), abs=1e-4)
        assert all(not delta.prompt_scores for delta in answer.deltas[1:])
    assert alone.text == "the quick brown 😀 bird"
    assert (alone.ids, alone.reason) == ([], "length")
    assert half.wait().text == "a�"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("frequency_penalty", 2.5),
        ("presence_penalty", float("inf")),
        ("n", 0),
        ("n", 1000),
        ("logprobs", 21),
        ("logprobs", True),
        ("echo", 1),
        ("logit_bias", [3]),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", dict.fromkeys(range(2000), 0.0)),
        ("stop_token_ids", [3]),
    ],
)
def test_the_field_that_is_wrong_is_named(field, value):
    with pytest.raises(BadRequestError) as refused:
        Sampling(**{field: value})
    assert refused.value.field == field


def test_a_bias_out_of_range_is_named_by_its_token():
    with pytest.raises(BadRequestError) as refused:
        Sampling(logit_bias={4: 101})
    assert refused.value.field == "logit_bias[4]"

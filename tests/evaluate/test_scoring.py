"""Laws of scoring: bits are those of the model, however the answers are batched or cut into windows."""

from __future__ import annotations

import math
import random
import zlib
from collections import Counter

import pytest
import torch

from aifactory.evaluate.scoring import Unigram, _windows, answer_bits, answer_scores, deflate_bits
from aifactory.text.documents import prompt_tokens
from aifactory.text.tasks import Task

WORDS = ["the", "quick", "größe", "日本語", "return", "x = 1", "😀", "\n"]


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(3)


@pytest.fixture(scope="module")
def tasks():
    rng = random.Random(2)

    def text(longest):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, longest)))

    return [Task(text(10) if i % 4 else "", text(12)) for i in range(60)]


@torch.inference_mode()
def bits_alone(model, tokenizer, task):
    """Token by token, each after all that is before it."""
    ids = [*prompt_tokens(tokenizer, task.prompt), *tokenizer.encode(task.answer)]
    first = len(prompt_tokens(tokenizer, task.prompt))
    log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(log_probs[i - 1, ids[i]]) for i in range(first, len(ids))) / math.log(2)


def test_bits_equal_those_of_each_task_alone(model, tokenizer, tasks):
    found = answer_bits(model, tokenizer, tasks)

    assert found == pytest.approx([bits_alone(model, tokenizer, task) for task in tasks], rel=1e-4)
    assert found == pytest.approx([answer_bits(model, tokenizer, [task])[0] for task in tasks], rel=1e-5)
    assert found == pytest.approx(answer_bits(model, tokenizer, tasks[::-1])[::-1], rel=1e-5)


def test_a_chat_is_asked_in_the_tokens_of_its_template(model, tokenizer):
    messages = '[{"role": "user", "content": "the quick größe"}]'
    plain = Task("user:\nthe quick größe\n\nassistant:\n", "x = 1")

    found = answer_bits(model, tokenizer, [Task("", "x = 1", messages)], fallback="plain")

    assert found == answer_bits(model, tokenizer, [plain])
    # Without a template nobody can ask it so: what was said goes before it as it is.
    refused = answer_bits(model, tokenizer, [Task("", "x = 1", messages)])
    assert refused == answer_bits(model, tokenizer, [Task("the quick größe", "x = 1")]) != found


def test_an_empty_answer_costs_nothing(model, tokenizer):
    assert answer_bits(model, tokenizer, [Task("a", ""), Task("a" * 2000, "")]) == [0.0, 0.0]
    assert answer_bits(model, tokenizer, []) == []


@torch.inference_mode()
def greedy(model, tokenizer, prompt, *, number):
    """The tokens that the model writes after a prompt, the likeliest each, up to its end or so many."""
    ids, written = prompt_tokens(tokenizer, prompt), []
    while len(written) < number:
        token = int(model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax())
        if token == tokenizer.eos_id:
            return written, True
        written.append(token)
    return written, False


def test_an_answer_is_exact_where_greedy_decoding_writes_it_and_ends(model, tokenizer):
    prompts = [*WORDS, *(f"{a} {b}" for a in WORDS for b in WORDS)]
    exact, others = [], []
    with torch.no_grad():
        end = model.lm_head.weight[tokenizer.eos_id].clone()
        # So that it ends sooner or later.
        model.lm_head.weight[tokenizer.eos_id] *= 2.5
    try:
        for prompt in prompts:
            written, has_ended = greedy(model, tokenizer, prompt, number=8)
            text = tokenizer.decode(written)
            if written and tokenizer.encode(text) == written:
                (exact if has_ended else others).append(Task(prompt, text))
                others += [Task(prompt, f"{text} the")]
                others += [Task(prompt, tokenizer.decode(written[:-1]))] if len(written) > 1 else []
        found = answer_scores(model, tokenizer, [*exact, *others])
        bits = answer_bits(model, tokenizer, [*exact, *others])
    finally:
        with torch.no_grad():
            model.lm_head.weight[tokenizer.eos_id] = end

    assert exact and others
    assert [score.is_exact for score in found] == [True] * len(exact) + [False] * len(others)
    assert [score.bits for score in found] == bits
    assert [score.is_exact for score in answer_scores(model, tokenizer, [Task("a", "")])] == [False]


@pytest.mark.parametrize(("prompt", "answer"), [(1, 96), (1, 400), (50, 60), (95, 1), (96, 1), (300, 300), (10, 86)])
def test_windows_score_each_token_of_the_answer_once_with_at_least_half_the_context(prompt, answer):
    ids = list(range(prompt + answer))
    windows = _windows(0, ids[:prompt], ids[prompt:], 96)

    assert [token for window in windows for token in window.ids[window.first :]] == ids[prompt:]
    for window in windows:
        assert len(window.ids) <= 96
        assert window.first >= min(48, prompt)
        assert window.ids == list(range(window.ids[0], window.ids[0] + len(window.ids)))


def test_a_long_answer_is_scored_in_windows(model, tokenizer):
    task = Task("the quick " * 5, "return x = 1 größe " * 40)
    ids = [*prompt_tokens(tokenizer, task.prompt), *tokenizer.encode(task.answer)]
    assert len(ids) > 2 * 96

    expected = 0.0
    for window in _windows(0, prompt_tokens(tokenizer, task.prompt), tokenizer.encode(task.answer), 96):
        with torch.inference_mode():
            log_probs = model(input_ids=torch.tensor([window.ids])).logits[0].log_softmax(-1)
        expected -= sum(float(log_probs[i - 1, window.ids[i]]) for i in range(window.first, len(window.ids)))

    assert answer_bits(model, tokenizer, [task]) == [pytest.approx(expected / math.log(2), rel=1e-4)]


def test_deflate_knows_what_the_prompt_says():
    sentence = "a sentence that nobody has ever written, of 61 bytes in all.\n"

    assert deflate_bits(Task(sentence, sentence)) < 0.2 * deflate_bits(Task("", sentence))
    assert deflate_bits(Task("", "a" * 1000)) < 0.05 * 8000
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    assert deflate_bits(Task("", sentence)) == 8 * len(packed.compress(sentence.encode()) + packed.flush())


def test_the_unigram_model_is_a_distribution_over_the_tokens(tokenizer):
    texts = ["the quick the", "größe 日本語"] * 700
    unigram = Unigram(tokenizer, iter(texts))
    counts = Counter(token for text in texts for token in tokenizer.encode(text))
    total = sum(counts.values()) + tokenizer.vocab_size

    def bits(token):
        return math.log2(total / (counts[token] + 1))

    assert sum(2 ** -bits(token) for token in range(tokenizer.vocab_size)) == pytest.approx(1.0)
    for text in ("the", "größe the", "never seen 😀", ""):
        assert unigram.bits(Task("whatever", text)) == pytest.approx(sum(map(bits, tokenizer.encode(text))))
    assert unigram.bits(Task("", "the")) < unigram.bits(Task("", "zzz"))

"""Laws of TorchEngine: its answers are the model's own, and no request harms another."""

from __future__ import annotations

import gc
import random
import threading
import weakref

import pytest
import torch

from aifactory.engine.engine import TorchEngine
from aifactory.errors import BadRequestError, CapacityError, TokenizerMismatchError

PROMPT_LENGTHS = [1, 3, 40, 17, 16, 5, 64, 33, 2, 90]


def make_prompts(vocab_size, lengths=PROMPT_LENGTHS, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(1, vocab_size) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def generate(model, prompt_ids, max_tokens):
    output = model.generate(
        torch.tensor([prompt_ids]), do_sample=False, max_new_tokens=max_tokens, pad_token_id=0, eos_token_id=0
    )
    return output[0, len(prompt_ids) :].tolist()


def slow_down(model, monkeypatch, delay_s=0.02):
    forward = model.forward
    wait = threading.Event().wait

    def delayed(input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **options):
        wait(delay_s)
        return forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **options,
        )

    monkeypatch.setattr(model, "forward", delayed)


def test_greedy_ragged_batch_equals_generate_token_for_token(any_model, tokenizer, start, make_request, collected):
    prompts = make_prompts(tokenizer.vocab_size)
    engine = start(any_model)

    answers = [collected() for _ in prompts]
    for index, prompt in enumerate(prompts):
        engine.submit(make_request(f"r{index}", prompt, max_tokens=24, temperature=0.0), answers[index])

    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.wait().ids == generate(any_model, prompt, 24)
        assert answer.reason in ("length", "stop")
        end = -1 if answer.reason == "stop" else None
        assert answer.text == tokenizer.decode(answer.ids[:end])


def test_greedy_staggered_requests_equal_generate(model, tokenizer, start, make_request, collected):
    prompts = make_prompts(tokenizer.vocab_size, seed=1)
    lengths = [5, 30, 12, 25, 3, 40, 7, 20, 33, 11]
    engine = start(model, num_slots=3)

    answers = [collected() for _ in prompts]
    began = threading.Event()
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        engine.submit(make_request(f"r{index}", prompt, max_tokens=length, temperature=0.0), answers[index])
        began.wait(0.004 * (index % 3))

    for prompt, length, answer in zip(prompts, lengths, answers, strict=True):
        assert answer.wait().ids == generate(model, prompt, length)


def test_chunked_prefill_equals_whole_prefill(model, tokenizer, start, make_request, collected):
    prompts = make_prompts(tokenizer.vocab_size, seed=2)
    ids_of = {}
    for chunk in (1, 7, 16, 256):
        engine = start(model, prefill_chunk=chunk)
        answers = [collected() for _ in prompts]
        for index, prompt in enumerate(prompts):
            engine.submit(make_request(f"r{index}", prompt, max_tokens=10, temperature=0.0), answers[index])
        ids_of[chunk] = [answer.wait().ids for answer in answers]

    assert ids_of[1] == ids_of[7] == ids_of[16] == ids_of[256]


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8}, {"top_k": 5}, {"top_k": 20, "top_p": 0.5}])
def test_same_seed_gives_same_answer_alone_and_in_a_full_batch(
    model, tokenizer, start, make_request, collected, settings
):
    prompts = make_prompts(tokenizer.vocab_size, seed=3)
    wanted = {"max_tokens": 20, "temperature": 1.3, "seed": 11, **settings}
    alone = collected()
    start(model).submit(make_request("alone", prompts[3], **wanted), alone)
    alone.wait()

    engine = start(model, num_slots=8)
    crowd = [collected() for _ in prompts]
    for index, prompt in enumerate(prompts):
        sampling = wanted if index == 3 else {"max_tokens": 30, "temperature": (index % 3) * 0.7, "top_k": index}
        engine.submit(make_request(f"r{index}", prompt, **sampling), crowd[index])

    assert crowd[3].wait().ids == alone.ids
    assert len({tuple(answer.wait().ids) for answer in crowd}) > 1


def test_stop_strings_never_leak(model, tokenizer, start, make_request, collected):
    prompt = make_prompts(tokenizer.vocab_size, [12], seed=5)[0]
    engine = start(model)
    whole = collected()
    engine.submit(make_request("whole", prompt, max_tokens=40, temperature=0.0), whole)
    text = whole.wait().text
    # Stop strings that begin and end inside tokens: every substring of three characters from the middle on.
    for begin in range(len(text) // 3, len(text) - 3, 3):
        stop = text[begin : begin + 3]
        answer = collected()
        engine.submit(
            make_request(f"s{begin}", prompt, max_tokens=40, temperature=0.0, stop=("never there", stop)), answer
        )
        answer.wait()

        assert answer.text == text[: text.index(stop)]
        assert answer.reason == "stop"


def test_oversized_and_malformed_prompts_are_refused_and_others_go_on(model, tokenizer, start, make_request, collected):
    engine = start(model)
    fine = collected()
    engine.submit(make_request("fine", [1, 2, 3], max_tokens=30, temperature=0.0), fine)

    with pytest.raises(BadRequestError, match=r"160 tokens, found 150 . 11 = 161") as refused:
        engine.submit(make_request("long", [1] * 150, max_tokens=11), collected())
    assert refused.value.field == "max_tokens"
    with pytest.raises(BadRequestError) as refused:
        engine.submit(make_request("longer", [1] * 200, max_tokens=1), collected())
    assert refused.value.field == "prompt_ids"
    for prompt in ([], [-1], [tokenizer.vocab_size]):
        with pytest.raises(BadRequestError) as refused:
            engine.submit(make_request("bad", prompt, max_tokens=1), collected())
        assert refused.value.field == "prompt_ids"
    with pytest.raises(BadRequestError) as refused:
        engine.submit(make_request("fine", [1], max_tokens=1), collected())
    assert refused.value.field == "id"

    exact = collected()
    engine.submit(make_request("exact", [1] * 150, max_tokens=10, temperature=0.0), exact)
    assert exact.wait().ids == generate(model, [1] * 150, 10)
    assert fine.wait().ids == generate(model, [1, 2, 3], 30)


def test_random_traffic_with_cancels_leaves_every_other_answer_right(model, tokenizer, start, make_request, collected):
    rng = random.Random(9)
    prompts = make_prompts(tokenizer.vocab_size, [rng.randrange(1, 60) for _ in range(50)], seed=9)
    lengths = [rng.randrange(1, 40) for _ in prompts]
    doomed = {index for index in range(50) if rng.random() < 0.3}
    engine = start(model, num_slots=5, prefill_chunk=24)

    answers = [collected() for _ in prompts]
    began = threading.Event()
    for index, prompt in enumerate(prompts):
        engine.submit(make_request(f"r{index}", prompt, max_tokens=lengths[index], temperature=0.0), answers[index])
        if index % 4 == 3:
            began.wait(rng.random() * 0.01)
            for late in range(index - 3, index + 1):
                if late in doomed:
                    engine.cancel(f"r{late}")

    for index, answer in enumerate(answers):
        expected = generate(model, prompts[index], lengths[index])
        ids = answer.wait().ids
        assert ids == expected[: len(ids)]
        if index not in doomed:
            assert ids == expected
        assert [delta.finish_reason is not None for delta in answer.deltas[:-1]] == [False] * (len(answer.deltas) - 1)
    assert engine.num_unfinished == 0


def test_full_queue_raises_capacity_error_and_cancel_frees_it(model, start, make_request, collected, monkeypatch):
    slow_down(model, monkeypatch)
    engine = start(model, num_slots=1, max_queued=2)
    running_began = threading.Event()
    running = collected(lambda delta: running_began.set())
    engine.submit(make_request("running", [1], max_tokens=120, seed=0), running)
    assert running_began.wait(10)
    waiting = [collected(), collected()]
    for index, answer in enumerate(waiting):
        engine.submit(make_request(f"w{index}", [1], max_tokens=2, seed=0), answer)

    with pytest.raises(CapacityError):
        engine.submit(make_request("one too many", [1], max_tokens=2), collected())
    assert engine.num_unfinished == 3

    engine.cancel("w0")
    assert waiting[0].wait().reason == "cancelled"
    assert running.reason is None
    engine.cancel("running")
    assert running.wait().reason == "cancelled"
    assert waiting[1].wait().reason in ("length", "stop")
    engine.cancel("long gone")
    assert len(running.ids) < 120


def test_exception_in_forward_fails_those_in_it_and_later_requests_succeed(
    model, start, make_request, collected, monkeypatch
):
    forward = model.forward
    broken = threading.Event()

    def fragile(input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **options):
        if broken.is_set():
            raise RuntimeError("the device is gone")
        threading.Event().wait(0.005)
        return forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **options,
        )

    monkeypatch.setattr(model, "forward", fragile)
    engine = start(model)
    answers = [collected(), collected()]
    for index, answer in enumerate(answers):
        engine.submit(make_request(f"r{index}", [index + 1], max_tokens=100, temperature=0.0), answer)
    while not all(answer.deltas for answer in answers):
        threading.Event().wait(0.005)
    broken.set()
    for answer in answers:
        assert answer.wait().reason == "error"
        assert answer.deltas[-1].error == "RuntimeError: the device is gone"
    while_broken = collected()
    engine.submit(make_request("while broken", [9], max_tokens=5), while_broken)
    assert while_broken.wait().reason == "error"

    broken.clear()
    later = collected()
    engine.submit(make_request("later", [3, 4, 5], max_tokens=12, temperature=0.0), later)
    assert later.wait().ids == generate(model, [3, 4, 5], 12)
    assert engine.num_unfinished == 0


def test_nan_logits_end_their_own_request_only(model, start, make_request, collected, monkeypatch):
    forward = model.forward

    def poisoned(input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **options):
        output = forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **options,
        )
        # At its fourth position the second row breaks, and leaves nan in the cache as a real overflow would.
        if input_ids.shape == (2, 1) and int(position_ids[1, 0]) == 4:
            output.logits[1] = torch.nan
            for layer in past_key_values.slot_layers:
                layer.values[1, :, :5] = torch.nan
        return output

    monkeypatch.setattr(model, "forward", poisoned)
    engine = start(model, num_slots=2, prefill_chunk=256)
    healthy, broken = collected(), collected()
    with engine._changed:  # both at once, so that the second one is row 1
        engine.submit(make_request("healthy", [1, 2], max_tokens=30, temperature=0.0), healthy)
        engine.submit(make_request("broken", [3, 4], max_tokens=30, temperature=0.0), broken)
    assert broken.wait().reason == "error"
    assert "not finite" in broken.deltas[-1].error
    assert healthy.wait().ids == generate(model, [1, 2], 30)

    monkeypatch.undo()
    heirs = [collected(), collected()]
    for index, heir in enumerate(heirs):
        engine.submit(make_request(f"h{index}", [5 + index], max_tokens=12, temperature=0.0), heir)
    for index, heir in enumerate(heirs):
        assert heir.wait().ids == generate(model, [5 + index], 12)


def test_callback_that_raises_harms_nobody_else(model, start, make_request, collected):
    def explode(delta):
        raise ValueError("client gone")

    engine = start(model, num_slots=2)
    engine.submit(make_request("explodes", [1, 2], max_tokens=50, temperature=0.0), explode)
    other = collected()
    engine.submit(make_request("other", [3, 4], max_tokens=20, temperature=0.0), other)

    assert other.wait().ids == generate(model, [3, 4], 20)
    engine.close(10.0)
    assert engine.num_unfinished == 0


def test_close_drains_what_is_in_flight(model, start, make_request, collected):
    engine = start(model, num_slots=2)
    answers = [collected() for _ in range(6)]
    for index, answer in enumerate(answers):
        engine.submit(make_request(f"r{index}", [index + 1], max_tokens=20, temperature=0.0), answer)

    engine.close(60.0)

    assert all(answer.reason in ("length", "stop") for answer in answers)
    assert engine.num_unfinished == 0
    assert not engine._thread.is_alive()
    with pytest.raises(CapacityError):
        engine.submit(make_request("late", [1], max_tokens=1), collected())
    engine.close(0.0)


def test_close_without_patience_cancels(model, start, make_request, collected, monkeypatch):
    slow_down(model, monkeypatch)
    engine = start(model, num_slots=1)
    answers = [collected() for _ in range(3)]
    for index, answer in enumerate(answers):
        engine.submit(make_request(f"r{index}", [1], max_tokens=150, seed=0), answer)

    engine.close(0.0)

    assert {answer.reason for answer in answers} == {"cancelled"}


def test_close_frees_the_cache(model, start):
    engine = start(model)
    cache = weakref.ref(engine._scheduler._cache)

    engine.close(0.0)
    gc.collect()

    assert cache() is None


def test_engine_may_be_used_from_its_own_callbacks(model, start, make_request, collected):
    engine = start(model)
    second, third = collected(), collected()

    def on_first(delta):
        if delta.finish_reason:
            engine.submit(make_request("first", [2], max_tokens=3, seed=0), second)
            engine.submit(make_request("third", [2], max_tokens=100, seed=0), third)
            engine.cancel("third")

    engine.submit(make_request("first", [1], max_tokens=2, seed=0), collected(on_first))
    assert second.wait().reason in ("length", "stop")
    assert third.wait().reason == "cancelled"

    closing = collected(lambda delta: engine.close(5.0))
    engine.submit(make_request("closes", [1], max_tokens=2, seed=0), closing)
    closing.wait()
    engine._thread.join(10)
    assert not engine._thread.is_alive()


def test_tokenizer_of_another_model_is_refused(tokenizer, model):
    small = type(model)(type(model.config)(**{**model.config.to_dict(), "vocab_size": 100}))

    with pytest.raises(TokenizerMismatchError, match="at most 100 tokens"):
        TorchEngine(small, tokenizer)

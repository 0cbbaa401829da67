"""Laws of TorchEngine alone: its inner workings, and how it fails. What every engine promises is in test_conformance.py."""

from __future__ import annotations

import gc
import random
import threading
import weakref

import pytest
import torch
from conformance import Collected, held_until

from aifactory.engine.scheduler import MOST_CHUNKS
from aifactory.errors import CapacityError

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


def test_many_that_wait_are_read_before_a_few_go_on_and_a_few_keep_none_waiting_long(model, start, make_request):
    engine = start(model, num_slots=42, prefill_chunk=16, prefix_tokens=0)
    happened, ended = [], threading.Event()

    def tell(name):
        def on_delta(delta):
            happened.append(name)
            if name == "first" and delta.finish_reason is not None:
                ended.set()

        return on_delta

    with engine._changed:  # all at once
        engine.submit(make_request("first", [7] * 16, max_tokens=40, temperature=0.0), tell("first"))
        for index in range(40):
            engine.submit(make_request(f"r{index}", [index + 1] * 16, max_tokens=1, temperature=0.0), tell("other"))
    assert ended.wait(60)

    # How many were read between two tokens of the first one; they end with theirs, so one decodes and all others wait.
    between = [len(others) for others in "".join("f" if name == "first" else "o" for name in happened).split("f")]
    assert sum(between) == 40
    # A chunk is a prompt. What is told of a token may be held back for the next one.
    assert 2 * MOST_CHUNKS >= max(between) >= MOST_CHUNKS
    assert sum(count >= MOST_CHUNKS for count in between) >= 4


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


def test_close_frees_the_cache(model, start):
    engine = start(model)
    cache = weakref.ref(engine._scheduler._cache)

    engine.close(0.0)
    gc.collect()

    assert cache() is None


@pytest.mark.parametrize("options", [{"compiled": True}, {"graphs": True}], ids=str)
def test_prompts_that_wait_are_read_in_one_call_and_a_beginning_that_they_share_once(
    model, start, ask, submit, options
):
    engine = start(model, num_slots=8, prefill_chunk=256, prefix_tokens=512, **options)
    calls, let = [], threading.Event()
    reader = engine._scheduler._prompts
    read = reader.read

    def noted(chunks):
        calls.append([(len(chunk.ids), chunk.begin) for chunk in chunks])
        return read(chunks)

    def together(prompts):
        """Their answers, when all of them have come while the engine was held."""
        let.clear()
        holding = Collected(held_until(let))
        submit(engine, holding, [9], max_tokens=1)
        assert holding.begun.wait(60)
        calls.clear()
        answers = [ask(engine, prompt, max_tokens=4, temperature=0) for prompt in prompts]
        let.set()
        return [answer.wait().ids for answer in answers]

    reader.read = noted
    short = [[1, 2, 3, 4, 5], [7], [6] * 9, [3, 2, 1]]
    alone = [together([prompt])[0] for prompt in short]
    assert together(short) == alone
    assert calls == [[(5, 0), (1, 0), (9, 0), (3, 0)]]

    beginning = [5, 4, 3, 2] * 16
    long = [[*beginning, *prompt] for prompt in short[:3]]
    found = together(long)
    assert sorted(calls[0] + calls[1]) == [(1, 64), (9, 64), (69, 0)]
    assert found == [ask(engine, prompt, max_tokens=4, temperature=0).wait().ids for prompt in long]

"""Laws of the cache: what begins alike is read once, memory is bounded and counted, and no request harms another."""

from __future__ import annotations

import random
import resource
from pathlib import Path

import pytest
import torch

from aifactory.engine.cache import SlotCache
from aifactory.engine.prefix import BLOCK, PrefixStore
from aifactory.errors import BadRequestError, ConfigError


def make_ids(seed, count):
    rng = random.Random(seed)
    return [rng.randrange(1, 300) for _ in range(count)]


@pytest.fixture(params=[False, True], ids=["plain", "compiled"])
def compiled(request):
    return request.param


@torch.inference_mode()
def generate(model, prompt_ids, max_tokens):
    output = model.generate(
        torch.tensor([prompt_ids]), do_sample=False, max_new_tokens=max_tokens, pad_token_id=0, eos_token_id=0
    )
    return output[0, len(prompt_ids) :].tolist()


def test_requests_that_begin_alike_read_the_beginning_once_and_answer_as_if_alone(
    model, start, make_request, collected, compiled
):
    engine = start(model, compiled=compiled)
    shared = make_ids(1, 2 * BLOCK)
    prompts = [
        shared + make_ids(2, 9),
        shared + make_ids(3, 5),
        shared,
        shared[:BLOCK] + make_ids(4, 3),
        make_ids(5, 70),
    ]
    for index, prompt in enumerate(prompts):
        answer = collected()
        engine.submit(make_request(f"r{index}", prompt, max_tokens=8, temperature=0.0), answer)
        assert answer.wait().ids == generate(model, prompt, 8)
    # The second: both blocks. The third is its own last token's text: one block. The fourth: one. The fifth: none.
    assert engine.cache_use.num_reused == (2 + 1 + 1) * BLOCK


def test_a_conversation_goes_on_from_its_own_answer(model, start, make_request, collected, compiled):
    engine = start(model, compiled=compiled)
    first = collected()
    prompt = make_ids(6, BLOCK - 10)
    engine.submit(make_request("first", prompt, max_tokens=40, temperature=0.0, logit_bias={0: -100}), first)
    turn = prompt + first.wait().ids + make_ids(7, 4)
    second = collected()
    engine.submit(make_request("second", turn, max_tokens=8, temperature=0.0), second)

    assert second.wait().ids == generate(model, turn, 8)
    assert engine.cache_use.num_reused == BLOCK


@pytest.mark.parametrize(
    "options",
    [{"batch_invariant": True}, {"reuses_answers": False}, {"tiles": False}, {"weights": "bfloat16"}],
    ids=str,
)
def test_what_goes_on_from_an_answer_has_the_same_bits_wherever_that_answer_was_given(
    model, start, make_request, collected, options
):
    prompt, wanted = make_ids(6, BLOCK + 6), {"max_tokens": 62, "temperature": 0.0, "logit_bias": {0: -100}}

    def scores(engine, name, prompt, **wanted):
        answer = collected()
        engine.submit(make_request(name, prompt, **wanted, logprobs=1), answer)
        return [score for delta in answer.wait().deltas for score in delta.scores]

    engine, elsewhere = (start(model, compiled=True, **options) for _ in range(2))
    turn = prompt + [score.token_id for score in scores(engine, "first", prompt, **wanted)] + make_ids(7, 4)
    following = {"max_tokens": 12, "temperature": 1.0, "seed": 3}

    assert scores(engine, "second", turn, **following) == scores(elsewhere, "second", turn, **following)
    assert engine.cache_use.num_reused >= BLOCK


def test_with_weights_of_bfloat16_a_reused_answer_and_one_that_is_read_again_have_the_same_bits(
    model, start, make_request, collected
):
    prompt, wanted = make_ids(6, BLOCK + 6), {"max_tokens": 62, "temperature": 0.0, "logit_bias": {0: -100}}

    def scores(engine, name, prompt, **wanted):
        answer = collected()
        engine.submit(make_request(name, prompt, **wanted, logprobs=1), answer)
        return [score for delta in answer.wait().deltas for score in delta.scores]

    engine, other = (start(model, compiled=True, weights="bfloat16", prefix_tokens=kept) for kept in (None, 0))
    turn = prompt + [score.token_id for score in scores(engine, "first", prompt, **wanted)] + make_ids(7, 4)
    following = {"max_tokens": 12, "temperature": 1.0, "seed": 3}

    assert scores(engine, "second", turn, **following) == scores(other, "second", turn, **following)
    assert engine.cache_use.num_reused >= 2 * BLOCK  # the answer was
    assert other.cache_use.num_reused == 0


def test_with_weights_of_bfloat16_keys_and_values_take_half_the_memory(model, start):
    engine, other = (start(model, compiled=True, weights=weights) for weights in ("bfloat16", "float32"))

    assert 2 * engine.cache_use.bytes_per_token == other.cache_use.bytes_per_token


def test_a_reused_beginning_gives_the_same_bits(model, start, make_request, collected):
    prompt, wanted = make_ids(8, 100), {"max_tokens": 12, "temperature": 1.0, "seed": 1, "logprobs": 5}

    def scores(engine, name):
        answer = collected()
        engine.submit(make_request(name, prompt, **wanted), answer)
        return [score for delta in answer.wait().deltas for score in delta.scores]

    engine = start(model, compiled=True)
    first = scores(engine, "first")
    assert scores(engine, "again") == first
    assert engine.cache_use.num_reused == BLOCK
    without = start(model, compiled=True, prefix_tokens=0)
    assert scores(without, "first") == first
    assert scores(without, "again") == first
    assert without.cache_use.num_reused == without.cache_use.num_kept == 0


def test_the_store_keeps_its_bound_and_drops_what_was_used_longest_ago_and_ends_first():
    cache = SlotCache(num_layers=1, num_slots=1, context_length=4 * BLOCK, dtype=torch.float32, device="cpu")
    cache.slot_layers[0].lazy_initialization(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8))
    store = PrefixStore(5 * BLOCK + 3)
    texts = [make_ids(seed, 2 * BLOCK + 1) for seed in range(3)]
    for text in texts[:2]:
        store.keep(cache, 0, text, None)
    assert store.restore(cache, 0, texts[0], None) == 2 * BLOCK
    store.keep(cache, 0, texts[2], None)

    assert store.num_tokens == 5 * BLOCK
    assert store.num_bytes == 5 * BLOCK * cache.bytes_per_token
    assert store.restore(cache, 0, texts[1], None) == BLOCK
    assert store.restore(cache, 0, texts[0], None) == 2 * BLOCK
    assert store.restore(cache, 0, texts[2], "an adapter") == 0
    # A text longer than the store leaves its beginning there.
    store.keep(cache, 0, make_ids(9, 4 * BLOCK), None)
    assert store.num_tokens == 5 * BLOCK


def test_what_a_row_holds_comes_back_as_it_was():
    torch.manual_seed(0)
    cache = SlotCache(num_layers=3, num_slots=2, context_length=2 * BLOCK, dtype=torch.float32, device="cpu")
    for layer in cache.slot_layers:
        layer.lazy_initialization(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))
        layer.keys[1] = torch.randn_like(layer.keys[1])
        layer.values[1] = torch.randn_like(layer.values[1])
    states = cache.read_states(1, 3, 3 + BLOCK)
    cache.write_states(0, 10, states)

    assert states.shape == (2, 3, 2, BLOCK, 8)
    assert torch.equal(cache.read_states(0, 10, 10 + BLOCK), states)
    assert cache.bytes_per_token == 3 * 2 * 2 * 8 * 4


def test_more_than_fits_waits_and_what_never_fits_is_refused_with_the_reason(
    model, start, make_request, collected, compiled
):
    engine = start(model, compiled=compiled, cache_tokens=100, num_slots=4)
    with pytest.raises(BadRequestError, match=r"100 tokens of the whole cache, found 60 . 41 = 101") as refused:
        engine.submit(make_request("never", make_ids(1, 60), max_tokens=41), collected())
    assert refused.value.field == "max_tokens"
    most = 0

    def watch(delta):
        nonlocal most
        most = max(most, engine.cache_use.num_reserved)

    prompts = [make_ids(seed, 20 + 7 * seed) for seed in range(9)]
    answers = [collected(watch) for _ in prompts]
    for index, prompt in enumerate(prompts):
        engine.submit(make_request(f"r{index}", prompt, max_tokens=20, temperature=0.0), answers[index])
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.wait().ids == generate(model, prompt, 20)
    assert 40 < most <= 100
    engine.close(10.0)
    assert engine.cache_use.num_reserved == 0


def test_a_row_that_is_given_back_takes_no_memory():
    size = 64 * 2**20
    cache = SlotCache(num_layers=1, num_slots=2, context_length=size // 4 // 64, dtype=torch.float32, device="cpu")
    layer = cache.slot_layers[0]
    before = resident()
    layer.lazy_initialization(torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 1, 64))
    assert resident() - before < size / 4
    layer.keys.fill_(1.0)
    layer.values.fill_(1.0)
    assert resident() - before > 3 * size
    cache.release(0)
    assert resident() - before < 2.5 * size
    assert float(layer.keys[0].abs().max()) == 0
    assert float(layer.keys[1].min()) == 1


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.parametrize("options", [{"cache_tokens": 1}, {"prefix_tokens": -1}])
def test_bounds_that_hold_nothing_are_refused(model, start, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        start(model, **options)

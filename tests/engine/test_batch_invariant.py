"""Laws of batch_invariant: the same bits alone and in a crowd, seeds and scores included, with and without the kernels."""

from __future__ import annotations

import random

import pytest
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def wide_model(tokenizer):
    # Wide enough for torch's kernels to choose another order for another batch.
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 512}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=tokenizer.vocab_size, max_position_embeddings=256)).eval()


def bits_of(engine, prompts, make_request, collected, **wanted):
    answers = [collected() for _ in prompts]
    for index, prompt in enumerate(prompts):
        wanted_here = {**wanted, "seed": index, "echo": index % 4 == 0}
        engine.submit(make_request(f"r{index}-{len(prompts)}", prompt, **wanted_here), answers[index])
    return [
        [
            (s.token_id, s.logprob, s.top)
            for delta in answer.wait().deltas
            for s in (*delta.prompt_scores, *delta.scores)
        ]
        for answer in answers
    ]


@pytest.mark.parametrize(("compiled", "invariant"), [(True, False), (True, True), (False, True), (False, False)])
def test_the_same_bits_alone_and_in_a_crowd(wide_model, tokenizer, start, make_request, collected, compiled, invariant):
    rng = random.Random(1)
    lengths = [1, 9, 16, 33, 64, 70, 31, 100]
    prompts = [[rng.randrange(1, tokenizer.vocab_size) for _ in range(length)] for length in lengths]
    wanted = {"max_tokens": 16, "temperature": 1.0, "logprobs": 4}
    options = {"compiled": compiled, "batch_invariant": invariant, "num_slots": 8, "prefill_chunk": 32}

    crowd = bits_of(start(wide_model, **options), prompts, make_request, collected, **wanted)
    engine = start(wide_model, **options)
    # The first of each kind: alone, one after the other.
    alone = []
    for index in range(len(prompts)):
        answer = collected()
        echo = index % 4 == 0
        engine.submit(make_request(f"a{index}", prompts[index], **wanted, seed=index, echo=echo), answer)
        scores = [s for delta in answer.wait().deltas for s in (*delta.prompt_scores, *delta.scores)]
        alone.append([(s.token_id, s.logprob, s.top) for s in scores])

    if compiled or invariant:
        assert alone == crowd
    else:
        # What the option is for: without it torch's kernels do give other bits.
        assert alone != crowd

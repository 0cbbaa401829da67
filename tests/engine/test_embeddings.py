"""Laws of embeddings: they are the model's own hidden states, whole texts read in chunks, and hold up nobody."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from aifactory.engine.protocol import GenerationRequest
from aifactory.errors import BadRequestError


@torch.inference_mode()
def expected(model, ids, pooling):
    hidden = model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    return hidden.mean(0) if pooling == "mean" else hidden[-1]


def embed(engine, collected, name, ids, pooling):
    answer = collected()
    engine.submit(GenerationRequest(id=name, prompt_ids=tuple(ids), pooling=pooling), answer)
    return answer


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("compiled", [False, None])
def test_embeddings_are_those_of_the_plain_model_beside_answers(
    any_model, tokenizer, start, make_request, collected, pooling, compiled
):
    rng = random.Random(1)
    engine = start(copy.deepcopy(any_model), compiled=compiled, prefill_chunk=16)
    texts = [[rng.randrange(1, tokenizer.vocab_size) for _ in range(length)] for length in (1, 15, 16, 40, 160, 64)]
    beside = collected()
    engine.submit(make_request("beside", texts[1], max_tokens=40, temperature=0.0), beside)
    answers = [embed(engine, collected, f"e{index}", ids, pooling) for index, ids in enumerate(texts)]

    for ids, answer in zip(texts, answers, strict=True):
        (delta,) = answer.wait().deltas
        assert (delta.finish_reason, delta.text, delta.token_ids) == ("stop", "", ())
        assert torch.allclose(torch.tensor(delta.embedding), expected(any_model, ids, pooling), atol=1e-4)
    alone = collected()
    engine.submit(make_request("alone", texts[1], max_tokens=40, temperature=0.0), alone)
    assert alone.wait().ids == beside.wait().ids


def test_the_kernels_give_the_same_bits_in_any_chunks(model, start, collected):
    ids = [(7 * place) % 300 for place in range(100)]
    found = [
        embed(start(model, compiled=True, prefill_chunk=chunk), collected, "e", ids, "mean").wait().deltas[0].embedding
        for chunk in (5, 256)
    ]
    assert found[0] == found[1]


def test_what_can_not_be_embedded_is_refused_and_what_is_no_number_is_an_error(model, start, collected):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[3] = torch.nan
    for compiled in (False, True):
        engine = start(copy.deepcopy(broken), compiled=compiled)
        answer = embed(engine, collected, "e", [1, 2], "mean").wait()
        assert (answer.reason, "not finite" in answer.deltas[0].error) == ("error", True)
        with pytest.raises(BadRequestError, match="160 tokens"):
            embed(engine, collected, "long", [1] * 161, "last")
    with pytest.raises(BadRequestError) as refused:
        GenerationRequest(id="a", prompt_ids=(1,), pooling="max")
    assert refused.value.field == "pooling"

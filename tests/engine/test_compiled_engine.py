"""Laws of the kernels: the model's own answers, and the same bits whatever is beside a row and however many threads there are."""

from __future__ import annotations

import copy
import random
import threading

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from aifactory.engine import matrix_unit, vectors
from aifactory.engine.engine import TorchEngine
from aifactory.engine.packed import DEPTH, PANEL, PackedLinear, pack_matrix, pack_model, why_not_packed
from aifactory.engine.team import ThreadTeam
from aifactory.errors import ConfigError, ParityError

LENGTHS = [1, 3, 40, 17, 16, 5, 64, 33, 2, 90]


def make_prompts(tokenizer, seed):
    rng = random.Random(seed)
    return [[rng.randrange(1, tokenizer.vocab_size) for _ in range(length)] for length in LENGTHS]


@torch.inference_mode()
def generate(model, prompt, max_tokens):
    output = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=max_tokens, pad_token_id=0, eos_token_id=0
    )
    return output[0, len(prompt) :].tolist()


def answers_of(engine, prompts, make_request, collected, **sampling):
    answers = [collected() for _ in prompts]
    for index, prompt in enumerate(prompts):
        engine.submit(make_request(f"r{index}", prompt, **sampling), answers[index])
    return [answer.wait() for answer in answers]


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_greedy_in_fp32_equals_generate_token_for_token(
    kernel_model, tokenizer, start, make_request, collected, num_threads
):
    prompts = make_prompts(tokenizer, 0)
    engine = start(kernel_model, compiled=True, num_threads=num_threads)
    answers = answers_of(engine, prompts, make_request, collected, max_tokens=24, temperature=0.0)
    torch.set_num_threads(1)

    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.ids == generate(kernel_model, prompt, 24)


@pytest.mark.parametrize(("weights", "distance"), [("bfloat16", 0.15), ("int8", 0.6)])
def test_greedy_in_fewer_bits_is_near_the_best_of_fp32_teacher_forced(
    model, tokenizer, start, make_request, collected, weights, distance
):
    prompts = make_prompts(tokenizer, 1)
    engine = start(model, compiled=True, weights=weights)
    answers = answers_of(engine, prompts, make_request, collected, max_tokens=24, temperature=0.0)

    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            log_probs = model(input_ids=torch.tensor([prompt + answer.ids])).logits[0].log_softmax(-1)
        for place, token_id in enumerate(answer.ids, start=len(prompt) - 1):
            assert float(log_probs[place].max() - log_probs[place, token_id]) < distance


@pytest.mark.parametrize("kept", [{}, {"weights": "bfloat16"}, {"weights": "bfloat16", "tiles": False}], ids=str)
def test_an_answer_has_the_same_bits_alone_in_a_crowd_in_other_chunks_and_with_other_threads(
    model, tokenizer, start, make_request, collected, kept
):
    prompts = make_prompts(tokenizer, 2)
    wanted = {"max_tokens": 20, "temperature": 1.0, "seed": 5, "logprobs": 3}

    def bits(answer):
        return [(score.token_id, score.logprob, score.top) for delta in answer.deltas for score in delta.scores]

    crowd = [
        bits(a)
        for a in answers_of(
            start(model, compiled=True, num_slots=8, **kept), prompts, make_request, collected, **wanted
        )
    ]
    for options in ({"num_threads": 2}, {"prefill_chunk": 5}, {"num_slots": 3, "prefill_chunk": 256}):
        engine = start(model, compiled=True, **options, **kept)
        for index in (2, 6, 9):
            (alone,) = answers_of(engine, prompts[index : index + 1], make_request, collected, **wanted)
            assert bits(alone) == crowd[index]
    torch.set_num_threads(1)


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (8, 8), (13, 24), (64, 200), (37, 1024), (301, 520)])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_product_is_that_of_the_weights_as_they_are_kept(kind, rows, columns):
    torch.manual_seed(6)
    linear = torch.nn.Linear(columns, rows)
    weight = linear.weight.detach()
    matrix = pack_matrix(weight, linear.bias.detach(), kind)
    if kind == "int8":
        scale = weight.abs().amax(-1) / 127
        kept = (weight / scale[:, None]).round() * scale[:, None]
        assert float((kept - weight).abs().max() / weight.abs().max()) <= 1 / 254 + 1e-6
        weight = kept
    else:
        weight = weight.to(getattr(torch, kind)).float()
    for num_threads in (1, 2):
        team = ThreadTeam(num_threads)
        packed = PackedLinear(matrix, columns, rows, team)
        for count in (1, 2, 3, 4, 7, 12, 29):
            x = torch.randn(count, columns)
            # bfloat16 is multiplied by bfloat16, as torch does.
            given = x.bfloat16() if kind == "bfloat16" else x
            expected = torch.nn.functional.linear(given.double(), weight.double(), linear.bias.double())
            found = packed(x)
            assert torch.allclose(found.double(), expected, atol=1e-4)
            # Each row as if it were alone.
            assert all(torch.equal(found[row], packed(x[row : row + 1])[0]) for row in range(count))
        team.close()


def test_weights_are_laid_out_by_the_numbers_of_the_kernels():
    assert (PANEL, DEPTH) == (vectors.PANEL, matrix_unit.DEPTH)


def test_packing_keeps_one_copy_of_the_weights(model):
    packed_model, team = copy.deepcopy(model), ThreadTeam(1)
    packed = pack_model(packed_model, "float32", team)
    team.close()

    base = packed.qkv.weight.data_ptr()
    size = packed.qkv.weight.nbytes
    for layer in packed_model.model.layers:
        assert base <= layer.self_attn.k_proj._arrays[0].ctypes.data < base + size
    assert sum(p.nbytes for p in packed_model.parameters()) < packed.num_bytes / 10


def test_a_row_that_is_not_finite_ends_alone(model, start, make_request, collected, tokenizer):
    # A token whose embedding is no number: whoever samples or reads it breaks, nobody else does.
    broken_model = copy.deepcopy(model)
    broken_id = 77
    with torch.no_grad():
        broken_model.model.embed_tokens.weight[broken_id] = torch.nan
    engine = start(broken_model, compiled=True)
    healthy, broken = collected(), collected()
    engine.submit(
        make_request("healthy", [1, 2], max_tokens=30, temperature=0.0, logit_bias={broken_id: -100}), healthy
    )
    began = threading.Event()
    broken = collected(lambda delta: began.set())
    engine.submit(make_request("broken", [3, 4], max_tokens=30, temperature=0.0, logit_bias={broken_id: 100}), broken)

    assert broken.wait().reason == "error"
    assert "not finite" in broken.deltas[-1].error
    assert healthy.wait().reason in ("length", "stop")
    heir = collected()
    engine.submit(make_request("heir", [5, 6], max_tokens=30, temperature=0.0, logit_bias={broken_id: -100}), heir)
    assert heir.wait().reason in ("length", "stop")


def test_what_the_kernels_can_not_compute_is_said(any_model, tokenizer):
    sizes = {
        "vocab_size": 320,
        "hidden_size": 36,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 64,
    }
    odd = LlamaForCausalLM(LlamaConfig(**sizes))
    gelu = LlamaForCausalLM(LlamaConfig(**{**sizes, "hidden_size": 24}, hidden_act="gelu"))
    assert "hidden_size of 36" in why_not_packed(odd)
    assert "gelu" in why_not_packed(gelu)
    assert (why_not_packed(any_model) is None) == (type(any_model).__name__ != "GPT2LMHeadModel")
    for options in ({"compiled": True}, {"weights": "int8"}):
        with pytest.raises(ConfigError, match="hidden_size of 36"):
            TorchEngine(odd, tokenizer, **options)
    with pytest.raises(ConfigError, match="compiled off"):
        TorchEngine(copy.deepcopy(any_model), tokenizer, compiled=False, weights="int8")


def test_kernels_that_compute_something_else_are_found_out(model, tokenizer, monkeypatch):
    from aifactory.engine import compiled

    step = compiled.CompiledForward.step
    monkeypatch.setattr(compiled.CompiledForward, "step", lambda self, ids, at: step(self, ids, torch.zeros_like(at)))
    with pytest.raises(ParityError, match="llama"):
        TorchEngine(copy.deepcopy(model), tokenizer)


def test_threads_of_a_team_end_with_their_engine(model, start):
    before = threading.active_count()
    engine = start(model, compiled=True, num_threads=3)
    assert threading.active_count() == before + 3
    engine.close(0.0)
    assert threading.active_count() == before
    torch.set_num_threads(1)


def test_the_team_runs_every_number_once():
    team = ThreadTeam(3)
    seen = np.zeros(3, np.int64)
    done = threading.Barrier(3)

    def note(number, num_threads, add):
        seen[number] += add
        done.wait(10)

    for _ in range(50):
        team.run(note, 2)
    team.close()
    assert seen.tolist() == [100, 100, 100]

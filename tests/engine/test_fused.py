"""Laws of decode steps and prompts by Triton's kernels: what they compute is the model's own forward, whatever the rows and lengths.

They run on a GPU, or in Triton's interpreter where Triton is without one (make test-kernels).
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

# What Triton is to be, it must know before anybody loads it, and transformers does.
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "expected an NVIDIA GPU or TRITON_INTERPRET=1, found neither; make test-kernels", allow_module_level=True
    )
pytest.importorskip("triton", reason="expected Triton, found none; make test-kernels")

from closed_loop import byte_tokenizer
from conformance import Collected

from aifactory.engine import fused
from aifactory.engine.cache import SlotCache
from aifactory.engine.engine import TorchEngine
from aifactory.engine.fused import FusedForward, Tiles
from aifactory.engine.fused_layers import FusedLayers
from aifactory.engine.fused_prompts import FusedPrompts
from aifactory.engine.prompts import PromptChunk
from aifactory.engine.protocol import GenerationRequest, Sampling
from aifactory.engine.steps import DecodeSteps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = {
    "vocab_size": 200,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
SMALL_TILES = {name: Tiles(rows=16, columns=32, warps=4) for name in ("qkv", "out", "up", "down", "head")}


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def model(request):
    torch.manual_seed(3)
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True, rms_norm_eps=1e-3)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    }[request.param]()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return made.to(DEVICE).eval()


def after_prompts(model, prompts, num_slots):
    """A cache in whose first rows these prompts are."""
    cache = SlotCache(
        num_layers=2, num_slots=num_slots, context_length=256, dtype=model.dtype, device=DEVICE, has_spare_row=True
    )
    for row, prompt in enumerate(prompts):
        positions, mask = cache.plan_prefill(row, 0, len(prompt))
        ids = torch.tensor([prompt], device=DEVICE)
        model(input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache)
        cache.open_row(row, len(prompt))
    return cache


def exact_logits(model, ids):
    return model(input_ids=torch.tensor([ids], device=DEVICE), use_cache=False).logits[0, -1].float()


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 200, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("lengths", [[7], [70, 1, 33], [1, 2] * 9], ids=len)
@pytest.mark.parametrize("is_long", [False, True])
@torch.inference_mode()
def test_a_fused_step_is_the_models_own(model, lengths, is_long, monkeypatch):
    if is_long:  # each part of a few positions, so that rows have from one part to all
        monkeypatch.setattr(fused, "_LONG", 1)
        monkeypatch.setattr(fused, "_LEAST_PART", 16)
        monkeypatch.setattr(fused, "_BLOCK_T", 16)
    prompts = prompts_of(*lengths)
    cache = after_prompts(model, prompts, len(prompts) + 1)
    layers = FusedLayers(model, num_positions=cache.num_positions)
    steps = DecodeSteps(
        FusedForward(layers, cache, most_rows=len(prompts) + 1, tiles=SMALL_TILES), cache, device=DEVICE
    )
    texts = [[*prompt, 11 + row] for row, prompt in enumerate(prompts)]
    steps.feed(
        torch.tensor([text[-1] for text in texts], device=DEVICE),
        torch.tensor([len(text) - 1 for text in texts], device=DEVICE),
    )
    for _ in range(2):
        logits_BV = steps.step(max(map(len, texts)))
        for row, text in enumerate(texts):
            exact_V = exact_logits(model, text)
            error = float((logits_BV[row].float() - exact_V).norm() / exact_V.norm())
            assert error < 1e-4, (row, len(text))
            text.append(int(exact_V.argmax()))
        assert steps.likeliest() == [text[-1] for text in texts]


@pytest.mark.parametrize("lengths", [[5], [150, 1, 40], [3, 2] * 5], ids=len)
@torch.inference_mode()
def test_prompts_read_together_are_each_read_by_itself(model, lengths):
    prompts = prompts_of(*lengths)
    # Something stands before each chunk, as much as its row has beyond its half.
    begins = [length // 2 for length in lengths]
    cache = after_prompts(
        model, [prompt[:begin] or prompt[:1] for prompt, begin in zip(prompts, begins, strict=True)], 10
    )
    read = FusedPrompts(FusedLayers(model, num_positions=cache.num_positions), cache).read
    order = sorted(range(len(prompts)), key=lambda row: -row)

    logits_CV = read([PromptChunk(prompts[row][begins[row] :], row, begins[row], len(prompts[row])) for row in order])
    for row, logits_V in zip(order, logits_CV, strict=True):
        exact_V = exact_logits(model, prompts[row])
        assert float((logits_V.float() - exact_V).norm() / exact_V.norm()) < 1e-4, (row, len(prompts[row]))

    # What they wrote is read by the next ones, and rows that were not theirs are as they were.
    logits_CV = read([PromptChunk([7], row, len(prompts[row]), len(prompts[row]) + 1) for row in order])
    for row, logits_V in zip(order, logits_CV, strict=True):
        exact_V = exact_logits(model, [*prompts[row], 7])
        assert float((logits_V.float() - exact_V).norm() / exact_V.norm()) < 1e-4, (row, len(prompts[row]))
    for layer in cache.slot_layers:
        assert not layer.keys[len(prompts) : cache.num_slots].any()


@pytest.mark.skipif(
    DEVICE != "cuda", reason="expected an NVIDIA GPU, found none: an engine takes the kernels there alone"
)
def test_an_engine_with_the_kernels_answers_a_ragged_crowd_as_its_model_would(model):
    model = model.to(torch.bfloat16)
    plain = copy.deepcopy(model)
    engine = TorchEngine(model, byte_tokenizer(200), num_slots=6, prefill_chunk=100, device=DEVICE, prefix_tokens=1024)
    try:
        beginning = prompts_of(80)[0]
        prompts = [*prompts_of(3, 150, 1, 64, 90, 7, 33, 120), [*beginning, 1], [*beginning, 2, 3], beginning]
        answers = [Collected() for _ in prompts]
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            sampling = Sampling(max_tokens=1 + 5 * (index % 4), temperature=0.0)
            engine.submit(GenerationRequest(id=str(index), prompt_ids=tuple(prompt), sampling=sampling), answer)
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids = answer.wait().ids
            assert answer.reason in ("length", "stop") and ids, index
            with torch.inference_mode():
                logits_TV = (
                    plain(input_ids=torch.tensor([prompt + ids], device=DEVICE), use_cache=False).logits[0].float()
                )
            logprobs_TV = logits_TV.log_softmax(-1)[len(prompt) - 1 : -1]
            behind = logprobs_TV.max(-1).values - logprobs_TV[torch.arange(len(ids)), ids]
            assert float(behind.max()) < 0.3, (index, behind.tolist())
    finally:
        engine.close(0.0)

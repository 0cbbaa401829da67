"""Laws of the decode steps by Triton's kernels: what they compute is the model's own forward, whatever the rows and lengths.

They run on a GPU, or in Triton's interpreter where Triton is without one (make test-kernels).
"""

from __future__ import annotations

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

from aifactory.engine import fused
from aifactory.engine.cache import SlotCache
from aifactory.engine.fused import FusedForward, Tiles
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
    steps = DecodeSteps(FusedForward(model, cache, most_rows=len(prompts) + 1, tiles=SMALL_TILES), cache, device=DEVICE)
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

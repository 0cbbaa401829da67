"""Laws of the operations that are counted: known figures come out, and a machine's peak says where it is from."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from aifactory.train.flops import flops_per_token, peak, utilisation


def llama(**sizes):
    return LlamaConfig(**{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **sizes})


def test_the_model_of_the_benchmark_needs_9_gflop_a_token():
    config = llama(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)

    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert flops_per_token(model, config, attended_tokens=4096) == 6 * weights + 12 * 16 * 2048 * 4096
    assert flops_per_token(model, config, attended_tokens=4096) == pytest.approx(9.02e9, rel=1e-3)


@pytest.mark.parametrize("kind", ["tied", "untied", "gpt2"])
def test_what_is_counted_is_what_torch_counts_in_a_step(kind):
    if kind == "gpt2":
        config = GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        model = GPT2LMHeadModel(config)
    else:
        config = llama(vocab_size=100, intermediate_size=48, tie_word_embeddings=kind == "tied")
        model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # as convention has it: all pairs of tokens
    ids_BT = torch.ones(2, 24, dtype=torch.long)
    with FlopCounterMode(display=False) as counted:
        model(input_ids=ids_BT, use_cache=False).logits.sum().backward()
    flops = counted.get_flop_counts()["Global"]
    # Rotary angles, which torch counts as a product: one per token and half head, forward alone.
    angles = sum(flops.values()) - 48 * flops_per_token(model, config, attended_tokens=24)

    assert 0 <= angles <= 2 * 48 * 8


def test_weights_that_are_not_trained_cost_a_third_less():
    config = llama(vocab_size=100, intermediate_size=48)
    model = LlamaForCausalLM(config)
    trained = flops_per_token(model, config, attended_tokens=0)
    model.requires_grad_(False)

    assert flops_per_token(model, config, attended_tokens=0) == pytest.approx(trained * 2 / 3)


def test_the_peak_of_a_cpu_is_measured_and_says_so():
    found = peak(torch.device("cpu"), torch.float32)

    assert found.source == "measured"
    assert found.flops_per_s > 0
    assert utilisation(10.0, found.flops_per_s / 40, found, workers=2) == pytest.approx(0.125)

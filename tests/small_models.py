"""Models that tests make, with seeded weights: of several architectures, and a Llama on disk with its byte-level BPE tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

LINES = ["the quick brown fox jumps over the lazy dog", "a bird in the hand is worth two in the bush"] * 4
VOCABULARY = 60


def make_model(kind: str) -> PreTrainedModel:
    """A model of two layers over `VOCABULARY` tokens: "llama", "qwen2" with grouped heads, or "gpt2"."""
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, **ids)).eval()
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**sizes, **ids, num_key_value_heads=2)).eval()
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **ids)).eval()


def write_small_model(folder: Path, *, seed: int = 7, context: int = 96, hidden: int = 32) -> Path:
    """Write a model in Hugging Face form; its weights are wide, so that it finds texts of very different likelihood."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(LINES, trainer)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=trained.get_vocab_size(),
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=context,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(trained.to_str(), encoding="utf-8")
    return folder

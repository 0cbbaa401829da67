"""Write a Llama with random weights as the trainer exports models: `random_model.py FOLDER OPTIONS`, which are JSON.

Its greedy answers never end: the end token's row of the tied embedding is zero, so that there is always a likelier token.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from closed_loop import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from aifactory.engine.golden import GOLDEN_NAME, golden_answers


def main(
    folder: Path, *, seed: int, hidden: int, inner: int, layers: int, heads: int, vocabulary: int, context: int
) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model, tokenizer = LlamaForCausalLM(config).eval(), byte_tokenizer(vocabulary)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.eos_id] = 0.0
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer.tokenizer_json)
    end = tokenizer.eos_token
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / GOLDEN_NAME).write_bytes(golden_answers(model, tokenizer))
    print(json.dumps({"answer": None}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))

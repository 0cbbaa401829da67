"""The engine on one GPU against its memory's bandwidth, on a bare machine: needs torch and transformers, and no Ray.

A Llama of a billion parameters (the shape of Llama 3.2 1B) with random weights in bfloat16, prompts of 128 tokens; decode steps
with every slot in use.

Who      fused    decode steps by the project's kernels, as CUDA graphs: what the engine takes by itself
         graphs   by the model's own forward, as CUDA graphs
Keys     of fused; with _graphs behind them, but for bandwidth_gb_s, of graphs:
         tokens_per_s_bB       of answers, B requests at once
         between_ms_p50_bB     from a token to the next of its answer; _p99 likewise
         ttft_ms_p50_bB        from sending to the first token
         bandwidth_gb_s        what reading 2 GB on the device reaches, measured in the same run
         bandwidth_share_bB    weights, keys and values that a step reads, by the median time between tokens, of that
With --quick a small model, on the CPU where there is no GPU.
"""

from __future__ import annotations

import statistics
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from closed_loop import bandwidth_gb_s, byte_tokenizer, closed_loop, random_llama
from moments import percentile, random_prompts
from runner import Measured, main
from transformers import LlamaConfig

from aifactory.engine.engine import TorchEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much of everything."""

    config: LlamaConfig
    batches: tuple[int, ...]
    prompt_tokens: int
    answer_tokens: int
    rounds: int
    bandwidth_bytes: int


FULL = Sizes(
    config=LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128_256,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    ),
    batches=(1, 8, 64),
    prompt_tokens=128,
    answer_tokens=256,
    rounds=5,
    bandwidth_bytes=2 * 2**30,
)
QUICK = Sizes(
    config=LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    ),
    batches=(1, 4),
    prompt_tokens=16,
    answer_tokens=8,
    rounds=1,
    bandwidth_bytes=2**20,
)


WHO: dict[str, dict[str, bool]] = {"": {}, "_graphs": {"compiled": False}}
"""Options of the engine, by what stands behind their keys."""


def measure(quick: bool, rounds: int | None) -> Measured:
    """Engines whose slots the largest batch fills, in turn."""
    if not quick and not torch.cuda.is_available():
        raise SystemExit("expected an NVIDIA GPU, found none; --quick runs on the CPU")
    sizes, device = QUICK if quick else FULL, "cuda" if torch.cuda.is_available() else "cpu"
    raw: dict[str, list[float]] = {}
    with ExitStack() as stack:
        engines = {who: _start(sizes, device, options) for who, options in WHO.items()}
        for engine in engines.values():
            stack.callback(engine.close, 0.0)
        # The first round warms up: kernels are chosen and captured, memory is taken.
        for round_number in range((rounds or sizes.rounds) + 1):
            bandwidth = bandwidth_gb_s(sizes.bandwidth_bytes, device)
            found = {"bandwidth_gb_s": bandwidth}
            for batch in sizes.batches:
                prompts = random_prompts(batch, sizes.prompt_tokens, seed=1000 * round_number + batch)
                for who, engine in engines.items():
                    seen = closed_loop(engine, prompts, concurrency=batch, answer_tokens=sizes.answer_tokens)
                    tokens = batch * (sizes.prompt_tokens + sizes.answer_tokens / 2)
                    step_bytes = engine.weight_bytes + engine.cache_use.bytes_per_token * tokens
                    median_s = statistics.median(seen.between)
                    found |= {
                        f"tokens_per_s_b{batch}{who}": seen.tokens_per_s,
                        f"between_ms_p50_b{batch}{who}": 1e3 * median_s,
                        f"between_ms_p99_b{batch}{who}": 1e3 * percentile(seen.between, 0.99),
                        f"ttft_ms_p50_b{batch}{who}": 1e3 * percentile(seen.first, 0.5),
                        f"bandwidth_share_b{batch}{who}": step_bytes / median_s / 1e9 / bandwidth,
                    }
            for key, value in found.items() if round_number else ():
                raw.setdefault(key, []).append(value)
    return Measured(
        figures={key: float(f"{statistics.median(values):.4g}") for key, values in raw.items()},
        raw=raw,
        notes=[torch.cuda.get_device_name() if device == "cuda" else "on the CPU, which proves only that it runs"],
    )


def _start(sizes: Sizes, device: str, options: dict[str, bool]) -> TorchEngine:
    return TorchEngine(
        random_llama(sizes.config, torch.bfloat16, device),
        byte_tokenizer(sizes.config.vocab_size),
        num_slots=max(sizes.batches),
        prefix_tokens=0,
        device=device,
        **options,
    )


if __name__ == "__main__":
    main("serve_gpu", measure)

"""The engine by itself on a CPU: tokens, times and the share of the memory's bandwidth, by kind of weights, interleaved.

A Llama of 110 million parameters with random weights; prompts of 128 tokens, answers of 64. In each round every engine has its
turn, beside a measurement of the bandwidth: what reading 512 MB reaches with as many threads.

Keys     tokens_per_s_KIND_cC      of answers, C requests at once; KIND is plain (the model's own forward in fp32, by torch),
                                   or what the kernels keep the weights as: float32, bfloat16, int8
         ttft_ms_p50_KIND_cC       from sending to the first token; _p99 likewise
         between_ms_p50_KIND_cC    from a token to the next of its answer; _p99 likewise
         bandwidth_gb_s            measured in the same run
         bandwidth_share_c1_KIND   what a decode step of one request reads, by the median time between tokens, of that
         over_plain_cC             tokens_per_s of float32 over plain
         start_s_KIND              checks, packing and, where they were not compiled before, the kernels
Each figure is the median over rounds of its raw numbers.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from closed_loop import Seen, bandwidth_gb_s, byte_tokenizer, closed_loop, percentile, random_llama
from runner import Measured, main
from transformers import LlamaConfig

from aifactory.engine.engine import TorchEngine

KINDS = ("plain", "float32", "bfloat16", "int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much of everything."""

    hidden: int
    inner: int
    layers: int
    heads: int
    vocabulary: int
    prompt_tokens: int
    answer_tokens: int
    concurrency: tuple[int, ...]
    requests_each: int
    """Requests of a run for each that goes at once."""
    rounds: int
    bandwidth_bytes: int


FULL = Sizes(
    hidden=768,
    inner=2048,
    layers=12,
    heads=12,
    vocabulary=20_000,
    prompt_tokens=128,
    answer_tokens=64,
    concurrency=(1, 8, 32),
    requests_each=2,
    rounds=5,
    bandwidth_bytes=512 * 2**20,
)
QUICK = Sizes(
    hidden=64,
    inner=128,
    layers=2,
    heads=4,
    vocabulary=512,
    prompt_tokens=16,
    answer_tokens=8,
    concurrency=(1, 4),
    requests_each=2,
    rounds=1,
    bandwidth_bytes=2**20,
)


def measure(quick: bool, rounds: int | None) -> Measured:
    """All engines in one process, one at a time."""
    sizes = QUICK if quick else FULL
    raw: dict[str, list[float]] = {}
    engines: dict[str, TorchEngine] = {}
    try:
        for kind in KINDS:
            started = time.perf_counter()
            engines[kind] = _start(kind, sizes)
            raw[f"start_s_{kind}"] = [time.perf_counter() - started]
        for round_number in range(rounds or sizes.rounds):
            bandwidth = bandwidth_gb_s(sizes.bandwidth_bytes, "cpu")
            raw.setdefault("bandwidth_gb_s", []).append(bandwidth)
            for concurrency in sizes.concurrency:
                for kind, engine in engines.items():
                    seen = closed_loop(
                        engine,
                        concurrency=concurrency,
                        num_requests=concurrency * sizes.requests_each,
                        prompt_tokens=sizes.prompt_tokens,
                        answer_tokens=sizes.answer_tokens,
                        seed=1000 * round_number + concurrency,
                    )
                    for key, value in _figures(seen, f"{kind}_c{concurrency}").items():
                        raw.setdefault(key, []).append(value)
                    if concurrency == 1:
                        share = _bytes_a_step(engine, sizes) / statistics.median(seen.between) / 1e9 / bandwidth
                        raw.setdefault(f"bandwidth_share_c1_{kind}", []).append(share)
                ours, plain = (raw[f"tokens_per_s_{kind}_c{concurrency}"][-1] for kind in ("float32", "plain"))
                raw.setdefault(f"over_plain_c{concurrency}", []).append(ours / plain)
    finally:
        for engine in engines.values():
            engine.close(0.0)
    return Measured(
        figures={key: round(statistics.median(values), 3) for key, values in raw.items()},
        raw=raw,
        notes=[f"{torch.get_num_threads()} threads"],
    )


def _start(kind: str, sizes: Sizes) -> TorchEngine:
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=sizes.prompt_tokens + sizes.answer_tokens,
        tie_word_embeddings=True,
    )
    return TorchEngine(
        random_llama(config, torch.float32, "cpu"),
        byte_tokenizer(sizes.vocabulary),
        num_slots=max(sizes.concurrency),
        # Every prompt is another: nothing would be found, and nothing is kept.
        prefix_tokens=0,
        compiled=kind != "plain",
        weights=None if kind == "plain" else kind,  # type: ignore[arg-type]
    )


def _figures(seen: Seen, name: str) -> dict[str, float]:
    return {
        f"tokens_per_s_{name}": seen.tokens_per_s,
        **{f"ttft_ms_p{int(100 * p)}_{name}": 1e3 * percentile(seen.first, p) for p in (0.5, 0.99)},
        **{f"between_ms_p{int(100 * p)}_{name}": 1e3 * percentile(seen.between, p) for p in (0.5, 0.99)},
    }


def _bytes_a_step(engine: TorchEngine, sizes: Sizes) -> float:
    """Weights, and keys and values of half an answer on the average."""
    return engine.weight_bytes + engine.cache_use.bytes_per_token * (sizes.prompt_tokens + sizes.answer_tokens / 2)


if __name__ == "__main__":
    main("serve", measure)

"""Kernels: `python -m aifactory.kernels` compiles the kernels of data plane and engine, so that nobody's first run waits for it.

numba compiles a kernel for the types and the processor that it first meets, and keeps it beside its source (or in
NUMBA_CACHE_DIR). That takes about a minute of one core for all of them, once. `make` does it as a part of the installation; without
it the first run does, bit by bit.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_STEPS: tuple[dict[str, Any], ...] = (
    {"step": "unicode"},
    {"step": "language", "keep": ["en"], "min_probability": 0.0},
    {"step": "gopher_quality", "min_doc_words": 5, "min_stop_words": 1},
    {"step": "gopher_repetition"},
    {"step": "fineweb", "short_line_thr": 1.0},
    {"step": "c4", "min_num_sentences": 1},
    {"step": "personal"},
    {"step": "near_duplicates"},
    {"step": "decontaminate"},
)
"""Those that have kernels."""
_TEXT = (
    "the of and that with have time people water number sound world place year work part name house "
    "answer learn study letter page naïve “quoted” café mother@example.org 192.168.10.20"
)


def compile_kernels() -> float:
    """Compile what is not compiled yet, by making a small corpus, tokenizing it and starting an engine; the seconds taken."""
    from aifactory.config import Config
    from aifactory.factory import Factory

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="aifactory-kernels-") as folder:
        _write_rows(Path(folder, "rows.jsonl"))
        config = {
            "name": "kernels",
            "ingest": {
                "sources": [{"name": "rows", "kind": "jsonl", "path": str(Path(folder, "rows.jsonl"))}],
                "steps": _STEPS,
                "holdout_share": 0.2,
            },
            "tokenize": {"vocab_size": 400, "row_len": 64},
            "runtime": {"storage": str(Path(folder, "storage"))},
        }
        with Factory(Config.model_validate(config)) as factory:
            factory.tokenize()
            factory.trace(text=f"{_TEXT} {_TEXT}")
    _judge_feedback()
    _start_engine()
    return time.perf_counter() - started


def _judge_feedback() -> None:
    """Of a few users who agree."""
    from aifactory.config import FeedbackTrust
    from aifactory.ingest.trust import Said, judge_feedback

    rows = [Said(id=f"{i}", question=_TEXT, answer=f"{i % 2}", user=f"u{i}") for i in range(8)]
    judge_feedback(rows, [], FeedbackTrust())


def _start_engine() -> None:
    """For weights in float32, in which releases are served; other kinds are compiled when they are first asked for."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, LlamaForCausalLM

    from aifactory.engine.engine import TorchEngine
    from aifactory.text.tokenizer import END_OF_TEXT, TextTokenizer

    tokenizer = Tokenizer(models.BPE({END_OF_TEXT: 0, "a": 1}, []))
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=16,
        max_position_embeddings=16,
    )
    model = LlamaForCausalLM(config)
    TorchEngine(model, TextTokenizer(tokenizer.to_str().encode()), compiled=True, num_slots=1).close(0.0)


def _write_rows(file: Path) -> None:
    rng, words = random.Random(0), _TEXT.split()
    texts = [
        ". ".join(" ".join(rng.choices(words, k=12)) for _ in range(rng.randrange(4, 9))) + "." for _ in range(300)
    ]
    texts += [
        text.replace("world", "planet", 1) for text in texts[:60]
    ]  # near-duplicates, some of them of holdout rows
    with open(file, "w", encoding="utf-8") as stream:
        for text in texts:
            stream.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    print("compiling the kernels, once: about a minute", file=sys.stderr, flush=True)
    print(f"kernels compiled in {compile_kernels():.1f} s", file=sys.stderr)

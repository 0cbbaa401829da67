"""Engines: the folder of a release -> what answers with it, checked, as the configuration has it. Knows no Ray."""

from __future__ import annotations

from pathlib import Path

import torch

from aifactory.config.runtime import Endpoint
from aifactory.engine.protocol import Engine
from aifactory.text.tokenizer import TextTokenizer, load_tokenizer


def load_engine(folder: Path, endpoint: Endpoint, *, tolerance: float) -> tuple[Engine, TextTokenizer]:
    """The engine of a release, which says what its trainer said, within `tolerance` nats.

    Raises  ParityError, ConfigError, UnsafeModelError, TokenizerMismatchError.
    """
    device = "cuda" if endpoint.gpus_per_replica else "cpu"
    threads = max(1, int(endpoint.cpus_per_replica))
    torch.set_num_threads(threads)
    load = _load_vllm if endpoint.engine == "vllm" else _load_torch
    return load(folder, endpoint, device=device, threads=threads, tolerance=tolerance)


def _load_torch(
    folder: Path, endpoint: Endpoint, *, device: str, threads: int, tolerance: float
) -> tuple[Engine, TextTokenizer]:
    from aifactory.engine.engine import TorchEngine
    from aifactory.engine.golden import check_golden_answers
    from aifactory.engine.load import load_model
    from aifactory.engine.parity import in_bfloat16

    model, tokenizer = load_model(folder, device=device, dtype=torch.float32), load_tokenizer(folder)
    # As it was trained; what fewer bits change is checked after it.
    check_golden_answers(folder, model, tokenizer, tolerance=tolerance)
    on_cuda = device == "cuda"
    if on_cuda and endpoint.weights != "float32":
        model = in_bfloat16(model)
    engine = TorchEngine(
        model,
        tokenizer,
        num_slots=endpoint.slots,
        max_queued=endpoint.max_queued,
        device=device,
        num_threads=threads,
        batch_invariant=endpoint.batch_invariant,
        # A stream that another replica goes on with is to be the same to the bit, and that replica may know other answers.
        reuses_answers=endpoint.mode != "resilient",
        weights=None if on_cuda or endpoint.weights == "auto" or endpoint.weights == "float32" else endpoint.weights,
    )
    return engine, tokenizer


def _load_vllm(
    folder: Path, endpoint: Endpoint, *, device: str, threads: int, tolerance: float
) -> tuple[Engine, TextTokenizer]:
    from aifactory.engine.golden import check_golden_engine
    from aifactory.engine.vllm_engine import VllmEngine

    tokenizer = load_tokenizer(folder)
    engine = VllmEngine(
        folder,
        tokenizer,
        num_slots=endpoint.slots,
        max_queued=endpoint.max_queued,
        device=device,
        num_threads=threads,
        max_adapters=len(endpoint.adapters),
    )
    try:
        # The weights are in vLLM's process: what it answers is compared.
        check_golden_engine(folder, engine, tokenizer, tolerance=tolerance)
    except BaseException:
        engine.close(0.0)
        raise
    return engine, tokenizer

"""python benchmarks/engine_kernels.py: the engine's products and prompts on a CPU, by the matrix unit's tiles and by its vector units.

All of them in turn, round by round, on the threads that torch takes; ratios are medians over rounds, so that a machine that others
use too slows both. Under a minute with --quick, a few minutes in full. Keys:

    tiles_over_vectors_KIND_TOKENS   how many times faster a prompt of so many tokens is read, with weights of that kind
    tiles_over_torch, vectors_over_torch   products of 256 vectors in float32, a thread each, beside torch's own (oneDNN)
    tiles_error, vectors_error, torch_error   of these, the largest error by the sum of its terms' magnitudes

None where the processor has no tiles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from runner import Measured, main
from transformers import LlamaConfig, LlamaForCausalLM

from aifactory.engine import matrix_unit, tiles
from aifactory.engine.cache import SlotCache
from aifactory.engine.compiled import CompiledForward
from aifactory.engine.packed import pack_model
from aifactory.engine.parity import check_cached_forward
from aifactory.engine.products import product
from aifactory.engine.team import ThreadTeam
from aifactory.engine.vectors import PANEL
from aifactory.engine.worksharing import SYNC_SIZE

SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
QUICK_SIZES = {**SIZES, "num_hidden_layers": 2}
VOCABULARY, CONTEXT = 32_000, 1024
TOKENS = (64, 128, 512)
KINDS = ("float32", "bfloat16", "int8")
PRODUCT = (256, 2304, 768)
"""Vectors, rows of the matrix, columns."""
ROUNDS = 15


def measure(quick: bool, rounds: int | None) -> Measured:
    """As the module says."""
    number = rounds or (3 if quick else ROUNDS)
    raw: dict[str, list[float]] = {}
    figures: dict[str, float | None] = {}
    _measure_products(number, raw, figures)
    for kind in KINDS[:1] if quick else KINDS:
        _measure_prompts(kind, QUICK_SIZES if quick else SIZES, number, raw, figures)
    notes = [f"{torch.get_num_threads()} threads", f"products of {PRODUCT} in GFLOP/s, prompts in ms"]
    return Measured(figures=figures, raw=raw, notes=notes)


def _in_turn(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, round by round; the first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - began)
    return {name: seconds[1:] for name, seconds in taken.items()}


def _over(one: list[float], other: list[float]) -> float:
    """How many times faster one is."""
    return round(statistics.median(b / a for a, b in zip(one, other, strict=True)), 3)


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> np.ndarray:
    # torch's memory begins at cache lines.
    return torch.zeros(*shape, dtype=dtype).numpy()


def _measure_products(rounds: int, raw: dict[str, list[float]], figures: dict[str, float | None]) -> None:
    num_vectors, num_rows, length = PRODUCT
    rng = np.random.default_rng(0)
    w_NK = rng.standard_normal((num_rows, length)).astype(np.float32)
    x_BK = rng.standard_normal((num_vectors, length)).astype(np.float32)
    panels, vectors = _zeros(num_rows // PANEL, length, PANEL), _zeros(num_vectors, length)
    panels[:], vectors[:] = w_NK.reshape(-1, PANEL, length).transpose(0, 2, 1), x_BK
    y, sync, none = _zeros(num_vectors, num_rows), np.zeros(SYNC_SIZE, np.int64), _zeros(0)
    given, weight = torch.from_numpy(x_BK), torch.from_numpy(w_NK)
    found: dict[str, np.ndarray] = {}

    def by_vectors() -> None:
        product(0, 1, sync, panels, none, none, vectors, y)
        found["vectors"] = y

    def by_torch() -> None:
        found["torch"] = torch.nn.functional.linear(given, weight).numpy()

    def by_tiles() -> None:
        for b in range(num_vectors):
            tiles.cut_row(vectors[b], b, left, matrix_unit.TERMS)
        tiles.multiply_tiles(panels, left, right, parts, tiled, num_vectors, 0, len(panels))
        found["tiles"] = tiled

    calls = {"vectors": by_vectors, "torch": by_torch}
    if matrix_unit.can_use_tiles():
        left, right = (_zeros(n, dtype=torch.int16) for n in (tiles.num_left(num_vectors, length), tiles.NUM_RIGHT))
        parts = _zeros(tiles.num_parts(num_vectors))
        tiled = _zeros(num_vectors, num_rows)
        calls["tiles"] = by_tiles
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    taken = _in_turn(calls, 3 * rounds)
    torch.set_num_threads(threads)
    exact = x_BK.astype(np.float64) @ w_NK.T.astype(np.float64)
    most = np.abs(x_BK).astype(np.float64) @ np.abs(w_NK.T).astype(np.float64)
    for name in ("tiles", "vectors", "torch"):
        figures[f"{name}_error"] = float(f"{(np.abs(found[name] - exact) / most).max():.3g}") if name in found else None
        raw[f"gflops_{name}"] = [2e-9 * num_vectors * num_rows * length / each for each in taken.get(name, ())]
    figures["tiles_over_torch"] = _over(taken["tiles"], taken["torch"]) if "tiles" in taken else None
    figures["vectors_over_torch"] = _over(taken["vectors"], taken["torch"])


def _measure_prompts(
    kind: str, sizes: Mapping[str, int], rounds: int, raw: dict[str, list[float]], figures: dict[str, float | None]
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, tie_word_embeddings=True)
    model, team = LlamaForCausalLM(config).eval(), ThreadTeam(torch.get_num_threads())
    with torch.inference_mode():
        packed = pack_model(model, kind, team)
        cache = SlotCache(
            num_layers=sizes["num_hidden_layers"],
            num_slots=1,
            context_length=CONTEXT,
            dtype=torch.float32,
            device="cpu",
            has_spare_row=False,
        )
        check_cached_forward(model, cache, vocab_size=VOCABULARY, context_length=CONTEXT)
        cache.touch(CONTEXT)
        forwards = {
            name: CompiledForward(model, packed, cache, team, with_tiles=name == "tiles")
            for name in ("vectors", "tiles")
            if name == "vectors" or matrix_unit.can_use_tiles()
        }
        for tokens in TOKENS:
            ids = torch.randint(1, VOCABULARY, (1, tokens))

            def reads(forward: CompiledForward, ids: torch.Tensor = ids) -> Callable[[], object]:
                return lambda: forward.prefill(ids, 0, 0, length=ids.shape[1], last_only=True)

            taken = _in_turn({name: reads(forward) for name, forward in forwards.items()}, rounds)
            for name, seconds in taken.items():
                raw[f"ms_{name}_{kind}_{tokens}"] = [1000 * each for each in seconds]
            key = f"tiles_over_vectors_{kind}_{tokens}"
            figures[key] = _over(taken["tiles"], taken["vectors"]) if "tiles" in taken else None
    team.close()


if __name__ == "__main__":
    main("engine_kernels", measure)

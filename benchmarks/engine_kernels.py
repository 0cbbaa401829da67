"""python benchmarks/engine_kernels.py: the engine's products and prompts on a CPU, by the matrix unit's tiles and by its vector units.

All of them in turn, round by round, on the threads that torch takes; ratios are medians over rounds, so that a machine that others
use too slows both. Under a minute with --quick, a few minutes in full. Keys:

    tiles_over_vectors_KIND_TOKENS   how many times faster a prompt of so many tokens is read, with weights of that kind
    tiles_over_vectors_bfloat16_step_B   likewise a step of B rows, which go by tiles with these weights alone
    bfloat16_over_float32_TOKENS, ..._step_B   each as the engine has it: float32's steps by vectors, all else by tiles
    tiles_over_torch, vectors_over_torch   products of 256 vectors in float32, a thread each, beside torch's own (oneDNN)
    tiles_error, vectors_error, torch_error   of these, the largest error by the sum of its terms' magnitudes

Those of tiles are None where the processor has none.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from runner import Measured, main
from transformers import LlamaConfig, LlamaForCausalLM

from aifactory.engine import matrix_unit, tiles
from aifactory.engine.cache import SlotCache
from aifactory.engine.compiled import CompiledForward
from aifactory.engine.packed import WeightKind, pack_model
from aifactory.engine.parity import check_cached_forward
from aifactory.engine.products import product
from aifactory.engine.team import ThreadTeam
from aifactory.engine.vectors import PANEL
from aifactory.engine.worksharing import SYNC_SIZE

SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
QUICK_SIZES = {**SIZES, "num_hidden_layers": 2}
VOCABULARY, CONTEXT = 32_000, 1024
TOKENS = (64, 128, 512)
ROWS = (1, 8, 32)
"""Of a step, each at position AT."""
AT = 256
KINDS: tuple[WeightKind, ...] = ("float32", "bfloat16", "int8")
PRODUCT = (256, 2304, 768)
"""Vectors, rows of the matrix, columns."""
ROUNDS = 15


def measure(quick: bool, rounds: int | None) -> Measured:
    """As the module says."""
    number = rounds or (3 if quick else ROUNDS)
    raw: dict[str, list[float]] = {}
    figures: dict[str, float | None] = {}
    _measure_products(number, raw, figures)
    _measure_forwards(QUICK_SIZES if quick else SIZES, number, raw, figures)
    notes = [f"{torch.get_num_threads()} threads", f"products of {PRODUCT} in GFLOP/s, prompts and steps in ms"]
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


def _forwards(kind: WeightKind, sizes: Mapping[str, int], team: ThreadTeam) -> dict[str, CompiledForward]:
    """The same model with weights of a kind, without tiles and with them."""
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).eval()
    packed = pack_model(model, kind, team)
    cache = SlotCache(
        num_layers=sizes["num_hidden_layers"],
        num_slots=max(ROWS),
        context_length=CONTEXT,
        dtype=torch.float32,
        device="cpu",
        kept_dtype=torch.bfloat16 if kind == "bfloat16" else None,
    )
    check_cached_forward(model, cache, vocab_size=VOCABULARY, context_length=CONTEXT)
    cache.touch(CONTEXT)
    return {
        name: CompiledForward(model, packed, cache, team, with_tiles=name == "tiles")
        for name in ("vectors", "tiles")
        if name == "vectors" or matrix_unit.can_use_tiles()
    }


def _measure_forwards(
    sizes: Mapping[str, int], rounds: int, raw: dict[str, list[float]], figures: dict[str, float | None]
) -> None:
    team = ThreadTeam(torch.get_num_threads())
    with torch.inference_mode():
        forwards = {
            f"{name}_{kind}": forward for kind in KINDS for name, forward in _forwards(kind, sizes, team).items()
        }
        for tokens in TOKENS:
            ids = torch.randint(1, VOCABULARY, (1, tokens))

            def reads(forward: CompiledForward, ids: torch.Tensor = ids) -> Callable[[], object]:
                return lambda: forward.prefill(ids, 0, 0, length=ids.shape[1], last_only=True)

            calls = {name: reads(forward) for name, forward in forwards.items()}
            _compare(calls, KINDS, f"{tokens}", rounds, raw, figures)
        for rows in ROWS:
            ids = torch.randint(1, VOCABULARY, (rows, 1))

            def steps(forward: CompiledForward, ids: torch.Tensor = ids) -> Callable[[], object]:
                return lambda: forward.step(ids, torch.full((len(ids),), AT))

            calls = {name: steps(forward) for name, forward in forwards.items() if name != "tiles_int8"}
            _compare(calls, ("bfloat16",), f"step_{rows}", rounds, raw, figures)
    team.close()


def _compare(
    calls: Mapping[str, Callable[[], object]],
    kinds: Sequence[str],
    what: str,
    rounds: int,
    raw: dict[str, list[float]],
    figures: dict[str, float | None],
) -> None:
    taken = _in_turn(calls, rounds)
    for name, seconds in taken.items():
        raw[f"ms_{name}_{what}"] = [1000 * each for each in seconds]
    for kind in kinds:
        has_tiles = f"tiles_{kind}" in taken
        figures[f"tiles_over_vectors_{kind}_{what}"] = (
            _over(taken[f"tiles_{kind}"], taken[f"vectors_{kind}"]) if has_tiles else None
        )
    best = {kind: taken.get(f"tiles_{kind}", taken[f"vectors_{kind}"]) for kind in ("float32", "bfloat16")}
    figures[f"bfloat16_over_float32_{what}"] = _over(best["bfloat16"], best["float32"])


if __name__ == "__main__":
    main("engine_kernels", measure)

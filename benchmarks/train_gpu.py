"""A model of 1 billion parameters on one GPU, without Ray: how fast, and what each technique gives.

    python benchmarks/train_gpu.py                                  the step as it is meant
    python benchmarks/train_gpu.py --compile off --loss plain …     one variant
    python benchmarks/train_gpu.py --ablation                       each technique left out in turn, in one call of 10 minutes
    python benchmarks/train_gpu.py --quick                          at a small size, on a CPU too

Needs    torch (2.11 or newer), transformers (5.17 or newer) and NumPy alone: it runs on a bare machine.
Model    Llama-3.2-1B's shape (hidden 2,048, 16 layers, 32 heads of 64, 8 for keys and values, MLP 8,192, vocabulary 128,256,
         tied), random weights; fp32 weights and optimiser states, products in bf16 by autocast.
Data     rows of 4,096 random tokens, packed: documents of --document-tokens at the median (log-normal, sigma 1); 0: one
         document a row. Never read from a disk, so nothing waits for it.
Step     the files of aifactory/train as they are: attention, cross-entropy, activations, compilation, clipping, fused AdamW.

Keys     tokens_per_s    median over the steps after the warm-up, synchronised at the end of each
         mfu             tokens/s x FLOPs per token / peak, by the convention of aifactory/train/flops.py: 6 for each weight of a
                         matrix and 12 x layers x width x row length for attention, causal or not: 9.02 GFLOP a token here
         mfu_computed    the same with what attention truly computes: half of the square of each document's length
         peak_tflops     of the card, dense bf16: 989.4 for an H200, an H100 SXM (the maker's data sheets); measured elsewhere
         peak_memory_gib what torch held at most
The last line is one JSON object; the whole result goes to benchmarks/results/ where a GPU was used.
Wanted   45 % MFU of 989 TFLOP/s on an H200, 49,000 tokens/s.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import __version__ as transformers_version

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aifactory.train.execution import Execution
from aifactory.train.float8 import convert_to_float8
from aifactory.train.flops import flops_per_token, peak, utilisation
from aifactory.train.preparation import prepare
from aifactory.train.step import clip_gradients, make_optimizer, summed_loss, update

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to run the step."""

    attention: str = "varlen"
    loss: str = "pieces"
    activations: str = "none"
    compile: bool = True
    precision: str = "bf16"
    micro_batch_rows: int = 4
    micro_batches: int = 1
    row_len: int = 4096
    document_tokens: int = 1024
    steps: int = 12
    warmup: int = 4


LLAMA_1B = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
}
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}


def ablation(start: Variant) -> dict[str, Variant]:
    """The step as it is meant, and each technique left out or put in, one at a time."""
    return {
        "as meant": start,
        "without varlen attention": replace(start, attention="mask"),
        "without cross-entropy in pieces": replace(
            start, loss="plain", micro_batch_rows=max(1, start.micro_batch_rows // 2)
        ),
        "without compilation": replace(start, compile=False),
        "selective activations": replace(start, activations="selective"),
        "full activations, twice the rows": replace(
            start, activations="full", micro_batch_rows=2 * start.micro_batch_rows
        ),
        "one document a row": replace(start, document_tokens=0),
        "half the rows": replace(start, micro_batch_rows=max(1, start.micro_batch_rows // 2)),
        "twice the rows": replace(start, micro_batch_rows=2 * start.micro_batch_rows),
        "fp8": replace(start, precision="fp8"),
    }


def packed_rows(
    rng: np.random.Generator, rows: int, length: int, document_tokens: int, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """ids_BT, positions_BT, loss_mask_BT, and the mean over all tokens of the length of their document."""
    positions = np.empty((rows, length), np.int64)
    squares = 0
    for row in range(rows):
        at = 0
        while at < length:
            drawn = int(rng.lognormal(np.log(document_tokens), 1.0)) if document_tokens else length
            size = min(max(drawn, 16), length - at)
            positions[row, at : at + size] = np.arange(size)
            squares += size * size
            at += size
    ids = torch.from_numpy(rng.integers(0, vocab_size, (rows, length)))
    positions_BT = torch.from_numpy(positions)
    return ids, positions_BT, (positions_BT > 0).long(), squares / (rows * length)


def run(variant: Variant, shape: dict[str, Any], device: torch.device, *, deadline: float) -> dict[str, Any]:
    """Train some steps; what was measured."""
    torch.manual_seed(1)
    config = LlamaConfig(**shape)
    with torch.device(device):
        model = LlamaForCausalLM(config).train()
    autocast_precision: Any = "fp32" if variant.precision == "fp32" else "bf16"
    if variant.precision == "fp8":
        convert_to_float8(model, device)
    execution = Execution(
        attention=variant.attention, loss=variant.loss, activations=variant.activations, compile=variant.compile
    )
    prepare(model, execution, device, autocast_precision)
    recipe: Any = SimpleNamespace(learning_rate=3e-4, weight_decay=0.1, beta1=0.9, beta2=0.95)
    optimizer = make_optimizer(model, recipe)
    best = peak(device, torch.bfloat16 if autocast_precision == "bf16" else torch.float32)
    flops = flops_per_token(model, config, attended_tokens=variant.row_len)
    rng = np.random.default_rng(1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds: list[float] = []
    losses: list[float] = []
    attended: list[float] = []
    begun = time.perf_counter()
    for step in range(variant.warmup + variant.steps):
        batches = [
            packed_rows(rng, variant.micro_batch_rows, variant.row_len, variant.document_tokens, config.vocab_size)
            for _ in range(variant.micro_batches)
        ]
        start = time.perf_counter()
        num_tokens = sum(int(mask_BT[:, 1:].sum()) for _, _, mask_BT, _ in batches)
        total = torch.zeros((), device=device)
        for ids_BT, positions_BT, mask_BT, _ in batches:
            tensors = (each.to(device) for each in (ids_BT, positions_BT, mask_BT))
            loss = summed_loss(model, *tensors, precision=autocast_precision) / num_tokens
            loss.backward()
            total += loss.detach()
        losses.append(float(total))
        clip_gradients(model, 1.0)
        update(optimizer, rate=3e-4)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if step >= variant.warmup:
            seconds.append(time.perf_counter() - start)
            attended += [batch[3] for batch in batches]
        elif step == 0:
            first = time.perf_counter() - begun
        if len(seconds) >= 3 and time.perf_counter() > deadline:
            break
    tokens = variant.micro_batches * variant.micro_batch_rows * variant.row_len
    rate = tokens / statistics.median(seconds)
    # A causal mask needs half of the square of each document's length.
    computed = flops_per_token(model, config, attended_tokens=statistics.mean(attended) / 2)
    held = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {
        "tokens_per_s": round(rate, 1),
        "mfu": round(utilisation(rate, flops, best, workers=1), 4),
        "mfu_computed": round(utilisation(rate, computed, best, workers=1), 4),
        "gflop_per_token": round(flops / 1e9, 3),
        "peak_tflops": round(best.flops_per_s / 1e12, 2),
        "peak_source": best.source,
        "peak_memory_gib": None if held is None else round(held, 2),
        "first_step_s": round(first, 2),
        "step_s": [round(each, 5) for each in seconds],
        "losses": [round(losses[0], 4), round(losses[-1], 4)],
        "variant": asdict(variant),
    }


@contextlib.contextmanager
def _released(device: torch.device) -> Iterator[None]:
    yield
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model; writes no result")
    parser.add_argument("--ablation", action="store_true", help="each technique left out in turn")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these of an ablation, in their order")
    parser.add_argument("--budget-s", type=float, default=540.0, help="of an ablation: begin no variant after so many")
    parser.add_argument("--attention", choices=["mask", "varlen"])
    parser.add_argument("--loss", choices=["plain", "pieces"])
    parser.add_argument("--activations", choices=["none", "selective", "full"])
    parser.add_argument("--compile", choices=["on", "off"])
    parser.add_argument("--precision", choices=["bf16", "fp32", "fp8"])
    parser.add_argument("--micro-batch-rows", type=int)
    parser.add_argument("--micro-batches", type=int)
    parser.add_argument("--row-len", type=int)
    parser.add_argument("--document-tokens", type=int)
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and not arguments.quick:
        parser.error("expected a CUDA device, found none; --quick runs on a CPU")
    start = Variant()
    if arguments.quick:
        start = replace(start, micro_batch_rows=2, row_len=64, document_tokens=16, steps=3, warmup=1)
        if device.type == "cpu":
            start = replace(start, compile=False, precision="fp32")
    names = ("attention", "loss", "activations", "precision", "micro_batch_rows", "micro_batches")
    names += ("row_len", "document_tokens", "steps")
    chosen = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.compile:
        chosen["compile"] = arguments.compile == "on"
    start = replace(start, **chosen)
    variants = ablation(start) if arguments.ablation else {"as meant": start}
    if arguments.only:
        unknown = [name for name in arguments.only if name not in variants]
        if unknown:
            parser.error(f"expected of {', '.join(map(repr, variants))}, found {unknown[0]!r}; --ablation has them all")
        variants = {name: variants[name] for name in arguments.only}
    shape = SMALL if arguments.quick else LLAMA_1B
    begun = time.perf_counter()
    found: dict[str, Any] = {}
    for name, variant in variants.items():
        if time.perf_counter() - begun > arguments.budget_s:
            found[name] = {"left_out": "no time was left"}
            continue
        try:
            with _released(device):
                found[name] = run(variant, shape, device, deadline=begun + arguments.budget_s)
        # What does not fit, or what the card can't do, ends its own variant alone.
        except Exception as error:
            if not arguments.ablation:
                raise
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
        print(f"{name}: {json.dumps(found[name])}", file=sys.stderr, flush=True)
    result = {
        "benchmark": "train_gpu",
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers_version,
        },
        "found": found,
    }
    if device.type == "cuda" and not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        name = "train_gpu_ablation" if arguments.ablation else "train_gpu"
        file = RESULTS / f"{name}-{result['date']}.json"
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    keys = ("tokens_per_s", "mfu", "mfu_computed", "peak_tflops", "peak_memory_gib")
    shown = {name: {key: each[key] for key in keys} if "mfu" in each else each for name, each in found.items()}
    print(json.dumps(shown if arguments.ablation else shown["as meant"]))


if __name__ == "__main__":
    main()

"""Runs that others have published, in the planner's terms; each with the table that it is from. Nothing is fitted to them.

What a source does not say is assumed, and said in `assumed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from aifactory.plan.accelerators import ACCELERATORS, Accelerator
from aifactory.plan.layout import Activations, Layout, Step
from aifactory.plan.shapes import PUBLISHED, ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """One run: tokens/s of one accelerator, and what it held at most where that is told."""

    name: str
    shape: ModelShape
    accelerator: Accelerator
    layout: Layout
    step: Step
    tokens_per_s: float
    memory_gib: float | None = None
    source: str
    assumed: str = ""
    num_parameters: int | None = None


TITAN = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"
TITAN_H100 = replace(ACCELERATORS["h100"], memory_gb=96, bandwidth_gb_s=2400, power_limit_watts=500)
"""Its hardware: H100 with 96 GB of HBM2e at 2.4 TB/s, limited to 500 W, 400 Gb/s each."""
MOSAIC = "MosaicML llm-foundry, scripts/train/benchmarking/README.md"
LLAMA_3 = "Llama Team 2024, arXiv:2407.21783"


def titan(table: int, gpus: int, tokens_per_s: float, memory_gib: float, *, is_compiled: bool) -> TrainingRun:
    step = Step(
        row_len=8192,
        micro_batch_rows=2,
        activations="selective",
        is_compiled=is_compiled,
        loss="plain",
        residual_bytes=2,
    )
    return TrainingRun(
        name=f"Llama 3.1 8B, {gpus} H100, FSDP{', compiled' if is_compiled else ''}",
        shape=PUBLISHED["llama-3.1-8b"],
        accelerator=TITAN_H100,
        layout=Layout(data=gpus, shard="fsdp"),
        step=step,
        tokens_per_s=tokens_per_s,
        memory_gib=memory_gib,
        source=f"{TITAN}, table {table}",
    )


def mpt(hidden: int, layers: int, heads: int, positions: int) -> ModelShape:
    """MPT (llm-foundry, scripts/train/yamls/pretrain/mpt-*.yaml): four times as wide inside, a vocabulary of 50,368, tied."""
    return ModelShape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=4 * hidden,
        vocab=50_368,
        tied=True,
        gated=False,
        positions=positions,
    )


MPT = {
    "760m": (1536, 24, 12),
    "1b": (2048, 24, 16),
    "3b": (2560, 32, 20),
    "7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
    "30b": (7168, 48, 56),
    "70b": (8192, 80, 64),
}
A100_ROCE = ACCELERATORS["a100"]


def mosaic(
    size: str,
    row_len: int,
    gpus: int,
    gpu: str,
    micro: int,
    accumulated: int,
    tokens_per_s: float,
    activations: Activations,
    num_parameters: int,
) -> TrainingRun:
    return TrainingRun(
        name=f"MPT {size}, {gpus} {gpu.upper()}, rows of {row_len}{', full' if activations == 'full' else ''}",
        shape=mpt(*MPT[size], row_len),
        accelerator=ACCELERATORS[gpu],
        layout=Layout(data=gpus, shard="fsdp"),
        step=Step(
            row_len=row_len,
            micro_batch_rows=micro,
            micro_batches=accumulated,
            activations=activations,
            # Its norms are fused, it has no rotary positions, and between products nothing is in fp32: counted tensor by tensor,
            # 102 bytes a number of the width are moved in a layer, where compiled blocks of a Llama move more.
            is_compiled=True,
            loss="plain",
            residual_bytes=2,
            gradient_bytes=2,
        ),
        tokens_per_s=tokens_per_s,
        source=f"{MOSAIC}, {'H100 80GB BF16' if gpu == 'h100' else 'A100 80GB'}",
        assumed="gradients cross in bf16; element-wise work as where blocks are compiled",
        num_parameters=num_parameters,
    )


LLAMA_405B = Step(row_len=8192, micro_batch_rows=1, micro_batches=16, is_compiled=True, residual_bytes=2)


def llama_405b(gpus: int, rows: int, tflops: float) -> TrainingRun:
    """Table 4 tells TFLOP/s of the model; by the planner's convention a token is so many of them."""
    shape = PUBLISHED["llama-3.1-405b"]
    return TrainingRun(
        name=f"Llama 3 405B, {gpus:,} H100",
        shape=shape,
        accelerator=ACCELERATORS["h100"],
        layout=Layout(data=gpus // 128, tensor=8, pipeline=16, shard="fsdp", virtual_stages=8),
        step=replace(LLAMA_405B, micro_batches=rows),
        tokens_per_s=tflops * 1e12 / shape.flops_per_token(8192),
        source=f"{LLAMA_3}, table 4",
        assumed="one layer in each part of a pipeline's stage; one row a micro-batch",
    )


NANOCHAT_D24 = ModelShape(
    hidden=1536,
    layers=24,
    heads=12,
    kv_heads=12,
    head_dim=128,
    intermediate=4 * 1536,
    vocab=32_768,
    tied=False,
    gated=False,
)
NANOCHAT = TrainingRun(
    name="nanochat d24, 8 H100",
    shape=NANOCHAT_D24,
    accelerator=ACCELERATORS["h100"],
    layout=Layout(data=8),
    # Windows of 1,024 in three layers of four and of 2,048 in the fourth: 832 tokens attended to on average.
    step=Step(row_len=2048, micro_batch_rows=16, micro_batches=2, document_tokens=1664, is_compiled=True, loss="plain"),
    tokens_per_s=16_704 * 524_288 / 10_949.46713 / 8,
    source="karpathy/nanochat, README.md, leaderboard of 29 January 2026 (steps, total_training_time)",
    assumed="batches of 524,288 tokens, windows SSSL, AdamW's cost in the place of Muon's",
)

TRAINING: Sequence[TrainingRun] = (
    titan(1, 8, 5_762, 82.4, is_compiled=False),
    titan(1, 8, 6_667, 77.0, is_compiled=True),
    titan(3, 128, 5_605, 67.0, is_compiled=False),
    titan(3, 128, 6_514, 62.0, is_compiled=True),
    llama_405b(8_192, 32, 430),
    llama_405b(16_384, 16, 400),
    NANOCHAT,
    mosaic("760m", 2048, 16, "h100", 24, 1, 68_551, "none", 760_470_528),
    mosaic("1b", 2048, 8, "h100", 14, 1, 45_455, "none", 1_315_950_592),
    mosaic("1b", 8192, 8, "h100", 3, 4, 29_157, "none", 1_328_533_504),
    mosaic("3b", 2048, 64, "h100", 6, 3, 22_525, "none", 2_651_837_440),
    mosaic("3b", 512, 8, "h100", 40, 6, 27_965, "none", 2_647_905_280),
    mosaic("7b", 2048, 8, "h100", 6, 1, 10_643, "none", 6_658_859_008),
    mosaic("7b", 4096, 8, "h100", 16, 2, 8_611, "full", 6_667_247_616),
    mosaic("13b", 2048, 64, "h100", 2, 1, 4_800, "none", 12_853_954_560),
    mosaic("30b", 2048, 32, "h100", 14, 3, 2_308, "full", 29_975_214_080),
    mosaic("70b", 2048, 64, "h100", 8, 4, 1_039, "full", 64_862_437_376),
    mosaic("1b", 2048, 8, "a100", 14, 4, 20_513, "none", 1_315_950_592),
    mosaic("3b", 2048, 8, "a100", 10, 2, 10_811, "none", 2_651_837_440),
    mosaic("7b", 2048, 8, "a100", 6, 2, 4_641, "none", 6_658_859_008),
    mosaic("7b", 8192, 8, "a100", 8, 2, 3_206, "full", 6_684_024_832),
    mosaic("13b", 2048, 8, "a100", 2, 3, 2_262, "none", 12_853_954_560),
    mosaic("30b", 2048, 8, "a100", 3, 21, 916, "full", 29_975_214_080),
    mosaic("70b", 2048, 64, "a100", 8, 4, 410, "full", 64_862_437_376),
)
"""Of MosaicML's tables a row of each size and, where there are several, of each kind; throughput is T/s/GPU."""

A100_FIT = "MPT 7b, 8 A100, rows of 2048"
"""The run to which A100's share of its peak is fitted; it proves nothing about the planner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hours:
    """Accelerator-hours of a whole pretraining."""

    name: str
    run: TrainingRun
    tokens: float
    hours: float


def _pretraining(
    name: str, model: str, gpu: str, layout: Layout, step: Step, tokens: float, hours: float, source: str, assumed: str
) -> Hours:
    run = TrainingRun(
        name=name,
        shape=PUBLISHED[model],
        accelerator=ACCELERATORS[gpu],
        layout=layout,
        step=step,
        tokens_per_s=tokens / hours / 3600,
        source=source,
        assumed=assumed,
    )
    return Hours(name=name, run=run, tokens=tokens, hours=hours)


LLAMA_2 = "meta-llama/llama-models, models/llama2/MODEL_CARD.md"
LLAMA_31 = "meta-llama/llama-models, models/llama3_1/MODEL_CARD.md"
_LLAMA_2_STEP = Step(row_len=4096, micro_batch_rows=2, activations="selective", residual_bytes=2)
_ROWS_8K = Step(row_len=8192, micro_batch_rows=1, is_compiled=True, residual_bytes=2)
_TOLD = "the layout, and that steps are all that the hours are of"

HOURS: Sequence[Hours] = (
    _pretraining(
        "Llama 2 7B, 2.0T tokens",
        "llama-2-7b",
        "a100",
        Layout(data=512, shard="fsdp"),
        _LLAMA_2_STEP,
        2.0e12,
        184_320,
        LLAMA_2,
        _TOLD,
    ),
    _pretraining(
        "Llama 2 13B, 2.0T tokens",
        "llama-2-13b",
        "a100",
        Layout(data=512, shard="fsdp"),
        _LLAMA_2_STEP,
        2.0e12,
        368_640,
        LLAMA_2,
        _TOLD,
    ),
    _pretraining(
        "Llama 2 70B, 2.0T tokens",
        "llama-2-70b",
        "a100",
        Layout(data=256, tensor=8, shard="fsdp"),
        replace(_LLAMA_2_STEP, micro_batch_rows=4),
        2.0e12,
        1_720_320,
        LLAMA_2,
        _TOLD,
    ),
    _pretraining(
        "Llama 3.1 8B, 15T tokens",
        "llama-3.1-8b",
        "h100",
        Layout(data=1024, shard="fsdp"),
        _ROWS_8K,
        15e12,
        1.46e6,
        LLAMA_31,
        _TOLD,
    ),
    _pretraining(
        "Llama 3.1 70B, 15T tokens",
        "llama-3.1-70b",
        "h100",
        Layout(data=256, tensor=8, shard="fsdp"),
        replace(_ROWS_8K, micro_batch_rows=2),
        15e12,
        7.0e6,
        LLAMA_31,
        _TOLD,
    ),
    _pretraining(
        "Llama 3.1 405B, 15.6T tokens",
        "llama-3.1-405b",
        "h100",
        Layout(data=128, tensor=8, pipeline=16, shard="fsdp", virtual_stages=8),
        LLAMA_405B,
        15.6e12,
        30.84e6,
        f"{LLAMA_31}; tokens: {LLAMA_3}, section 3",
        "the layout of table 4 all the time",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """Tokens/s of one request."""

    model: str
    tensor: int
    tokens_per_s: float


GPT_FAST = "pytorch-labs/gpt-fast, README.md: bf16, one request, A100 80GB held to 330 W"
DECODING: Sequence[Decoding] = (
    Decoding(model="llama-2-7b", tensor=1, tokens_per_s=104.9),
    Decoding(model="llama-2-7b", tensor=2, tokens_per_s=168.84),
    Decoding(model="llama-2-7b", tensor=4, tokens_per_s=254.02),
    Decoding(model="llama-2-7b", tensor=8, tokens_per_s=328.43),
    Decoding(model="llama-2-70b", tensor=2, tokens_per_s=21.32),
    Decoding(model="llama-2-70b", tensor=4, tokens_per_s=38.01),
    Decoding(model="llama-2-70b", tensor=8, tokens_per_s=62.50),
)

CARBON: Sequence[tuple[str, float, float]] = (
    ("Llama 2 7B", 184_320, 31.22),
    ("Llama 2 13B", 368_640, 62.44),
    ("Llama 2 70B", 1_720_320, 291.42),
)
"""Model, GPU-hours and tonnes of `LLAMA_2`; 400 W, a PUE of 1.1 and 0.385 kg a kWh (Touvron et al. 2023, arXiv:2302.13971,
section 6)."""

FLOPS: Sequence[tuple[str, str, float, float]] = (
    ("gpt-3-175b", "Brown et al. 2020, arXiv:2005.14165, table D.1", 300e9, 3.14e23),
    ("llama-3.1-405b", f"{LLAMA_3}, section 3.2", 15.6e12, 3.8e25),
)
"""Model, source, tokens, and operations of the whole pretraining; both sources leave attention out."""

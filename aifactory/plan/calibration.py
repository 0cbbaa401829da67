"""Calibration: the shares of a maker's figures that are reached, as fitted to this project's own runs.

`python benchmarks/plan_errors.py --fit` fits them anew, and a test compares. Fitted on (one H200, `benchmarks/results/`):

    products, attention, eager   train_gpu_ablation-2026-11-26: "as meant", "one document a row", "without compilation"
    bandwidth                    serve_gpu-2026-11-26: bandwidth_gb_s
    decode, prefill              serve_gpu-2026-11-26: one request (between_ms_p50_b1, ttft_ms_p50_b1)

    A100's products             one row of MosaicML's table: MPT 7b, 8 A100, rows of 2,048
    all-reduces of decoding     two rows of gpt-fast's table: Llama 2 7B on one A100 and on two

All else that plans are compared with, this project's other runs and what others have published, is predicted.
Assumed, from what is commonly measured, and fitted to nothing: LINK_SHARE, OVERLAP.
"""

from __future__ import annotations

PRODUCTS_SHARE = 0.566
"""Of dense products in bf16, of the peak, on Hopper."""
A100_PRODUCTS_SHARE = 0.689
"""The same on an A100, whose clock its power bounds less."""
ATTENTION_SHARE = 0.353
"""Of attention's products, of the peak; its scores are computed a second time in the backward pass."""
EAGER_BYTES = 4.68
"""What is moved by element-wise work that is not compiled, over what is with it."""
BANDWIDTH_SHARE = 0.884
"""Of the memory's bandwidth, of the maker's figure."""
DECODE_LAYER_S = 17.9e-6
"""A layer of a decode step beside what it reads, seconds."""
PREFILL_LAYER_S = 0.801e-3
"""Least of a layer of a forward pass that is no graph: the host's time, seconds."""
ALL_REDUCE_S = 13.6e-6
"""Least of an all-reduce of one token's numbers within a node, seconds."""
LINK_SHARE = 0.8
"""Of a link's bandwidth, of the maker's figure, by large collectives (NCCL's own tests reach about 360 of 450 GB/s)."""
OVERLAP = 1.0
"""What of a step's computing may hide what FSDP and DDP exchange."""
HOURS_PER_INTERRUPTION = 54 * 24 * 16_384 / 419
"""Accelerator-hours between two unexpected interruptions: Llama Team 2024, arXiv:2407.21783, section 3.3.4."""
RESTART_S = 38
"""From a failure to the next step: fit_to_first_step_s of benchmarks/results/train-2026-11-26.json. On a large cluster more."""

MEMORY_MARGIN = 1.16
"""What a step may need over what is reckoned: more than the farthest that one of the known runs was above its plan."""
BOUNDS = {
    "own, training on one H200": 0.07,
    "own, memory on one H200": 0.18,
    "own, training on CPUs": 0.41,
    "own, serving on one H200": 0.29,
    "own, ingestion on two CPUs": 0.36,
    "published, training": 0.38,
    "published, memory": 0.30,
    "published, parameters": 0.001,
    "published, accelerator-hours": 0.69,
    "published, decoding": 0.29,
    "published, operations": 0.01,
    "published, carbon of given hours": 0.001,
}
"""By group of known runs the largest error of a prediction, as a share: what a plan is to be believed. Hours of whole pretrainings
are all underestimated: steps are not all that their hours were of."""

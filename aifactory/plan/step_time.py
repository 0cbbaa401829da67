"""Time of a training step, in parts: products and attention by the peak, element-wise work by the memory, what is exchanged by
links, what pipelines wait. Which shares of the makers' figures are reached: `calibration`.

Products     6 operations a weight and token; 2 more where blocks are computed again (full)
Attention    12 x layers x width x tokens attended to, which a causal kernel halves, and a sixth more: scores are computed again
Element-wise each kept number is written, read twice, and its gradient written and read
Update       40 bytes a weight: clipping reads and scales the gradient, AdamW reads four numbers and writes three
Pipeline     (stages - 1) / (parts of a stage x micro-batches) of the work is waited for (Narayanan et al. 2021, arXiv:2104.04473,
             section 2.2)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from aifactory.plan import calibration
from aifactory.plan.accelerators import Accelerator
from aifactory.plan.layout import Layout, Step
from aifactory.plan.memory import kept_bytes
from aifactory.plan.shapes import ModelShape

_MOVES = 5
_UPDATE_BYTES = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one micro-batch asks of one device, before any share is known."""

    product_flops: float
    attention_flops: float
    moved_bytes: float
    eager_bytes: float
    """Of `moved_bytes` what grows without compilation."""
    layers: float
    """Layers whose kernels are started, forwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one optimiser step on one device."""

    products_s: float
    attention_s: float
    elementwise_s: float
    host_s: float
    """What starting kernels takes beyond what they take."""
    update_s: float
    exchange_s: float
    """What is waited for."""
    pipeline_s: float
    crowded_s: float
    """What it takes longer because the rest of the node computes too."""

    @property
    def total(self) -> float:
        parts = self.products_s + self.attention_s + self.elementwise_s + self.host_s + self.update_s
        return parts + self.exchange_s + self.pipeline_s + self.crowded_s


def work_of(shape: ModelShape, layout: Layout, step: Step) -> Work:
    """Of one micro-batch on one device (the mean of a pipeline's stages)."""
    parts = layout.tensor * layout.pipeline
    tokens = step.micro_tokens
    # Without a gradient of their own, frozen weights cost two operations less.
    per_weight = 4 + 2 * step.trained_share
    products = per_weight * shape.product_weights
    attention = 12.0 * shape.layers * shape.width * step.attended * 7 / 6
    moved = _MOVES * shape.layers * kept_bytes(shape, replace(step, is_compiled=True), "none")
    logits = 12.0 * shape.vocab
    passes = 1.0
    if step.activations == "full":
        products += 2 * shape.active_block_weights
        attention += 4.0 * shape.layers * shape.width * step.attended
        passes = 4 / 3
    elif step.activations == "selective":
        passes = 1.2  # element-wise work of the forward pass, once more: one of five moves
    casts = 12.0 * shape.parameters if layout.shards == 1 else 0.0
    return Work(
        product_flops=products * tokens / parts,
        attention_flops=attention * tokens / parts,
        moved_bytes=(moved * passes * tokens + logits * tokens + casts) / parts,
        eager_bytes=0.0 if step.is_compiled else moved * passes * tokens / parts,
        layers=shape.layers / layout.pipeline,
    )


def step_time(shape: ModelShape, layout: Layout, step: Step, accelerator: Accelerator) -> StepTime:
    """Of one optimiser step."""
    work, count = work_of(shape, layout, step), step.micro_batches
    is_gpu = accelerator.kind == "gpu"
    rate = accelerator.tflops * 1e12 * accelerator.clock_share
    bandwidth = accelerator.bandwidth_gb_s * 1e9 * calibration.BANDWIDTH_SHARE
    # Of a CPU `tflops` is what a step sustains as a whole.
    products = work.product_flops / (rate * accelerator.products_share)
    attention = work.attention_flops / (rate * (calibration.ATTENTION_SHARE if is_gpu else 1))
    elementwise = host = update = 0.0
    if is_gpu:
        moved = work.moved_bytes + (calibration.EAGER_BYTES - 1) * work.eager_bytes
        elementwise = moved / bandwidth
        least = 3 * work.layers * calibration.PREFILL_LAYER_S
        host = max(0.0, least - products - attention - elementwise)
        owned = shape.parameters / (layout.tensor * layout.pipeline * layout.shards) * step.trained_share
        update = owned * _UPDATE_BYTES / bandwidth
    micro = products + attention + elementwise + host
    exchange = _exposed(shape, layout, step, accelerator, micro)
    tensor = _tensor_exchange(shape, layout, step, accelerator) * count
    waited = (layout.pipeline - 1) / (layout.virtual_stages * count) if layout.pipeline > 1 else 0.0
    busy = micro * count + tensor
    is_crowded = layout.count >= accelerator.per_node and layout.count > 1
    crowded = (1 / accelerator.crowded_share - 1) * (busy + update) if is_crowded else 0.0
    return StepTime(
        products_s=products * count,
        attention_s=attention * count,
        elementwise_s=elementwise * count,
        host_s=host * count,
        update_s=update,
        exchange_s=exchange + tensor,
        pipeline_s=waited * busy,
        crowded_s=crowded,
    )


def collective_s(num_bytes: float, members: int, stride: int, accelerator: Accelerator) -> float:
    """Seconds in which each of so many devices gets all of `num_bytes`, of which each has its part.

    members   that are `stride` devices apart, so that fewer of them lie in one node
    """
    if members == 1:
        return 0.0
    local = max(1, min(members, accelerator.per_node // stride))
    nodes = members / local
    inside = num_bytes * (1 - 1 / local) / (accelerator.link_gb_s * 1e9)
    # All devices of a node bring in what it lacks, each by its own network.
    between = num_bytes * (1 - 1 / nodes) / (local * accelerator.network_gb_s * 1e9)
    return max(inside, between) / calibration.LINK_SHARE


def _exposed(shape: ModelShape, layout: Layout, step: Step, accelerator: Accelerator, micro_s: float) -> float:
    """What data-parallel groups exchange in a step and computing does not hide."""
    if layout.data == 1:
        return 0.0
    parts = layout.tensor * layout.pipeline
    stride = min(layout.tensor, accelerator.per_node)
    weights = shape.parameters / parts
    trained = weights * step.trained_share
    # On a CPU the cores that compute also send, and weights cross as they are.
    overlap, size = (calibration.OVERLAP, 2) if accelerator.kind == "gpu" else (0.0, 4)
    copies = layout.data // layout.shards
    # An all-reduce is a reduce-scatter and an all-gather.
    between = 2 * collective_s(
        trained / layout.shards * step.gradient_bytes, copies, stride * layout.shards, accelerator
    )
    if layout.shards == 1:
        # DDP waits for the last micro-batch's gradients, which cross while its backward pass goes on.
        return max(0.0, between - overlap * micro_s * 2 / 3)
    gathered = 2 * collective_s(size * weights, layout.shards, stride, accelerator)
    reduced = collective_s(step.gradient_bytes * trained, layout.shards, stride, accelerator)
    block = collective_s(size * weights / shape.layers, layout.shards, stride, accelerator)
    # A pipeline's stage keeps what it has gathered until its micro-batches have passed.
    passes = 1 if layout.pipeline > 1 else step.micro_batches
    hidden = micro_s * (step.micro_batches if layout.pipeline > 1 else 1) * overlap
    return passes * (block + max(0.0, gathered + reduced - hidden)) + between


def _tensor_exchange(shape: ModelShape, layout: Layout, step: Step, accelerator: Accelerator) -> float:
    """What tensor-parallel devices wait for in a micro-batch: two all-reduces a layer forwards, and two backwards."""
    if layout.tensor == 1:
        return 0.0
    rounds = 4 + (2 if step.activations == "full" else 0)
    one = 2 * collective_s(2.0 * step.micro_tokens * shape.hidden, layout.tensor, 1, accelerator)
    return rounds * one * shape.layers / layout.pipeline

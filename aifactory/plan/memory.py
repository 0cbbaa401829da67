"""Memory of a training step on one device, counted tensor by tensor; nothing here is fitted.

States        weights, gradients and AdamW's two moments (fp32: 16 bytes a weight); gradients exist from the backward pass on
Casts         weights in bf16: of the whole model under autocast, of the blocks at work with FSDP2
Activations   what the backward pass needs, by layer and token (`kept_bytes`)
Loss          logits, whole or a piece at a time (`aifactory/train/cross_entropy.py`)

Source   Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", arXiv:2205.05198, section 4,
         for a block with gated MLP and grouped queries; Rajbhandari et al. 2020, "ZeRO", arXiv:1910.02054, section 3, for states
Legend   H width of the residual, Q of the queries, K of the keys, I of the MLP
"""

from __future__ import annotations

from dataclasses import dataclass

from aifactory.plan.accelerators import Accelerator
from aifactory.plan.layout import Activations, Layout, Step
from aifactory.plan.shapes import ModelShape

_PIECE_BYTES = {"cpu": 64 * 2**20, "gpu": 2**30}
"""As `aifactory/train/cross_entropy.py` has them."""
_GATHERED_BLOCKS = 2
"""FSDP2 gathers the next block while one computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on the fullest device."""

    states: float
    casts: float
    activations: float
    loss: float

    @property
    def total(self) -> float:
        return self.states + self.casts + self.activations + self.loss


def kept_bytes(shape: ModelShape, step: Step, activations: Activations) -> float:
    """What one layer keeps of one token for the backward pass, bytes."""
    size = step.residual_bytes
    hidden, queries = shape.hidden, shape.width
    heads = (
        2 * (queries + 2 * shape.kv_width) + 2 * queries + 4 * shape.heads
    )  # q, k, v, what attention gives, its sums
    inner = shape.intermediate * shape.active_experts
    if activations == "full":
        return size * hidden
    if activations == "selective":  # the block's input, and what products give
        return size * hidden + heads + 2 * hidden + 2 * inner * (2 if shape.gated else 1) + 2 * hidden
    # Norms keep what goes into them; products keep what goes into them, in bf16; the MLP its products and what lies between.
    if step.is_compiled:
        return 2 * size * hidden + 2 * 2 * hidden + heads + 2 * inner * (3 if shape.gated else 2)
    copies = 3 + (2 if shape.gated else 1) if size == 4 else 2  # under autocast each product casts its input for itself
    normalised = 2 * size * hidden if size == 4 else 0
    return 2 * size * hidden + normalised + copies * 2 * hidden + heads + 2 * inner * (4 if shape.gated else 2)


def loss_bytes(shape: ModelShape, step: Step, kind: str) -> float:
    """What is there at once of the logits and their gradients."""
    in_piece = max(1, _PIECE_BYTES[kind] // (4 * shape.vocab))
    tokens = step.micro_tokens if step.loss == "plain" else min(step.micro_tokens, in_piece)
    # In bf16, in fp32, their softmax or its gradient, and the gradient in bf16; in pieces the head's gradient is summed in fp32.
    return tokens * shape.vocab * (2 + 4 + 4 + 2) + (6 * shape.head_weights if step.loss == "pieces" else 0)


def memory_of(shape: ModelShape, layout: Layout, step: Step, accelerator: Accelerator) -> Memory:
    """Of the fullest device at the fullest moment: the end of a forward pass, or that of the backward pass."""
    parts = layout.tensor * layout.pipeline
    weights = shape.parameters / parts
    if layout.pipeline > 1:  # the first stage has the embeddings, the last one the head
        weights = (shape.block_weights / layout.pipeline + shape.head_weights) / layout.tensor
    owned = weights / layout.shards
    trained = owned * step.trained_share
    is_cast = accelerator.kind == "gpu"
    if layout.shards > 1:
        block = shape.block_weights / shape.layers / layout.tensor
        heads = shape.head_weights / layout.tensor * (1 if shape.tied or layout.pipeline > 1 else 2)
        casts = 2 * (_GATHERED_BLOCKS * block + heads) + step.gradient_bytes * block
    else:
        casts = 2 * weights if is_cast else 0.0
    before = owned * step.weight_bytes + trained * step.moment_bytes
    gradients = 4 * trained
    layers = -(-shape.layers // layout.pipeline)
    # 1F1B: as many micro-batches are under way on the first stage as there are stages.
    under_way = min(step.micro_batches, layout.pipeline) if layout.pipeline > 1 else 1
    kept = kept_bytes(shape, step, step.activations)
    activations = kept * step.micro_tokens * layers * under_way
    if step.activations != "none":  # one block is computed again
        activations += kept_bytes(shape, step, "none") * step.micro_tokens
    activations /= layout.tensor
    loss = loss_bytes(shape, step, accelerator.kind) / layout.tensor
    forward = before + (gradients if step.micro_batches > 1 else 0)
    if forward + activations + loss >= before + gradients:
        return Memory(states=forward, casts=casts, activations=activations, loss=loss)
    return Memory(states=before + gradients, casts=casts, activations=0.0, loss=0.0)

"""Execution: how a step is computed, the model being the same."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How a step is computed."""

    attention: str = "auto"
    """`mask`, `varlen`, or `auto`: varlen where the model and the device have it."""
    loss: str = "auto"
    """`plain`, `pieces` (no logits of the whole batch), or `auto`: pieces where the model's head allows it."""
    activations: str = "none"
    """What is kept for the backward pass: everything (`none` is computed again), `selective` or `full`."""
    compile: bool = False
    """Whether the blocks are compiled."""
    gradients: str = "fp32"
    """In what gradients cross from worker to worker: `fp32` or `bf16`."""

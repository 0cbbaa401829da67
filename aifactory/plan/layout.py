"""Layout and Step: over which devices a model is spread, and what one step of training is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aifactory.errors import ConfigError

Shard = Literal["ddp", "fsdp"]
Activations = Literal["none", "selective", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How many devices share what. `data` groups of `tensor` x `pipeline` devices hold a model each, or (fsdp) share one."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    shard: Shard = "ddp"
    """ddp: each group holds all weights, gradients and optimiser states; fsdp: its share of them."""
    shard_groups: int | None = None
    """Of fsdp: so many groups hold one copy between them (hybrid sharding). Default: all."""
    virtual_stages: int = 1
    """Of pipeline: parts of the model on each device (interleaved schedule)."""

    @property
    def count(self) -> int:
        return self.data * self.tensor * self.pipeline

    @property
    def shards(self) -> int:
        """Groups among which a copy of the states is spread."""
        return 1 if self.shard == "ddp" else min(self.data, self.shard_groups or self.data)

    @property
    def words(self) -> str:
        parts = []
        if self.data > 1:
            hybrid = f" by {self.shards}" if self.shard == "fsdp" and self.shards < self.data else ""
            parts.append(f"{'FSDP' if self.shard == 'fsdp' else 'DDP'} {self.data}{hybrid}")
        parts += [f"tensor {self.tensor}"] if self.tensor > 1 else []
        parts += [f"pipeline {self.pipeline}"] if self.pipeline > 1 else []
        return " x ".join(parts) or "one device"


def spread(count: int, *, tensor: int, pipeline: int, shard: Shard, shard_groups: int | None = None) -> Layout:
    """So many devices as groups of tensor x pipeline.

    Raises   ConfigError where the groups don't come out even.
    """
    group = tensor * pipeline
    if count % group:
        raise ConfigError(
            f"expected a number of accelerators that is a multiple of tensor x pipeline = {tensor} x {pipeline}, found {count}; "
            "change one of them."
        )
    return Layout(data=count // group, tensor=tensor, pipeline=pipeline, shard=shard, shard_groups=shard_groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimiser step and how it is computed, in the terms of `runtime.execution`."""

    row_len: int
    """Tokens of a row."""
    micro_batch_rows: int
    """Rows of one forward pass of one group."""
    micro_batches: int = 1
    """Forward passes of one group in a step."""
    document_tokens: float | None = None
    """Mean over all tokens of the length of their document. Default: a document is a row."""
    activations: Activations = "none"
    is_compiled: bool = False
    loss: Literal["pieces", "plain"] = "pieces"
    attention: Literal["varlen", "mask"] = "varlen"
    gradient_bytes: int = 4
    """Of a gradient as it crosses from device to device."""
    residual_bytes: int = 4
    """Of a number between blocks: 4 under autocast of fp32 weights, 2 where weights are cast before (FSDP2)."""
    weight_bytes: int = 4
    """Of a weight as the optimiser keeps it."""
    moment_bytes: int = 8
    """Of the optimiser's two states of a weight."""
    trained_share: float = 1.0
    """Of the weights: below 1 with adapters."""

    @property
    def micro_tokens(self) -> int:
        return self.micro_batch_rows * self.row_len

    @property
    def attended(self) -> float:
        """Tokens that a token attends to on average: half of its document; with a mask all of its row are computed."""
        if self.attention == "mask":
            return float(self.row_len)
        return (self.document_tokens or self.row_len) / 2

    def tokens(self, layout: Layout) -> int:
        """Of one step, over all devices."""
        return layout.data * self.micro_batches * self.micro_tokens

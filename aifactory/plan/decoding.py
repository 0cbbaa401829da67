"""Decoding and prefill: what answers take. Decode steps read all weights and all keys and values, so the memory's bandwidth bounds
them; prompts are bounded by products, or by the host that starts the kernels.

Source   Pope et al. 2022, "Efficiently Scaling Transformer Inference", arXiv:2211.05102, section 2.1
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aifactory.plan import calibration
from aifactory.plan.accelerators import Accelerator
from aifactory.plan.shapes import ModelShape
from aifactory.plan.step_time import collective_s

KV_SHARE = 0.9
"""Of the memory that weights leave, what keys and values may take; the rest is for activations and the allocator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """A model on so many devices of one node."""

    shape: ModelShape
    accelerator: Accelerator
    tensor: int = 1
    bytes_per_weight: int = 2
    bytes_per_kv: int = 2
    has_host_bound_prefill: bool = True
    """Whether prompts go one after another through a forward pass that is no graph, as in the project's own engine."""

    @property
    def weight_bytes(self) -> float:
        """On each device."""
        return self.shape.parameters * self.bytes_per_weight / self.tensor

    def read_bytes(self, requests: float) -> float:
        """Of weights in a decode step, on each device: embeddings are looked up, and of experts those that any request meets."""
        shape = self.shape
        untouched = math.pow(1 - shape.active_experts / shape.experts, requests)
        experts = shape.layers * shape.experts * shape.mlp_weights
        return (shape.block_weights - untouched * experts + shape.head_weights) * self.bytes_per_weight / self.tensor

    @property
    def kv_bytes_per_token(self) -> float:
        """On each device; heads of keys are spread, or held again where there are fewer of them than devices."""
        return self.shape.kv_numbers_per_token * self.bytes_per_kv / min(self.tensor, self.shape.kv_heads)

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values there is room for; 0 where not even the weights fit."""
        room = self.accelerator.memory_bytes - self.weight_bytes
        return max(0, int(KV_SHARE * room / self.kv_bytes_per_token))

    def decode_s(self, requests: int, context_tokens: float) -> float:
        """A step that gives each of so many requests a token, their prompts and answers so long by now."""
        chip = self.accelerator
        share = calibration.BANDWIDTH_SHARE if chip.kind == "gpu" else 1.0
        read = self.read_bytes(requests) + requests * context_tokens * self.kv_bytes_per_token
        reading = read / (chip.bandwidth_gb_s * 1e9 * share)
        weights = self.shape.product_weights
        flops = requests * (2 * weights + 4 * self.shape.layers * self.shape.width * context_tokens) / self.tensor
        computing = flops / self._rate
        layers = self.shape.layers * calibration.DECODE_LAYER_S if chip.kind == "gpu" else 0.0
        return max(reading, computing) + layers + self._exchange_s(requests)

    def prefill_s(self, prompt_tokens: float) -> float:
        """One prompt, by itself."""
        shape = self.shape
        flops = 2 * shape.active_block_weights * prompt_tokens + 2 * shape.head_weights
        flops += 2 * shape.layers * shape.width * prompt_tokens**2
        chip = self.accelerator
        reading = self.read_bytes(prompt_tokens) / (chip.bandwidth_gb_s * 1e9)
        is_bound = self.has_host_bound_prefill and chip.kind == "gpu"
        host = shape.layers * calibration.PREFILL_LAYER_S if is_bound else 0.0
        return max(flops / self.tensor / self._rate, reading, host) + self._exchange_s(prompt_tokens)

    def _exchange_s(self, tokens: float) -> float:
        """Two all-reduces a layer."""
        if self.tensor == 1:
            return 0.0
        one = 2 * collective_s(2.0 * tokens * self.shape.hidden, self.tensor, 1, self.accelerator)
        return 2 * self.shape.layers * (one + calibration.ALL_REDUCE_S)

    @property
    def _rate(self) -> float:
        chip = self.accelerator
        return chip.tflops * 1e12 * chip.clock_share * chip.products_share


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a replica does that answers so many requests at once, one after another without a pause."""

    requests: int
    requests_per_s: float
    token_s: float
    """From a token to the next of an answer, with the prompts of others between."""
    first_token_s: float
    """From a request's turn to its first token, with the mean wait for other prompts."""
    tokens_per_s: float
    """Of answers."""


def load_of(replica: Replica, requests: int, *, prompt_tokens: int, answer_tokens: int) -> Load:
    """A closed loop of so many requests, by Little's law."""
    prefill = replica.prefill_s(prompt_tokens)
    decode = replica.decode_s(requests, prompt_tokens + answer_tokens / 2)
    whole = requests * prefill + answer_tokens * decode
    rate = requests / whole
    busy = min(0.99, rate * prefill)
    return Load(
        requests=requests,
        requests_per_s=rate,
        token_s=(whole - prefill) / answer_tokens,
        # The queue of prompts alone: served one by one in equal times (M/D/1), after the decode step that is under way.
        first_token_s=prefill + decode / 2 * (requests > 1) + busy / (2 * (1 - busy)) * prefill,
        tokens_per_s=rate * answer_tokens,
    )

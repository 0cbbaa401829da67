"""Arithmetic: the floating-point operations of a training step, and of how many a machine is capable. Pure torch.

MFU (model FLOPs utilisation) = tokens/s x FLOPs per token / (workers x peak). Source: Chowdhery et al. 2022, "PaLM",
arXiv:2204.02311, appendix B. What is computed a second time for activation checkpointing is not counted.

A token costs 2 operations for each weight of a matrix in the forward pass, 2 in the backward pass for the gradient of the
activations, and 2 for that of the weight if it is trained; and 12 x layers x width of all heads x tokens attended to for
attention. By convention these are all tokens of the row, though a causal mask needs half of them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PretrainedConfig

_PUBLISHED_TFLOPS = (
    # Dense products in bf16 with sums in fp32, from the makers' data sheets; the first name that occurs in the device's own.
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H800", 989.4),
    ("GH200", 989.4),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.1),
    ("L40", 181.1),
    ("L4", 121.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("RTX 4090", 165.2),
    ("MI300X", 1307.4),
    ("MI250X", 383.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The most floating-point operations a second that one worker's device is capable of."""

    flops_per_s: float
    source: Literal["published", "measured"]
    """published: the maker's figure for dense products; measured: the best large matrix product, here and now."""


def flops_per_token(model: nn.Module, config: PretrainedConfig, *, attended_tokens: float) -> float:
    """Floating-point operations of the forward and backward pass, a token.

    model            before or after it is sharded; weights that are not trained (under LoRA) have no gradient of their own
    config           its `config`
    attended_tokens  tokens of a row, by convention; for packed documents, of what is truly computed, the mean over all
                     tokens of the length of their document
    """
    text = config.get_text_config(decoder=True)
    total = 0.0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue  # looked up, not multiplied; where it is the head too, the head's module counts it
        for weight in module.parameters(recurse=False):
            if weight.dim() < 2:
                continue
            active = weight.numel()
            if weight.dim() == 3:  # experts, of which a token meets some
                active = active * int(getattr(text, "num_experts_per_tok", weight.shape[0])) // weight.shape[0]
            total += (6 if weight.requires_grad else 4) * active
    width = int(text.num_attention_heads) * head_width(config)
    return total + 12 * int(text.num_hidden_layers) * width * attended_tokens


def head_width(config: PretrainedConfig) -> int:
    """Numbers of a query in one attention head."""
    text = config.get_text_config(decoder=True)
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Of one device: published where the table has it, else the best of some matrix products (a tenth of a second)."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for known, tflops in _PUBLISHED_TFLOPS:
            if known in name:
                return Peak(flops_per_s=tflops * 1e12, source="published")
    return Peak(flops_per_s=_measured(device, dtype), source="measured")


def utilisation(tokens_per_s: float, flops_of_token: float, best: Peak, *, workers: int) -> float:
    """MFU: the share of the peak of all workers that the model's own operations are."""
    return tokens_per_s * flops_of_token / (workers * best.flops_per_s)


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    """With as many threads as torch has now. 1,024 rows are enough for a CPU, and large products for a GPU."""
    size = 1024 if device.type == "cpu" else 8192
    with torch.no_grad():
        left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
        best, started = float("inf"), time.perf_counter()
        rounds = 0
        while rounds < 3 or time.perf_counter() - started < 0.1:
            begun = time.perf_counter()
            product = left @ right
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best, rounds = min(best, time.perf_counter() - begun), rounds + 1
        del product
    return 2.0 * size**3 / best

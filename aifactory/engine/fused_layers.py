"""FusedLayers: the weights of a Llama-like model as the kernels for CUDA read them, and what steps and prompts have in common.

model ─FusedLayers─▶ one matrix for queries, keys and values, and one for gate and up, in each layer
                     (the model's own modules are views of the same memory, and go on computing what else there is)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from aifactory.engine.packed import why_not_llama

MOST_QUERIES = 16
"""Heads that may share keys and values."""
_GATE_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """Weights and biases of one layer."""

    norm_H: Tensor
    qkv: tuple[Tensor, Tensor | None]
    gains: tuple[Tensor, Tensor] | None
    out: tuple[Tensor, Tensor | None]
    mlp_norm_H: Tensor
    up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]


def why_not_fused(model: PreTrainedModel) -> str | None:
    """What keeps the kernels from computing this model's steps; None if nothing does."""
    reason = why_not_llama(model)
    if reason is not None:
        return reason
    if find_spec("triton") is None:
        return "Triton is not installed"
    if model.device.type != "cuda":
        return f"it is on {model.device}"
    if model.dtype not in (torch.bfloat16, torch.float16):
        # In fp32 an answer is the model's own, token for token.
        return f"its weights are {model.dtype}"
    attention, config = model.model.layers[0].self_attn, model.config
    if attention.head_dim & (attention.head_dim - 1) or not 16 <= attention.head_dim <= 256:
        return f"its head_dim of {attention.head_dim} is no power of 2 from 16 to 256"
    if config.num_attention_heads // config.num_key_value_heads > MOST_QUERIES:
        return f"more than {MOST_QUERIES} heads share keys and values"
    if any(getattr(layer.mlp.gate_proj, "bias", None) is not None for layer in model.model.layers):
        return "its MLP has biases"
    return None


class FusedLayers:
    """All of a model that `why_not_fused` has nothing against."""

    def __init__(self, model: PreTrainedModel, *, num_positions: int) -> None:
        """Lay the weights out anew, in place.

        num_positions   of a row of the cache
        """
        from aifactory.engine import triton_kernels

        self.kernels = triton_kernels
        config, attention = model.config, model.model.layers[0].self_attn
        self.eps = float(config.rms_norm_eps)
        self.scaling = float(attention.scaling)
        self.width = attention.head_dim
        self.num_heads_kv = config.num_key_value_heads
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.embedding_VH: Tensor = model.model.embed_tokens.weight
        self.layers = [_fused(layer) for layer in model.model.layers]
        self.norm_H = model.model.norm.weight
        self.head = model.lm_head.weight, model.lm_head.bias
        device = model.device
        with torch.inference_mode():
            positions = torch.arange(num_positions, device=device)[None]
            tables = model.model.rotary_emb(torch.empty(1, device=device), positions)
        self.cos_TD, self.sin_TD = (table[0].float().contiguous() for table in tables)

    def through(self, x_BH: Tensor, attend: Callable[[int, FusedLayer, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """All layers, products by the library: x, fp32, and y, which is still to be added to it.

        attend   index of a layer, the layer, queries, keys and values (B, N) -> what heads attended to (B, heads * D)
        """
        y_BH = None
        for index, layer in enumerate(self.layers):
            qkv_BN = functional.linear(self.normalize(x_BH, y_BH, layer.norm_H), *layer.qkv)
            y_BH = functional.linear(attend(index, layer, qkv_BN), *layer.out)
            gated_BN = functional.linear(self.normalize(x_BH, y_BH, layer.mlp_norm_H), *layer.up)
            y_BH = functional.linear(self.gate(gated_BN), *layer.down)
        assert y_BH is not None, "a model without layers"
        return x_BH, y_BH

    def logits(self, x_BH: Tensor, y_BH: Tensor) -> Tensor:
        """The logits (B, V) of what `through` gave, in the weights' type."""
        return functional.linear(self.normalize(x_BH, y_BH, self.norm_H), *self.head)

    def normalize(self, x_BH: Tensor, y_BH: Tensor | None, norm_H: Tensor) -> Tensor:
        """The norm of x + y in the weights' type; x, fp32, is that sum from then on."""
        out_BH = torch.empty_like(x_BH, dtype=norm_H.dtype)
        num_rows, width = x_BH.shape
        self.kernels.normalize[(num_rows,)](
            x_BH,
            x_BH if y_BH is None else y_BH,
            norm_H,
            out_BH,
            width,
            self.eps,
            BLOCK_K=power_of_two(width),
            ADDS=y_BH is not None,
            num_warps=8,
        )
        return out_BH

    def gate(self, y_BN: Tensor) -> Tensor:
        """silu(y1) * y2 of the halves of each row."""
        num_rows, width = y_BN.shape[0], y_BN.shape[1] // 2
        out_BN = torch.empty(num_rows, width, dtype=y_BN.dtype, device=y_BN.device)
        self.kernels.gate[(num_rows, -(-width // _GATE_BLOCK))](y_BN, out_BN, width, BLOCK_N=_GATE_BLOCK)
        return out_BN


@torch.no_grad()
def _fused(layer: Any) -> FusedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    gains = tuple(getattr(attention, name).weight for name in ("q_norm", "k_norm") if hasattr(attention, name))
    return FusedLayer(
        norm_H=layer.input_layernorm.weight,
        qkv=_one_below_another(attention.q_proj, attention.k_proj, attention.v_proj),
        gains=(gains[0], gains[1]) if gains else None,
        out=(attention.o_proj.weight, attention.o_proj.bias),
        mlp_norm_H=layer.post_attention_layernorm.weight,
        up=_one_below_another(mlp.gate_proj, mlp.up_proj),
        down=(mlp.down_proj.weight, mlp.down_proj.bias),
    )


def _one_below_another(*modules: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Their weights and biases as one matrix and one vector; the modules read the same memory from then on."""
    weight_NK = torch.cat([module.weight for module in modules])
    biases: list[Tensor] = [module.bias for module in modules if module.bias is not None]
    bias_N = torch.cat(biases) if biases else None
    sizes = [module.out_features for module in modules]
    for module, part in zip(modules, torch.split(weight_NK, sizes), strict=True):
        module.weight = nn.Parameter(part, requires_grad=False)
    if bias_N is not None:
        for module, part in zip(modules, torch.split(bias_N, sizes), strict=True):
            module.bias = nn.Parameter(part, requires_grad=False)
    return weight_NK, bias_N


def power_of_two(number: int) -> int:
    """The next one."""
    return 1 << (number - 1).bit_length()

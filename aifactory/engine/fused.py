"""FusedForward: decode steps of a Llama-like model on CUDA, by kernels that read each weight once.

    model ─FusedForward─▶ one matrix for queries, keys and values, and one for gate and up, in each layer
                          (the model's own modules are views of the same memory, and go on computing prompts)

Rows     one by kernels of this project alone (triton_kernels.py): such a step takes as long as its weights take to read.
         Several by the library's matrix products, with the same attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from aifactory.engine.cache import SlotCache
from aifactory.engine.packed import why_not_llama

_MOST_QUERIES = 16
_LONG = 1024
"""Positions from which on a context is read in parts, side by side: one program a head no longer keeps up with the weights."""
_PARTS = 16
_LEAST_PART = 256
_BLOCK_T = 128
_GATE_BLOCK = 1024
_ATTEND_WARPS = 4


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a projection is cut."""

    rows: int
    """Of the weight, for each program."""
    columns: int
    """At once."""
    warps: int


MEASURED = {
    "qkv": Tiles(rows=4, columns=1024, warps=4),
    "out": Tiles(rows=16, columns=1024, warps=8),
    "up": Tiles(rows=4, columns=512, warps=2),
    "down": Tiles(rows=4, columns=1024, warps=8),
    "head": Tiles(rows=8, columns=512, warps=2),
}
"""Of all that were tried the fastest on an H200, of a model of a billion parameters."""


@dataclass(frozen=True, slots=True)
class _Layer:
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
    if config.num_attention_heads // config.num_key_value_heads > _MOST_QUERIES:
        return f"more than {_MOST_QUERIES} heads share keys and values"
    if any(getattr(layer.mlp.gate_proj, "bias", None) is not None for layer in model.model.layers):
        return "its MLP has biases"
    return None


class FusedForward:
    """A `DecodeForward` of models that `why_not_fused` has nothing against."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: SlotCache,
        *,
        most_rows: int,
        tiles: Mapping[str, Tiles] = MEASURED,
    ) -> None:
        """Lay the weights out anew, in place. The cache must be allocated.

        most_rows   of a step
        tiles       how projections are cut, by their names
        """
        from aifactory.engine import triton_kernels

        self._kernels = triton_kernels
        self._tiles = tiles
        config, attention = model.config, model.model.layers[0].self_attn
        self._cache = cache
        self._eps = float(config.rms_norm_eps)
        self._scaling = float(attention.scaling)
        self._width = width = attention.head_dim
        self._num_heads_kv = config.num_key_value_heads
        self._group = config.num_attention_heads // config.num_key_value_heads
        self._embedding_VH: Tensor = model.model.embed_tokens.weight
        self._layers = [_fused(layer) for layer in model.model.layers]
        self._norm_H = model.model.norm.weight
        self._head = model.lm_head.weight, model.lm_head.bias
        device = model.device
        with torch.inference_mode():
            positions = torch.arange(cache.num_positions, device=device)[None]
            tables = model.model.rotary_emb(torch.empty(1, device=device), positions)
        self._cos_TD, self._sin_TD = (table[0].float().contiguous() for table in tables)
        heads = most_rows * self._num_heads_kv * self._group
        self._sums = torch.empty(heads * _PARTS * width, device=device)
        self._most, self._weight = (torch.empty(heads * _PARTS, device=device) for _ in range(2))

    def extent(self, longest: int) -> int:
        """Short or long: the kernels read as far as each row goes."""
        return min(_LONG if longest <= _LONG else self._cache.num_positions, self._cache.num_positions)

    def __call__(self, ids_B1: Tensor, positions_B: Tensor, rows_B: Tensor, extent: int) -> Tensor:
        """The logits (B, V), float32 of one row, of several in the weights' type."""
        x_BH = functional.embedding(ids_B1[:, 0], self._embedding_VH).float()
        places = positions_B, rows_B, 1 if extent <= _LONG else _PARTS
        return self._alone(x_BH, *places) if len(x_BH) == 1 else self._together(x_BH, *places)

    def _alone(self, x_1H: Tensor, positions_B: Tensor, rows_B: Tensor, parts: int) -> Tensor:
        """Each product by a kernel of this project, norm, gate and sum within."""
        for index, layer in enumerate(self._layers):
            qkv_1N = self._project("qkv", x_1H, *layer.qkv, norm_K=layer.norm_H)
            attended_1N = self._attend(qkv_1N, index, layer, positions_B, rows_B, parts)
            self._project("out", attended_1N, *layer.out, add_to=x_1H)
            inner_1I = self._project("up", x_1H, *layer.up, norm_K=layer.mlp_norm_H, is_gated=True)
            self._project("down", inner_1I, *layer.down, add_to=x_1H)
        return self._project("head", x_1H, *self._head, norm_K=self._norm_H)

    def _together(self, x_BH: Tensor, positions_B: Tensor, rows_B: Tensor, parts: int) -> Tensor:
        """Products by the library, which is at its best with several rows; what lies between them in one kernel each."""
        y_BH = None
        for index, layer in enumerate(self._layers):
            qkv_BN = functional.linear(self._normalize(x_BH, y_BH, layer.norm_H), *layer.qkv)
            y_BH = functional.linear(self._attend(qkv_BN, index, layer, positions_B, rows_B, parts), *layer.out)
            gated_BN = functional.linear(self._normalize(x_BH, y_BH, layer.mlp_norm_H), *layer.up)
            y_BH = functional.linear(self._gate(gated_BN), *layer.down)
        return functional.linear(self._normalize(x_BH, y_BH, self._norm_H), *self._head)

    def _normalize(self, x_BH: Tensor, y_BH: Tensor | None, norm_H: Tensor) -> Tensor:
        out_BH = torch.empty_like(x_BH, dtype=norm_H.dtype)
        num_rows, width = x_BH.shape
        self._kernels.normalize[(num_rows,)](
            x_BH,
            x_BH if y_BH is None else y_BH,
            norm_H,
            out_BH,
            width,
            self._eps,
            BLOCK_K=_power_of_two(width),
            ADDS=y_BH is not None,
            num_warps=8,
        )
        return out_BH

    def _gate(self, y_BN: Tensor) -> Tensor:
        num_rows, width = y_BN.shape[0], y_BN.shape[1] // 2
        out_BN = torch.empty(num_rows, width, dtype=y_BN.dtype, device=y_BN.device)
        self._kernels.gate[(num_rows, -(-width // _GATE_BLOCK))](y_BN, out_BN, width, BLOCK_N=_GATE_BLOCK)
        return out_BN

    def _project(
        self,
        name: str,
        x_1K: Tensor,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        *,
        norm_K: Tensor | None = None,
        is_gated: bool = False,
        add_to: Tensor | None = None,
    ) -> Tensor:
        num_outputs = len(weight_NK) // (2 if is_gated else 1)
        out_1N = add_to if add_to is not None else torch.empty(1, num_outputs, device=x_1K.device)
        tiles = self._tiles[name]
        self._kernels.project[(-(-num_outputs // tiles.rows),)](
            x_1K,
            x_1K if norm_K is None else norm_K,
            weight_NK,
            x_1K if bias_N is None else bias_N,
            out_1N,
            x_1K.shape[1],
            num_outputs,
            self._eps,
            BLOCK_N=tiles.rows,
            BLOCK_K=tiles.columns,
            HAS_NORM=norm_K is not None,
            HAS_BIAS=bias_N is not None,
            IS_GATED=is_gated,
            ADDS=add_to is not None,
            num_warps=tiles.warps,
        )
        return out_1N

    def _attend(
        self, qkv_BN: Tensor, index: int, layer: _Layer, positions_B: Tensor, rows_B: Tensor, parts: int
    ) -> Tensor:
        num_rows, heads, group, width = len(qkv_BN), self._num_heads_kv, self._group, self._width
        out_BN = torch.empty(num_rows, heads * group * width, dtype=qkv_BN.dtype, device=qkv_BN.device)
        states = self._cache.slot_layers[index]
        gains = layer.gains or (qkv_BN, qkv_BN)
        self._kernels.attend[(num_rows, heads, parts)](
            qkv_BN,
            states.keys,
            states.values,
            self._cache.mask_ST,
            self._cos_TD,
            self._sin_TD,
            *gains,
            positions_B,
            rows_B,
            out_BN,
            self._sums,
            self._most,
            self._weight,
            self._cache.num_positions,
            self._scaling,
            self._eps,
            H=heads,
            G=group,
            D=width,
            QUERIES=_MOST_QUERIES,
            BLOCK_T=_BLOCK_T,
            PARTS=parts,
            LEAST_PART=_LEAST_PART,
            HAS_GAINS=layer.gains is not None,
            num_warps=_ATTEND_WARPS,
            num_stages=3,
        )
        if parts > 1:
            self._kernels.merge[(num_rows * heads, group)](
                self._sums,
                self._most,
                self._weight,
                out_BN,
                G=group,
                D=width,
                PARTS=parts,
                num_warps=1,
            )
        return out_BN


@torch.no_grad()
def _fused(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    gains = tuple(getattr(attention, name).weight for name in ("q_norm", "k_norm") if hasattr(attention, name))
    return _Layer(
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


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()

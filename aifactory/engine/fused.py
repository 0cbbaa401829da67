"""FusedForward: decode steps of a Llama-like model on CUDA, by kernels that read each weight once.

    model ─FusedForward─▶ one matrix for queries, keys and values, and one for gate and up, in each layer
                          (the model's own modules are views of the same memory, and go on computing prompts)

Rows     up to 16 by kernels of this project (triton_kernels.py), as the step then takes as long as its weights take to read;
         more by the library's matrix products, with the same attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from aifactory.engine.cache import SlotCache
from aifactory.engine.packed import why_not_llama

_MOST_FUSED = 16
_MOST_QUERIES = 16
_LONG = 1024
"""Positions from which on a context is read in parts, side by side: one program a head no longer keeps up with the weights."""
_PARTS = 16
_LEAST_PART = 256
_BLOCK_T = 64


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a projection is cut."""

    rows: int
    """Of the weight, for each program."""
    columns: int
    """At once."""
    warps: int
    stages: int


_ALONE = {
    "qkv": Tiles(rows=8, columns=512, warps=4, stages=2),
    "out": Tiles(rows=8, columns=512, warps=4, stages=2),
    "up": Tiles(rows=8, columns=512, warps=4, stages=2),
    "down": Tiles(rows=8, columns=512, warps=4, stages=2),
    "head": Tiles(rows=8, columns=512, warps=4, stages=2),
}
_TOGETHER = {
    "qkv": Tiles(rows=16, columns=256, warps=4, stages=4),
    "out": Tiles(rows=16, columns=256, warps=4, stages=4),
    "up": Tiles(rows=16, columns=256, warps=4, stages=4),
    "down": Tiles(rows=16, columns=256, warps=4, stages=4),
    "head": Tiles(rows=16, columns=256, warps=4, stages=4),
}


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
        self, model: PreTrainedModel, cache: SlotCache, *, most_rows: int, tiles: dict[str, Tiles] | None = None
    ) -> None:
        """Lay the weights out anew, in place. The cache must be allocated.

        most_rows   of a step
        tiles       how projections are cut, by their names, where it is not to be as measured
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
        """The logits (B, V), float32."""
        x_BH = functional.embedding(ids_B1[:, 0], self._embedding_VH).float()
        parts = 1 if extent <= _LONG else _PARTS
        project = self._project if len(x_BH) <= _MOST_FUSED else self._project_many
        for index, layer in enumerate(self._layers):
            qkv_BN = project("qkv", x_BH, *layer.qkv, norm_K=layer.norm_H)
            attended_BN = self._attend(qkv_BN, index, layer, positions_B, rows_B, parts)
            project("out", attended_BN, *layer.out, add_to=x_BH)
            inner_BI = project("up", x_BH, *layer.up, norm_K=layer.mlp_norm_H, is_gated=True)
            project("down", inner_BI, *layer.down, add_to=x_BH)
        return project("head", x_BH, *self._head, norm_K=self._norm_H)

    def _project(
        self,
        name: str,
        x_BK: Tensor,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        *,
        norm_K: Tensor | None = None,
        is_gated: bool = False,
        add_to: Tensor | None = None,
    ) -> Tensor:
        num_rows, num_outputs = len(x_BK), len(weight_NK) // (2 if is_gated else 1)
        out_BN = add_to if add_to is not None else torch.empty(num_rows, num_outputs, device=x_BK.device)
        tiles = (self._tiles or (_ALONE if num_rows == 1 else _TOGETHER))[name]
        self._kernels.project[(-(-num_outputs // tiles.rows),)](
            x_BK,
            x_BK if norm_K is None else norm_K,
            weight_NK,
            x_BK if bias_N is None else bias_N,
            out_BN,
            x_BK.shape[1],
            num_outputs,
            self._eps,
            num_rows=num_rows,
            ROWS=1 if num_rows == 1 else 16,
            BLOCK_N=tiles.rows,
            BLOCK_K=tiles.columns,
            HAS_NORM=norm_K is not None,
            HAS_BIAS=bias_N is not None,
            IS_GATED=is_gated,
            ADDS=add_to is not None,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        return out_BN

    def _project_many(
        self,
        name: str,
        x_BK: Tensor,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        *,
        norm_K: Tensor | None = None,
        is_gated: bool = False,
        add_to: Tensor | None = None,
    ) -> Tensor:
        if norm_K is not None:
            x_BK = functional.rms_norm(x_BK, x_BK.shape[-1:], norm_K.float(), self._eps)
        y_BN = functional.linear(x_BK.to(weight_NK.dtype), weight_NK, bias_N)
        if is_gated:
            gate_BN, up_BN = y_BN.chunk(2, dim=-1)
            y_BN = functional.silu(gate_BN) * up_BN
        if add_to is not None:
            return add_to.add_(y_BN)
        return y_BN.float()

    def _attend(
        self, qkv_BN: Tensor, index: int, layer: _Layer, positions_B: Tensor, rows_B: Tensor, parts: int
    ) -> Tensor:
        num_rows, heads, group, width = len(qkv_BN), self._num_heads_kv, self._group, self._width
        out_BN = torch.empty(num_rows, heads * group * width, device=qkv_BN.device)
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
            num_warps=4,
            num_stages=3,
        )
        if parts > 1:
            self._kernels.merge[(num_rows * heads, group)](
                self._sums, self._most, self._weight, out_BN, G=group, D=width, PARTS=parts, num_warps=1
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
    weight_NK = torch.cat([module.weight.detach() for module in modules])
    biases = [module.bias for module in modules if module.bias is not None]
    bias_N = torch.cat(biases) if biases else None
    sizes = [module.out_features for module in modules]
    for module, part in zip(modules, torch.split(weight_NK, sizes), strict=True):
        module.weight = nn.Parameter(part, requires_grad=False)
    if bias_N is not None:
        for module, part in zip(modules, torch.split(bias_N, sizes), strict=True):
            module.bias = nn.Parameter(part, requires_grad=False)
    return weight_NK, bias_N

"""FusedForward: decode steps of a Llama-like model on CUDA, by kernels that read each weight once.

Rows     one by kernels of this project alone (triton_kernels.py): such a step takes as long as its weights take to read.
         Several by the library's matrix products, with the same attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from aifactory.engine.cache import SlotCache
from aifactory.engine.fused_layers import MOST_QUERIES, FusedLayer, FusedLayers

_LONG = 1024
"""Positions from which on a context is read in parts, side by side: one program a head no longer keeps up with the weights."""
_PARTS = 16
_LEAST_PART = 256
_BLOCK_T = 128
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


class FusedForward:
    """A `DecodeForward` over the layers of one model."""

    def __init__(
        self,
        layers: FusedLayers,
        cache: SlotCache,
        *,
        most_rows: int,
        tiles: Mapping[str, Tiles] = MEASURED,
    ) -> None:
        """The cache must be allocated.

        most_rows   of a step
        tiles       how projections are cut, by their names
        """
        self._of = layers
        self._kernels = layers.kernels
        self._cache = cache
        self._tiles = tiles
        heads = most_rows * layers.num_heads_kv * layers.group
        device = layers.norm_H.device
        self._sums = torch.empty(heads * _PARTS * layers.width, device=device)
        self._most, self._weight = (torch.empty(heads * _PARTS, device=device) for _ in range(2))

    def extent(self, longest: int) -> int:
        """Short or long: the kernels read as far as each row goes."""
        return min(_LONG if longest <= _LONG else self._cache.num_positions, self._cache.num_positions)

    def __call__(self, ids_B1: Tensor, positions_B: Tensor, rows_B: Tensor, extent: int) -> Tensor:
        """The logits (B, V), float32 of one row, of several in the weights' type."""
        x_BH = functional.embedding(ids_B1[:, 0], self._of.embedding_VH).float()
        places = positions_B, rows_B, 1 if extent <= _LONG else _PARTS
        return self._alone(x_BH, *places) if len(x_BH) == 1 else self._together(x_BH, *places)

    def _alone(self, x_1H: Tensor, positions_B: Tensor, rows_B: Tensor, parts: int) -> Tensor:
        """Each product by a kernel of this project, norm, gate and sum within."""
        for index, layer in enumerate(self._of.layers):
            qkv_1N = self._project("qkv", x_1H, *layer.qkv, norm_K=layer.norm_H)
            attended_1N = self._attend(qkv_1N, index, layer, positions_B, rows_B, parts)
            self._project("out", attended_1N, *layer.out, add_to=x_1H)
            inner_1I = self._project("up", x_1H, *layer.up, norm_K=layer.mlp_norm_H, is_gated=True)
            self._project("down", inner_1I, *layer.down, add_to=x_1H)
        return self._project("head", x_1H, *self._of.head, norm_K=self._of.norm_H)

    def _together(self, x_BH: Tensor, positions_B: Tensor, rows_B: Tensor, parts: int) -> Tensor:
        """Products by the library, which is at its best with several rows; what lies between them in one kernel each."""

        def attend(index: int, layer: FusedLayer, qkv_BN: Tensor) -> Tensor:
            return self._attend(qkv_BN, index, layer, positions_B, rows_B, parts)

        return self._of.logits(*self._of.through(x_BH, attend))

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
            self._of.eps,
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
        self, qkv_BN: Tensor, index: int, layer: FusedLayer, positions_B: Tensor, rows_B: Tensor, parts: int
    ) -> Tensor:
        num_rows, heads, group, width = len(qkv_BN), self._of.num_heads_kv, self._of.group, self._of.width
        out_BN = torch.empty(num_rows, heads * group * width, dtype=qkv_BN.dtype, device=qkv_BN.device)
        states = self._cache.slot_layers[index]
        gains = layer.gains or (qkv_BN, qkv_BN)
        self._kernels.attend[(num_rows, heads, parts)](
            qkv_BN,
            states.keys,
            states.values,
            self._cache.mask_ST,
            self._of.cos_TD,
            self._of.sin_TD,
            *gains,
            positions_B,
            rows_B,
            out_BN,
            self._sums,
            self._most,
            self._weight,
            self._cache.num_positions,
            self._of.scaling,
            self._of.eps,
            H=heads,
            G=group,
            D=width,
            QUERIES=MOST_QUERIES,
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

"""Packed: a Llama-like model's matrices laid out as the kernels read them, and its modules as views of the same memory.

    model ─pack_model─▶ PackedWeights (one array a role, over all layers) ◀─views─ PackedLinear, PackedEmbedding

Layout   a matrix of N rows and K columns is (P, K, PANEL): panels of PANEL rows, in which column stands beside column. What goes
         into one matrix, as queries, keys and values, begins a panel each; rows that are wanting in the last one are zero.
         Of bfloat16 it is (P, K / 2, PANEL, 2), two columns side by side as Intel's matrix unit wants them, K rounded up to DEPTH.
Weights  float32; int8, each row with a scale, largest magnitude at 127: the error of a weight is at most 1/254 of the largest in
         its row; bfloat16, by which vectors are multiplied that are rounded to it too, as torch's own are. Sums are in float32, and
         so are norms and biases, what is added up from layer to layer, and the cache but that of bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aifactory.engine.team import ThreadTeam
from aifactory.errors import ConfigError

WeightKind = Literal["float32", "bfloat16", "int8"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_MULTIPLE = 8
PANEL = 16
"""Rows of a panel; the kernels' own number, which is not to be had without loading them."""
DEPTH = 32
"""Columns that a tile of bfloat16 holds; likewise."""


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """One matrix, or the same one of every layer."""

    weight: Tensor
    """(panels, columns, PANEL) or (layers, panels, columns, PANEL), or by pairs of columns."""
    scale: Tensor
    """float32, (panels * PANEL,) or (layers, panels * PANEL); without elements unless the weights are int8."""
    bias: Tensor
    """Likewise; without elements where there is none."""

    def layer(self, index: int, begin: int, end: int) -> PackedMatrix:
        """A view of some panels of one layer's."""
        rows = slice(PANEL * begin, PANEL * end)
        return PackedMatrix(
            self.weight[index, begin:end],
            self.scale[index, rows] if self.scale.numel() else self.scale[index],
            self.bias[index, rows] if self.bias.numel() else self.bias[index],
        )

    def arrays(self) -> tuple[Any, Any, Any]:
        """Weight, scale and bias as NumPy's over the same memory; bfloat16 as int16, (..., K / 2, 2 * PANEL)."""
        is_paired = self.weight.dtype == torch.bfloat16
        weight = self.weight.flatten(-2).view(torch.int16) if is_paired else self.weight
        return weight.numpy(), self.scale.numpy(), self.bias.numpy()

    @property
    def num_bytes(self) -> int:
        """What a step reads of it."""
        return sum(part.numel() * part.element_size() for part in (self.weight, self.scale, self.bias))


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """All that a decode step reads, by role."""

    qkv: PackedMatrix
    out: PackedMatrix
    up: PackedMatrix
    """Gate above, up below."""
    down: PackedMatrix
    head: PackedMatrix
    norms: tuple[Tensor, ...]
    """Before attention and before the MLP (L, H), of queries and keys (L, D) or (L, 0), the last (H,)."""

    @property
    def num_bytes(self) -> int:
        """What a step at batch 1 reads, apart from the cache."""
        return sum(matrix.num_bytes for matrix in (self.qkv, self.out, self.up, self.down, self.head))


class PackedLinear(nn.Module):
    """`nn.Linear` over packed rows, computed by the kernels whatever the number of vectors."""

    def __init__(self, matrix: PackedMatrix, in_features: int, out_features: int, team: ThreadTeam) -> None:
        super().__init__()
        from aifactory.engine.products import product
        from aifactory.engine.worksharing import SYNC_SIZE

        self._product = product
        self._arrays = matrix.arrays()
        self._team = team
        self._sync = np.zeros(SYNC_SIZE, np.int64)
        self.out_features, self.in_features = out_features, in_features
        self._is_rounded = matrix.weight.dtype == torch.bfloat16
        self._num_padded = PANEL * matrix.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), float32."""
        rows = x.reshape(-1, self.in_features).contiguous()
        if self._is_rounded:
            rows = rows.bfloat16().float()
        y = torch.empty(len(rows), self._num_padded)
        if len(rows):
            self._team.run(self._product, self._sync, *self._arrays, rows.detach().numpy(), y.numpy())
        return y[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)


class PackedEmbedding(nn.Module):
    """`nn.Embedding` over packed rows."""

    def __init__(self, table: PackedMatrix, width: int) -> None:
        super().__init__()
        self._table = table
        self._width = width

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., hidden), float32."""
        rows = self._table.weight[ids // PANEL, :, ids % PANEL].flatten(ids.dim())[..., : self._width].float()
        return rows * self._table.scale[ids][..., None] if self._table.scale.numel() else rows


def why_not_packed(model: PreTrainedModel) -> str | None:
    """What keeps the kernels from computing this model; None if nothing does."""
    reason = why_not_llama(model)
    if reason is not None:
        return reason
    config = model.config
    head_dim = model.model.layers[0].self_attn.head_dim
    widths = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size, "head_dim": head_dim}
    for field, width in widths.items():
        if width % _MULTIPLE:
            return f"its {field} of {width} is no multiple of {_MULTIPLE}"
    if model.device.type != "cpu":
        return f"it is on {model.device}"
    return None


def why_not_llama(model: PreTrainedModel) -> str | None:
    """What of this model a block of Llama, with biases or norms of queries and keys, does not have; None if nothing."""
    name = type(model).__name__
    if name not in _ARCHITECTURES:
        return f"it is a {name}, none of {', '.join(_ARCHITECTURES)}"
    if model.config.hidden_act != "silu":
        return f"its MLP is gated by {model.config.hidden_act}, not by silu"
    rope = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        return f"its rotary positions ({rope}) depend on the length of the text"
    return None


@torch.no_grad()
def pack_model(model: PreTrainedModel, kind: WeightKind, team: ThreadTeam) -> PackedWeights:
    """Lay out the weights for the kernels, and put modules in their place that read the same memory.

    The model's own matrices are given up one by one, so that no more than one layer is there twice.
    Raises  ConfigError if the kernels can't compute this architecture (`why_not_packed`) or the kind is unknown.
    """
    reason = why_not_packed(model)
    if reason is not None:
        raise ConfigError(f"Expected a model for the compiled kernels, found that {reason}. Leave `weights` out.")
    if kind not in get_args(WeightKind):
        raise ConfigError(f"Expected weights of {', '.join(get_args(WeightKind))}, found {kind!r}.")
    layers = model.model.layers
    packed: dict[str, PackedMatrix] = {}
    for role, block, names in (
        ("qkv", "self_attn", ("q_proj", "k_proj", "v_proj")),
        ("out", "self_attn", ("o_proj",)),
        ("up", "mlp", ("gate_proj", "up_proj")),
        ("down", "mlp", ("down_proj",)),
    ):
        parts = [[getattr(getattr(layer, block), name) for name in names] for layer in layers]
        matrix = packed[role] = _for_layers(len(layers), parts[0], kind)
        for index, modules in enumerate(parts):
            begin = 0
            for name, module in zip(names, modules, strict=True):
                end = begin + num_panels(module.out_features)
                view = matrix.layer(index, begin, end)
                _fill(view, module.weight, module.bias)
                begin = end
                setattr(
                    getattr(layers[index], block),
                    name,
                    PackedLinear(view, module.in_features, module.out_features, team),
                )
    embedding, head = model.model.embed_tokens, model.lm_head
    tied = head.weight.data_ptr() == embedding.weight.data_ptr()
    packed["head"] = pack_matrix(head.weight, head.bias, kind)
    table = packed["head"] if tied else pack_matrix(embedding.weight, None, kind)
    model.model.embed_tokens = PackedEmbedding(table, embedding.embedding_dim)
    model.lm_head = PackedLinear(packed["head"], head.in_features, head.out_features, team)
    model.to(torch.float32)  # type: ignore[arg-type]

    def stacked(block: str | None, name: str) -> Tensor:
        modules = [getattr(layer if block is None else getattr(layer, block), name, None) for layer in layers]
        return torch.stack([module.weight if module is not None else torch.empty(0) for module in modules])

    norms = (
        stacked(None, "input_layernorm"),
        stacked(None, "post_attention_layernorm"),
        stacked("self_attn", "q_norm"),
        stacked("self_attn", "k_norm"),
        model.model.norm.weight.detach().clone(),
    )
    return PackedWeights(norms=norms, **packed)


def num_panels(num_rows: int) -> int:
    """Panels of so many rows."""
    return -(-num_rows // PANEL)


def pack_matrix(weight: Tensor, bias: Tensor | None, kind: WeightKind) -> PackedMatrix:
    """One matrix (N, K) and its bias (N,) by itself."""
    matrix = _zeros((), num_panels(len(weight)), weight.shape[1], kind, has_bias=bias is not None)
    _fill(matrix, weight, bias)
    return matrix


def _for_layers(num_layers: int, modules: list[nn.Linear], kind: WeightKind) -> PackedMatrix:
    total = sum(num_panels(module.out_features) for module in modules)
    has_bias = any(module.bias is not None for module in modules)
    return _zeros((num_layers,), total, modules[0].in_features, kind, has_bias=has_bias)


def _zeros(layers: tuple[int, ...], panels: int, num_columns: int, kind: WeightKind, *, has_bias: bool) -> PackedMatrix:
    columns = (-(-num_columns // DEPTH) * DEPTH // 2, PANEL, 2) if kind == "bfloat16" else (num_columns, PANEL)
    return PackedMatrix(
        torch.zeros(*layers, panels, *columns, dtype=_DTYPES[kind]),
        torch.ones(*layers, panels * PANEL if kind == "int8" else 0),
        torch.zeros(*layers, panels * PANEL if has_bias else 0),
    )


def _fill(matrix: PackedMatrix, weight: Tensor, bias: Tensor | None) -> None:
    num_rows = len(weight)
    if matrix.weight.dtype == torch.int8:
        largest = weight.float().abs().amax(dim=-1)
        scale = torch.where(largest > 0, largest / 127, 1.0)
        weight = (weight.float() / scale[:, None]).round()
        matrix.scale[:num_rows] = scale
    # In pieces of whole panels, so that a large matrix is not there three times.
    for panel in range(num_panels(num_rows)):
        rows = weight[PANEL * panel : PANEL * (panel + 1)]
        if matrix.weight.dtype == torch.bfloat16:
            # Two columns of a row are neighbours in it already.
            pairs = rows.reshape(len(rows), -1, 2).transpose(0, 1)
            matrix.weight[panel, : len(pairs), : len(rows)] = pairs
        else:
            matrix.weight[panel, :, : len(rows)] = rows.T
    if bias is not None:
        matrix.bias[:num_rows] = bias

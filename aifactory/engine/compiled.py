"""CompiledForward: the forward of a packed model, by the kernels, over the same cache as the model's own forward.

Law      a token's logits depend, to the bit, on its own text alone, and on where its prompt ended: not on the batch, nor on how the
         prompt was cut into chunks, nor on the number of threads. With tiles (`has_tiles`) a longer prompt has other bits than the
         same tokens that were generated one by one; whoever puts one in the other's place has last bits that differ. With weights of
         bfloat16 it never has: all is read and written alike.
Shapes   as in kernels.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from aifactory.engine.adapters import Adapter
from aifactory.engine.cache import SlotCache
from aifactory.engine.packed import PANEL, PackedWeights, num_panels
from aifactory.engine.prompts import PromptChunk
from aifactory.engine.team import ThreadTeam
from aifactory.errors import ConfigError

_Places = npt.NDArray[np.int64]


_ROLES = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)
"""The modules that each of the four matrices holds, from above."""


class _LowRanks:
    """The changes of all adapters, as the kernels read them. Replaced as a whole, so that a step sees one state."""

    def __init__(
        self, adapters: Sequence[Adapter], shapes: Sequence[tuple[int, ...]], num_rows: Mapping[str, int]
    ) -> None:
        """`shapes` are (layers, rows of all panels, columns) of each role's matrix; `num_rows` is how many rows a module has."""
        self._num_rows = num_rows
        self.index = {adapter.name: index for index, adapter in enumerate(adapters)}
        self.rank = -(-max([adapter.rank for adapter in adapters], default=0) // 8) * 8
        num, rank = len(adapters), self.rank
        self.a = tuple(
            np.zeros((num, layers, len(names) * rank, columns), np.float32)
            for (_, names), (layers, _, columns) in zip(_ROLES, shapes, strict=True)
        )
        self.b = tuple(np.zeros((num, layers, rows, rank), np.float32) for layers, rows, _ in shapes)
        for index, adapter in enumerate(adapters):
            unused = set(adapter.changes)
            for role, (block, names) in enumerate(_ROLES):
                for layer in range(shapes[role][0]):
                    unused -= self._fill(
                        role, index, layer, adapter, [f"model.layers.{layer}.{block}.{n}" for n in names]
                    )
            if unused:
                raise ConfigError(
                    f"Expected an adapter of projections of attention and MLP, found {min(unused)} in {adapter.name}. The "
                    "kernels don't know of it: set compiled to false."
                )

    def _fill(self, role: int, index: int, layer: int, adapter: Adapter, paths: Sequence[str]) -> set[str]:
        used, begin = set(), 0
        for part, path in enumerate(paths):
            change = adapter.changes.get(path)
            num_rows = self._num_rows[path.rsplit(".", 1)[1]]
            if change is not None:
                first, rank = part * self.rank, change.a.shape[0]
                self.a[role][index, layer, first : first + rank] = change.a.float().numpy()
                self.b[role][index, layer, begin : begin + num_rows, :rank] = change.b.float().numpy()
                used.add(path)
            begin += PANEL * num_panels(num_rows)
        return used


class CompiledForward:
    """Takes the place of `model(...)`: prompts, and steps in which each of the first rows gets one token. A `PromptReader`."""

    least_tiled = 48
    """A prompt of fewer tokens is read without tiles: with few vectors weights are cut longer than they are multiplied. Less than a
    block of `prefix.py`, so that no beginning that is kept was read without them."""

    def __init__(
        self, model: PreTrainedModel, weights: PackedWeights, cache: SlotCache, team: ThreadTeam, *, with_tiles: bool
    ) -> None:
        """Compile, or load what was compiled before; the cache must be allocated.

        with_tiles   whether prompts may be read by the processor's matrix unit, where it has one
        """
        from aifactory.engine.kernels import forward
        from aifactory.engine.matrix_unit import can_use_tiles
        from aifactory.engine.tiles import NUM_RIGHT, num_left, num_parts
        from aifactory.engine.vectors import MOST_VECTORS
        from aifactory.engine.worksharing import SYNC_SIZE

        self._forward = forward
        self._team = team
        self._embed = model.get_input_embeddings()
        self._cache = cache
        config, attention = model.config, model.model.layers[0].self_attn
        num_heads, num_heads_kv, width = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
        num_positions = cache.num_positions
        self._kind = np.empty(0, np.int16 if cache.kept_dtype == torch.bfloat16 else np.float32)
        self._sync = np.zeros(SYNC_SIZE, np.int64)
        self._address_L2 = np.array(cache.addresses(), np.int64)
        self._shape = (
            num_heads,
            num_heads_kv,
            width,
            num_positions,
            config.intermediate_size,
            bool(weights.norms[2].numel()),
            float(config.rms_norm_eps),
            float(attention.scaling),
        )
        roles = [matrix.arrays() for matrix in (weights.qkv, weights.out, weights.up, weights.down)]
        self._weights, self._scales, self._biases = (tuple(role[i] for role in roles) for i in range(3))
        self._norms = tuple(norm.numpy() for norm in weights.norms)
        self._head = weights.head.arrays()
        with torch.inference_mode():
            cos_1TD, sin_1TD = model.model.rotary_emb(torch.empty(1), torch.arange(num_positions)[None])
        self._rotary = tuple(np.ascontiguousarray(table[0].numpy()) for table in (cos_1TD, sin_1TD))
        # Layers, rows of all panels, columns.
        columns = (config.hidden_size, num_heads * width, config.hidden_size, config.intermediate_size)
        self._shapes = [
            (len(weight), PANEL * weight.shape[1], num) for weight, num in zip(self._weights, columns, strict=True)
        ]
        rows = [shape[1] for shape in self._shapes]
        self._widths = (config.hidden_size, rows[0], num_heads * width, rows[1], rows[2])
        self._num_rows = {
            name: getattr(getattr(model.model.layers[0], block), name).out_features
            for block, names in _ROLES
            for name in names
        }
        self._low_ranks = _LowRanks([], self._shapes, self._num_rows)
        no_rows = (_zeros(0, width) for width in (0, *self._widths))
        self._buffers = (*no_rows, _zeros(team.num_threads, MOST_VECTORS, num_positions))
        self._vocab_size = model.lm_head.out_features
        self._num_logits = PANEL * len(self._head[0])
        longest = max(columns for _, _, columns in self._shapes)
        uses_tiles, is_paired = with_tiles and can_use_tiles(), self._weights[0].dtype == np.int16
        self._always_tiled = uses_tiles and is_paired
        self.has_tiles = uses_tiles and not is_paired
        """Whether prompts may have other bits than what is generated."""
        self._num_left, self._num_parts = partial(num_left, length=longest), num_parts
        self._left = torch.empty(0, dtype=torch.int16).numpy()
        num_right = NUM_RIGHT if self.has_tiles else 0  # weights of bfloat16 are tiles
        self._rights = torch.empty(team.num_threads, num_right, dtype=torch.int16).numpy()
        self._sums = torch.empty(team.num_threads, 0).numpy()

    def set_adapters(self, adapters: Sequence[Adapter]) -> None:
        """Make these known. From any thread; a step that runs goes on with those that it knew.

        Raises  ConfigError if one changes what the kernels don't know of.
        """
        self._low_ranks = _LowRanks(adapters, self._shapes, self._num_rows)

    def step(self, ids_B1: Tensor, positions_B: Tensor, adapters: Sequence[str | None] = ()) -> Tensor:
        """Logits (B, V) after one more token of each of the first B rows, which is written into the cache."""
        rows_B = np.arange(len(ids_B1))
        return self._run(ids_B1[:, 0], rows_B, positions_B.numpy(), rows_B, adapters, is_tiled=self._always_tiled)

    def prefill(
        self, ids_1Q: Tensor, row: int, begin: int, *, length: int, last_only: bool, adapter: str | None = None
    ) -> Tensor:
        """Logits (1 or Q, V) after the last or after each of Q tokens, which are written into one row from `begin` on;
        `length` as `PromptChunk.length`."""
        num_tokens = ids_1Q.shape[1]
        last_O = np.arange(num_tokens - 1 if last_only else 0, num_tokens)
        places = np.arange(begin, begin + num_tokens)
        rows_Q, adapters = np.full(num_tokens, row), [adapter] * num_tokens
        return self._run(ids_1Q[0], rows_Q, places, last_O, adapters, is_tiled=self._is_tiled(length))

    def read(self, chunks: Sequence[PromptChunk]) -> Tensor:
        """As `PromptReader.read`."""
        lengths = [len(chunk.ids) for chunk in chunks]
        self._cache.touch(max(chunk.begin + length for chunk, length in zip(chunks, lengths, strict=True)))
        ids_Q = torch.tensor([token_id for chunk in chunks for token_id in chunk.ids])
        rows_Q = np.repeat([chunk.row for chunk in chunks], lengths)
        positions_Q = np.concatenate(
            [np.arange(chunk.begin, chunk.begin + length) for chunk, length in zip(chunks, lengths, strict=True)]
        )
        is_tiled = self._is_tiled(chunks[0].length)
        return self._run(ids_Q, rows_Q, positions_Q, np.cumsum(lengths) - 1, [None] * len(ids_Q), is_tiled=is_tiled)

    def tokens_together(self, length: int) -> int:
        """As `PromptReader.tokens_together`: by then a weight that is read, or cut, is used often enough."""
        return 256 if self._is_tiled(length) else 64

    def reads_alike(self, length: int, other: int) -> bool:
        """As `PromptReader.reads_alike`: both by tiles, or neither."""
        return self._is_tiled(length) == self._is_tiled(other)

    def _is_tiled(self, length: int) -> bool:
        # By the whole prompt: how it was cut into chunks must not tell.
        return self._always_tiled or (self.has_tiles and length >= self.least_tiled)

    def hidden(self, ids_1Q: Tensor, row: int, begin: int, *, length: int, adapter: str | None = None) -> Tensor:
        """As `prefill`, but the hidden states (Q, H) after the last norm."""
        num_tokens = ids_1Q.shape[1]
        each_Q = np.arange(num_tokens)
        rows_Q, adapters = np.full(num_tokens, row), [adapter] * num_tokens
        is_tiled = self._is_tiled(length)
        return self._run(ids_1Q[0], rows_Q, begin + each_Q, each_Q, adapters, is_tiled=is_tiled, with_logits=False)

    def _run(
        self,
        ids_B: Tensor,
        row_B: _Places,
        position_B: _Places,
        last_O: _Places,
        adapters: Sequence[str | None],
        *,
        is_tiled: bool = False,
        with_logits: bool = True,
    ) -> Tensor:
        x_BH = self._embed(ids_B).contiguous()
        low_ranks = self._low_ranks
        self._make_room(len(x_BH), 3 * low_ranks.rank)
        if is_tiled and len(self._left) < self._num_left(len(x_BH)):
            self._left = torch.empty(self._num_left(len(x_BH)), dtype=torch.int16).numpy()
            self._sums = torch.empty(len(self._rights), self._num_parts(len(x_BH))).numpy()
        adapter_B = np.full(len(x_BH), -1)
        for place, name in enumerate(adapters):
            if name is not None:
                adapter_B[place] = low_ranks.index[name]
        hidden_OH = torch.empty(len(last_O), x_BH.shape[1])
        logits_OV = torch.empty(len(last_O), self._num_logits if with_logits else 0)
        self._team.run(
            self._forward,
            self._sync,
            x_BH.numpy(),
            row_B,
            position_B,
            last_O,
            adapter_B,
            bool((adapter_B >= 0).any()),
            low_ranks.a,
            low_ranks.b,
            self._address_L2,
            self._kind,
            self._shape,
            self._weights,
            self._scales,
            self._biases,
            self._norms,
            self._head,
            self._rotary,
            self._buffers,
            is_tiled,
            self._left,
            self._rights,
            self._sums,
            hidden_OH.numpy(),
            logits_OV.numpy(),
        )
        return logits_OV[:, : self._vocab_size] if with_logits else hidden_OH

    def _make_room(self, num_tokens: int, num_low: int) -> None:
        if num_tokens > len(self._buffers[0]) or num_low > self._buffers[0].shape[1]:
            num_tokens = max(num_tokens, len(self._buffers[0]))
            arrays = (_zeros(num_tokens, width) for width in (num_low, *self._widths))
            self._buffers = (*arrays, self._buffers[-1])


def _zeros(*shape: int) -> npt.NDArray[np.float32]:
    """An array of float32 that begins where a cache line does, as torch's tensors do and NumPy's need not: of what lies across two
    lines the kernels read half as much a second."""
    return torch.zeros(*shape).numpy()

"""FusedPrompts: the next tokens of several prompts in one forward of a Llama-like model on CUDA.

    chunks of prompts, end to end ─▶ (product) ─▶ turn: keys and values to the cache ─▶ attend_prompts ─▶ (product) ─▶ ...

Why      a prompt of a hundred tokens keeps a GPU busy for a millisecond, and the model's own forward takes ten to launch. Chunks
         lie end to end, so none is padded, and each attends to its own row of the cache alone.
Graphs   few tokens are computed sooner than their kernels are launched one by one: up to the next of some sizes they are
         filled up with tokens that go to the cache's spare row, and each size is one CUDA graph.
Shapes   C chunks, Q tokens of all of them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from aifactory.engine.cache import SlotCache
from aifactory.engine.fused_layers import FusedLayer, FusedLayers, power_of_two
from aifactory.engine.graphs import Graphs
from aifactory.engine.prompts import PromptChunk

_MOST_TILE = 64 * 128
"""Queries of a program times their width, which its registers hold in fp32."""
_BLOCK_T = 64
_TURN_BLOCK = 16
_SIZES = (64, 128, 192, 256, 384, 512, 768, 1024)
"""Tokens of a graph."""
_MOST_CHUNKS = 16
"""Chunks of a graph, each of which may leave a block half empty."""


class FusedPrompts:
    """A `PromptReader` over the layers of one model."""

    def __init__(self, layers: FusedLayers, cache: SlotCache) -> None:
        """The cache must be allocated, and have a spare row."""
        self._of = layers
        self._cache = cache
        self._device = layers.norm_H.device
        # Queries that share keys and values are in the same program.
        self._queries = power_of_two(layers.group)
        self._block_q = max(1, min(64, _MOST_TILE // layers.width) // self._queries)
        self._graphs_of_device = Graphs(self._device)
        self._graphs: dict[int, tuple[Tensor, Tensor, Callable[[], None], Sequence[Tensor]]] = {}

    def tokens_together(self, length: int) -> int:
        """As `PromptReader.tokens_together`."""
        return 8192

    def reads_alike(self, length: int, other: int) -> bool:
        """As `PromptReader.reads_alike`: all are read alike."""
        return True

    def read(self, chunks: Sequence[PromptChunk]) -> Tensor:
        """As `PromptReader.read`."""
        lengths = [len(chunk.ids) for chunk in chunks]
        self._cache.touch(max(chunk.begin + length for chunk, length in zip(chunks, lengths, strict=True)))
        last_C = torch.from_numpy(np.cumsum(lengths) - 1).to(self._device)
        tokens_3Q, blocks_B4 = self._laid_out(chunks)
        size = next((size for size in _SIZES if size >= tokens_3Q.shape[1]), None)
        if size is None or len(chunks) > _MOST_CHUNKS:
            x_QH, y_QH = self._through(tokens_3Q.to(self._device), blocks_B4.to(self._device))
        else:
            x_QH, y_QH = self._replay(size, tokens_3Q, blocks_B4)
        return self._of.logits(x_QH[last_C], y_QH[last_C])

    def _replay(self, size: int, tokens_3Q: Tensor, blocks_B4: Tensor) -> Sequence[Tensor]:
        if size not in self._graphs:
            most_blocks = size // self._block_q + _MOST_CHUNKS
            tokens_3S = torch.zeros(3, size, dtype=torch.int64, device=self._device)
            blocks_S4 = torch.zeros(most_blocks, 4, dtype=torch.int32, device=self._device)
            # The tokens of one row, all at its beginning.
            tokens_3S[2] = self._cache.spare_row
            run, results = self._graphs_of_device.capture(
                lambda: self._through(tokens_3S, blocks_S4), inputs=(), idle=()
            )
            self._graphs[size] = tokens_3S, blocks_S4, run, results
        tokens_3S, blocks_S4, run, results = self._graphs[size]
        num_tokens, num_blocks = tokens_3Q.shape[1], len(blocks_B4)
        filled_3S = torch.zeros(tokens_3S.shape, dtype=torch.int64)
        filled_3S[2] = self._cache.spare_row
        filled_3S[:, :num_tokens] = tokens_3Q
        tokens_3S.copy_(filled_3S)
        # A block of no tokens reads and writes nothing.
        filled_S4 = torch.zeros(blocks_S4.shape, dtype=torch.int32)
        filled_S4[:num_blocks] = blocks_B4
        blocks_S4.copy_(filled_S4)
        run()
        return results

    def _through(self, tokens_3Q: Tensor, blocks_B4: Tensor) -> tuple[Tensor, Tensor]:
        ids_Q, positions_Q, rows_Q = tokens_3Q

        def attend(index: int, layer: FusedLayer, qkv_QN: Tensor) -> Tensor:
            return self._attend(qkv_QN, index, layer, positions_Q, rows_Q, blocks_B4)

        return self._of.through(functional.embedding(ids_Q, self._of.embedding_VH).float(), attend)

    def _laid_out(self, chunks: Sequence[PromptChunk]) -> tuple[Tensor, Tensor]:
        """Ids, positions and rows of all tokens; of each block of queries its first token, how many, their row and position."""
        ids, positions, rows, blocks = [], [], [], []
        first = 0
        for chunk in chunks:
            length = len(chunk.ids)
            ids.append(np.asarray(chunk.ids, dtype=np.int64))
            positions.append(np.arange(chunk.begin, chunk.begin + length))
            rows.append(np.full(length, chunk.row))
            blocks += [
                (first + at, min(self._block_q, length - at), chunk.row, chunk.begin + at)
                for at in range(0, length, self._block_q)
            ]
            first += length
        tokens_3Q = np.stack([np.concatenate(each) for each in (ids, positions, rows)])
        # The longest contexts first, so that none of them is left alone at the end.
        blocks_B4 = np.array(sorted(blocks, key=lambda block: -block[3]), dtype=np.int32)
        return torch.from_numpy(tokens_3Q), torch.from_numpy(blocks_B4)

    def _attend(
        self, qkv_QN: Tensor, index: int, layer: FusedLayer, positions_Q: Tensor, rows_Q: Tensor, blocks_B4: Tensor
    ) -> Tensor:
        of, num_tokens = self._of, len(qkv_QN)
        heads, group, width = of.num_heads_kv, of.group, of.width
        states = self._cache.slot_layers[index]
        q_QM = torch.empty(num_tokens, heads * group * width, dtype=qkv_QN.dtype, device=qkv_QN.device)
        out_QM = torch.empty_like(q_QM)
        of.kernels.turn[(-(-num_tokens // _TURN_BLOCK), (group + 2) * heads)](
            qkv_QN,
            states.keys,
            states.values,
            of.cos_TD,
            of.sin_TD,
            *(layer.gains or (qkv_QN, qkv_QN)),
            positions_Q,
            rows_Q,
            q_QM,
            num_tokens,
            self._cache.num_positions,
            of.eps,
            H=heads,
            G=group,
            D=width,
            BLOCK_Q=_TURN_BLOCK,
            HAS_GAINS=layer.gains is not None,
            num_warps=2,
        )
        of.kernels.attend_prompts[(len(blocks_B4), heads)](
            q_QM,
            states.keys,
            states.values,
            blocks_B4,
            out_QM,
            self._cache.num_positions,
            of.scaling,
            H=heads,
            G=group,
            D=width,
            QUERIES=self._queries,
            BLOCK_Q=self._block_q,
            BLOCK_T=_BLOCK_T,
            num_warps=4,
            num_stages=2,
        )
        return out_QM

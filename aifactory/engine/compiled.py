"""CompiledForward: the forward of a packed model, by the kernels, over the same cache as the model's own forward.

Law      a token's logits depend, to the bit, on its own text alone: not on the batch, nor on how the prompt was cut into chunks,
         nor on the number of threads.
Shapes   as in kernels.py.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from aifactory.engine.cache import SlotCache
from aifactory.engine.packed import PackedWeights
from aifactory.engine.team import ThreadTeam

_Places = npt.NDArray[np.int64]


class CompiledForward:
    """Takes the place of `model(...)`: prompts of one row, and steps in which each of the first rows gets one token."""

    def __init__(self, model: PreTrainedModel, weights: PackedWeights, cache: SlotCache, team: ThreadTeam) -> None:
        """Compile, or load what was compiled before; the cache must be allocated."""
        from aifactory.engine.kernels import LANES, forward

        self._forward = forward
        self._team = team
        self._embed = model.get_input_embeddings()
        self._cache = cache
        config, attention = model.config, model.model.layers[0].self_attn
        num_heads, num_heads_kv, width = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
        num_positions = cache.num_positions
        self._sync = np.zeros(16, np.int64)
        self._address_L2 = np.array(cache.addresses(), np.int64)
        self._shape = (
            num_heads,
            num_heads_kv,
            width,
            num_positions,
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
        self._widths = (
            config.hidden_size,
            (num_heads + 2 * num_heads_kv) * width,
            num_heads * width,
            config.hidden_size,
            2 * config.intermediate_size,
        )
        no_rows = (np.zeros((0, width), np.float32) for width in self._widths)
        self._buffers = (*no_rows, np.zeros((team.num_threads, num_positions + LANES), np.float32))
        self._vocab_size = len(self._head[0])

    def step(self, ids_B1: Tensor, positions_B: Tensor) -> Tensor:
        """Logits (B, V) after one more token of each of the first B rows, which is written into the cache."""
        rows_B = np.arange(len(ids_B1))
        return self._run(ids_B1[:, 0], rows_B, positions_B.numpy(), rows_B)

    def prefill(self, ids_1Q: Tensor, row: int, begin: int, *, last_only: bool) -> Tensor:
        """Logits (1 or Q, V) after the last or after each of Q tokens, which are written into one row from `begin` on."""
        num_tokens = ids_1Q.shape[1]
        last_O = np.arange(num_tokens - 1 if last_only else 0, num_tokens)
        return self._run(ids_1Q[0], np.full(num_tokens, row), np.arange(begin, begin + num_tokens), last_O)

    def _run(self, ids_B: Tensor, row_B: _Places, position_B: _Places, last_O: _Places) -> Tensor:
        x_BH = self._embed(ids_B).contiguous()
        self._make_room(len(x_BH))
        logits_OV = torch.empty(len(last_O), self._vocab_size)
        self._team.run(
            self._forward,
            self._sync,
            x_BH.numpy(),
            row_B,
            position_B,
            last_O,
            self._address_L2,
            self._shape,
            self._weights,
            self._scales,
            self._biases,
            self._norms,
            self._head,
            self._rotary,
            self._buffers,
            logits_OV.numpy(),
        )
        return logits_OV

    def _make_room(self, num_tokens: int) -> None:
        if num_tokens > len(self._buffers[0]):
            arrays = (np.zeros((num_tokens, width), np.float32) for width in self._widths)
            self._buffers = (*arrays, self._buffers[-1])

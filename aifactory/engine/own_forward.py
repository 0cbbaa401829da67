"""OwnForward: decode steps by a Hugging Face model's own forward, with the shapes that graphs need."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from aifactory.engine.cache import READ_MULTIPLE, SlotCache


class OwnForward:
    """A `DecodeForward` of any model that the cache can hold. It must be without adapters while it runs."""

    def __init__(self, model: PreTrainedModel, cache: SlotCache) -> None:
        self._model = model
        self._cache = cache

    def extent(self, longest: int) -> int:
        """The next power of two, so that a row of any length meets few of them; no more than the cache has."""
        return min(max(READ_MULTIPLE, 1 << (longest - 1).bit_length()), self._cache.num_positions)

    def __call__(self, ids_B1: Tensor, positions_B: Tensor, rows_B: Tensor, extent: int) -> Tensor:
        """The logits (B, V), in the model's type."""
        mask_B11L = self._cache.plan_decode(positions_B, longest=extent, rows_B=rows_B)
        output = self._model(
            input_ids=ids_B1,
            position_ids=positions_B[:, None],
            attention_mask=mask_B11L,
            past_key_values=self._cache,
            use_cache=True,
        )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

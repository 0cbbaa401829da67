"""PromptReader: what reads the prompts of several requests in one call, into their rows of the cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aifactory.engine.cache import SlotCache


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Tokens of one row's prompt, from position `begin` on. What stands before them is in the row."""

    ids: Sequence[int]
    row: int
    begin: int
    length: int
    """Tokens of the whole prompt, by which a reader may choose how it reads it; 0 of what was generated after it, which has to be
    read as if it were generated here."""


class PromptReader(Protocol):
    """Reads chunks of different rows."""

    def tokens_together(self, length: int) -> int:
        """So many tokens of prompts of this length in one call take no longer each than more would: whoever could still join
        begins a call of its own."""
        ...

    def reads_alike(self, length: int, other: int) -> bool:
        """Whether prompts of these lengths may be in one call."""
        ...

    def read(self, chunks: Sequence[PromptChunk]) -> Tensor:
        """Write the chunks' keys and values to their rows; the logits (C, V) after the last token of each."""
        ...


class OwnPrompts:
    """By a Hugging Face model's own forward, one chunk after the other. It must be without adapters meanwhile."""

    def __init__(self, model: PreTrainedModel, cache: SlotCache) -> None:
        self._model = model
        self._cache = cache
        self._last_only = last_only(model)

    def tokens_together(self, length: int) -> int:
        """As `PromptReader.tokens_together`."""
        return 1024

    def reads_alike(self, length: int, other: int) -> bool:
        """All are read one by one."""
        return True

    def read(self, chunks: Sequence[PromptChunk]) -> Tensor:
        """As `PromptReader.read`."""
        return torch.cat([self._read(chunk) for chunk in chunks])

    def _read(self, chunk: PromptChunk) -> Tensor:
        positions_1Q, mask_11QL = self._cache.plan_prefill(chunk.row, chunk.begin, chunk.begin + len(chunk.ids))
        output = self._model(
            input_ids=torch.tensor([list(chunk.ids)], device=self._model.device),
            position_ids=positions_1Q,
            attention_mask=mask_11QL,
            past_key_values=self._cache,
            use_cache=True,
            **self._last_only,
        )
        logits_1V: Tensor = output.logits[:, -1]
        return logits_1V


def last_only(model: PreTrainedModel) -> dict[str, int]:
    """What keeps a forward from computing more logits than the last, which the head of a small model is most of; where it can."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

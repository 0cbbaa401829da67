"""Parity: before an engine serves a model, its cached forward is compared with the model's plain one."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aifactory.engine.cache import SlotCache
from aifactory.errors import ParityError

_MAX_RELATIVE_ERROR = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Of the logits' norm; wrong positions or a wrong mask give 0.1 and more, the order of summation 1e-6 in fp32."""
_MAX_RELATIVE_ERROR_16_BIT = 0.1


def check_cached_forward(model: PreTrainedModel, cache: SlotCache, *, vocab_size: int, context_length: int) -> None:
    """Prefill two short rows in chunks, decode one token of both at once, compare with two plain forwards.

    Also allocates the cache, so that memory that isn't there is missed now and not at the first request.

    Raises  ParityError, if this architecture does with a cache what SlotCache doesn't know of.
    """
    device = model.device
    num_rows = min(2, cache.num_slots)
    lengths = [min(length, context_length - 1) for length in (6, 4)][:num_rows]
    rows = [
        [(7 * position + 3 * row + 1) % vocab_size for position in range(lengths[row] + 1)] for row in range(num_rows)
    ]
    for row, length in enumerate(lengths):
        for begin in range(0, length, 3):
            end = min(begin + 3, length)
            positions, mask = cache.plan_prefill(row, begin, end)
            ids = torch.tensor([rows[row][begin:end]], device=device)
            _logits(model, ids, position_ids=positions, attention_mask=mask, past_key_values=cache)
        cache.open_row(row, length)
    positions_B = torch.tensor(lengths, device=device)
    mask = cache.plan_decode(positions_B, longest=1 + max(lengths))
    last_ids = torch.tensor([[row_ids[-1]] for row_ids in rows], device=device)
    cached_BV = _logits(model, last_ids, position_ids=positions_B[:, None], attention_mask=mask, past_key_values=cache)
    limit = _MAX_RELATIVE_ERROR.get(cached_BV.dtype, _MAX_RELATIVE_ERROR_16_BIT)
    for row, row_ids in enumerate(rows):
        plain_V = _logits(model, torch.tensor([row_ids], device=device), use_cache=False)[0].double()
        error = float((cached_BV[row].double() - plain_V).norm() / plain_V.norm().clamp_min(1e-12))
        # Logits of a model that is broken already (nan) are for the evaluation to judge.
        if error > limit:
            raise ParityError(
                f"Expected the cached forward to give the logits of the plain one within {limit:g} of their norm, "
                f"found {error:.2g} for a {model.config.model_type} model. Serve this architecture with another engine."
            )


def _logits(model: PreTrainedModel, ids: Tensor, **options: object) -> Tensor:
    logits: Tensor = model(input_ids=ids, **{"use_cache": True, **options}).logits[:, -1]
    return logits

"""Parity: before an engine serves a model, its cached forward is compared with the model's plain one."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aifactory.engine.cache import SlotCache
from aifactory.engine.compiled import CompiledForward
from aifactory.engine.load import read_context_length
from aifactory.engine.packed import WeightKind
from aifactory.engine.prompts import PromptChunk, PromptReader
from aifactory.engine.steps import DecodeSteps
from aifactory.errors import ParityError

_MAX_RELATIVE_ERROR = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Of the logits' norm; wrong positions or a wrong mask give 0.1 and more, the order of summation 1e-6 in fp32."""
_MAX_RELATIVE_ERROR_16_BIT = 0.1
_MAX_PACKED_ERROR: dict[WeightKind, float] = {"float32": 1e-3, "bfloat16": 0.1, "int8": 0.3}
"""Of the logits' norm, against the weights as they were. Tiny models with wide weights have 1e-2 and 5e-2 of it."""


def plain_logits(model: PreTrainedModel, *, vocab_size: int, context_length: int) -> Tensor:
    """The logits (V,) after a short text, without a cache: what weights are compared by before and after packing."""
    ids = _texts(1, vocab_size, context_length)[0]
    return _logits(model, torch.tensor([ids], device=model.device), use_cache=False)[0].double()


def check_packed(model: PreTrainedModel, before_V: Tensor, kind: WeightKind, *, context_length: int) -> None:
    """Compare a packed model with what `plain_logits` gave before.

    Raises  ParityError.
    """
    after_V = plain_logits(model, vocab_size=len(before_V), context_length=context_length)
    error = float((after_V - before_V).norm() / before_V.norm().clamp_min(1e-12))
    if error > _MAX_PACKED_ERROR[kind]:
        raise ParityError(
            f"Expected weights as {kind} to give the logits of the model as it was within {_MAX_PACKED_ERROR[kind]:g} of "
            f"their norm, found {error:.2g}. Take weights of higher precision for this model."
        )


def in_bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with weights of 16 bits, in place.

    Raises  ParityError if its logits are not near those before.
    """
    context_length = read_context_length(model.config, None)
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    with torch.inference_mode():
        before_V = plain_logits(model, vocab_size=len(embedding), context_length=context_length)
        model = model.to(torch.bfloat16)  # type: ignore[arg-type]
        check_packed(model, before_V, "bfloat16", context_length=context_length)
    return model


def check_cached_forward(
    model: PreTrainedModel,
    cache: SlotCache,
    *,
    vocab_size: int,
    context_length: int,
    compiled: CompiledForward | None = None,
    steps: DecodeSteps | None = None,
    prompts: PromptReader | None = None,
    as_long: bool = False,
) -> None:
    """Prefill two short rows in chunks, decode one token of both at once, compare with two plain forwards.

    compiled   what computes in place of the model's own forward
    steps      what decodes in its place
    prompts    what reads prompts in its place, and here the last token too
    as_long    whether it is told that they are as long as can be
    Also allocates the cache, so that memory that isn't there is missed now and not at the first request.

    Raises  ParityError, if this architecture does with a cache what SlotCache doesn't know of.
    """
    device = model.device
    rows = _texts(min(2, cache.num_slots), vocab_size, context_length)
    lengths = [len(row_ids) - 1 for row_ids in rows]
    told_length = context_length if as_long else max(len(row_ids) for row_ids in rows)
    for row, length in enumerate(lengths):
        for begin in range(0, length, 3):
            end = min(begin + 3, length)
            positions, mask = cache.plan_prefill(row, begin, end)
            ids = torch.tensor([rows[row][begin:end]], device=device)
            if prompts is not None:
                prompts.read([PromptChunk(rows[row][begin:end], row, begin, told_length)])
            elif compiled is None:
                _logits(model, ids, position_ids=positions, attention_mask=mask, past_key_values=cache)
            else:
                compiled.prefill(ids, row, begin, length=told_length, last_only=True)
        cache.open_row(row, length)
    positions_B = torch.tensor(lengths, device=device)
    last_ids = torch.tensor([[row_ids[-1]] for row_ids in rows], device=device)
    if prompts is not None:
        chunks = [PromptChunk(ids[-1:], row, len(ids) - 1, told_length) for row, ids in enumerate(rows)]
        cached_BV = prompts.read(chunks)
    elif steps is not None:
        steps.feed(last_ids[:, 0], positions_B)
        cached_BV = steps.step(1 + max(lengths))
    elif compiled is not None:
        cached_BV = compiled.step(last_ids, positions_B)
    else:
        mask = cache.plan_decode(positions_B, longest=1 + max(lengths))
        options = {"position_ids": positions_B[:, None], "attention_mask": mask, "past_key_values": cache}
        cached_BV = _logits(model, last_ids, **options)
    # The kernels of a CPU give fp32 whatever the model's type was; what they round shows in the cache's.
    limit = _MAX_RELATIVE_ERROR.get(cache.kept_dtype, _MAX_RELATIVE_ERROR_16_BIT)
    for row, row_ids in enumerate(rows):
        plain_V = _logits(model, torch.tensor([row_ids], device=device), use_cache=False)[0].double()
        error = float((cached_BV[row].double() - plain_V).norm() / plain_V.norm().clamp_min(1e-12))
        # Logits of a model that is broken already (nan) are for the evaluation to judge.
        if error > limit:
            raise ParityError(
                f"Expected the cached forward to give the logits of the plain one within {limit:g} of their norm, "
                f"found {error:.2g} for a {model.config.model_type} model. Serve this architecture with another engine."
            )


def _texts(num_rows: int, vocab_size: int, context_length: int) -> list[list[int]]:
    lengths = [min(length, context_length) for length in (7, 5)][:num_rows]
    return [
        [(7 * position + 3 * row + 1) % vocab_size for position in range(length)] for row, length in enumerate(lengths)
    ]


def _logits(model: PreTrainedModel, ids: Tensor, **options: object) -> Tensor:
    logits: Tensor = model(input_ids=ids, **{"use_cache": True, **options}).logits[:, -1]
    return logits

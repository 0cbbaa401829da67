"""Limits: what an engine can never serve of a request, told when it is submitted. Knows no torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from aifactory.engine.protocol import GenerationRequest
from aifactory.errors import BadRequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one engine with one model."""

    context_length: int
    """Most tokens of a prompt and its answer together."""
    cache_tokens: int
    """Most tokens that the cache of keys and values holds."""
    vocab_size: int
    """Rows of the model's embedding: each token id is below it."""
    max_queued: int
    """Answers that may wait."""

    def check(self, request: GenerationRequest, adapters: Collection[str]) -> None:
        """Raises BadRequestError naming the field, if the request can never be served; `adapters` are the names known."""
        num_prompt = len(request.prompt_ids)
        max_tokens = request.num_tokens - num_prompt
        if num_prompt == 0:
            raise BadRequestError("Expected a prompt of at least one token, found none.", field="prompt_ids")
        for limit, what in (
            (self.context_length, f"the context of {self.context_length} tokens"),
            (self.cache_tokens, f"the {self.cache_tokens} tokens of the whole cache"),
        ):
            if num_prompt + max_tokens > limit:
                raise BadRequestError(
                    f"Expected prompt and max_tokens within {what}, found {num_prompt} + {max_tokens} = "
                    f"{num_prompt + max_tokens}. Shorten the prompt or lower max_tokens.",
                    # A prompt that leaves no room for a single token is itself at fault.
                    field="prompt_ids" if num_prompt >= limit else "max_tokens",
                )
        if request.adapter is not None and request.adapter not in adapters:
            raise BadRequestError(
                f"Expected an adapter of {', '.join(sorted(adapters)) or 'none'}, found {request.adapter!r}.",
                field="adapter",
            )
        if request.num_answers > self.max_queued:
            raise BadRequestError(
                f"Expected n of at most {self.max_queued}, the answers that may wait, found {request.sampling.n}.",
                field="n",
            )
        for field, ids in (
            ("logit_bias", request.sampling.logit_bias),
            ("stop_token_ids", request.sampling.stop_token_ids),
        ):
            if ids and max(ids) >= self.vocab_size:
                raise BadRequestError(
                    f"Expected token ids from 0 to {self.vocab_size - 1} in {field}, found {max(ids)}.", field=field
                )
        if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= self.vocab_size:
            raise BadRequestError(
                f"Expected token ids from 0 to {self.vocab_size - 1}, found {min(request.prompt_ids)} to "
                f"{max(request.prompt_ids)}.",
                field="prompt_ids",
            )
        unknown = next((each for ids in request.begun for each in ids if not 0 <= each < self.vocab_size), None)
        if unknown is not None:
            raise BadRequestError(
                f"Expected token ids from 0 to {self.vocab_size - 1} in begun, found {unknown}.", field="begun"
            )

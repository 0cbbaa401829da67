"""Token scores in the two forms that OpenAI's interface has for them.

completions   columns: tokens, token_logprobs, top_logprobs, text_offset
chat          an object a token: its text, bytes and log-probability, and the same of its alternatives
Law           one entry for each token of the answer, and of the prompt where it is echoed: also for those without text.
Text          a token that is no whole character is written `bytes:\\xe4`, as OpenAI does; a control token by its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from aifactory.engine.protocol import TokenScore
from aifactory.text.tokenizer import IncrementalDecoder, TextTokenizer

_LEAST = -9999.0
"""Stands for what has no probability: JSON knows no infinity."""


class CompletionScores:
    """The scores of one choice of a completion, as they come."""

    def __init__(self, tokenizer: TextTokenizer, *, echo: bool) -> None:
        self._tokenizer = tokenizer
        self._decoder = IncrementalDecoder(tokenizer, continues=not echo)
        self._offset = 0

    def pass_over(self, token_ids: Iterable[int]) -> None:
        """Begin after these tokens, whose columns were sent before."""
        for token_id in token_ids:
            self._offset += len(self._decoder.feed(token_id))

    def columns(self, scores: Sequence[TokenScore]) -> dict[str, Any]:
        """The next tokens. Offsets are characters of the choice's text, where a token begins."""
        offsets = []
        for score in scores:
            offsets.append(self._offset)
            self._offset += len(self._decoder.feed(score.token_id))
        name = self._tokenizer.name_of
        return {
            "tokens": [name(score.token_id) for score in scores],
            "token_logprobs": [_finite(score.logprob) for score in scores],
            "top_logprobs": [
                None if score.logprob is None else _by_name(name, [*score.top, (score.token_id, score.logprob)])
                for score in scores
            ],
            "text_offset": offsets,
        }


def chat_scores(tokenizer: TextTokenizer, scores: Iterable[TokenScore]) -> dict[str, Any]:
    """The next tokens of a chat's answer."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        # A control token stands for no bytes, which OpenAI writes as null.
        data = list(tokenizer.bytes_of(token_id)) or None
        return {"token": tokenizer.name_of(token_id), "logprob": _finite(logprob), "bytes": data}

    content = [
        entry(score.token_id, score.logprob) | {"top_logprobs": [entry(*each) for each in score.top]}
        for score in scores
    ]
    return {"content": content, "refusal": None}


def _by_name(name: Any, pairs: Iterable[tuple[int, float]]) -> dict[str, float | None]:
    # The most probable of those that share a name: two tokens may stand for the same text.
    found: dict[str, float | None] = {}
    for token_id, logprob in pairs:
        found.setdefault(name(token_id), _finite(logprob))
    return found


def _finite(logprob: float | None) -> float | None:
    return logprob if logprob is None or math.isfinite(logprob) else _LEAST

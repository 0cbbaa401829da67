"""Choice: logits of a step's rows -> a token for each, and its score where one is asked for.

    logits ─▶ edits.py ─▶ grammar.py ─▶ sampling.py ─▶ token
       └──────────────────────────────▶ logprobs.py ─▶ score
Shapes   B rows of a step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aifactory.engine.answer import Answer
from aifactory.engine.edits import LogitEdits
from aifactory.engine.logprobs import score_tokens
from aifactory.engine.protocol import TokenScore
from aifactory.engine.sampling import NOT_FINITE, Draws, SamplingBatch


class Choice:
    """What the rows of a step ask for; built when rows come or go, not in every step."""

    def __init__(
        self, answers: Sequence[Answer], draws: Sequence[Draws], *, vocab_size: int, device: torch.device | str
    ) -> None:
        samplings = [answer.request.sampling for answer in answers]
        self._edits = LogitEdits(
            samplings,
            [answer.request.prompt_ids for answer in answers],
            [answer.token_ids for answer in answers],
            vocab_size=vocab_size,
            device=device,
        )
        self._matchers = {row: answer.matcher for row, answer in enumerate(answers) if answer.matcher is not None}
        self._batch = SamplingBatch(samplings, draws, device=device)
        self._num_top = {row: s.logprobs for row, s in enumerate(samplings) if s.logprobs is not None}
        self.is_likeliest = not (self._num_top or self._matchers) and self._edits.is_empty and self._batch.is_greedy
        """Whether each row takes the token of its largest logit, and nobody asks for its score."""

    def choose(self, logits_BV: Tensor) -> tuple[Tensor, list[int], list[TokenScore | None]]:
        """The next tokens, (B,) int64 on the device and as a list, NOT_FINITE where a row has none; and their scores."""
        edited_BV = logits_BV if self._edits.is_empty else self._edits.apply(logits_BV)
        if self._matchers:
            edited_BV = self._mask(edited_BV)
        ids_B = self._batch.choose(edited_BV)
        self._edits.took(ids_B)
        # The one wait for the device in a step without scores.
        token_ids: list[int] = ids_B.tolist()
        scores: list[TokenScore | None] = [None] * len(token_ids)
        rows = [row for row in self._num_top if token_ids[row] != NOT_FINITE]
        if rows:
            found = score_tokens(
                logits_BV[rows], [token_ids[row] for row in rows], [self._num_top[row] for row in rows]
            )
            for row, score in zip(rows, found, strict=True):
                scores[row] = score
        return ids_B, token_ids, scores

    def _mask(self, logits_BV: Tensor) -> Tensor:
        masked_BV = logits_BV.clone()
        for row, matcher in self._matchers.items():
            masked_BV[row].masked_fill_(~matcher.allow().to(masked_BV.device), -torch.inf)
        return masked_BV

"""Edits: what a request asks of the logits themselves, before temperature: penalties and biases.

Order    repetition (of prompt and answer), then frequency and presence (of the answer), then bias.
Law      a row without edits keeps its bits, and an edited one depends on its own tokens only.
Source   repetition: Keskar et al. 2019, CTRL, arXiv:1909.05858, section 4.1, with negative logits multiplied, as everybody
         has it; frequency and presence: OpenAI API reference, "Frequency and presence penalties".
Shapes   B rows of a step, P rows with penalties, E biased (row, token) pairs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aifactory.engine.protocol import Sampling


class LogitEdits:
    """The edits of a step's rows, on the device; built when rows come or go, not in every step."""

    def __init__(
        self,
        samplings: Sequence[Sampling],
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        *,
        vocab_size: int,
        device: torch.device | str,
    ) -> None:
        """`answers` are the tokens that each row has so far; `took` tells of those that follow."""
        rows = [row for row, sampling in enumerate(samplings) if _is_penalised(sampling)]
        self._rows_P = torch.tensor(rows, dtype=torch.long, device=device)
        if rows:
            self._repetition_P1 = _column([samplings[row].repetition_penalty for row in rows], device)
            self._frequency_P1 = _column([samplings[row].frequency_penalty for row in rows], device)
            self._presence_P1 = _column([samplings[row].presence_penalty for row in rows], device)
            self._counts_PV = torch.stack([_counts(answers[row], vocab_size) for row in rows]).to(device)
            in_prompt_PV = torch.stack([_counts(prompts[row], vocab_size) for row in rows]).to(device)
            self._seen_PV = (in_prompt_PV + self._counts_PV) > 0
            self._each_P = torch.arange(len(rows), device=device)
        biases = [
            (row, token_id, bias)
            for row, sampling in enumerate(samplings)
            for token_id, bias in sampling.logit_bias.items()
        ]
        self._bias_at = tuple(torch.tensor([bias[axis] for bias in biases], device=device) for axis in (0, 1))
        self._bias_E = torch.tensor([bias for _, _, bias in biases], device=device)
        self.is_empty = not rows and not biases

    def apply(self, logits_BV: Tensor) -> Tensor:
        """The edited logits, fp32; what is given stays as it is."""
        edited_BV = logits_BV.float().clone()
        if len(self._rows_P):
            logits_PV = edited_BV[self._rows_P]
            repeated_PV = torch.where(logits_PV < 0, logits_PV * self._repetition_P1, logits_PV / self._repetition_P1)
            logits_PV = torch.where(self._seen_PV, repeated_PV, logits_PV)
            logits_PV -= self._counts_PV * self._frequency_P1
            logits_PV -= (self._counts_PV > 0) * self._presence_P1
            edited_BV[self._rows_P] = logits_PV
        if len(self._bias_E):
            edited_BV[self._bias_at] += self._bias_E
        return edited_BV

    def took(self, ids_B: Tensor) -> None:
        """Count the tokens that the rows were given."""
        if len(self._rows_P):
            # A row without a token (NOT_FINITE) ends now; what is counted for it is read no more.
            ids_P = ids_B[self._rows_P].clamp(min=0)
            self._counts_PV[self._each_P, ids_P] += 1
            self._seen_PV[self._each_P, ids_P] = True


def _is_penalised(sampling: Sampling) -> bool:
    return (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) != (1.0, 0.0, 0.0)


def _counts(ids: Sequence[int], vocab_size: int) -> Tensor:
    return torch.bincount(torch.tensor(list(ids), dtype=torch.long), minlength=vocab_size).float()


def _column(values: Sequence[float], device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

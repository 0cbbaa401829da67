"""Logprobs: what a model's own distribution says of tokens that were chosen or given.

They are taken from the raw logits in fp32, so they don't depend on temperature, penalties, biases or grammars.
Shapes   N places, V vocabulary, K alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aifactory.engine.protocol import MAX_LOGPROBS, TokenScore


def score_tokens(logits_NV: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenScore]:
    """The score of each token under the logits of its place, with `num_top` alternatives each."""
    log_probs_NV = logits_NV.float().log_softmax(dim=-1)
    ids_N1 = torch.tensor(token_ids, device=logits_NV.device)[:, None]
    chosen_N = log_probs_NV.gather(1, ids_N1)[:, 0].tolist()
    if any(num_top):
        # Always as many, whoever asks for how many, so that equals fall the same way whatever is in the batch.
        top = log_probs_NV.topk(min(MAX_LOGPROBS, log_probs_NV.shape[-1]), dim=-1)
        alternatives = [
            tuple(zip(ids[:count], values[:count], strict=True))
            for ids, values, count in zip(top.indices.tolist(), top.values.tolist(), num_top, strict=True)
        ]
    else:
        alternatives = [()] * len(chosen_N)
    return [
        TokenScore(token_id=token_id, logprob=logprob, top=top)
        for token_id, logprob, top in zip(token_ids, chosen_N, alternatives, strict=True)
    ]

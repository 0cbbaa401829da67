"""Golden answers: what the trainer's own model says to a few prompts, kept with the model it exported.

Whoever serves the folder says the same to the same prompts, or does not serve it: tokens equal one by one, and
log-probabilities within a stated tolerance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from aifactory.errors import ParityError
from aifactory.text.documents import prompt_tokens
from aifactory.text.tokenizer import TextTokenizer

GOLDEN_NAME = "golden.json"
_PROMPTS = (
    "",
    "def main():\n    ",
    "The quick brown fox jumps over the lazy dog. ",
    "naïve café, Größe, 你好, 🙂, \t\r\n  tabs\tand   spaces",
    "<|endoftext|> is text here, not a control token",
)
_NUM_ALTERNATIVES = 20


@torch.inference_mode()
def golden_answers(model: PreTrainedModel, tokenizer: TextTokenizer, *, extra_prompts: Sequence[str] = ()) -> bytes:
    """Token ids of each prompt and the likeliest next tokens after it, in fp32, as JSON."""
    answers = []
    for prompt in (*_PROMPTS, *extra_prompts):
        ids = prompt_tokens(tokenizer, prompt)
        log_probs_V = _next_log_probs(model, ids)
        top = log_probs_V.topk(min(_NUM_ALTERNATIVES, len(log_probs_V)))
        answers.append(
            {"prompt": prompt, "ids": ids, "next_ids": top.indices.tolist(), "log_probs": top.values.tolist()}
        )
    return json.dumps({"answers": answers}, indent=1).encode()


@torch.inference_mode()
def check_golden_answers(folder: Path, model: PreTrainedModel, tokenizer: TextTokenizer, *, tolerance: float) -> float:
    """The largest difference of a log-probability, nats.

    Raises  ParityError if a token differs or the difference is above `tolerance`.
    """
    golden: dict[str, Any] = json.loads((folder / GOLDEN_NAME).read_bytes())
    largest = torch.zeros(())
    for answer in golden["answers"]:
        ids = prompt_tokens(tokenizer, answer["prompt"])
        if ids != answer["ids"]:
            raise ParityError(
                f"Expected the tokens {answer['ids'][:20]} for {answer['prompt']!r}, found {ids[:20]}, in {folder}. The "
                "tokenizer is not the one that the model was trained with; train it again."
            )
        log_probs_V = _next_log_probs(model, ids)
        found = log_probs_V[torch.tensor(answer["next_ids"], device=log_probs_V.device)].cpu()
        # Unlike Python's `max`, this keeps a difference that is not a number.
        largest = torch.maximum(largest, (found - torch.tensor(answer["log_probs"])).abs().max())
    if not largest <= tolerance:
        raise ParityError(
            f"Expected the trainer's log-probabilities within {tolerance:g} nats, found a difference of "
            f"{float(largest):.3g}, in {folder}. The weights were changed or are computed in another precision; train or "
            "export them again."
        )
    return float(largest)


def _next_log_probs(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    ids_1T = torch.tensor([list(ids)], device=model.device)
    logits_V: torch.Tensor = model(input_ids=ids_1T, use_cache=False).logits[0, -1]
    return logits_V.float().log_softmax(-1)

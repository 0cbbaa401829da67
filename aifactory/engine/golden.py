"""Golden answers: what the trainer's own model says to a few prompts, kept with the model it exported.

Whoever serves the folder says the same to the same prompts, or does not serve it: tokens equal one by one, and
log-probabilities within a stated tolerance.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from aifactory.engine.protocol import Delta, Engine, GenerationRequest, Sampling
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


def check_golden_engine(folder: Path, engine: Engine, tokenizer: TextTokenizer, *, tolerance: float) -> float:
    """The largest difference of a log-probability, nats, between the trainer's model and an engine that holds its own.

    Raises  ParityError if a token differs or the difference is above `tolerance`.
    """
    largest = _largest_gap(folder, engine, tokenizer, adapter=None, culprit="The tokenizer is not the model's own")
    if not largest <= tolerance:
        raise ParityError(
            f"Expected the trainer's log-probabilities within {tolerance:g} nats, found a difference of {largest:.3g}, in "
            f"{folder}. The weights were changed or the engine computes them in another precision."
        )
    return largest


def check_golden_adapter(
    folder: Path, engine: Engine, tokenizer: TextTokenizer, *, adapter: str, tolerance: float
) -> float:
    """The largest difference of a log-probability, nats, between the model of `folder`, into which an adapter was merged,
    and the engine's model with that adapter beside it.

    Raises  ParityError if a token differs or the difference is above `tolerance`: the adapter belongs to other weights.
    """
    culprit = "The adapter was trained with another tokenizer"
    largest = _largest_gap(folder, engine, tokenizer, adapter=adapter, culprit=culprit)
    if not largest <= tolerance:
        raise ParityError(
            f"Expected the log-probabilities of the model that was trained with the adapter within {tolerance:g} nats, "
            f"found a difference of {largest:.3g}. The adapter belongs to other weights."
        )
    return largest


def _largest_gap(folder: Path, engine: Engine, tokenizer: TextTokenizer, *, adapter: str | None, culprit: str) -> float:
    golden: dict[str, Any] = json.loads((folder / GOLDEN_NAME).read_bytes())
    largest = 0.0
    for number, answer in enumerate(golden["answers"]):
        ids = prompt_tokens(tokenizer, answer["prompt"])
        if ids != answer["ids"]:
            raise ParityError(
                f"Expected the tokens {answer['ids'][:20]} for {answer['prompt']!r}, found {ids[:20]}. {culprit}."
            )
        found = _likeliest(engine, f"golden-{adapter}-{number}", ids, adapter, len(answer["next_ids"]))
        # What is not among the likeliest is less likely than all of them.
        least = min(found.values())
        for token_id, expected in zip(answer["next_ids"], answer["log_probs"], strict=True):
            gap = abs(expected - found[token_id]) if token_id in found else max(0.0, expected - least)
            # Unlike `max`, this keeps a difference that is not a number.
            largest = gap if gap > largest or math.isnan(gap) else largest
    return largest


def _likeliest(
    engine: Engine, request_id: str, ids: Sequence[int], adapter: str | None, number: int
) -> dict[int, float]:
    """So many of the likeliest next tokens by the engine, with their log-probabilities."""
    answered: Future[list[Delta]] = Future()
    deltas: list[Delta] = []

    def take(delta: Delta) -> None:
        deltas.append(delta)
        if delta.finish_reason is not None:
            answered.set_result(deltas)

    sampling = Sampling(max_tokens=1, temperature=0.0, logprobs=number)
    engine.submit(GenerationRequest(id=request_id, prompt_ids=tuple(ids), sampling=sampling, adapter=adapter), take)
    scores = [score for delta in answered.result() for score in delta.scores]
    if not scores:
        raise ParityError(f"Expected an answer to a golden prompt, found: {deltas[-1].error or 'none'}.")
    return dict(scores[0].top)


def _next_log_probs(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    ids_1T = torch.tensor([list(ids)], device=model.device)
    logits_V: torch.Tensor = model(input_ids=ids_1T, use_cache=False).logits[0, -1]
    return logits_V.float().log_softmax(-1)

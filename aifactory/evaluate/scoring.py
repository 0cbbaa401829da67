"""Scoring: the bits that a model needs for an answer, given its prompt, and whether it would give just that. Pure torch.

Units    bits; a byte of the answer is a byte of its UTF-8.
Legend   B answers, T tokens of the longest, V vocabulary.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from aifactory.engine.load import read_context_length
from aifactory.errors import BadRequestError
from aifactory.text.documents import chat_prompt_tokens, prompt_tokens
from aifactory.text.tasks import Task
from aifactory.text.tokenizer import TextTokenizer

_BATCH_TOKENS = 8192
_BATCH_LOGITS = 2**26
"""256 MB in fp32: a large vocabulary makes smaller batches."""
_ENCODE_TEXTS = 1000


@dataclass(frozen=True, slots=True)
class _Window:
    """A stretch of token ids of which those from `first` on are scored."""

    task: int
    ids: list[int]
    first: int


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """What a model makes of one answer."""

    bits: float
    """That it needs for the answer after its prompt, without the end token."""
    is_exact: bool
    """Whether it writes this answer and ends, where it always takes the likeliest token. An empty answer never is."""


def answer_bits(
    model: PreTrainedModel, tokenizer: TextTokenizer, tasks: Sequence[Task], *, fallback: str = "none"
) -> list[float]:
    """The bits of each answer, as `answer_scores` finds them."""
    return [score.bits for score in answer_scores(model, tokenizer, tasks, fallback=fallback)]


@torch.inference_mode()
def answer_scores(
    model: PreTrainedModel, tokenizer: TextTokenizer, tasks: Sequence[Task], *, fallback: str = "none"
) -> list[AnswerScore]:
    """What the model makes of each answer after its prompt.

    A chat is asked in the tokens of the tokenizer's template, or else of that which `fallback` names, as it is trained and
    served; one that the template refuses is asked as the plain text of its turns.

    An answer that does not fit the model's context is scored in windows that overlap by half of it.
    Nothing is generated: an answer is what greedy decoding writes where each of its tokens, and then the end, is the likeliest
    after those before it.
    """
    context = read_context_length(model.config)
    windows = [
        window
        for index, task in enumerate(tasks)
        for window in _windows(index, _asked(tokenizer, task, fallback), tokenizer.encode(task.answer), context)
    ]
    bits = [0.0] * len(tasks)
    likeliest = [bool(task.answer) for task in tasks]
    last = {window.task: window for window in windows}
    for batch in _batches(windows, min(_BATCH_TOKENS, _BATCH_LOGITS // tokenizer.vocab_size)):
        longest = max(len(window.ids) for window in batch)
        # Padding stands on the right, where no token that is scored can see it.
        ids_BT = torch.full((len(batch), longest), tokenizer.eos_id, dtype=torch.long)
        for row, window in enumerate(batch):
            ids_BT[row, : len(window.ids)] = torch.tensor(window.ids)
        ids_BT = ids_BT.to(model.device)
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        nats_BT = functional.cross_entropy(
            logits_BTV[:, :-1].float().flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none"
        ).view(len(batch), longest - 1)
        best_BT = logits_BTV.argmax(-1).cpu()
        for row, window in enumerate(batch):
            wanted = window.ids[window.first :]
            if last[window.task] is window:
                wanted = [*wanted, tokenizer.eos_id]
            found = best_BT[row, window.first - 1 : window.first - 1 + len(wanted)].tolist()
            likeliest[window.task] &= found == wanted
            scored = nats_BT[row, window.first - 1 : len(window.ids) - 1]
            bits[window.task] += float(scored.double().sum()) / math.log(2)
    return [AnswerScore(each, is_exact) for each, is_exact in zip(bits, likeliest, strict=True)]


def _asked(tokenizer: TextTokenizer, task: Task, fallback: str) -> list[int]:
    if task.messages:
        try:
            return chat_prompt_tokens(tokenizer, json.loads(task.messages), fallback=fallback)
        except BadRequestError:
            pass  # the row is sound, and every model that is compared has the same text to go by
    return prompt_tokens(tokenizer, task.asked)


def deflate_bits(task: Task) -> float:
    """The bits of the answer by gzip's algorithm (DEFLATE, level 9) that has read the prompt.

    Source   RFC 1951; a raw stream, so that no header is counted.
    """
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=task.asked.encode()[-32768:])
    return 8.0 * len(packer.compress(task.answer.encode()) + packer.flush())


class Unigram:
    """A model that knows how frequent each token is, and nothing else."""

    def __init__(self, tokenizer: TextTokenizer, texts: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        self._counts: Counter[int] = Counter()
        remaining = iter(texts)
        while some := list(islice(remaining, _ENCODE_TEXTS)):
            self._counts.update(chain.from_iterable(tokenizer.encode_batch(some)))
        # One more of each token than was seen: none is impossible.
        self._total = sum(self._counts.values()) + tokenizer.vocab_size

    def bits(self, task: Task) -> float:
        """The bits of the answer; the prompt tells it nothing."""
        return sum(math.log2(self._total / (self._counts[token] + 1)) for token in self._tokenizer.encode(task.answer))


def _windows(task: int, prompt: list[int], answer: list[int], context: int) -> list[_Window]:
    ids = prompt + answer
    if len(ids) <= context:
        return [_Window(task, ids, len(prompt))] if answer else []
    windows = []
    scored = len(prompt)
    while scored < len(ids):
        start = max(0, scored - context // 2)
        end = min(len(ids), start + context)
        windows.append(_Window(task, ids[start:end], scored - start))
        scored = end
    return windows


def _batches(windows: Sequence[_Window], most_tokens: int) -> Iterable[list[_Window]]:
    """Windows of like length together, at most so many tokens with padding, or one window."""
    batch: list[_Window] = []
    for window in sorted(windows, key=lambda w: (-len(w.ids), w.task, w.first)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > most_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch

"""Scores: the log-probabilities that a model gives to tokens that are known already. Pure torch.

Units    nats, computed in the model's precision and taken from fp32 logits.
Law      What a row gets depends on the row and the model alone, to the bit. Kernels choose the order of their sums by the
         shape of what they are given and by the number of threads, so rows never share a forward, none is padded to the
         length of another, and each is computed on one thread; the processor is filled by rows beside one another
         (`each_alone`). Another device or instruction set may still round otherwise.
Legend   T tokens of a stretch, C continuations, L tokens of the longest of them, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aifactory.engine.load import read_context_length
from aifactory.errors import ConfigError

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_LOGITS = 2**26
"""256 MB in fp32: with a large vocabulary a text is read in more windows."""
_LEAST_WINDOW = 64


def each_alone(function: Callable[[Item], Result], items: Sequence[Item], *, device: torch.device) -> list[Result]:
    """`function` of each item, in their order, each on one thread; on a CPU as many at once as torch has threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if device.type != "cpu" or num_threads == 1 or len(items) < 2:
            return [function(item) for item in items]
        # New threads take over the number that is set now.
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(num_threads)


@torch.inference_mode()
def sum_log_probs(model: PreTrainedModel, ids: Sequence[int], *, first: int) -> float:
    """The log-probability of the tokens from `first` (at least 1) on, each after those before it; nats.

    What does not fit the model's context, or gives too many logits at once, is read in windows that overlap by half.
    """
    total = 0.0
    for begin, scored, end in _windows(len(ids), first, _window_of(model)):
        ids_1T = torch.tensor([list(ids[begin:end])], device=model.device)
        logits_TV: Tensor = model(input_ids=ids_1T, use_cache=False).logits[0]
        log_probs_T = _log_probs(logits_TV[scored - begin - 1 : -1], ids_1T[0, scored - begin :])
        total += float(log_probs_T.double().sum())
    return total


@torch.inference_mode()
def continuation_log_probs(
    model: PreTrainedModel, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[float]:
    """The log-probability of each continuation (none is empty) after the prompt, which is read once; nats.

    Raises  ConfigError for a model that keeps no keys and values of what it has read.
    """
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    ids_1T = torch.tensor([list(prompt_ids)], device=model.device)
    read = model(input_ids=ids_1T, use_cache=True, **last_only)
    next_V = read.logits[0, -1].float().log_softmax(-1)
    found = [float(next_V[ids[0]]) for ids in continuations]
    longest = max(map(len, continuations))
    if longest == 1:
        return found
    cache = getattr(read, "past_key_values", None)
    if cache is None:
        raise ConfigError(
            f"Expected a model that keeps keys and values, found a {model.config.model_type} model that keeps none. Take "
            "another model, or labels of one token each."
        )
    cache.batch_repeat_interleave(len(continuations))
    # Padding stands on the right, where no token that counts sees it, and depends on the continuations alone.
    ids_CL = torch.zeros((len(continuations), longest), dtype=torch.long)
    for row, ids in enumerate(continuations):
        ids_CL[row, : len(ids)] = torch.tensor(list(ids))
    ids_CL = ids_CL.to(model.device)
    logits_CLV: Tensor = model(input_ids=ids_CL[:, :-1], past_key_values=cache, use_cache=True).logits
    log_probs_CL = _log_probs(logits_CLV, ids_CL[:, 1:]).double()
    return [
        start + float(log_probs_CL[row, : len(ids) - 1].sum())
        for row, (start, ids) in enumerate(zip(found, continuations, strict=True))
    ]


def _log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """Of each id under the logits (..., V) that stand at its place."""
    return logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def _window_of(model: PreTrainedModel) -> int:
    """Most tokens of one forward: what the model can read, within the bound on logits."""
    vocab_size = int(model.config.get_text_config(decoder=True).vocab_size)
    return min(read_context_length(model.config), max(_LEAST_WINDOW, _MOST_LOGITS // vocab_size))


def _windows(num_ids: int, first: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Begin, first scored token and end of each window; together they score [first, num_ids) once.

    Invariant  a scored token has at least half a window before it, or all that there is.
    """
    scored = first
    while scored < num_ids:
        begin = 0 if num_ids <= length else max(0, scored - length // 2)
        end = min(num_ids, begin + length)
        yield begin, scored, end
        scored = end

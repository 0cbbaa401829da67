"""Model scores: what a model says of rows, as a label or as bits per byte. Torch is imported where a model is asked.

In       a block of rows, and which model (`StepModel`: resolved by whoever plans the work, fetched by whoever does it)
Out      labels with their probability, or verdicts with bits per byte
Law      a row's score depends on the row and the model alone, to the bit, whatever is in its block (see `engine.scores`): on
         CPUs of one kind. On CUDA, where there is a device, sums round otherwise than on a CPU.
Raises   ConfigError, UnsafeModelError, StorageError.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aifactory.config import LabelByModelStep, ModelQualityStep
from aifactory.errors import ConfigError, StorageError
from aifactory.ingest.columns import Verdicts
from aifactory.records.storage import Storage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from aifactory.text.tokenizer import TextTokenizer

_NO_NUMBER = 1e9
"""Bits per byte of a text for which the model gives no number: it can't be more surprised."""
_FIELD = re.compile(r"\{(text|prompt)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Files of one directory below a storage root."""

    storage: Storage
    folder: tuple[str, ...]
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepModel:
    """The model that a step asks: which one it is, and where its files are."""

    digest: str
    """Of its content; bears identity."""
    files: Stored | Path
    """In the storage root, or a folder on a disk that all workers share."""

    def fetch(self) -> Path:
        """A local folder in Hugging Face form. Raises StorageError."""
        if isinstance(self.files, Path):
            if not self.files.is_dir():
                raise StorageError(
                    f"expected the model of a step at {self.files} on every machine, found no such folder; put it on a disk "
                    "that all workers share, or name a release of the registry."
                )
            return self.files
        stored = self.files
        return stored.storage.fetch(list(stored.names), *stored.folder, version=self.digest)


def model_labels(
    table: pa.Table, step: LabelByModelStep, model: StepModel
) -> tuple[list[str], npt.NDArray[np.float64]]:
    """The label of each of N rows, "" below `min_confidence`, and the probability of the likeliest one."""
    share_NL = label_probabilities(table, step, model)
    best_N = share_NL.argmax(axis=1)  # the first of equal ones
    confidence_N = share_NL[np.arange(len(share_NL)), best_N]
    labels = [
        step.labels[best] if confidence >= step.min_confidence else ""
        for best, confidence in zip(best_N.tolist(), confidence_N.tolist(), strict=True)
    ]
    return labels, confidence_N


def label_probabilities(table: pa.Table, step: LabelByModelStep, model: StepModel) -> npt.NDArray[np.float64]:
    """N rows x L labels: the probability of each label's continuation among those of all labels; rows add up to 1.

    Raises   ConfigError if the prompt without any text does not fit the model's context.
    """
    from aifactory.engine.load import read_context_length
    from aifactory.engine.scores import continuation_log_probs, each_alone

    if not table.num_rows:
        return np.zeros((0, len(step.labels)))
    loaded, tokenizer = _loaded(model)
    continuations = [_continuation(tokenizer, step.continuation.replace("{label}", label)) for label in step.labels]
    lengths = np.array([len(ids) for ids in continuations], np.float64)
    room = read_context_length(loaded.config) - max(map(len, continuations))
    fields = sorted(set(_FIELD.findall(step.prompt)))
    if len(_prompt_ids(tokenizer, step.prompt, dict.fromkeys(fields, ""), room)) > room:
        raise ConfigError(
            f"expected a prompt of label_by_model that leaves room for text within the model's context of "
            f"{read_context_length(loaded.config)} tokens, found more without any text; shorten it: {step.prompt!r}"
        )

    def log_probs(row: Mapping[str, str]) -> list[float]:
        values = {name: _beginning(row[name], step.max_text_bytes) for name in fields}
        return continuation_log_probs(loaded, _prompt_ids(tokenizer, step.prompt, values, room), continuations)

    rows = table.select(fields).to_pylist()
    found_NL = np.array(each_alone(log_probs, rows, device=loaded.device))
    if step.length_normalised:
        found_NL /= lengths
    weight_NL = np.exp(found_NL - found_NL.max(axis=1, keepdims=True))
    # A model that gives no number for a row says nothing of it.
    shares: npt.NDArray[np.float64] = np.nan_to_num(weight_NL / weight_NL.sum(axis=1, keepdims=True))
    return shares


def quality_verdicts(table: pa.Table, step: ModelQualityStep, model: StepModel) -> Verdicts:
    """Which of N rows surprise the model too much or too little; the score is bits per byte."""
    bits_N = bits_per_byte(table, step, model)
    broken_N = np.zeros(len(bits_N), np.uint8)
    broken_N[bits_N < step.min_bits_per_byte] = 2
    broken_N[bits_N > step.max_bits_per_byte] = 1
    return Verdicts(("too_surprising", "too_predictable"), broken_N, np.where(broken_N, bits_N, 0.0))


def bits_per_byte(table: pa.Table, step: ModelQualityStep, model: StepModel) -> npt.NDArray[np.float64]:
    """Bits that the model needs for the beginning of each of N texts, after its prompt, by byte of UTF-8."""
    from aifactory.engine.scores import each_alone, sum_log_probs
    from aifactory.text.documents import prompt_tokens

    if not table.num_rows:
        return np.zeros(0)
    loaded, tokenizer = _loaded(model)

    def bits(row: Mapping[str, str]) -> float:
        text = _beginning(row["text"], step.sample_bytes)
        before = prompt_tokens(tokenizer, _end(row["prompt"], step.sample_bytes))
        nats = sum_log_probs(loaded, [*before, *tokenizer.encode(text)], first=len(before))
        return -nats / math.log(2) / max(len(text.encode()), 1)

    rows = table.select(["text", "prompt"]).to_pylist()
    found_N = np.array(each_alone(bits, rows, device=loaded.device), np.float64)
    return np.where(np.isfinite(found_N), found_N, _NO_NUMBER)


# ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@lru_cache(maxsize=2)
def _loaded(model: StepModel) -> tuple[PreTrainedModel, TextTokenizer]:
    """The model in fp32 and its tokenizer; they stay loaded in this process."""
    import torch

    from aifactory.engine.load import load_model
    from aifactory.text.tokenizer import load_tokenizer

    folder = model.fetch()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(folder, device=device, dtype=torch.float32), load_tokenizer(folder)


def _continuation(tokenizer: TextTokenizer, text: str) -> list[int]:
    # Encoding puts a space of its own before a text where decoding takes it away again.
    ids = tokenizer.encode(text.removeprefix(" ") if tokenizer.strips_first_space else text)
    if not ids:
        raise ConfigError(f"expected a continuation of at least one token for each label, found none for {text!r}.")
    return ids


def _prompt_ids(tokenizer: TextTokenizer, template: str, values: Mapping[str, str], room: int) -> Sequence[int]:
    """The tokens of the prompt, its longest field cut at the end until they are at most `room`, or nothing is left."""
    from aifactory.text.documents import prompt_tokens

    left: dict[str, str] = dict(values)
    while True:
        # In one pass, so that a text with "{prompt}" in it stays as it is.
        ids = prompt_tokens(tokenizer, _FIELD.sub(lambda match: left[match[1]], template))
        excess = len(ids) - room
        longest = max(left, key=lambda name: len(left[name]))
        if excess <= 0 or not left[longest]:
            return ids
        kept = tokenizer.encode(left[longest])[:-excess]
        shorter = _beginning(left[longest], sum(len(tokenizer.bytes_of(token)) for token in kept))
        # Shorter in any case: a tokenizer may normalise, and then its tokens have other bytes than the text.
        left[longest] = min(shorter, left[longest][:-1], key=len)


def _beginning(text: str, num_bytes: int) -> str:
    """The characters that lie whole in the first bytes."""
    return text.encode()[:num_bytes].decode("utf-8", "ignore")


def _end(text: str, num_bytes: int) -> str:
    """The characters that lie whole in the last bytes."""
    data = text.encode()
    return data[max(len(data) - num_bytes, 0) :].decode("utf-8", "ignore")


def step_model(models: Mapping[str, StepModel], step: Any) -> StepModel:
    """The model of a step, out of those that were resolved by the names that the configuration gives them."""
    if step.model not in models:
        raise ConfigError(
            f"expected the model {step.model!r} of the step {step.step} to be resolved, found {sorted(models) or 'none'}."
        )
    return models[step.model]

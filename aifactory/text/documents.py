"""Documents: prompt and text -> token ids and which of them carry loss.

    [bos] prompt... text... [eos]
      F      F        T       T

The prompt and the text are encoded apart, as the server does: it encodes the prompt alone, and the model then writes
tokens of the text. Encoded together, a token could straddle the border, and the model would train on what it never sees.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from aifactory.errors import BadRequestError
from aifactory.text.chat import chat_tokens
from aifactory.text.encoder import Encoder
from aifactory.text.tokenizer import TextTokenizer

Document = tuple[list[int], list[bool]]
"""Token ids and, for each of them, whether predicting it carries loss; both of one length."""


def prompt_tokens(tokenizer: TextTokenizer, prompt: str) -> list[int]:
    """What the server hands to the engine for a plain prompt: [bos] and its tokens."""
    return [tokenizer.bos_id, *tokenizer.encode(prompt)]


def chat_prompt_tokens(
    tokenizer: TextTokenizer,
    messages: Sequence[Mapping[str, object]],
    *,
    fallback: str,
    tools: Sequence[Mapping[str, object]] = (),
) -> list[int]:
    """What the server hands to the engine for a chat: [bos] and the tokens of the rendered messages."""
    return [tokenizer.bos_id, *chat_tokens(tokenizer, messages, fallback=fallback, tools=tools)]


def document_tokens(tokenizer: TextTokenizer, *, prompt: str, text: str) -> Document:
    """Tokens and loss mask of one document; a plain text is a document with prompt == ""."""
    return _join(tokenizer, prompt_tokens(tokenizer, prompt), tokenizer.encode(text))


def chat_document_tokens(
    tokenizer: TextTokenizer, *, messages: Sequence[Mapping[str, object]], text: str, fallback: str
) -> Document:
    """Tokens and loss mask of a chat and its answer, `text`; the prompt is the one that the server makes."""
    return _join(tokenizer, chat_prompt_tokens(tokenizer, messages, fallback=fallback), tokenizer.encode(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedDocuments:
    """D documents, flat: document i is ids_N[offsets_D1[i] : offsets_D1[i + 1]], of which the first prompt_lengths_D[i]
    carry no loss and the others do."""

    ids_N: npt.NDArray[np.unsignedinteger]
    offsets_D1: npt.NDArray[np.int64]
    prompt_lengths_D: npt.NDArray[np.int64]
    refused: Mapping[int, str]
    """The documents without any token, because the model's template refuses their messages, and why."""

    def __len__(self) -> int:
        return len(self.prompt_lengths_D)


def encode_documents(
    tokenizer: TextTokenizer,
    encoder: Encoder,
    *,
    prompts: pa.Array,
    texts: pa.Array,
    messages: pa.Array | None = None,
    fallback: str = "none",
) -> EncodedDocuments:
    """`document_tokens` of each prompt and text, or `chat_document_tokens` where there are messages.

    messages   the turns before the answer as JSON; "" where there are none, and then the prompt counts.
    Raises     ConfigError for a chat template that can't run.
    """
    if len(prompts) != len(texts):
        raise ValueError(f"Expected as many prompts as texts, found {len(prompts)} and {len(texts)}.")
    text_ids, text_offsets = encoder.encode_texts(texts)
    text_lengths = np.diff(text_offsets)
    prompt_ids, prompt_lengths, refused = _encode_prompts(tokenizer, encoder, prompts, messages, fallback)
    kept = np.ones(len(texts), np.bool_)
    if refused:
        kept[list(refused)] = False
        text_ids = text_ids[np.repeat(kept, text_lengths)]
        text_lengths = np.where(kept, text_lengths, 0)

    lengths = np.where(kept, prompt_lengths + text_lengths + 2, 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.empty(offsets[-1], text_ids.dtype)
    # What is neither [bos] nor prompt nor [eos] is text, and lies in the order in which it was encoded.
    is_text = np.ones(len(ids), np.bool_)
    begins, ends = offsets[:-1][kept], offsets[1:][kept] - 1
    ids[begins], ids[ends] = tokenizer.bos_id, tokenizer.eos_id
    is_text[begins] = is_text[ends] = False
    if len(prompt_ids):
        before = np.cumsum(prompt_lengths) - prompt_lengths
        at = np.repeat(offsets[:-1] + 1 - before, prompt_lengths) + np.arange(len(prompt_ids))
        ids[at] = prompt_ids
        is_text[at] = False
    ids[is_text] = text_ids
    return EncodedDocuments(
        ids_N=ids,
        offsets_D1=offsets,
        prompt_lengths_D=np.where(kept, prompt_lengths + 1, 0),
        refused=refused,
    )


def _encode_prompts(
    tokenizer: TextTokenizer, encoder: Encoder, prompts: pa.Array, messages: pa.Array | None, fallback: str
) -> tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.int64], dict[int, str]]:
    """The ids of all prompts end to end, how many each has, and the chats that were refused."""
    lengths = np.zeros(len(prompts), np.int64)
    refused: dict[int, str] = {}
    chats = _filled(messages) if messages is not None else np.zeros(0, np.int64)
    plain = np.setdiff1d(_filled(prompts), chats, assume_unique=True)
    ids, offsets = encoder.encode_texts(prompts.take(pa.array(plain)))
    lengths[plain] = np.diff(offsets)
    if messages is None or not len(chats):
        return ids, lengths, refused
    found = dict(zip(plain.tolist(), np.split(ids, offsets[1:])[:-1], strict=True))
    for i in chats.tolist():
        try:
            chat = chat_tokens(tokenizer, json.loads(messages[i].as_py()), fallback=fallback)
        except BadRequestError as error:
            refused[i] = str(error)
            continue
        found[i] = np.array(chat, ids.dtype)
        lengths[i] = len(chat)
    return np.concatenate([ids[:0], *(found[i] for i in sorted(found))]), lengths, refused


def _filled(texts: pa.Array) -> npt.NDArray[np.int64]:
    """Which of the texts are not empty."""
    return np.flatnonzero(pc.binary_length(texts).to_numpy(zero_copy_only=False))


def _join(tokenizer: TextTokenizer, prompt_ids: list[int], text_ids: list[int]) -> Document:
    ids = [*prompt_ids, *text_ids, tokenizer.eos_id]
    carries_loss = [False] * len(prompt_ids) + [True] * (len(text_ids) + 1)
    return ids, carries_loss

"""Documents: prompt and text -> token ids and which of them carry loss.

    [bos] prompt... text... [eos]
      F      F        T       T

The prompt and the text are encoded apart, as the server does: it encodes the prompt alone, and the model then writes
tokens of the text. Encoded together, a token could straddle the border, and the model would train on what it never sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aifactory.text.chat import chat_tokens
from aifactory.text.tokenizer import TextTokenizer

Document = tuple[list[int], list[bool]]
"""Token ids and, for each of them, whether predicting it carries loss; both of one length."""


def prompt_tokens(tokenizer: TextTokenizer, prompt: str) -> list[int]:
    """What the server hands to the engine for a plain prompt: [bos] and its tokens."""
    return [tokenizer.bos_id, *tokenizer.encode(prompt)]


def chat_prompt_tokens(
    tokenizer: TextTokenizer, messages: Sequence[Mapping[str, object]], *, fallback: str
) -> list[int]:
    """What the server hands to the engine for a chat: [bos] and the tokens of the rendered messages."""
    return [tokenizer.bos_id, *chat_tokens(tokenizer, messages, fallback=fallback)]


def document_tokens(tokenizer: TextTokenizer, *, prompt: str, text: str) -> Document:
    """Tokens and loss mask of one document; a plain text is a document with prompt == ""."""
    return _join(tokenizer, prompt_tokens(tokenizer, prompt), tokenizer.encode(text))


def chat_document_tokens(
    tokenizer: TextTokenizer, *, messages: Sequence[Mapping[str, object]], text: str, fallback: str
) -> Document:
    """Tokens and loss mask of a chat and its answer, `text`; the prompt is the one that the server makes."""
    return _join(tokenizer, chat_prompt_tokens(tokenizer, messages, fallback=fallback), tokenizer.encode(text))


def document_tokens_batch(tokenizer: TextTokenizer, *, prompts: Sequence[str], texts: Sequence[str]) -> list[Document]:
    """`document_tokens` of each pair, in their order, encoded on all threads of the tokenizers library."""
    if len(prompts) != len(texts):
        raise ValueError(f"Expected as many prompts as texts, found {len(prompts)} and {len(texts)}.")
    prompt_rows = tokenizer.encode_batch(prompts)
    text_rows = tokenizer.encode_batch(texts)
    return [
        _join(tokenizer, [tokenizer.bos_id, *prompt_ids], text_ids)
        for prompt_ids, text_ids in zip(prompt_rows, text_rows, strict=True)
    ]


def _join(tokenizer: TextTokenizer, prompt_ids: list[int], text_ids: list[int]) -> Document:
    ids = [*prompt_ids, *text_ids, tokenizer.eos_id]
    carries_loss = [False] * len(prompt_ids) + [True] * (len(text_ids) + 1)
    return ids, carries_loss

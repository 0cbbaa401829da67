"""Laws of documents: the answer and its end carry loss, and the prompt's tokens are the server's."""

from __future__ import annotations

import pytest

from aifactory.text.documents import (
    chat_document_tokens,
    chat_prompt_tokens,
    document_tokens,
    document_tokens_batch,
    prompt_tokens,
)


def test_text_and_eos_carry_loss_bos_and_prompt_never(tokenizer):
    ids, carries_loss = document_tokens(tokenizer, prompt="the quick", text=" brown fox")

    prompt, text = tokenizer.encode("the quick"), tokenizer.encode(" brown fox")
    assert ids == [tokenizer.bos_id, *prompt, *text, tokenizer.eos_id]
    assert carries_loss == [False] * (1 + len(prompt)) + [True] * (len(text) + 1)


def test_plain_text_is_a_document_without_prompt(tokenizer):
    ids, carries_loss = document_tokens(tokenizer, prompt="", text="fox")

    assert ids == [tokenizer.bos_id, *tokenizer.encode("fox"), tokenizer.eos_id]
    assert carries_loss == [False, *[True] * (len(ids) - 1)]
    assert document_tokens(tokenizer, prompt="", text="") == ([tokenizer.bos_id, tokenizer.eos_id], [False, True])


def test_the_border_is_where_the_server_puts_it(tokenizer):
    # Together "the" is one token; a prompt that ends in "t" must not swallow the answer's "he".
    ids, _ = document_tokens(tokenizer, prompt="t", text="he")

    assert ids[:-1] == [*prompt_tokens(tokenizer, "t"), *tokenizer.encode("he")]
    assert ids[1:-1] != tokenizer.encode("the")


def test_a_batch_gives_the_documents_one_by_one(tokenizer):
    prompts, texts = ["", "the quick", "<|endoftext|>"], ["日本語", "brown 😀", ""]

    batch = document_tokens_batch(tokenizer, prompts=prompts, texts=texts)

    assert batch == [document_tokens(tokenizer, prompt=p, text=t) for p, t in zip(prompts, texts, strict=True)]
    with pytest.raises(ValueError, match="3 and 1"):
        document_tokens_batch(tokenizer, prompts=prompts, texts=["x"])


def test_a_chat_document_begins_with_the_prompt_that_is_served(tokenizer):
    messages = [{"role": "user", "content": "the dog?"}]

    ids, carries_loss = chat_document_tokens(tokenizer, messages=messages, text="fox", fallback="plain")

    prompt = chat_prompt_tokens(tokenizer, messages, fallback="plain")
    assert ids == [*prompt, *tokenizer.encode("fox"), tokenizer.eos_id]
    assert carries_loss.count(False) == len(prompt)

"""Laws of documents: the answer and its end carry loss, and the prompt's tokens are the server's."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import pyarrow as pa
import pytest

from aifactory.text.documents import (
    chat_document_tokens,
    chat_prompt_tokens,
    document_tokens,
    encode_documents,
    prompt_tokens,
)
from aifactory.text.encoder import open_encoder


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


def encoded(tokenizer, prompts, texts, messages=None, fallback="none"):
    """`encode_documents` of lists: each document as (ids, carries_loss), and what was refused."""
    columns = [pa.array(values, pa.string()) for values in (prompts, texts)]
    turns = None if messages is None else pa.array(messages, pa.string())
    flat = encode_documents(
        tokenizer, open_encoder(tokenizer), prompts=columns[0], texts=columns[1], messages=turns, fallback=fallback
    )
    rows = [flat.ids_N[start:end].tolist() for start, end in pairwise(flat.offsets_D1.tolist())]
    prompts = flat.prompt_lengths_D.tolist()
    documents = [(ids, [i >= prompt for i in range(len(ids))]) for ids, prompt in zip(rows, prompts, strict=True)]
    return documents, dict(flat.refused)


@pytest.mark.parametrize("seed", range(5))
def test_columns_give_the_documents_one_by_one(tokenizer, seed):
    rng = random.Random(seed)
    words = ["the quick", "", "日本語", "😀", " brown", "<|endoftext|>", "fox\n"]
    number = rng.randrange(30)
    texts = ["".join(rng.choices(words, k=rng.randrange(4))) for _ in range(number)]
    prompts = ["".join(rng.choices(words, k=rng.randrange(3))) if seed % 2 else "" for _ in range(number)]

    documents, refused = encoded(tokenizer, prompts, texts)

    assert documents == [document_tokens(tokenizer, prompt=p, text=t) for p, t in zip(prompts, texts, strict=True)]
    assert refused == {}


def test_as_many_prompts_as_texts_are_expected(tokenizer):
    with pytest.raises(ValueError, match="3 and 1"):
        encoded(tokenizer, ["", "", ""], ["x"])


def test_where_there_are_messages_they_are_the_prompt(with_template):
    tokenizer = with_template("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
    chat = [{"role": "user", "content": "the <|im_end|> dog?"}]
    turns = json.dumps(chat)

    documents, refused = encoded(tokenizer, ["a", "b", "", ""], ["fox", "dog", "cat", "x"], ["", turns, "", turns])

    assert refused == {}
    assert documents == [
        document_tokens(tokenizer, prompt="a", text="fox"),
        chat_document_tokens(tokenizer, messages=chat, text="dog", fallback="none"),
        document_tokens(tokenizer, prompt="", text="cat"),
        chat_document_tokens(tokenizer, messages=chat, text="x", fallback="none"),
    ]


def test_messages_that_the_template_refuses_give_a_document_without_tokens_and_the_reason(with_template):
    tokenizer = with_template("{% if messages[0].role != 'user' %}{{ raise_exception('users first') }}{% endif %}hi")
    turns = [json.dumps([{"role": role, "content": "the"}]) for role in ("user", "system", "user", "system")]

    documents, refused = encoded(tokenizer, [""] * 5, ["a", "b", "c", "d", "e"], ["", *turns])

    assert [len(ids) for ids, _ in documents if not ids] == [0, 0]
    assert documents[2] == documents[4] == ([], [])
    assert documents[3] == chat_document_tokens(tokenizer, messages=json.loads(turns[2]), text="d", fallback="none")
    assert documents[0] == document_tokens(tokenizer, prompt="", text="a")
    assert list(refused) == [2, 4]
    assert "users first" in refused[2]


def test_the_template_of_chats_is_the_given_one_where_the_tokenizer_has_none(tokenizer):
    chat = [{"role": "user", "content": "the dog?"}]

    documents, _ = encoded(tokenizer, [""], ["fox"], [json.dumps(chat)], fallback="plain")
    _, refused = encoded(tokenizer, [""], ["fox"], [json.dumps(chat)])

    assert documents == [chat_document_tokens(tokenizer, messages=chat, text="fox", fallback="plain")]
    assert list(refused) == [0]


def test_a_chat_document_begins_with_the_prompt_that_is_served(tokenizer):
    messages = [{"role": "user", "content": "the dog?"}]

    ids, carries_loss = chat_document_tokens(tokenizer, messages=messages, text="fox", fallback="plain")

    prompt = chat_prompt_tokens(tokenizer, messages, fallback="plain")
    assert ids == [*prompt, *tokenizer.encode("fox"), tokenizer.eos_id]
    assert carries_loss.count(False) == len(prompt)

"""Laws of a token set: it holds every document that trains, exactly, and no other."""

from __future__ import annotations

import json

import numpy as np
import pytest

from aifactory.cluster.tasks import run_here
from aifactory.errors import ConfigError, EmptyCorpusError
from aifactory.text.documents import document_tokens
from aifactory.tokens.vocabulary import train_vocabulary


def read_documents(tokens):
    """Token ids and loss of each document, put together again from the shards."""
    found = {}
    for n in range(len(tokens.rows)):
        ids, _, mask = (values[0] for values in tokens.rows.read(np.array([n])))
        for place in tokens.rows.documents(n):
            here = slice(place["start"], place["start"] + place["length"])
            found.setdefault(place["row"], {})[place["offset"]] = (ids[here].tolist(), mask[here].tolist())
    return {
        row: tuple([value for at in sorted(pieces) for value in pieces[at][i]] for i in range(2))
        for row, pieces in found.items()
    }


@pytest.mark.parametrize(("seed", "row_len"), [(0, 64), (1, 16), (2, 700)])
def test_the_shards_decode_to_every_training_document_exactly(make_corpus, tokenize, seed, row_len):
    corpus, rows = make_corpus(seed)
    tokens = tokenize(corpus, row_len=row_len)
    found = read_documents(tokens)

    wanted = {row.id: row for row in rows if row.side == "train"}
    assert set(found) == set(wanted)
    for row_id, (ids, mask) in found.items():
        row = wanted[row_id]
        expected, carries_loss = document_tokens(tokens.tokenizer, prompt=row.prompt, text=row.text)
        assert ids == expected
        assert tokens.tokenizer.decode(ids) == row.prompt + row.text
        answer = [token for token, loss in zip(ids, carries_loss, strict=True) if loss]
        assert tokens.tokenizer.decode(answer) == row.text
        # No loss on the prompt, nor on the first token after a cut.
        assert [m for m, loss in zip(mask, carries_loss, strict=True) if not loss] == [0] * carries_loss.count(False)
        assert sum(mask) == sum(carries_loss[i] for i in range(len(ids)) if i % row_len)


def test_no_row_of_the_holdout_is_in_a_shard_nor_in_the_vocabulary(make_corpus, tokenize):
    _, rows = make_corpus(pairs=[("", f"{i} " + "zq" * 50 * (i % 2)) for i in range(80)])
    # The rows that speak of zq are left in on the side of the holdout alone.
    pairs = [(row.prompt, row.text) for row in rows if row.side == "holdout" or "zq" not in row.text]
    corpus, rows = make_corpus(seed=1, pairs=pairs)
    held_out = {row.id for row in rows if row.side == "holdout"}
    tokens = tokenize(corpus)

    assert any("zq" in row.text for row in rows)
    assert held_out.isdisjoint(read_documents(tokens))
    assert "zq" not in json.loads(tokens.bytes["tokenizer/tokenizer.json"])["model"]["vocab"]


def test_the_figures_count_what_is_there(make_corpus, tokenize):
    corpus, rows = make_corpus()
    tokens = tokenize(corpus)
    documents = read_documents(tokens)

    ids, positions, mask = tokens.rows.read(np.arange(len(tokens.rows)))
    assert tokens.figures["documents"] == len(documents)
    assert tokens.figures["packed_rows"] == len(tokens.rows) == len(ids) == len(positions)
    assert tokens.figures["tokens"] == sum(len(ids) for ids, _ in documents.values())
    assert tokens.figures["loss_tokens"] == mask.sum()
    assert tokens.figures["text_bytes"] == sum(len(row.text.encode()) for row in rows if row.side == "train")
    assert tokens.figures["vocab_size"] == tokens.tokenizer.vocab_size == 300
    assert tokens.figures["tokenizer_digest"] == tokens.tokenizer.digest()


def test_the_order_of_tasks_changes_no_byte(make_corpus, tokenize):
    corpus, _ = make_corpus()

    def backwards(function, items):
        return run_here(function, items[::-1])[::-1]

    one, two = tokenize(corpus), tokenize(corpus, name="b", run=backwards)

    assert len([name for name in one.bytes if name.startswith("shard-")]) == 3
    assert one.bytes == two.bytes
    assert one.figures == two.figures


def test_a_tokenizer_that_is_taken_over_gives_the_same_ids(make_corpus, tokenize):
    corpus, _ = make_corpus()
    first = tokenize(corpus)
    other, _ = make_corpus(seed=5)

    second = tokenize(other, name="b", folder=first.folder / "tokenizer")

    def of_tokenizer(tokens):
        return {name: data for name, data in tokens.bytes.items() if name.startswith("tokenizer/")}

    assert of_tokenizer(second) == of_tokenizer(first)
    text = "the quick 日本語 <|endoftext|> größe"
    assert second.tokenizer.encode(text) == first.tokenizer.encode(text)


def test_a_folder_without_a_tokenizer_is_named(make_corpus, tokenize, tmp_path):
    corpus, _ = make_corpus()

    with pytest.raises(ConfigError, match=f"tokenizer.json in {tmp_path}"):
        tokenize(corpus, folder=tmp_path)


def test_a_corpus_without_training_rows_is_an_error(make_corpus, tokenize):
    _, rows = make_corpus()
    held_out = [(row.prompt, row.text) for row in rows if row.side == "holdout"]
    corpus, _ = make_corpus(seed=1, pairs=held_out)

    with pytest.raises(EmptyCorpusError, match=r"corpus/0+1"):
        tokenize(corpus)


def test_a_vocabulary_depends_on_the_texts_and_the_size_alone():
    texts = ["the quick brown fox " * 9, "größe 日本語 😀"] * 5

    one = train_vocabulary(iter(texts), vocab_size=300)

    assert train_vocabulary(texts, vocab_size=300) == one
    assert train_vocabulary(texts, vocab_size=290) != one
    assert train_vocabulary(texts[::2], vocab_size=300) != one

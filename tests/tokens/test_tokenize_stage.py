"""Laws of a token set: it holds every document that trains, exactly, and no other."""

from __future__ import annotations

import json
import logging
import random
import sys

import numpy as np
import pytest

from aifactory.cluster.tasks import run_here
from aifactory.errors import ConfigError, EmptyCorpusError
from aifactory.text.documents import chat_document_tokens, document_tokens
from aifactory.tokens import vocabulary


def read_documents(tokens):
    """Token ids and loss of each document, put together again from the shards."""
    found = {}
    for n in range(len(tokens.rows)):
        ids, _, mask = (values[0] for values in tokens.rows.read(np.array([n])))
        for place in tokens.rows.documents(n):
            here = slice(place["start"], place["start"] + place["length"])
            found.setdefault(place["row"], {})[place["offset"]] = (ids[here].tolist(), mask[here].tolist())
    documents = {
        row: tuple([value for at in sorted(pieces) for value in pieces[at][i]] for i in range(2))
        for row, pieces in found.items()
    }
    assert {row: ids.tolist() for row, ids in tokens.rows.whole_documents()} == {
        row: ids for row, (ids, _) in documents.items()
    }
    return documents


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


@pytest.mark.parametrize("mixed", [False, True])
def test_no_row_of_the_holdout_is_in_a_shard_nor_in_the_vocabulary(make_corpus, tokenize, mixed):
    _, rows = make_corpus(pairs=[("", f"{i} " + "zq" * 50 * (i % 2)) for i in range(80)])
    # The rows that speak of zq are left in on the side of the holdout alone.
    pairs = [(row.prompt, row.text) for row in rows if row.side == "holdout" or "zq" not in row.text]
    corpus, rows = make_corpus(seed=1, pairs=pairs, mixed=mixed)
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


@pytest.mark.parametrize("seed", range(3))
def test_decoding_a_shard_gives_back_the_bytes_of_every_document(make_corpus, tokenize, seed):
    rng = random.Random(seed)
    characters = [code for code in range(1, 0x110000) if not 0xD800 <= code < 0xE000]
    pairs = [
        ("", f"{i}:" + "".join(chr(rng.choice(characters)) for _ in range(rng.randrange(rng.choice([3, 300])))))
        for i in range(40)
    ]
    corpus, rows = make_corpus(pairs=pairs)
    tokens = tokenize(corpus, row_len=50)

    found = {row: b"".join(map(tokens.tokenizer.bytes_of, ids.tolist())) for row, ids in tokens.rows.whole_documents()}

    assert found == {row.id: row.text.encode() for row in rows if row.side == "train"}


def test_which_library_finds_the_tokens_changes_no_byte(make_corpus, tokenize, monkeypatch, caplog):
    corpus, _ = make_corpus()
    one = tokenize(corpus)
    # In a folder of its own, since a process opens the tokenizer of a folder once.
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    with caplog.at_level(logging.INFO, "aifactory"):
        two = tokenize(corpus, name="b")

    assert one.bytes == two.bytes
    assert one.figures == two.figures
    assert "gigatoken is not installed" in caplog.text


def test_a_corpus_without_a_column_of_messages_gives_the_same_shards(make_corpus, tokenize):
    corpus, _ = make_corpus()
    without, _ = make_corpus(columns=("id", "side", "source", "prompt", "text"))

    assert tokenize(without, name="b").bytes == tokenize(corpus).bytes


def test_chats_are_encoded_as_they_are_served(make_corpus, tokenize):
    chats = [
        [{"role": "system", "content": f"be brief {i}"}, {"role": "user", "content": "quick <|endoftext|> fox?"}]
        for i in range(20)
    ]
    pairs = [*((chat, "the answer") for chat in chats), ("", "plain text"), ("a question", "an answer")]
    corpus, rows = make_corpus(pairs=pairs)
    tokens = tokenize(corpus, row_len=300)
    found = read_documents(tokens)

    wanted = [row for row in rows if row.side == "train"]
    assert sum(row.messages != "" for row in wanted) > 5
    assert set(found) == {row.id for row in wanted}
    for row in wanted:
        expected = (
            chat_document_tokens(tokens.tokenizer, messages=json.loads(row.messages), text=row.text, fallback="plain")
            if row.messages
            else document_tokens(tokens.tokenizer, prompt=row.prompt, text=row.text)
        )
        assert found[row.id] == (expected[0], [int(loss) for loss in expected[1]])


def test_rows_whose_chat_the_template_refuses_are_counted_and_logged(make_corpus, tokenize, caplog):
    chats = [[{"role": "user", "content": f"quick {i}?"}] for i in range(20)]
    corpus, rows = make_corpus(
        pairs=[*((chat, "the answer") for chat in chats), *(("", f"text {i}") for i in range(9))]
    )
    with caplog.at_level(logging.INFO, "aifactory"):
        tokens = tokenize(corpus, chat_fallback="none")

    trained = [row for row in rows if row.side == "train"]
    assert set(read_documents(tokens)) == {row.id for row in trained if not row.messages}
    assert tokens.figures["rows_refused"] == sum(row.messages != "" for row in trained) > 0
    assert tokens.figures["rows_refused"] + tokens.figures["documents"] == len(trained)
    assert "chat template" in caplog.text


def test_a_vocabulary_is_trained_on_a_sample_of_a_corpus_that_is_larger(make_corpus, tokenize, monkeypatch):
    corpus, rows = make_corpus(pairs=[("", f"word{i % 7} " * 10) for i in range(900)])
    counted = []
    count_words = vocabulary.count_words
    monkeypatch.setattr(vocabulary, "count_words", lambda texts: counted.append(len(texts)) or count_words(texts))

    whole = tokenize(corpus)
    assert sum(counted) == sum(row.side == "train" for row in rows)
    counted.clear()
    some = tokenize(corpus, name="b", sample_bytes=corpus.record.figures["bytes_kept"] // 5)

    assert sum(counted) == pytest.approx(sum(row.side == "train" for row in rows) / 5, abs=3)
    assert len(counted) == 3
    assert some.figures["text_bytes"] == whole.figures["text_bytes"]
    again = tokenize(corpus, name="c", sample_bytes=corpus.record.figures["bytes_kept"] // 5)
    assert again.bytes == some.bytes

"""Laws of token sets of preferences: they hold every document that is learnt from, whole, beside what it is compared with."""

from __future__ import annotations

import hashlib
import io
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aifactory.cluster.tasks import run_here
from aifactory.config import Tokenize
from aifactory.errors import EmptyCorpusError
from aifactory.records.artifacts import ArtifactStore, Corpus, Record, digest_of
from aifactory.text.documents import chat_document_tokens, document_tokens
from aifactory.text.shards import TokenRows
from aifactory.text.tokenizer import load_tokenizer
from aifactory.tokens.pipeline import shard_names, tokenize_corpus

ROW_LEN = 48


def some_rows(seed, number):
    """Rows with a prompt or turns, a chosen and a rejected answer, and a label; a few of them are too long, or lack something."""
    rng = random.Random(seed)

    def words(most):
        return " ".join(rng.choice(["the", "fox", "日本語", "größe", "x = 1"]) for _ in range(rng.randrange(1, most)))

    rows = []
    for i in range(number):
        prompt = words(4)
        rows.append(
            {
                "id": hashlib.sha256(f"{seed} {i}".encode()).hexdigest()[:32],
                "side": "train" if i % 5 else "holdout",
                "source": "talk",
                "prompt": "" if i % 4 == 1 else prompt,
                "messages": json.dumps([{"content": prompt, "role": "user"}]) if i % 4 == 1 else "",
                "text": f"{i} " + words(30 if i % 11 == 3 else 5),
                "rejected": "" if i % 9 == 4 else f"no {i} " + words(5),
                "label": rng.choice(["true", "false", "1", "0", "True"]) if i % 7 else rng.choice(["", "good"]),
            }
        )
    return rows


@pytest.fixture
def preferences(storage):
    """A token set of rows, by objective."""

    def make(rows, objective, *, name="a", run=run_here, row_len=ROW_LEN):
        fingerprint = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        files = []
        for part in range(2):
            for side in ("train", "holdout"):
                sink = io.BytesIO()
                some = [row for row in rows[part::2] if row["side"] == side]
                pq.write_table(pa.Table.from_pylist(some, pa.schema(dict.fromkeys(rows[0], pa.string()))), sink)
                file = f"{side}-{part:05d}.parquet"
                files.append(storage.write_bytes(sink.getvalue(), "corpus", fingerprint[:16], file))
        record = Record(
            kind="corpus",
            fingerprint=fingerprint,
            digest=digest_of(files),
            code_version=1,
            recipe={},
            inputs=[],
            files=files,
            figures={"bytes_kept": sum(len(row["text"].encode()) for row in rows)},
        )
        target = ("tokens", name)
        storage.delete("parts")
        tokenized = tokenize_corpus(
            ArtifactStore(storage).publish(Corpus, record),
            recipe=Tokenize(vocab_size=300, row_len=row_len),
            tokenizer_folder=None,
            storage=storage,
            target=target,
            run=run,
            chat_fallback="plain",
            objective=objective,
        )
        folder = storage.fetch([file.name for file in tokenized.files], *target)
        return tokenized, TokenRows(folder, shard_names(tokenized.files)), load_tokenizer(folder / "tokenizer")

    return make


def document(tokenizer, row, answer):
    if row["messages"]:
        messages = json.loads(row["messages"])
        return chat_document_tokens(tokenizer, messages=messages, text=answer, fallback="plain")
    return document_tokens(tokenizer, prompt=row["prompt"], text=answer)


def wanted(tokenizer, rows, objective, row_len=ROW_LEN):
    """By row id the documents that are learnt from, each with its loss and its mark."""
    found = {}
    for row in (row for row in rows if row["side"] == "train"):
        if objective == "dpo":
            documents = [(*document(tokenizer, row, row[half]), mark) for half, mark in (("text", 1), ("rejected", -1))]
            known = bool(row["rejected"])
        else:
            known = row["label"].lower() in ("true", "false", "1", "0")
            documents = [(*document(tokenizer, row, row["text"]), 1 if row["label"].lower() in ("true", "1") else -1)]
        if known and sum(len(ids) for ids, _, _ in documents) <= row_len:
            found[row["id"]] = documents
    return found


def as_read(rows):
    """The same from what training reads."""
    found = {}
    for n in range(len(rows)):
        index = np.array([n])
        ids, positions, loss = (values[0] for values in rows.read(index))
        marks = rows.marks(index)[0]
        pieces = rows.documents(n)
        assert rows.count_documents(index) == len(pieces)
        end = 0
        for piece in pieces:
            assert (piece["start"], piece["offset"]) == (end, 0)
            end = piece["start"] + piece["length"]
            here = slice(piece["start"], end)
            assert positions[here].tolist() == list(range(piece["length"]))
            assert set(marks[here].tolist()) == {piece["mark"]}
            found.setdefault(piece["row"], []).append(
                (ids[here].tolist(), loss[here].astype(bool).tolist(), piece["mark"])
            )
        assert not marks[end:].any()
        assert not loss[end:].any()
    return found


@pytest.mark.parametrize("objective", ["dpo", "kto"])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_document_is_there_whole_with_its_mark_and_a_pair_lies_side_by_side(preferences, objective, seed):
    rows = some_rows(seed, 120)
    tokenized, packed, tokenizer = preferences(rows, objective)
    expected = wanted(tokenizer, rows, objective)
    trained = sum(row["side"] == "train" for row in rows)

    assert packed.has_marks
    assert as_read(packed) == expected
    assert 0 < len(expected) < trained
    assert tokenized.figures["documents"] == len(expected)
    assert tokenized.figures["rows_refused"] == trained - len(expected)
    assert tokenized.figures["tokens"] == sum(len(ids) for each in expected.values() for ids, _, _ in each)
    assert tokenized.figures["loss_tokens"] == sum(sum(loss) for each in expected.values() for _, loss, _ in each)
    if objective == "dpo":
        for n in range(len(packed)):
            pieces = packed.documents(n)
            assert [piece["row"] for piece in pieces[::2]] == [piece["row"] for piece in pieces[1::2]]
            assert [piece["mark"] for piece in pieces] == [1, -1] * (len(pieces) // 2)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_decoding_a_shard_gives_back_the_documents(preferences, objective):
    rows = {row["id"]: row for row in some_rows(3, 60)}
    _, packed, tokenizer = preferences(list(rows.values()), objective)
    found = [(name, tokenizer.decode(ids.tolist())) for name, ids in packed.whole_documents()]
    expected = wanted(tokenizer, list(rows.values()), objective)

    answers = ("text", "rejected") if objective == "dpo" else ("text",)
    assert sorted(found) == sorted(
        (name, tokenizer.decode(document(tokenizer, rows[name], rows[name][half])[0]))
        for name in expected
        for half in answers
    )
    if objective == "dpo":  # the chosen one first
        assert [name for name, _ in found[::2]] == [name for name, _ in found[1::2]]
        assert all(rows[name]["text"] in text for name, text in found[::2])


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_the_order_of_tasks_changes_no_byte(preferences, storage, objective):
    rows = some_rows(4, 60)
    one, _, _ = preferences(rows, objective)
    two, _, _ = preferences(
        rows, objective, name="b", run=lambda function, items: run_here(function, items[::-1])[::-1]
    )

    assert [(file.name, file.sha256) for file in one.files] == [(file.name, file.sha256) for file in two.files]


def test_without_a_pair_or_a_label_there_is_nothing_to_train_on_and_it_says_why(preferences):
    rows = [row | {"rejected": "", "label": "good"} for row in some_rows(5, 20)]

    with pytest.raises(EmptyCorpusError, match="expected a preference pair, found no rejected answer"):
        preferences(rows, "dpo")
    with pytest.raises(EmptyCorpusError, match="expected the label true or false of an answer, found 'good'"):
        preferences(rows, "kto")
    with pytest.raises(EmptyCorpusError, match=r"expected at most tokenize\.row_len tokens, 8, found \d+"):
        preferences([row | {"text": "words of an answer " * 9, "label": "true"} for row in rows], "kto", row_len=8)


def test_for_the_likelihood_the_chosen_answers_are_texts_like_any_others(preferences):
    rows = some_rows(6, 20)
    _, packed, tokenizer = preferences(rows, "likelihood", row_len=512)

    assert not packed.has_marks
    assert {name: ids.tolist() for name, ids in packed.whole_documents()} == {
        row["id"]: document(tokenizer, row, row["text"])[0] for row in rows if row["side"] == "train"
    }

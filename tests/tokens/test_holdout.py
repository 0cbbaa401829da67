"""Laws of the rows that a run is validated on: none of them trains, and which they are depends on the corpora alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from aifactory.errors import EmptyCorpusError
from aifactory.text.shards import TokenRows
from aifactory.tokens.holdout import pack_held_out


@pytest.fixture
def pack(storage, tokenize):
    def run(corpora, *, rows=4, target="held-out", row_len=64):
        tokens = tokenize(corpora[0])
        name = pack_held_out(
            corpora,
            tokenizer_folder=tokens.folder / "tokenizer",
            chat_fallback="plain",
            row_len=row_len,
            rows=rows,
            storage=storage,
            target=("runs", target),
        )
        return storage.read_bytes("runs", target, name), TokenRows(Path(storage.path("runs", target)), [name])

    return run


def documents_of(rows):
    return {document["row"] for index in range(len(rows)) for document in rows.documents(index)}


@pytest.mark.parametrize("mixed", [False, True])
def test_only_held_out_rows_are_packed_and_at_most_so_many(make_corpus, pack, mixed):
    corpus, source = make_corpus(number=120, mixed=mixed)
    _, rows = pack([corpus], rows=3)

    assert len(rows) == 3
    assert documents_of(rows) <= {row.id for row in source if row.side == "holdout"}


def test_all_of_them_are_packed_where_there_are_few(make_corpus, pack):
    corpus, source = make_corpus(number=30)
    _, rows = pack([corpus], rows=1000)

    assert documents_of(rows) == {row.id for row in source if row.side == "holdout"}


def test_the_same_corpora_give_the_same_bytes_and_all_of_them_give_rows(make_corpus, pack):
    (one, first), (two, second) = make_corpus(seed=1, number=90), make_corpus(seed=2, number=90)
    data, rows = pack([one, two], rows=20)

    assert pack([one, two], rows=20, target="again")[0] == data
    for source in (first, second):
        assert documents_of(rows) & {row.id for row in source}


def test_what_is_there_is_not_made_again(make_corpus, pack, storage):
    corpus, _ = make_corpus()
    data, _ = pack([corpus])
    again, _ = pack([corpus], rows=1)

    assert again == data


def test_without_held_out_rows_it_is_an_error_that_says_what_to_do(make_corpus, pack):
    made = (make_corpus(seed=seed, number=3) for seed in range(9))
    corpus = next(corpus for corpus, source in made if all(row.side == "train" for row in source))

    with pytest.raises(EmptyCorpusError, match=r"expected held-out rows in corpus/.* raise ingest\.holdout_share"):
        pack([corpus])

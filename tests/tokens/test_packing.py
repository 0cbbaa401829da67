"""Laws of packing: every token in exactly one place, and no loss where nothing can be learnt."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from aifactory.tokens.packing import Document, pack


def random_documents(seed, number, longest):
    rng = random.Random(seed)
    lengths = [rng.choice([1, 2, 16, 32, rng.randrange(1, longest)]) for _ in range(number)]
    return [
        Document(
            row=f"row-{i}",
            ids=[rng.randrange(1000) for _ in range(length)],
            loss_mask=[rng.random() < 0.7 for _ in range(length)],
        )
        for i, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_every_token_is_in_exactly_one_row(seed):
    documents = random_documents(seed, 40, 100)
    packed = pack(documents, row_len=16, vocab_size=1000, pad_id=7)

    by_row = {document.row: document for document in documents}
    found = {document.row: [None] * len(document.ids) for document in documents}
    covered = np.zeros(packed.ids_NT.shape, np.int64)
    for n, places in enumerate(packed.documents):
        for place in places:
            here = slice(place["start"], place["start"] + place["length"])
            covered[n, here] += 1
            for i, token in enumerate(packed.ids_NT[n, here].tolist()):
                assert found[place["row"]][place["offset"] + i] is None
                found[place["row"]][place["offset"] + i] = token
    assert found == {row: list(document.ids) for row, document in by_row.items()}
    assert covered.max() == 1
    assert covered.sum() == sum(len(document.ids) for document in documents)
    assert (packed.ids_NT[covered == 0] == 7).all()


@pytest.mark.parametrize("seed", range(4))
def test_positions_restart_with_every_piece_and_with_the_padding(seed):
    packed = pack(random_documents(seed, 40, 100), row_len=16, vocab_size=1000, pad_id=7)

    for n, places in enumerate(packed.documents):
        ends = [*(place["start"] for place in places), sum(place["length"] for place in places), 16]
        expected = [i for start, end in pairwise(ends) for i in range(end - start)]
        assert packed.positions_NT[n].tolist() == expected


@pytest.mark.parametrize("seed", range(4))
def test_loss_is_carried_by_the_tokens_that_say_so_and_have_one_before_them(seed):
    documents = {document.row: document for document in random_documents(seed, 40, 100)}
    packed = pack(list(documents.values()), row_len=16, vocab_size=1000, pad_id=7)

    for n, places in enumerate(packed.documents):
        expected = [0] * 16
        for place in places:
            mask = documents[place["row"]].loss_mask[place["offset"] : place["offset"] + place["length"]]
            expected[place["start"] : place["start"] + place["length"]] = [0, *map(int, mask[1:])]
        assert packed.loss_mask_NT[n].tolist() == expected


def test_rests_are_placed_best_fit():
    lengths = [10, 6, 9, 7, 4, 3, 2]
    documents = [Document(row=str(n), ids=[1] * n, loss_mask=[True] * n) for n in lengths]
    packed = pack(documents, row_len=16, vocab_size=10, pad_id=0)

    assert [[place["row"] for place in places] for places in packed.documents] == [
        ["10", "6"],
        ["9", "7"],
        ["4", "3", "2"],
    ]


def test_a_row_of_exactly_the_length_is_not_cut_and_one_more_token_is():
    documents = [Document(row=str(n), ids=list(range(n)), loss_mask=[True] * n) for n in (16, 17)]
    packed = pack(documents, row_len=16, vocab_size=100, pad_id=99)

    assert [[(p["row"], p["offset"], p["length"]) for p in places] for places in packed.documents] == [
        [("16", 0, 16)],
        [("17", 0, 16)],
        [("17", 16, 1)],
    ]
    assert packed.loss_mask_NT.sum() == 15 + 15 + 0

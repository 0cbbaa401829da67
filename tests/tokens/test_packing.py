"""Laws of packing: every token in exactly one place, and no loss where nothing can be learnt."""

from __future__ import annotations

import bisect
import random
from itertools import pairwise

import numpy as np
import pytest

from aifactory.text.shards import TokenRows, shard_bytes
from aifactory.tokens.packing import Document, pack


def random_documents(seed, number, longest, row_len=16):
    """Documents of all lengths about that of a row, with and without a prompt."""
    rng = random.Random(seed)
    documents = []
    for i in range(number):
        length = rng.choice([1, 2, row_len - 1, row_len, row_len + 1, 2 * row_len, rng.randrange(1, longest)])
        prompt = rng.choice([0, 1, length, rng.randrange(length + 1)])
        ids = [rng.randrange(1000) for _ in range(length)]
        documents.append(Document(row=f"row-{i}", ids=ids, loss_mask=[i >= prompt for i in range(length)]))
    return documents


def reference_pack(documents, row_len):
    """The rows' pieces as (row, start, offset, length): best fit piece by piece, by a sorted list of (room, row)."""
    pieces = [
        (n, offset, min(row_len, len(document.ids) - offset))
        for n, document in enumerate(documents)
        for offset in range(0, len(document.ids), row_len)
    ]
    rows, rooms = [], []
    for n, offset, length in sorted(pieces, key=lambda piece: (-piece[2], piece[0], piece[1])):
        at = bisect.bisect_left(rooms, (length, -1))
        if at < len(rooms):
            room, chosen = rooms.pop(at)
        else:
            room, chosen = row_len, len(rows)
            rows.append([])
        rows[chosen].append((documents[n].row, row_len - room, offset, length))
        if room > length:
            bisect.insort(rooms, (room - length, chosen))
    return rows


def read(packed, tmp_path):
    """ids_NT, positions_NT and loss_mask_NT as training reads them."""
    (tmp_path / "shard").write_bytes(shard_bytes(packed))
    rows = TokenRows(tmp_path, ["shard"])
    return rows.read(np.arange(len(rows)))


@pytest.mark.parametrize("seed", range(40))
def test_pieces_are_placed_as_the_definition_of_best_fit_has_it(seed):
    row_len = [2, 3, 16, 63, 64, 65, 130, 500][seed % 8]
    documents = random_documents(seed, 150, 3 * row_len, row_len)

    packed = pack(documents, row_len=row_len, vocab_size=[1000, 70_000][seed % 2], pad_id=7)

    names = ("row", "start", "offset", "length")
    found = [[tuple(piece[name] for name in names) for piece in pieces] for pieces in packed.documents.to_pylist()]
    assert found == reference_pack(documents, row_len)
    assert packed.ids_NT.dtype == (np.uint32 if seed % 2 else np.uint16)


@pytest.mark.parametrize("seed", range(8))
def test_every_token_is_in_exactly_one_row(seed):
    documents = random_documents(seed, 40, 100)
    packed = pack(documents, row_len=16, vocab_size=1000, pad_id=7)

    by_row = {document.row: document for document in documents}
    found = {document.row: [None] * len(document.ids) for document in documents}
    covered = np.zeros(packed.ids_NT.shape, np.int64)
    for n, places in enumerate(packed.documents.to_pylist()):
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
def test_positions_restart_with_every_piece_and_with_the_padding(seed, tmp_path):
    packed = pack(random_documents(seed, 40, 100), row_len=16, vocab_size=1000, pad_id=7)
    _, positions_NT, _ = read(packed, tmp_path)

    for n, places in enumerate(packed.documents.to_pylist()):
        ends = [*(place["start"] for place in places), sum(place["length"] for place in places), 16]
        expected = [i for start, end in pairwise(ends) for i in range(end - start)]
        assert positions_NT[n].tolist() == expected


@pytest.mark.parametrize("seed", range(4))
def test_loss_is_carried_by_the_tokens_that_say_so_and_have_one_before_them(seed, tmp_path):
    documents = {document.row: document for document in random_documents(seed, 40, 100)}
    packed = pack(list(documents.values()), row_len=16, vocab_size=1000, pad_id=7)
    _, _, loss_mask_NT = read(packed, tmp_path)

    for n, places in enumerate(packed.documents.to_pylist()):
        expected = [0] * 16
        for place in places:
            mask = documents[place["row"]].loss_mask[place["offset"] : place["offset"] + place["length"]]
            expected[place["start"] : place["start"] + place["length"]] = [0, *map(int, mask[1:])]
        assert loss_mask_NT[n].tolist() == expected


def test_rests_are_placed_best_fit():
    lengths = [10, 6, 9, 7, 4, 3, 2]
    documents = [Document(row=str(n), ids=[1] * n, loss_mask=[True] * n) for n in lengths]
    packed = pack(documents, row_len=16, vocab_size=10, pad_id=0)

    assert [[place["row"] for place in places] for places in packed.documents.to_pylist()] == [
        ["10", "6"],
        ["9", "7"],
        ["4", "3", "2"],
    ]


def test_a_row_of_exactly_the_length_is_not_cut_and_one_more_token_is():
    documents = [Document(row=str(n), ids=list(range(n)), loss_mask=[True] * n) for n in (16, 17)]
    packed = pack(documents, row_len=16, vocab_size=100, pad_id=99)

    assert [[(p["row"], p["offset"], p["length"]) for p in places] for places in packed.documents.to_pylist()] == [
        [("16", 0, 16)],
        [("17", 0, 16)],
        [("17", 16, 1)],
    ]
    assert packed.count_loss_tokens() == 15 + 15 + 0


def test_a_mask_that_is_not_that_of_a_prompt_and_its_answer_is_refused():
    with pytest.raises(ValueError, match="another mask in odd"):
        pack([Document(row="odd", ids=[1, 2, 3], loss_mask=[False, True, False])], row_len=8, vocab_size=9, pad_id=0)

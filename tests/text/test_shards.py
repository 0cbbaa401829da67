"""Laws of shards: what is mapped is what was written, at any index and in any order."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from aifactory.text.shards import PIECE, PackedRows, TokenRows, integer_type, shard_bytes


def make_rows(rng, number, row_len, vocab_size):
    """Rows that are filled at random: pieces of any length, of any place in a document, with padding and without."""
    documents = []
    for n in range(number):
        pieces, start = [], 0
        while start < row_len and rng.random() < 0.8:
            length = int(rng.integers(1, row_len - start + 1))
            prompt, offset = (int(value) for value in rng.integers(0, 2 * row_len, 2))
            pieces.append(
                {"row": f"r{n}-{start}", "start": start, "offset": offset, "length": length, "prompt": prompt}
            )
            start += length
        documents.append(pieces)
    ids = rng.integers(0, vocab_size, (number, row_len)).astype(integer_type(vocab_size))
    return PackedRows(ids_NT=ids, documents=pa.array(documents, pa.list_(PIECE)))


def positions_and_loss(rows):
    """What the layout says of each token, one by one."""
    positions, loss_mask = np.zeros((2, *rows.ids_NT.shape), np.int64)
    for n, pieces in enumerate(rows.documents.to_pylist()):
        filled = 0
        for piece in pieces:
            for i in range(piece["length"]):
                positions[n, piece["start"] + i] = i
                loss_mask[n, piece["start"] + i] = i > 0 and piece["offset"] + i >= piece["prompt"]
            filled = piece["start"] + piece["length"]
        positions[n, filled:] = np.arange(rows.ids_NT.shape[1] - filled)
    return positions, loss_mask


@pytest.fixture
def written(tmp_path):
    """Shards of several sizes, in the order of their names."""
    rng = np.random.default_rng(3)
    parts = [make_rows(rng, number, 12, 500) for number in (3, 1, 7)]
    names = [f"shard-{i}.arrow" for i in range(3)]
    for name, part in zip(names, parts, strict=True):
        (tmp_path / name).write_bytes(shard_bytes(part))
    return parts, TokenRows(tmp_path, names)


def test_random_reads_equal_sequential_ones(written):
    parts, rows = written
    everything = [np.concatenate([part.ids_NT for part in parts])]
    everything += map(np.concatenate, zip(*map(positions_and_loss, parts), strict=True))
    indices = np.random.default_rng(4).integers(0, len(rows), 50)

    assert len(rows) == 11
    assert rows.row_len == 12
    for some in (indices, indices[:1], indices[:0], np.arange(11)):
        for found, expected in zip(rows.read(some), everything, strict=True):
            assert found.dtype == np.int64
            assert found.shape == (len(some), 12)
            assert (found == expected[some]).all()
        assert rows.count_loss_tokens(some) == everything[2][some].sum()
    assert sum(part.count_loss_tokens() for part in parts) == everything[2].sum()


def test_the_documents_of_a_row_are_found_by_its_global_index(written):
    parts, rows = written

    found = [rows.documents(n) for n in range(len(rows))]

    assert found == [documents for part in parts for documents in part.documents.to_pylist()]


def test_the_same_rows_are_the_same_bytes():
    one, two = (make_rows(np.random.default_rng(5), 4, 8, 500) for _ in range(2))

    assert shard_bytes(one) == shard_bytes(two)


@pytest.mark.parametrize(("vocab_size", "kind"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_the_integers_are_the_narrowest_that_hold_every_id(tmp_path, vocab_size, kind):
    ids = np.array([[0, vocab_size - 1]], integer_type(vocab_size))
    rows = PackedRows(ids_NT=ids, documents=pa.array([[]], pa.list_(PIECE)))
    (tmp_path / "shard").write_bytes(shard_bytes(rows))

    found = TokenRows(tmp_path, ["shard"]).read(np.array([0]))

    assert integer_type(vocab_size) is kind
    assert found[0].tolist() == [[0, vocab_size - 1]]


def test_no_shards_are_no_rows(tmp_path):
    assert len(TokenRows(tmp_path, [])) == 0


def test_documents_are_put_together_again_from_their_pieces(tmp_path):
    documents = {f"r{i}": np.arange(i * 100, i * 100 + length) for i, length in enumerate((1, 8, 9, 30, 4))}
    pieces = [
        (name, offset, ids[offset : offset + 8]) for name, ids in documents.items() for offset in range(0, len(ids), 8)
    ]
    order = np.random.default_rng(0).permutation(len(pieces))
    for shard, some in (("a", order[:0]), ("b", order)):
        ids_NT = np.full((len(some), 12), 9999, np.uint16)
        places = []
        for n, i in enumerate(some):
            name, offset, ids = pieces[i]
            ids_NT[n, 2 : 2 + len(ids)] = ids
            places.append([{"row": name, "start": 2, "offset": offset, "length": len(ids), "prompt": 1}])
        rows = PackedRows(ids_NT=ids_NT, documents=pa.array(places, pa.list_(PIECE)))
        (tmp_path / shard).write_bytes(shard_bytes(rows))

    found = {name: ids.tolist() for name, ids in TokenRows(tmp_path, ["a", "b"]).whole_documents()}

    assert found == {name: ids.tolist() for name, ids in documents.items()}

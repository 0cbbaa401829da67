"""Laws of shards: what is mapped is what was written, at any index and in any order."""

from __future__ import annotations

import numpy as np
import pytest

from aifactory.text.shards import PackedRows, TokenRows, integer_type, shard_bytes


def make_rows(rng, number, row_len, vocab_size):
    return PackedRows(
        ids_NT=rng.integers(0, vocab_size, (number, row_len)).astype(integer_type(vocab_size)),
        positions_NT=rng.integers(0, row_len, (number, row_len)).astype(integer_type(row_len)),
        loss_mask_NT=rng.integers(0, 2, (number, row_len)).astype(np.uint8),
        documents=[[{"row": f"r{n}", "start": 0, "offset": n, "length": row_len}] for n in range(number)],
    )


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
    everything = [
        np.concatenate([getattr(part, name) for part in parts]) for name in ("ids_NT", "positions_NT", "loss_mask_NT")
    ]
    indices = np.random.default_rng(4).integers(0, len(rows), 50)

    assert len(rows) == 11
    assert rows.row_len == 12
    for found, expected in zip(rows.read(indices), everything, strict=True):
        assert found.dtype == np.int64
        assert (found == expected[indices]).all()
    assert rows.count_loss_tokens(indices) == everything[2][indices].sum()
    assert rows.count_loss_tokens(indices[:0]) == 0


def test_the_documents_of_a_row_are_found_by_its_global_index(written):
    parts, rows = written

    found = [rows.documents(n) for n in range(len(rows))]

    assert found == [list(documents) for part in parts for documents in part.documents]


def test_the_same_rows_are_the_same_bytes():
    one, two = (make_rows(np.random.default_rng(5), 4, 8, 500) for _ in range(2))

    assert shard_bytes(one) == shard_bytes(two)


@pytest.mark.parametrize(("vocab_size", "kind"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_the_integers_are_the_narrowest_that_hold_every_id(tmp_path, vocab_size, kind):
    rows = PackedRows(
        ids_NT=np.array([[0, vocab_size - 1]], integer_type(vocab_size)),
        positions_NT=np.array([[0, 1]], np.uint16),
        loss_mask_NT=np.array([[0, 1]], np.uint8),
        documents=[[]],
    )
    (tmp_path / "shard").write_bytes(shard_bytes(rows))

    found = TokenRows(tmp_path, ["shard"]).read(np.array([0]))

    assert integer_type(vocab_size) is kind
    assert found[0].tolist() == [[0, vocab_size - 1]]


def test_no_shards_are_no_rows(tmp_path):
    assert len(TokenRows(tmp_path, [])) == 0

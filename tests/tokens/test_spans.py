"""Laws of the index from text back to rows: what must be found is found, wherever it stands and however long its document."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest

from aifactory.errors import StorageError
from aifactory.text.shards import shard_bytes
from aifactory.tokens import spans
from aifactory.tokens.packing import Document, pack
from aifactory.tokens.runs import index_bytes
from aifactory.tokens.spans import GUARANTEED, RUN, STRIDE, SharingRow, find_rows, index_name


@pytest.fixture
def write(tmp_path):
    """Shards of documents, each a name and its ids, with their indexes; returns how to search them."""

    def make(*shards, row_len=40, vocab_size=1000, indexed=True):
        names = [f"shard-{i:05d}.arrow" for i in range(len(shards))]
        for name, documents in zip(names, shards, strict=True):
            rows = packed(documents, row_len=row_len, vocab_size=vocab_size)
            (tmp_path / name).write_bytes(shard_bytes(rows))
            if indexed:
                (tmp_path / index_name(name)).write_bytes(index_bytes(rows))
        files = {*names, *map(index_name, names)} if indexed else set(names)

        def search(ids, limit=10_000):
            return find_rows(ids, names, files, lambda _: tmp_path, limit=limit)

        return search

    return make


def packed(documents, *, row_len=40, vocab_size=1000):
    return pack(
        [Document(row=row, ids=ids, loss_mask=[True] * len(ids)) for row, ids in documents],
        row_len=row_len,
        vocab_size=vocab_size,
        pad_id=0,
    )


def random_ids(rng, number, alphabet):
    return [rng.randrange(1, alphabet) for _ in range(number)]


def common_spans(ids, text):
    """Each longest common span: where it begins in the document and in the text, and its length; token by token."""
    found = []
    for i in range(len(ids)):
        for j in range(len(text)):
            if ids[i] == text[j] and not (i and j and ids[i - 1] == text[j - 1]):
                length = 0
                while i + length < len(ids) and j + length < len(text) and ids[i + length] == text[j + length]:
                    length += 1
                found.append((i, j, length))
    return found


def expected_rows(shards, text):
    """What the layout promises: a span is found if a run of it begins at a place of the index."""
    rows = []
    for number, documents in enumerate(shards):
        for row, ids in documents:
            found = [
                (i, j, length)
                for i, j, length in common_spans(ids, text)
                if any(place % STRIDE == 0 for place in range(i, i + length - RUN + 1))
            ]
            if found:
                i, j, length = min(found, key=lambda span: (-span[2], span[1], span[0]))
                rows.append(
                    SharingRow(
                        row=row,
                        shard=f"shard-{number:05d}.arrow",
                        length=length,
                        text_begin=j,
                        row_begin=i,
                        covered=len({at for _, j, length in found for at in range(j, j + length)}),
                        num_spans=len(found),
                    )
                )
    return sorted(rows, key=lambda row: (-row.length, -row.covered, row.row))


@pytest.mark.parametrize("seed", range(40))
def test_just_the_spans_that_hold_a_run_of_the_index_are_found(write, seed):
    rng = random.Random(seed)
    alphabet, row_len = rng.choice([3, 4, 9, 60]), rng.choice([1, 3, 7, 40, 300])
    shards = [
        [(f"{s}-{d}", random_ids(rng, rng.choice([1, 4, 30, 150]), alphabet)) for d in range(rng.randrange(1, 9))]
        for s in range(3)
    ]
    text = random_ids(rng, 10, alphabet)
    for _ in range(4):
        _, ids = rng.choice(rng.choice(shards))
        begin = rng.randrange(len(ids))
        text += ids[begin : begin + rng.randrange(5, 60)] + random_ids(rng, rng.randrange(3), alphabet)
    found = write(*shards, row_len=row_len)(text)

    expected = expected_rows(shards, text)
    assert found.rows == expected
    assert (found.num_rows, found.left_out) == (len(expected), 0)


@pytest.mark.parametrize("row_len", [5, 16, 50, 1000])
def test_a_span_of_the_guaranteed_length_is_found_wherever_it_begins(write, row_len):
    rng = random.Random(row_len)
    document = random_ids(rng, 130, 1000)
    others = [(f"other{i}", random_ids(rng, 70, 1000)) for i in range(9)]
    search = write([*others[:5], ("wanted", document), *others[5:]], row_len=row_len)

    for begin in range(len(document) - GUARANTEED + 1):
        (row,) = search(document[begin : begin + GUARANTEED]).rows
        assert (row.row, row.length, row.row_begin, row.text_begin) == ("wanted", GUARANTEED, begin, 0)


def test_shorter_spans_are_found_at_the_stated_share_of_places(write):
    rng = random.Random(0)
    document = random_ids(rng, 10 * STRIDE + GUARANTEED, 1000)
    search = write([("wanted", document)])

    for length in range(RUN, GUARANTEED):
        found = sum(bool(search(document[begin : begin + length]).rows) for begin in range(10 * STRIDE))
        assert found == 10 * (length - RUN + 1)


def test_a_text_that_shares_nothing_finds_nothing(write):
    rng = random.Random(1)
    search = write([(str(i), random_ids(rng, 80, 500)) for i in range(20)])

    found = search([500 + token for token in random_ids(rng, 200, 400)])

    assert (found.rows, found.num_rows) == ([], 0)


def test_no_span_reaches_from_one_document_into_another(write):
    rng = random.Random(2)
    ids = random_ids(rng, 200, 1000)
    search = write([("a", ids[:40]), ("b", ids[40:57]), ("c", ids[57:100]), ("d", ids[100:])], row_len=100)

    assert {row.row: row.length for row in search(ids).rows} == {"a": 40, "b": 17, "c": 43, "d": 100}


def test_rows_are_ranked_by_the_longest_span_then_by_what_is_covered_then_by_id(write):
    rng = random.Random(3)
    text = random_ids(rng, 100, 1000)
    gap = [1001]
    search = write(
        [("y", text[:30] + gap), ("both", text[50:80] + gap + text[:20])],
        [("x", gap + text[20:50]), ("long", gap * 3 + text[:31]), ("short", text[90:])],
        vocab_size=1100,
    )

    rows = search(text).rows
    assert [row.row for row in rows][:4] == ["long", "both", "x", "y"]
    assert [row.covered for row in rows][:4] == [31, 50, 30, 30]
    assert [row.row for row in search(text, limit=3).rows] == ["long", "both", "x"]
    assert search(text, limit=3).num_rows == len(rows)


@pytest.mark.parametrize("most", [10, 500, 1_000_000])
def test_what_thousands_of_rows_share_hides_no_longer_span_of_one(write, monkeypatch, most):
    monkeypatch.setattr(spans, "MOST_CANDIDATES", most)
    rng = random.Random(4)
    boilerplate, unique = random_ids(rng, 60, 1000), random_ids(rng, 70, 1000)
    common = [(f"{i:04d}", random_ids(rng, 20, 1000) + boilerplate) for i in range(3000)]
    search = write(common[:1500], [*common[1500:], ("wanted", random_ids(rng, 9, 1000) + unique)])

    found = search([*boilerplate, 999, *unique])

    assert (found.rows[0].row, found.rows[0].length) == ("wanted", 70)
    # Each of the 3,000 has 7 whole runs of 60 tokens in the index, and each of them is there or counted.
    assert (found.left_out > 0) == (most < 1_000_000)
    assert found.num_rows == 3001 or found.left_out > 0


def test_no_more_candidates_are_compared_than_is_said(write, monkeypatch):
    rng = random.Random(5)
    text = [7] * 50 + random_ids(rng, 20, 1000)
    search = write([(f"{i:03d}", [7] * 90 + random_ids(rng, 30, 1000)) for i in range(100)])
    compared = []
    follow = spans._follow
    monkeypatch.setattr(spans, "_follow", lambda *args: compared.append(len(args[2])) or follow(*args))

    everything = search(text).left_out + sum(compared)
    monkeypatch.setattr(spans, "MOST_CANDIDATES", 1000)
    compared.clear()

    # 46 runs of one token again and again in the text meet 11 of them in each document.
    assert everything == 46 * 11 * 100
    assert search(text).left_out + sum(compared) == everything
    assert 1000 - 46 < sum(compared) <= 1000


def test_runs_with_equal_hashes_that_are_not_equal_are_no_span(write, monkeypatch):
    rng = random.Random(6)
    search = write([(str(i), random_ids(rng, 80, 1000)) for i in range(5)])
    text = [token + 1000 for token in random_ids(rng, 40, 1000)]
    everywhere = np.zeros(1, np.uint32)
    monkeypatch.setattr(spans, "_hashes", lambda tokens: np.repeat(everywhere, len(next(iter(tokens)))))
    monkeypatch.setattr(spans._Index, "look_up", lambda self, hashes: (np.array([0]), np.array([len(self.hash_M)])))

    assert search(text).rows == []


def test_the_index_of_wide_ids_finds_the_same(write):
    rng = random.Random(7)
    documents = [(str(i), random_ids(rng, 90, 1000)) for i in range(9)]
    text = documents[4][1][20:70]

    assert write(documents)(text) == write(documents, vocab_size=2**17)(text)


def test_the_index_is_sorted_and_its_bytes_depend_on_the_rows_alone():
    rng = random.Random(8)
    documents = [(str(i), random_ids(rng, rng.randrange(1, 200), 5)) for i in range(50)]
    one, two = index_bytes(packed(documents)), index_bytes(packed(documents))
    batch = pa.ipc.open_file(pa.BufferReader(one)).get_batch(0)
    hashes, places = batch.column("hash").to_numpy(), batch.column("place").to_numpy()

    assert one == two
    assert (np.lexsort((places, hashes)) == np.arange(len(places))).all()
    assert len(set(places.tolist())) == len(places)
    whole = sum(len(range(0, len(ids) - RUN + 1, STRIDE)) for _, ids in documents)
    assert len(places) == whole


def test_a_token_set_without_an_index_is_searched_all_the_same(write):
    rng = random.Random(9)
    shards = [[(f"{s}{i}", random_ids(rng, 90, 1000)) for i in range(9)] for s in range(3)]
    text = shards[1][4][1]

    assert write(*shards, indexed=False)(text) == write(*shards)(text)


def test_an_index_that_is_not_there_or_of_other_runs_is_an_error_that_names_it(write, tmp_path, monkeypatch):
    search = write([("a", list(range(50)))])
    monkeypatch.setattr(spans, "RUN", RUN + 1)
    with pytest.raises(StorageError, match=f"runs of 6 tokens in trace-00000.arrow, found {RUN}"):
        search(list(range(50)))
    monkeypatch.undo()
    (tmp_path / "trace-00000.arrow").unlink()
    with pytest.raises(StorageError, match=r"trace-00000\.arrow, found no such file"):
        search(list(range(50)))


def test_a_text_of_less_than_a_run_is_refused(write):
    with pytest.raises(ValueError, match=f"at least {RUN} tokens, found {RUN - 1}"):
        write([("a", list(range(50)))])(list(range(RUN - 1)))

"""Laws of listing: which files there are, how they are cut, and what a piece's digest depends on."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import sqlite3
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter
from servers import s3, s3_server, web  # noqa: F401 - fixtures

from aifactory.config.sources import Source
from aifactory.errors import ConfigError
from aifactory.ingest.cuts import MAX_BYTES, MIN_BYTES
from aifactory.ingest.listing import list_pieces

SOURCES = TypeAdapter(Source)


def source(path="", kind="text", **options):
    values = {"name": "docs", "kind": kind, **({"path": str(path)} if path else {}), **options}
    return SOURCES.validate_python(values)


def listed(path="", kind="text", *, seen=None, **options):
    return list_pieces([source(path, kind, **options)], seen=seen)


def origins(*args, **options):
    return [span.origin for piece in listed(*args, **options).pieces for span in piece.spans]


def digests(*args, **options):
    return [piece.digest for piece in listed(*args, **options).pieces]


TREE = {
    "a.txt": "a",
    "b.md": "b",
    "c.rst": "c",
    "deep/d.txt": "d",
    "deep/er/e.md": "e",
    "deep/er/_f.txt": "f",
    "tests/g.txt": "g",
    "deep/tests/h.txt": "h",
}


# ── which files ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["a.txt", "b.md", "deep/d.txt", "deep/er/_f.txt", "deep/er/e.md", "deep/tests/h.txt", "tests/g.txt"]),
        ({"include": ("*.txt",)}, ["a.txt"]),
        ({"include": ("*.{md,rst}",)}, ["b.md", "c.rst"]),
        ({"include": ("**/*.{md,rst}",)}, ["b.md", "c.rst", "deep/er/e.md"]),
        ({"include": ("{deep/**,a}/*.txt", "a.???")}, ["a.txt", "deep/d.txt", "deep/er/_f.txt", "deep/tests/h.txt"]),
        ({"include": ("[ab].*",)}, ["a.txt", "b.md"]),
        ({"include": ("[!a].*",)}, ["b.md", "c.rst"]),
        ({"exclude": ("**/tests/**", "*.md")}, ["a.txt", "deep/d.txt", "deep/er/_f.txt", "deep/er/e.md"]),
        ({"exclude": ("**/_*",)}, ["a.txt", "b.md", "deep/d.txt", "deep/er/e.md", "deep/tests/h.txt", "tests/g.txt"]),
        ({"exclude": ("deep/?", "tests/_", "deep/**/*.txt")}, ["a.txt", "b.md", "deep/er/e.md", "tests/g.txt"]),
        ({"include": ("**",), "exclude": ("deep/**", "**/*.{txt,md}")}, ["c.rst"]),
    ],
)
def test_globs_choose_files(write_files, options, expected):
    assert origins(write_files(TREE), **options) == expected


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("*.txt", ["a.txt"]),
        ("**/*.txt", ["a.txt", "deep/d.txt", "deep/er/_f.txt", "deep/tests/h.txt", "tests/g.txt"]),
        ("deep/*/*.md", ["er/e.md"]),
        ("dee?/{d.txt,er/e.md}", ["deep/d.txt", "deep/er/e.md"]),
    ],
)
def test_a_path_may_be_a_glob(write_files, glob, expected):
    root = write_files(TREE)

    assert origins(root / glob) == expected
    assert origins(f"file://{root}/{glob}") == expected


def test_a_file_whose_name_looks_like_a_glob_is_that_file(write_files):
    root = write_files({"[a].txt": "x", "a.txt": "y"})

    assert origins(root / "[a].txt") == ["[a].txt"]


def test_a_file_that_is_named_itself_is_read_whatever_its_ending(write_files):
    root = write_files(TREE)

    assert origins(root / "c.rst") == ["c.rst"]
    assert origins(f"file://{root}/c.rst") == ["c.rst"]
    assert origins(f"file://localhost{root}/c.rst") == ["c.rst"]


def test_a_file_of_another_host_is_refused(write_files):
    with pytest.raises(ConfigError, match=r"'docs'.*'example\.org'"):
        origins(f"file://example.org{write_files(TREE)}")


def test_a_link_that_leads_outside_is_not_followed(write_files, tmp_path):
    root = write_files({"a.txt": "a", "in/b.txt": "b"})
    secret = write_files({"secret.txt": "secret", "more/c.txt": "c"}, folder="outside")
    write_files({"x.txt": "its name begins as the root's"}, folder="source-2")
    os.symlink(secret / "secret.txt", root / "leak.txt")
    os.symlink(secret / "more", root / "folder")
    os.symlink(tmp_path / "source-2" / "x.txt", root / "beside.txt")
    os.symlink(root / "a.txt", root / "in" / "again.txt")
    os.symlink(tmp_path / "nowhere", root / "dangling.txt")
    os.symlink(root / "loop.txt", root / "loop.txt")

    assert origins(root) == ["a.txt", "in/again.txt", "in/b.txt"]


def test_what_is_no_regular_file_is_no_part_of_a_source(write_files):
    root = write_files({"a.txt": "a", "folder.txt/b.txt": "b"})
    os.mkfifo(root / "fifo.txt")
    os.symlink("/dev/zero", root / "zero.txt")

    assert origins(root) == ["a.txt", "folder.txt/b.txt"]
    with pytest.raises(ConfigError, match="regular"):
        origins(root / "fifo.txt")


def test_a_missing_path_is_an_error_that_says_where(tmp_path):
    with pytest.raises(ConfigError, match=rf"'docs'.*{tmp_path}/nowhere"):
        origins(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=rf"'docs'.*{tmp_path}/nowhere"):
        origins(tmp_path / "nowhere" / "*.txt")


def test_a_path_without_a_match_is_an_error_that_says_what_was_looked_for(write_files):
    root = write_files({"a.py": "a"})

    with pytest.raises(ConfigError, match=rf"\*\*/\*\.txt.*'docs'.*{root}"):
        origins(root)
    with pytest.raises(ConfigError, match=r"\*\.cfg"):
        origins(root, include=("*.cfg",))
    with pytest.raises(ConfigError, match=r"\*\.cfg"):
        origins(root / "*.cfg")


def test_a_name_that_is_no_utf8_is_escaped(write_files):
    root = write_files({"a.txt": "a"})
    (root / os.fsdecode(b"caf\xe9.txt")).write_text("b")

    assert origins(root) == ["a.txt", "caf\\xe9.txt"]


# ── identity ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_path_of_a_source_bears_no_identity_and_its_names_and_contents_do(write_files):
    here = listed(write_files({"a.txt": "a", "b/c.txt": "c"}, folder="one")).digest

    assert listed(write_files({"a.txt": "a", "b/c.txt": "c"}, folder="two")).digest == here
    assert listed(write_files({"a.txt": "A", "b/c.txt": "c"}, folder="three")).digest != here
    assert listed(write_files({"a.txt": "a", "b/d.txt": "c"}, folder="four")).digest != here
    assert listed(write_files({"a.txt": "a"}, folder="five")).digest != here


def test_what_is_made_of_a_file_bears_identity(write_files):
    root = write_files({"a.jsonl": '{"text": "a", "b": "c"}\n'})
    plain = digests(root, "jsonl")

    assert digests(root, "jsonl", columns={"text": "b"}) != plain
    assert digests(root, "text", include=("**",)) != plain
    assert digests(root, "jsonl", name="other") != plain
    assert digests(root, "jsonl", storage_options={"key": "secret"}, allow_private=True) == plain


def test_a_piece_is_cheap_to_hand_over(write_files):
    root = write_files({f"{i}.txt": "x" for i in range(100)})
    (piece,) = listed(root).pieces

    data = pickle.dumps(piece)

    assert pickle.loads(data) == piece
    assert len(data) < 300 * len(piece.spans)
    assert (piece.source, piece.keyed_by_file, piece.num_files, piece.num_bytes) == ("docs", True, 100, 100)


def test_sources_keep_their_order(write_files):
    a, b = write_files({"a.txt": "a"}, folder="a"), write_files({"b.jsonl": "{}"}, folder="b")
    found = list_pieces([source(b, "jsonl", name="second"), source(a, name="first")])

    assert [piece.source for piece in found.pieces] == ["second", "first"]
    assert not found.pieces[0].keyed_by_file


# ── what is known ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_known_is_not_read_again(write_files):
    root = write_files({f"{i}.jsonl": f'{{"text": "row {i}"}}\n' for i in range(50)})
    first = listed(root, "jsonl")

    again = listed(root, "jsonl", seen=json.loads(json.dumps(first.seen)))

    assert first.bytes_read > 0
    assert again.bytes_read == 0
    assert again.pieces == first.pieces
    assert again.seen == first.seen


def test_a_file_that_changed_is_read_again_and_no_other(write_files):
    root = write_files({f"{i}.txt": f"text {i}" for i in range(20)})
    first = listed(root)
    (root / "7.txt").write_text("TEXT 7")
    (root / "new.txt").write_text("new")
    (root / "3.txt").unlink()

    again = listed(root, seen=first.seen)

    assert again.bytes_read == len("TEXT 7") + len("new")
    assert again.pieces == listed(root).pieces


def test_a_file_of_the_same_size_and_time_with_another_content_is_noticed(write_files):
    root = write_files({"a.txt": "aaaa"})
    first = listed(root)
    before = os.stat(root / "a.txt")
    (root / "a.txt").write_text("bbbb")
    os.utime(root / "a.txt", ns=(before.st_atime_ns, before.st_mtime_ns))

    again = listed(root, seen=first.seen)

    assert again.digest != first.digest
    assert again.digest == listed(root).digest


def test_a_file_that_was_only_touched_is_the_same(write_files):
    root = write_files({"a.txt": "a", "b.txt": "b"})
    first = listed(root)
    os.utime(root / "a.txt", ns=(1, 1))

    again = listed(root, seen=first.seen)

    assert again.digest == first.digest
    assert again.bytes_read == 1


def test_what_was_known_for_other_columns_does_not_count(write_files):
    table = pa.table({"text": ["a"], "other": ["b"]})
    root = write_files({"a.parquet": parquet(table)})
    first = listed(root, "parquet")

    other = listed(root, "parquet", seen=first.seen, columns={"text": "other"})

    assert other.pieces == listed(root, "parquet", columns={"text": "other"}).pieces


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs Linux's /proc")
def test_a_file_that_can_not_be_read_is_listed_and_tried_again():
    # It opens, and reading it at 0 fails, whoever asks.
    first = listed("/proc/self/mem")

    assert [(span.origin, span.sha256) for span in first.pieces[0].spans] == [("mem", "")]
    assert not first.seen["docs"]["files"]


# ── groups ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def many_files(tmp_path):
    """A folder of 3,000 files, 90 MB in all, sparse so that they cost no room."""
    root = tmp_path / "many"
    rng = random.Random(5)
    for i in range(3000):
        folder = root / f"{i % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{i:05d}.txt", "wb") as file:
            file.truncate(rng.randrange(60_000))
    return root


def groups(listing):
    return {piece.digest: piece for piece in listing.pieces}


def test_small_files_are_grouped_and_a_group_is_neither_small_nor_large(many_files):
    found = listed(many_files)
    sizes = [piece.num_bytes for piece in found.pieces]

    assert sum(sizes) == sum(path.stat().st_size for path in many_files.rglob("*.txt"))
    assert max(sizes) <= MAX_BYTES
    assert min(sizes[:-1]) >= MIN_BYTES * 0.7
    assert 5 <= len(sizes) <= 25


def test_a_file_that_comes_or_goes_disturbs_its_own_group_alone(many_files):
    first = listed(many_files)
    rng = random.Random(6)
    files = sorted(many_files.rglob("*.txt"))
    for change in range(12):
        path = rng.choice(files)
        if change % 3 == 0:
            (path.parent / f"{path.stem}-new.txt").write_text("new")
        elif change % 3 == 1 and path.exists():
            path.unlink()
        else:
            path.write_text(f"edited {change}")
        now = listed(many_files, seen=first.seen)
        assert len(groups(now).keys() - groups(first).keys()) <= 3
        assert len(groups(first).keys() - groups(now).keys()) <= 3
        first = now


# ── cuts ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def json_lines(rng, number):
    return [
        json.dumps({"text": f"{i} " + "word " * rng.randrange(20, 400), "id": rng.randrange(10**9)}) + "\n"
        for i in range(number)
    ]


@pytest.fixture
def lines():
    return json_lines(random.Random(7), 30_000)


def parts(path, kind="jsonl", **options):
    return {piece.digest: piece for piece in listed(path, kind, **options).pieces}


def test_a_large_file_is_cut_at_lines_and_nothing_is_lost(tmp_path, lines):
    path = tmp_path / "big.jsonl"
    path.write_text("".join(lines))
    pieces = listed(path, "jsonl").pieces
    data = path.read_bytes()

    assert len(pieces) >= 2
    at = position = 0
    for piece in pieces:
        (span,) = piece.spans
        assert (span.start, piece.first_position) == (at, position)
        assert span.origin == f"big.jsonl#{span.sha256[:8]}"
        assert data[span.stop - 1 : span.stop] == b"\n"
        at = span.stop
        position += data[span.start : span.stop].count(b"\n")
    assert (at, position) == (len(data), len(lines))
    assert max(piece.num_bytes for piece in pieces) <= MAX_BYTES
    assert [piece.num_files for piece in pieces] == [1] + [0] * (len(pieces) - 1)


def test_lines_that_come_or_go_disturb_their_own_part_alone(tmp_path, lines):
    path = tmp_path / "big.jsonl"
    path.write_text("".join(lines))
    before = parts(path)
    rng = random.Random(8)
    for change in range(6):
        at = rng.randrange(len(lines))
        if change % 3 == 0:
            lines[at:at] = json_lines(rng, 3)
        elif change % 3 == 1:
            del lines[at : at + 2]
        else:
            lines[at] = json_lines(rng, 1)[0]
        path.write_text("".join(lines))
        now = parts(path)
        assert len(now.keys() - before.keys()) <= 2
        before = now
    path.write_text("".join(lines) + '{"text": "appended"}\n')
    assert len(parts(path).keys() - before.keys()) == 1


def test_equal_lines_are_cut_by_size(tmp_path):
    path = tmp_path / "big.jsonl"
    path.write_text('{"text": "the same again and again"}\n' * 600_000)

    pieces = listed(path, "jsonl").pieces

    assert len(pieces) >= 2
    assert max(piece.num_bytes for piece in pieces) <= MAX_BYTES


def test_a_line_that_is_longer_than_a_piece_is_not_cut(tmp_path):
    path = tmp_path / "big.jsonl"
    long = '{"text": "' + "x" * (MAX_BYTES + 5_000_000) + '"}\n'
    path.write_text('{"text": "a"}\n' + long + '{"text": "b"}\n' + long[:-1])

    found = listed(path, "jsonl")

    assert sum(piece.num_bytes for piece in found.pieces) == path.stat().st_size
    assert [piece.first_position for piece in found.pieces][:2] == [0, 1]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_csv_is_cut_at_lines_only_where_no_value_may_hold_one(tmp_path, ending):
    path = tmp_path / "big.csv"
    rows = [f"{i},{'word ' * (i % 300)}" for i in range(30_000)]
    rows[100:100] = ["", ""]
    path.write_bytes(ending.join(["id,text", *rows, ""]).encode())

    assert len(listed(path, "csv").pieces) == 1
    pieces = listed(path, "csv", multiline=False).pieces
    assert len(pieces) >= 2
    data = path.read_bytes()
    for piece in pieces[1:]:
        (span,) = piece.spans
        before = data[: span.start].decode().split(ending)
        assert piece.first_position == sum(1 for line in before if line) - 1


def test_a_compressed_file_is_one_piece(tmp_path, lines):
    path = tmp_path / "big.jsonl.gz"
    path.write_bytes(gzip.compress("".join(lines).encode(), 1))

    (piece,) = listed(path, "jsonl").pieces

    assert piece.spans[0].origin == "big.jsonl.gz"


def parquet(table, **options):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def test_parquet_is_cut_at_row_groups_and_hashes_what_is_asked_for(write_files):
    rng = random.Random(9)
    table = pa.table(
        {
            "text": [f"{i} {rng.randbytes(600).hex()}" for i in range(20_000)],
            "other": [rng.random() for _ in range(20_000)],
        }
    )
    root = write_files({"a.parquet": parquet(table, row_group_size=2500)})
    pieces = listed(root, "parquet").pieces
    assert len(pieces) >= 2
    assert [piece.first_position for piece in pieces] == [int(piece.spans[0].start) * 2500 for piece in pieces]

    changed = table.set_column(1, "other", pa.array([0.5] * 20_000))
    root = write_files({"a.parquet": parquet(changed, row_group_size=2500)}, folder="changed")
    assert [piece.digest for piece in listed(root, "parquet").pieces] == [piece.digest for piece in pieces]

    texts = table["text"].to_pylist()
    texts[19_000] = "edited"
    edited = table.set_column(0, "text", pa.array(texts))
    root = write_files({"a.parquet": parquet(edited, row_group_size=2500)}, folder="edited")
    now = [piece.digest for piece in listed(root, "parquet").pieces]
    assert sum((Counter(now) - Counter(piece.digest for piece in pieces)).values()) == 1


# ── object stores, the web ────────────────────────────────────────────────────────────────────────────────────────────


def test_an_object_store_is_a_place_like_any_other(s3, write_files):  # noqa: F811
    for name, text in TREE.items():
        s3.put(f"data/{name}", text.encode())
    s3.put("data-2/x.txt", b"its name begins as the folder's")
    uri = f"s3://{s3.bucket}/data"
    options = {"storage_options": s3.options, "allow_private": True}
    local = write_files(TREE)

    assert origins(uri, **options) == origins(local)
    assert listed(uri, **options).digest == listed(local).digest
    assert origins(uri + "/**/*.md", **options) == ["b.md", "deep/er/e.md"]
    assert origins(uri + "/c.rst", **options) == ["c.rst"]
    first = listed(uri, **options)
    assert listed(uri, seen=first.seen, **options).bytes_read == 0


def test_an_object_store_at_a_private_address_needs_permission(s3, monkeypatch):  # noqa: F811
    s3.put("a.txt", b"a")

    with pytest.raises(ConfigError, match="allow_private"):
        origins(f"s3://{s3.bucket}/", storage_options=s3.options)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://" + s3.options["endpoint_override"])
    with pytest.raises(ConfigError, match="allow_private"):
        origins(f"s3://{s3.bucket}/")
    for where in ("endpoint_override=127.0.0.1:9", "region=x&endpoint_override=127.0.0.1%3A9&scheme=http"):
        with pytest.raises(ConfigError, match="allow_private"):
            origins(f"s3://{s3.bucket}/?{where}")


def test_secrets_of_an_object_store_come_from_the_environment(s3, monkeypatch):  # noqa: F811
    s3.put("a.txt", b"a")
    options = {**s3.options, "secret_key": "${TEST_SECRET_KEY}"}

    with pytest.raises(ConfigError, match="TEST_SECRET_KEY"):
        origins(f"s3://{s3.bucket}/", storage_options=options, allow_private=True)
    monkeypatch.setenv("TEST_SECRET_KEY", "hunter2")
    found = listed(f"s3://{s3.bucket}/", storage_options=options, allow_private=True)
    assert b"hunter2" not in pickle.dumps(found)


def test_an_object_store_that_is_not_there_is_an_error(s3):  # noqa: F811
    for path in (f"s3://{s3.bucket}/nowhere", "s3://no-such-bucket/a"):
        with pytest.raises(ConfigError, match="'docs'"):
            origins(path, storage_options=s3.options, allow_private=True)


def test_a_url_is_one_file_and_is_read_again_when_its_stamp_changes(web):  # noqa: F811
    web.pages = {"/data/a%20b.txt?x=1": (200, {"ETag": '"1"'}, b"content")}
    url = web.url + "/data/a%20b.txt?x=1"

    first = listed(url, allow_private=True)
    assert [span.origin for span in first.pieces[0].spans] == ["a b.txt"]
    again = listed(url, allow_private=True, seen=first.seen)
    assert (again.bytes_read, again.digest) == (0, first.digest)
    web.pages["/data/a%20b.txt?x=1"] = (200, {"ETag": '"2"'}, b"changed")
    changed = listed(url, allow_private=True, seen=first.seen)
    assert (changed.bytes_read, changed.digest == first.digest) == (7, False)
    with pytest.raises(ConfigError, match="allow_private"):
        listed(url)


# ── databases ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_table_is_cut_by_its_key_and_a_change_disturbs_its_own_range_alone(tmp_path):
    rng = random.Random(10)
    connection = sqlite3.connect(tmp_path / "data.db")
    connection.execute("CREATE TABLE items (id INTEGER PRIMARY KEY, text TEXT, other REAL)")
    rows = [(i * 3, "word " * rng.randrange(100, 400), rng.random()) for i in range(25_000)]
    connection.executemany("INSERT INTO items VALUES (?, ?, ?)", rows)
    connection.commit()
    options = {"kind": "sql", "url": f"sqlite:///{tmp_path}/data.db", "table": "items", "key": "id"}
    before = {piece.digest: piece for piece in listed(**options).pieces}
    assert len(before) >= 3

    for statement in (
        "UPDATE items SET text = 'edited' WHERE id = 30000",
        "INSERT INTO items VALUES (30001, 'new', 0)",
        "DELETE FROM items WHERE id = 60",
        "INSERT INTO items VALUES (999999, 'appended', 0)",
    ):
        connection.execute(statement)
        connection.commit()
        now = {piece.digest: piece for piece in listed(**options).pieces}
        assert 1 <= len(now.keys() - before.keys()) <= 2
        before = now
    connection.execute("UPDATE items SET other = 0")
    connection.commit()
    assert {piece.digest for piece in listed(**options).pieces} == before.keys()

"""Laws of the sources: which files there are, and that what is malformed becomes a line of the ledger."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os

import pytest

from aifactory.config import Source
from aifactory.errors import ConfigError, StorageError
from aifactory.ingest.sources import digest_of_files, list_files, read_rows


def origins(root, kind="text", **options):
    return [file.origin for file in list_files([Source(name="docs", kind=kind, path=str(root), **options)])]


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
    root = write_files(TREE)

    assert origins(root, **options) == expected


def test_a_file_that_is_named_itself_is_read_whatever_its_ending(write_files):
    root = write_files(TREE)

    assert origins(root / "c.rst") == ["c.rst"]


def test_a_link_that_leads_outside_is_not_followed(write_files, tmp_path):
    root = write_files({"a.txt": "a", "in/b.txt": "b"})
    secret = write_files({"secret.txt": "secret", "more/c.txt": "c"}, folder="outside")
    os.symlink(secret / "secret.txt", root / "leak.txt")
    os.symlink(secret / "more", root / "folder")
    os.symlink(root / "a.txt", root / "in" / "again.txt")
    os.symlink(tmp_path / "nowhere", root / "dangling.txt")
    os.symlink(root / "loop.txt", root / "loop.txt")

    assert origins(root) == ["a.txt", "in/again.txt", "in/b.txt"]


def test_a_missing_path_is_an_error_that_says_where(tmp_path):
    with pytest.raises(ConfigError, match=rf"'docs'.*{tmp_path}/nowhere"):
        origins(tmp_path / "nowhere")


def test_a_path_without_a_match_is_an_error_that_says_what_was_looked_for(write_files):
    root = write_files({"a.py": "a"})

    with pytest.raises(ConfigError, match=rf"\*\*/\*\.txt.*'docs'.*{root}"):
        origins(root)
    with pytest.raises(ConfigError, match=r"\*\.cfg"):
        origins(root, include=("*.cfg",))


def test_the_path_of_a_source_bears_no_identity_and_its_contents_do(write_files):
    def digest(root):
        return digest_of_files(list_files([Source(name="docs", kind="text", path=str(root))]))

    here = digest(write_files({"a.txt": "a", "b/c.txt": "c"}, folder="one"))

    assert digest(write_files({"a.txt": "a", "b/c.txt": "c"}, folder="two")) == here
    assert digest(write_files({"a.txt": "A", "b/c.txt": "c"}, folder="three")) != here
    assert digest(write_files({"a.txt": "a", "b/d.txt": "c"}, folder="four")) != here


def test_a_name_that_is_no_utf8_is_escaped(write_files):
    root = write_files({"a.txt": "a"})
    (root / os.fsdecode(b"caf\xe9.txt")).write_text("b")

    assert origins(root) == ["a.txt", "caf\\xe9.txt"]


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs Linux's /proc")
def test_an_unreadable_file_is_a_line_of_the_ledger():
    # It opens, and reading it at 0 fails, whoever asks.
    (file,) = list_files([Source(name="docs", kind="text", path="/proc/self/mem")])

    (line,) = read_rows(file)

    assert (line.rule, line.origin, file.sha256) == ("unreadable_file", "mem", "")


@pytest.mark.parametrize("change", ["edit", "delete"])
def test_a_file_that_changed_since_it_was_listed_is_not_read_under_its_old_identity(write_files, change):
    root = write_files({"a.txt": "a"})
    (file,) = list_files([Source(name="docs", kind="text", path=str(root))])
    if change == "edit":
        (root / "a.txt").write_text("b")
    else:
        (root / "a.txt").unlink()

    with pytest.raises(StorageError, match=r"a\.txt"):
        list(read_rows(file))


def test_compressed_lines_are_the_same_rows(write_files):
    lines = "".join(json.dumps({"text": f"row {i} é"}) + "\n" for i in range(5)).encode()
    root = write_files({"a.jsonl": lines, "b.jsonl.gz": gzip.compress(lines)})

    plain, packed = (list(read_rows(f)) for f in list_files([Source(name="docs", kind="jsonl", path=str(root))]))

    assert [row.text for row in plain] == [f"row {i} é" for i in range(5)]
    assert packed == plain


def test_positions_count_lines_and_blank_ones_are_no_rows(write_files):
    root = write_files({"a.jsonl": '{"text": "a"}\n\n  \n{"text": "b"}\r\n'})
    (file,) = list_files([Source(name="docs", kind="jsonl", path=str(root))])

    assert [(row.position, row.text) for row in read_rows(file)] == [(0, "a"), (3, "b")]
    assert not any(dataclasses.asdict(row)["cluster"] for row in read_rows(file))

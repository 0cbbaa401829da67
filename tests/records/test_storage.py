"""python -m pytest tests/records/test_storage.py"""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import resource
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aifactory.errors import StorageError
from aifactory.records.storage import Storage


@pytest.fixture(params=["path", "file", "memory", "mock"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """A local path, a file URI, a filesystem of fsspec without folders, one of pyarrow that wants them made."""
    name = secrets.token_hex(8)
    roots = {
        "path": f"{tmp_path}/r",
        "file": f"file://{tmp_path}/r",
        "memory": f"memory://{name}/r",
        "mock": f"mock:///{name}",
    }
    storage = Storage(roots[request.param])
    yield storage
    if not storage.is_local:
        shutil.rmtree(storage.fetch([], "corpus", "f"), ignore_errors=True)


def test_a_file_comes_back_as_it_was_written(storage: Storage) -> None:
    data = bytes(range(256)) * 100

    stored = storage.write_bytes(data, "corpus", "f", "deep", "a.bin")

    assert storage.read_bytes("corpus", "f", "deep", "a.bin") == data
    assert (stored.name, stored.num_bytes, stored.sha256) == ("a.bin", 25_600, hashlib.sha256(data).hexdigest())
    assert storage.names("corpus", "f") == ["deep"]
    assert storage.names("corpus", "f", "deep") == ["a.bin"]


def test_what_is_not_there_is_none_or_empty(storage: Storage) -> None:
    assert storage.read_bytes("corpus", "f", "a.bin") is None
    assert storage.names("corpus", "f") == []
    storage.delete("corpus", "f")


def test_a_file_is_replaced_whole(storage: Storage) -> None:
    storage.write_bytes(b"long before", "corpus", "f", "a.bin")

    storage.write_bytes(b"after", "corpus", "f", "a.bin")

    assert storage.read_bytes("corpus", "f", "a.bin") == b"after"


def test_a_folder_is_uploaded_with_all_below_it_and_fetched_again(storage: Storage, tmp_path: Path) -> None:
    for name, data in (("b.txt", b"b"), ("a/c.txt", b"c"), ("empty", b"")):
        (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / name).write_bytes(data)

    files = storage.upload(tmp_path / "local", "corpus", "f")
    folder = storage.fetch([file.name for file in files], "corpus", "f")

    assert [(file.name, file.num_bytes) for file in files] == [("a/c.txt", 1), ("b.txt", 1), ("empty", 0)]
    assert [(folder / file.name).read_bytes() for file in files] == [b"c", b"b", b""]


def test_what_is_deleted_is_gone(storage: Storage) -> None:
    storage.write_bytes(b"x", "corpus", "f", "a.bin")
    storage.write_bytes(b"x", "corpus", "g", "a.bin")

    storage.delete("corpus", "f")

    assert storage.read_bytes("corpus", "f", "a.bin") is None
    assert storage.names("corpus") == ["g"]


def test_a_file_and_a_folder_are_deleted_alike_and_what_is_not_there_is_no_error(storage: Storage) -> None:
    storage.write_bytes(b"x", "runs", "f", "a.bin")
    storage.write_bytes(b"x", "runs", "f", "folder", "b.bin")
    for name in ("a.bin", "folder", "nowhere"):
        storage.delete_any("runs", "f", name)

    assert storage.names("runs", "f") == []


def test_a_fetched_copy_never_outlives_what_it_is_a_copy_of(storage: Storage) -> None:
    storage.write_bytes(b"first", "corpus", "f", "a.bin")
    storage.fetch(["a.bin"], "corpus", "f", version="digest-1")
    storage.write_bytes(b"second", "corpus", "f", "a.bin")

    folder = storage.fetch(["a.bin"], "corpus", "f", version="digest-2")

    assert (folder / "a.bin").read_bytes() == b"second"


def test_a_file_has_a_size_and_a_folder_or_nothing_has_none(storage: Storage) -> None:
    storage.write_bytes(b"x" * 1_234, "corpus", "f", "a.bin")
    storage.write_bytes(b"", "corpus", "f", "empty.bin")

    assert storage.size("corpus", "f", "a.bin") == 1_234
    assert storage.size("corpus", "f", "empty.bin") == 0
    assert storage.size("corpus", "f") is None
    assert storage.size("corpus", "f", "b.bin") is None
    assert storage.size("nowhere", "at", "all") is None


def test_a_file_that_need_not_be_durable_is_the_same_file(storage: Storage) -> None:
    durable = storage.write_bytes(b"abc", "f", "one.bin")
    passing = storage.write_bytes(b"abc", "f", "two.bin", durable=False)

    assert storage.read_bytes("f", "two.bin") == b"abc"
    assert (passing.num_bytes, passing.sha256) == (durable.num_bytes, durable.sha256)
    assert storage.names("f") == ["one.bin", "two.bin"]


def test_a_duplicate_is_a_file_of_its_own(storage: Storage) -> None:
    storage.write_bytes(b"first", "parts", "a.bin", durable=False)
    storage.write_bytes(b"is replaced", "corpus", "f", "deep", "b.bin")

    for target in (("corpus", "f", "deep", "b.bin"), ("new", "folders", "c.bin"), ("parts", "a.bin")):
        storage.duplicate([(("parts", "a.bin"), target)])
        storage.duplicate([(("parts", "a.bin"), target)])
        assert storage.read_bytes(*target) == b"first"
        assert storage.names(*target[:-1]) == [target[-1]]

    storage.write_bytes(b"second", "parts", "a.bin")
    assert storage.read_bytes("new", "folders", "c.bin") == b"first"
    storage.write_bytes(b"third", "corpus", "f", "deep", "b.bin")
    assert storage.read_bytes("parts", "a.bin") == b"second"
    storage.delete("parts")
    assert storage.read_bytes("new", "folders", "c.bin") == b"first"


def test_a_duplicate_of_nothing_is_explained_and_leaves_what_was_there(storage: Storage) -> None:
    storage.write_bytes(b"before", "corpus", "a.bin")
    with pytest.raises(StorageError, match=r"expected to write .*/corpus/a\.bin, found: .*none\.bin"):
        storage.duplicate([(("parts", "none.bin"), ("corpus", "a.bin"))])
    assert storage.read_bytes("corpus", "a.bin") == b"before"
    assert storage.names("corpus") == ["a.bin"]


def test_a_local_duplicate_is_a_link_and_takes_no_room(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes(b"abc", "parts", "a.bin")
    storage.duplicate([(("parts", "a.bin"), ("corpus", "b.bin"))])
    assert (tmp_path / "parts/a.bin").samefile(tmp_path / "corpus/b.bin")


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV])
def test_where_there_are_no_links_a_duplicate_is_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    storage = Storage(str(tmp_path))
    storage.write_bytes(b"abc", "parts", "a.bin")
    monkeypatch.setattr(os, "link", refuse)
    storage.duplicate([(("parts", "a.bin"), ("new", "corpus", "b.bin"))])
    assert storage.read_bytes("new", "corpus", "b.bin") == b"abc"
    assert storage.names("new", "corpus") == ["b.bin"]
    assert not (tmp_path / "parts/a.bin").samefile(tmp_path / "new/corpus/b.bin")


@pytest.mark.parametrize("is_duplicate", [False, True])
def test_the_names_of_a_durable_file_and_of_its_new_folders_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_duplicate: bool
) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes(b"abc", "a.bin")
    synced: set[str] = set()
    fsync = os.fsync

    def noted(handle: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    if is_duplicate:
        storage.duplicate([(("a.bin",), ("corpus", "f", "b.bin"))])
    else:
        storage.write_bytes(b"abc", "corpus", "f", "b.bin")

    assert {str(tmp_path), str(tmp_path / "corpus"), str(tmp_path / "corpus" / "f")} <= synced
    assert any(Path(name).name.startswith(".b.bin") for name in synced)
    synced.clear()
    storage.write_bytes(b"abc", "parts", "f", "b.bin", durable=False)
    assert not synced


def test_a_duplicate_that_fails_leaves_nothing_beside_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes(b"abc", "a.bin")
    storage.write_bytes(b"before", "corpus", "b.bin")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="found the disk or the quota full"):
        storage.duplicate([(("a.bin",), ("corpus", "b.bin"))])
    assert os.listdir(tmp_path / "corpus") == ["b.bin"]
    assert storage.read_bytes("corpus", "b.bin") == b"before"


def test_a_file_that_should_be_there_is_named_when_it_is_fetched() -> None:
    storage = Storage(f"memory://{secrets.token_hex(8)}")

    with pytest.raises(StorageError, match=r"expected memory://.*/corpus/f/a.bin, found no such file; publish it"):
        storage.fetch(["a.bin"], "corpus", "f")


@pytest.mark.parametrize("root", ["{}/r", "file://{}/r", "{}/a folder with spaces, % and ü#?", "memory://bucket/r"])
def test_a_storage_is_pickled_by_its_root(root: str, tmp_path: Path) -> None:
    storage = Storage(root.format(tmp_path))
    storage.write_bytes(b"x", "corpus", "f", "a.bin")

    copy = pickle.loads(pickle.dumps(storage))

    assert copy.root == storage.root
    assert copy.read_bytes("corpus", "f", "a.bin") == b"x"
    assert copy.names("corpus", "f") == ["a.bin"]
    assert len(pickle.dumps(storage)) < 400


def test_a_relative_root_means_the_folder_in_which_it_was_named(tmp_path: Path) -> None:
    before = Path.cwd()
    try:
        os.chdir(tmp_path)
        storage = Storage("root/")
    finally:
        os.chdir(before)

    assert storage.root == f"{tmp_path}/root"
    assert storage.path("a", "b") == f"{tmp_path}/root/a/b"


def test_a_bare_scheme_is_not_a_local_path() -> None:
    assert not Storage("memory://").is_local
    assert Storage("s3://bucket/x/").path("a") == "s3://bucket/x/a"


def test_a_root_that_nothing_opens_is_explained() -> None:
    with pytest.raises(StorageError, match="expected a path or a URI that pyarrow or fsspec opens, found 'nosuch://x'"):
        Storage("nosuch://x").read_bytes("a")


def test_a_write_that_cannot_be_done_is_explained(tmp_path: Path) -> None:
    (tmp_path / "corpus").write_text("a file where a folder should be")

    with pytest.raises(StorageError, match=f"expected to write {tmp_path}/corpus/f/a.bin, found"):
        Storage(str(tmp_path)).write_bytes(b"x", "corpus", "f", "a.bin")
    with pytest.raises(StorageError, match=f"expected to read {tmp_path}/corpus/f/a.bin, found"):
        Storage(str(tmp_path)).read_bytes("corpus", "f", "a.bin")


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes(b"before", "f", "old.bin")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
        for name in ("old.bin", "new.bin"):
            with pytest.raises(StorageError, match=f"expected to write .*{name}"):
                storage.write_bytes(b"x" * 100_000, "f", name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert os.listdir(tmp_path / "f") == ["old.bin"]
    assert storage.read_bytes("f", "old.bin") == b"before"


WRITER = """
import sys
from aifactory.records.storage import Storage
storage = Storage(sys.argv[1])
print("ready", flush=True)
at = 0
while True:
    storage.write_bytes(bytes([at % 256]) * 4_000_000, "f", "a.bin")
    at += 1
"""


@pytest.mark.parametrize("delay_s", [0.004, 0.03, 0.11])
def test_a_kill_leaves_a_file_whole_or_absent(tmp_path: Path, delay_s: float) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    time.sleep(delay_s)
    writer.kill()
    writer.wait(timeout=30)
    writer.stdout.close()

    storage = Storage(str(tmp_path))
    data = storage.read_bytes("f", "a.bin")

    assert data is None or (len(data) == 4_000_000 and len(set(data)) == 1)
    assert storage.names("f") == ([] if data is None else ["a.bin"])


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes(b"\0" * 1_000_000, "f", "a.bin")
    seen: set[tuple[int, int]] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            data = storage.read_bytes("f", "a.bin") or b""
            seen.add((len(data), len(set(data))))

    reader = threading.Thread(target=read)
    reader.start()
    for at in range(20):
        storage.write_bytes(bytes([at]) * 1_000_000, "f", "a.bin")
    done.set()
    reader.join()

    assert seen == {(1_000_000, 1)}

"""Laws of parts: there whole or not at all, made once, and never changed under an artifact that took them over."""

from __future__ import annotations

import hashlib
import json
import pickle
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from aifactory.errors import StorageError
from aifactory.records.parts import Part, PartStore, made
from aifactory.records.storage import Content, Storage, StoredFile

FILES = {"train.parquet": b"t" * 1_000, "holdout.parquet": b"h" * 10, "index.arrow": b""}
FIGURES = {"rows": 7, "by_rule": {"length": 2}, "examples": [{"text": "é"}]}


def fingerprint(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


ONE, OTHER = fingerprint("one"), fingerprint("other")


@pytest.fixture(params=["path", "memory", "mock"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> PartStore:
    """In a local folder, on a filesystem of fsspec without folders, and on one of pyarrow that wants them made."""
    name = secrets.token_hex(8)
    roots = {"path": f"{tmp_path}/r", "memory": f"memory://{name}/r", "mock": f"mock:///{name}"}
    return PartStore(Storage(roots[request.param]))


def folder(name: str) -> tuple[str, ...]:
    return "parts", name[:2], name[:32]


# ── there or not ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_part_is_found_as_it_was_published(store: PartStore) -> None:
    assert store.find(ONE) is None

    published = store.publish(ONE, FILES, FIGURES)

    found = store.find(ONE)
    assert found == published
    assert found is not None
    assert found.figures == FIGURES
    assert {name: store.read(found, name) for name in found.files} == FILES
    assert {name: file.sha256 for name, file in found.files.items()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()
    }
    assert store.find(OTHER) is None


def test_a_part_without_its_record_is_none(store: PartStore) -> None:
    store.publish(ONE, FILES, FIGURES)
    store.storage.delete_file(*folder(ONE), "part.json")
    assert store.find(ONE) is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("data", [b"", b"t" * 999, b"t" * 1_001, None])
def test_a_part_with_a_file_of_another_size_or_without_one_is_none_until_it_is_made_anew(
    store: PartStore, name: str, data: bytes | None
) -> None:
    store.publish(ONE, FILES, FIGURES)
    if data is None:
        store.storage.delete_file(*folder(ONE), name)
    else:
        store.storage.write_bytes(data, *folder(ONE), name)

    assert (store.find(ONE) is None) == (data != FILES[name])
    assert store.publish(ONE, FILES, FIGURES) == store.find(ONE)


@pytest.mark.parametrize("record", [b"", b"\0" * 200, b"{", b"[]", b"{}", b'{"files": [], "figures": {}}', b'"part"'])
def test_a_part_whose_record_was_damaged_is_none_and_is_made_anew(store: PartStore, record: bytes) -> None:
    whole = store.publish(ONE, FILES, FIGURES)
    store.storage.write_bytes(record, *folder(ONE), "part.json")
    assert store.find(ONE) is None

    assert made(store, run_here, lambda name: store.publish(name, FILES, FIGURES), [(ONE, ())]) == [whole]


class Failing(Storage):
    """Fails once so many files were written."""

    left = 0

    def write_bytes(
        self, data: Content, *parts: str, durable: bool = True, on_its_way: bool = False, hashed: bool = True
    ) -> StoredFile:
        if not self.left:
            raise StorageError("the disk is full")
        self.left -= 1
        return super().write_bytes(data, *parts, durable=durable, on_its_way=on_its_way, hashed=hashed)


@pytest.mark.parametrize("written", range(len(FILES) + 1))
def test_a_part_that_was_not_published_to_its_end_is_none(tmp_path: Path, written: int) -> None:
    storage = Failing(str(tmp_path))
    storage.left = written
    store = PartStore(storage)

    with pytest.raises(StorageError):
        store.publish(ONE, FILES, FIGURES)

    assert len(storage.names(*folder(ONE))) == written
    assert store.find(ONE) is None
    storage.left = len(FILES) + 1
    assert store.publish(ONE, FILES, FIGURES) == store.find(ONE)


def test_a_file_that_is_gone_is_named_with_what_to_do(store: PartStore) -> None:
    part = store.publish(ONE, FILES, FIGURES)
    store.storage.delete_file(*folder(ONE), "index.arrow")
    with pytest.raises(StorageError, match=r"index\.arrow, found no such file; delete its directory and run the same"):
        store.read(part, "index.arrow")


def test_a_store_and_a_part_are_pickled_into_tasks(tmp_path: Path) -> None:
    store = PartStore(Storage(str(tmp_path)))
    part = store.publish(ONE, FILES, FIGURES)
    there, thing = pickle.loads(pickle.dumps((store, part)))
    assert thing == part
    assert there.read(thing, "train.parquet") == FILES["train.parquet"]


def test_a_part_for_the_next_pass_alone_has_no_hashes_is_found_and_read_and_no_artifact_takes_it(
    store: PartStore,
) -> None:
    pieces = {name: [data[:7], memoryview(data)[7:]] for name, data in FILES.items()}
    part = store.publish(ONE, pieces, FIGURES, hashed=False)

    assert store.find(ONE) == part
    assert {file.sha256 for file in part.files.values()} == {""}
    assert {name: store.read(part, name) for name in FILES} == FILES
    assert {name: store.map(part, name).to_pybytes() for name in FILES} == FILES
    with pytest.raises(AssertionError, match="has a hash"):
        store.take([(part, "train.parquet", ("corpus", "f", "a.parquet"))])


def test_a_mapped_file_keeps_its_bytes_when_another_takes_its_place(store: PartStore) -> None:
    part = store.publish(ONE, FILES, FIGURES)
    mapped = store.map(part, "train.parquet")
    store.publish(ONE, {**FILES, "train.parquet": b"other"}, FIGURES)
    assert mapped.to_pybytes() == FILES["train.parquet"]
    with pytest.raises(StorageError, match=r"none\.arrow, found no such file; delete its directory"):
        store.map(part, "none.arrow")


# ── taken over ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_taken_over_is_the_file_under_its_new_name(store: PartStore) -> None:
    part = store.publish(ONE, FILES, FIGURES)

    (file,) = store.take([(part, "train.parquet", ("corpus", "f", "train-00003.parquet"))])

    assert file == StoredFile(
        name="train-00003.parquet", num_bytes=1_000, sha256=hashlib.sha256(FILES["train.parquet"]).hexdigest()
    )
    assert store.storage.read_bytes("corpus", "f", "train-00003.parquet") == FILES["train.parquet"]
    assert store.find(ONE) == part


def test_neither_a_part_nor_what_took_it_over_sees_the_other_change(store: PartStore) -> None:
    part = store.publish(ONE, FILES, FIGURES)
    target = ("corpus", "f", "train-00000.parquet")
    store.take([(part, "train.parquet", target)])

    store.publish(ONE, {**FILES, "train.parquet": b"other"}, FIGURES)
    assert store.storage.read_bytes(*target) == FILES["train.parquet"]
    store.storage.write_bytes(b"mine", *target)
    again = store.find(ONE)
    assert again is not None
    assert store.read(again, "train.parquet") == b"other"
    store.storage.delete("parts")
    assert store.storage.read_bytes(*target) == b"mine"


def test_taking_over_reads_and_writes_nothing_on_a_local_disk(tmp_path: Path) -> None:
    store = PartStore(Storage(str(tmp_path)))
    part = store.publish(ONE, FILES, FIGURES)
    store.take([(part, "train.parquet", ("corpus", "f", "a.parquet"))])
    assert (tmp_path / "corpus/f/a.parquet").samefile(tmp_path.joinpath(*folder(ONE), "train.parquet"))


# ── made once ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_here(function: Callable[..., None], items: Sequence[tuple[Any, ...]]) -> None:
    for item in items:
        function(*item)


def shuffled(function: Callable[..., None], items: Sequence[tuple[Any, ...]]) -> None:
    run_here(function, sorted(items))


class Maker:
    """Makes parts that hold what they were asked to, and notes which."""

    def __init__(self, store: PartStore) -> None:
        self.store = store
        self.asked: list[str] = []

    def __call__(self, name: str, content: str) -> None:
        self.asked.append(name)
        self.store.publish(name, {"a": content.encode()}, {"content": content})


def contents(store: PartStore, parts: Sequence[Part]) -> list[str]:
    return [store.read(part, "a").decode() for part in parts]


@pytest.mark.parametrize("run", [run_here, shuffled])
def test_parts_come_in_the_order_asked_for_whatever_the_order_they_are_made_in(
    store: PartStore, run: Callable[..., None]
) -> None:
    wanted = [(fingerprint(str(i)), (str(i),)) for i in (5, 3, 9, 1)]
    parts = made(store, run, Maker(store), wanted)
    assert [part.fingerprint for part in parts] == [name for name, _ in wanted]
    assert contents(store, parts) == ["5", "3", "9", "1"]


def test_only_what_is_missing_is_made_and_the_same_one_once(store: PartStore) -> None:
    wanted = [(fingerprint(str(i)), (str(i),)) for i in (1, 2, 1, 3, 2)]
    Maker(store)(*(wanted[1][0], "2"))
    maker = Maker(store)

    parts = made(store, run_here, maker, wanted)

    assert sorted(maker.asked) == sorted({wanted[0][0], wanted[3][0]})
    assert contents(store, parts) == ["1", "2", "1", "3", "2"]
    again = Maker(store)
    assert made(store, run_here, again, wanted) == parts
    assert again.asked == []


def test_what_was_made_before_a_failure_is_not_made_again(store: PartStore) -> None:
    wanted = [(fingerprint(str(i)), (str(i),)) for i in range(6)]

    def until_killed(function: Callable[..., None], items: Sequence[tuple[Any, ...]]) -> None:
        run_here(function, items[:4])
        raise KeyboardInterrupt

    first, second = Maker(store), Maker(store)
    with pytest.raises(KeyboardInterrupt):
        made(store, until_killed, first, wanted)
    parts = made(store, run_here, second, wanted)

    assert (len(first.asked), len(second.asked)) == (4, 2)
    assert contents(store, parts) == [str(i) for i in range(6)]


def test_nothing_is_asked_of_nothing(store: PartStore) -> None:
    assert made(store, run_here, Maker(store), []) == []


def test_a_record_is_plain_json_that_depends_on_the_part_alone(store: PartStore) -> None:
    store.publish(ONE, FILES, FIGURES)
    record = store.storage.read_bytes(*folder(ONE), "part.json")
    store.publish(OTHER, dict(reversed(FILES.items())), dict(reversed(FIGURES.items())))
    assert store.storage.read_bytes(*folder(OTHER), "part.json") == record
    assert record is not None
    assert json.loads(record)["figures"] == FIGURES

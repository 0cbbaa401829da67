"""python -m pytest tests/records/test_artifacts.py"""

from __future__ import annotations

import dataclasses
import pickle
import secrets
from pathlib import Path
from typing import Any

import pytest

from aifactory.errors import StorageError
from aifactory.records.artifacts import ArtifactStore, Corpus, Model, Record, digest_of
from aifactory.records.identity import fingerprint
from aifactory.records.storage import RECORD_NAME, Storage, StoredFile

IDENTITY = fingerprint(stage="corpus", code_version=1, recipe={"seed": 1}, inputs=[])


class LoggingStorage(Storage):
    """A storage that remembers what was written, in order."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.written: list[str] = []

    def write_bytes(self, data: bytes, *parts: str) -> StoredFile:
        self.written.append("/".join(parts))
        return super().write_bytes(data, *parts)


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(
        LoggingStorage(str(tmp_path) if request.param == "local" else f"memory://{secrets.token_hex(8)}")
    )


def record_of(store: ArtifactStore, **changes: Any) -> Record:
    file = store.storage.write_bytes(b"rows", *store.folder("corpus", IDENTITY), "rows.parquet")
    values: dict[str, Any] = {
        "kind": "corpus",
        "fingerprint": IDENTITY,
        "digest": digest_of([file]),
        "code_version": 1,
        "recipe": {"seed": 1},
        "inputs": ["batch/0123456789abcdef"],
        "files": [file],
        "figures": {"rows_in": 3, "rows_kept": 2, "rows_rejected": 1, "rows_holdout": 1},
        "execution": {"workers": 2},
        "seconds": 1.5,
        "joules": 2.5,
        "created_at": 1_000.0,
    }
    return Record(**(values | changes))


def test_without_a_record_there_is_no_artifact(store: ArtifactStore) -> None:
    record = record_of(store)

    assert store.find(Corpus, IDENTITY) is None
    with pytest.raises(StorageError, match=f"expected corpus {record.id} in .*, found no record of it"):
        store.get(Corpus, record.id)


def test_a_published_artifact_is_found_as_it_was_published(store: ArtifactStore) -> None:
    published = store.publish(Corpus, record_of(store))

    found = store.find(Corpus, IDENTITY)

    assert found == published == store.get(Corpus, published.id)
    assert found is not None
    assert found.record == record_of(store)
    assert (found.id, found.rows_in, found.rows_kept) == (f"corpus/{IDENTITY[:16]}", 3, 2)
    assert (found.rows_rejected, found.rows_holdout, found.fingerprint) == (1, 1, IDENTITY)
    assert found.uri == store.storage.path("corpus", IDENTITY[:16])
    assert pickle.loads(pickle.dumps(found)) == found


def test_the_record_is_written_last(store: ArtifactStore) -> None:
    store.publish(Corpus, record_of(store))

    assert isinstance(store.storage, LoggingStorage)
    assert [name.rpartition("/")[2] for name in store.storage.written] == ["rows.parquet", RECORD_NAME]


def test_the_first_record_stays(store: ArtifactStore) -> None:
    first = store.publish(Corpus, record_of(store))

    second = store.publish(Corpus, record_of(store, seconds=9.0, execution={"workers": 8}))

    assert second == first
    assert store.get(Corpus, first.id).record.seconds == 1.5


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"{}", b'{"files": [1]}', b"\xff\xfe", b'"x"'])
def test_a_record_that_cannot_be_read_is_an_error_and_not_an_absence(store: ArtifactStore, text: bytes) -> None:
    store.storage.write_bytes(text, *store.folder("corpus", IDENTITY), RECORD_NAME)

    with pytest.raises(StorageError, match=f"expected a record at .*{RECORD_NAME}, found: .*move the directory away"):
        store.find(Corpus, IDENTITY)


def test_a_record_with_a_key_of_a_newer_version_is_an_error(store: ArtifactStore) -> None:
    text = record_of(store).to_json().replace('"kind"', '"novel": 1, "kind"')
    store.storage.write_bytes(text.encode(), *store.folder("corpus", IDENTITY), RECORD_NAME)

    with pytest.raises(StorageError, match="novel"):
        store.find(Corpus, IDENTITY)


def test_an_artifact_under_the_digits_of_another_is_an_error(store: ArtifactStore) -> None:
    store.publish(Corpus, record_of(store))

    with pytest.raises(StorageError, match=f"expected the artifact .* found {IDENTITY}"):
        store.find(Corpus, IDENTITY[:16] + "0" * 48)


def test_an_artifact_of_another_kind_is_not_found(store: ArtifactStore) -> None:
    published = store.publish(Corpus, record_of(store))

    assert store.find(Model, IDENTITY) is None
    with pytest.raises(StorageError, match="expected model corpus/"):
        store.get(Model, published.id)


def test_the_files_of_an_artifact_are_fetched_to_a_local_folder(store: ArtifactStore) -> None:
    published = store.publish(Corpus, record_of(store))

    assert (store.fetch(published) / "rows.parquet").read_bytes() == b"rows"
    assert store.fetch(published, ["rows.parquet"]) == store.fetch(published)


def test_a_record_survives_json() -> None:
    record = record_of(ArtifactStore(Storage(f"memory://{secrets.token_hex(8)}")))

    copy = Record.from_json(record.to_json())

    assert copy == record
    assert copy.to_json() == record.to_json()
    with pytest.raises(dataclasses.FrozenInstanceError):
        copy.digest = "0"  # type: ignore[misc]


def test_a_digest_depends_on_names_and_bytes_and_not_on_order() -> None:
    a, b = (StoredFile(name=name, num_bytes=1, sha256=name * 64) for name in "ab")

    assert digest_of([a, b]) == digest_of([b, a])
    assert digest_of([a, b]) != digest_of([a])
    assert digest_of([a, b]) != digest_of([dataclasses.replace(a, name="c"), b])
    assert digest_of([a, b]) != digest_of([dataclasses.replace(a, sha256="c" * 64), b])

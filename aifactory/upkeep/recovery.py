"""`aifactory restore CONFIG --from TARGET`: what was lost comes back from a backup: the database, the artifacts, or both.

Artifacts come first, each with its record last; then all rows in one transaction. So a restore that was killed is run again. A
database that is there stays as it is, if it goes on from the snapshot (its audit has the line with which that ended): then what
artifacts it misses are brought back.

What was erased does not come back: a snapshot is refused if it knows less of erasures than the database, the proofs or the storage
root do. Nothing is replayed: a backup that is taken after an erasure deletes those of before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from aifactory.errors import StateError, StorageError
from aifactory.observe.events import log_event
from aifactory.records.artifacts import ERASED_NAME, Artifact, ArtifactStore
from aifactory.records.audit import GENESIS
from aifactory.records.books import Books
from aifactory.records.database import SCHEMA_HEAD
from aifactory.records.storage import RECORD_NAME, Storage
from aifactory.upkeep.backup import (
    ARTIFACTS,
    SNAPSHOTS,
    Snapshot,
    all_artifacts,
    copy_artifact,
    place_artifacts,
    place_of,
    snapshots,
)
from aifactory.upkeep.needs import BY_KIND, NOUNS, needed
from aifactory.upkeep.snapshot import holds_rows, put

RECOVERED = "recovered"
"""Event: the factory was brought back from a backup."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """What has come back."""

    snapshot: str
    taken_at: float
    rows: int | None
    """Of the database; None where it was there, and has stayed."""
    artifacts: int
    """That have come back."""
    artifacts_there: int
    """That were there."""
    lost: Sequence[str]
    """Artifacts that the database needs and that the snapshot does not have: made after it was taken."""

    @property
    def holds(self) -> bool:
        """Whether nothing is missing."""
        return not self.lost

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"holds": self.holds}

    def lines(self) -> list[str]:
        """The report as text."""
        at = datetime.fromtimestamp(self.taken_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        database = (
            f"the database stays as it was found: it goes on from the snapshot {self.snapshot}"
            if self.rows is None
            else f"{self.rows:,} rows of the database, of the snapshot {self.snapshot}: what was acknowledged after {at} is not "
            "in it"
        )
        lines = [f"Restored: {database}; {self.artifacts} artifacts; {self.artifacts_there} were there."]
        return [*lines, *(f"Lost: {each} was made after the snapshot" for each in self.lost)]


def recover(books: Books, source: str, *, snapshot: str | None = None) -> Recovered:
    """Bring a factory back.

    snapshot   the name of one; the newest by default
    Raises     StateError for a snapshot that would bring back what was erased, and for a database that holds another history;
               StorageError for a backup that is not as it was written.
    """
    place = place_of(books, source)
    chosen = _chosen(place, snapshot)
    tables = _tables(place, chosen)
    has_rows = holds_rows_if_there(books)
    _require_no_return(books, place, chosen, has_rows)
    if has_rows and chosen.audit_head != GENESIS:
        faults = [
            fault for fault in books.journal.audited(expect=chosen.audit_head).faults if chosen.audit_head in fault.what
        ]
        if faults:
            raise StateError(
                f"expected no rows of the factory {books.config.name} in {books.database.url.render_as_string()}, or those that the "
                f"snapshot {chosen.name} was taken of, found others. Move that database away, or name another runtime.state_url."
            )
    brought, there = _bring_artifacts(books, place, chosen)
    rows = None
    if not has_rows:
        with books.database.write_at(chosen.schema) as connection:
            rows = put(connection, tables)
    audited = books.journal.audited()
    if audited.faults:
        raise StorageError(
            f"expected the audit as it was written, found {audited.faults[0].what}; the snapshot is not what it was."
        )
    lost = sorted(
        each
        for each in needed(books)
        if books.artifacts.find(BY_KIND[each.partition("/")[0]], each.partition("/")[2]) is None
        and books.artifacts.erased(each) is None
    )
    detail = {"from": place.root, "snapshot": chosen.name, "rows": rows, "artifacts": brought, "lost": lost}
    with books.database.write(serialize=True) as connection:
        books.journal.write_within(connection, RECOVERED, subject=chosen.name, detail=detail)
        books.journal.audit_within(connection, "restore_backup", subject=chosen.name, detail=detail)
    log_event(RECOVERED, snapshot=chosen.name, artifacts=brought)
    return Recovered(
        snapshot=chosen.name,
        taken_at=chosen.taken_at,
        rows=rows,
        artifacts=brought,
        artifacts_there=there,
        lost=lost,
    )


def holds_rows_if_there(books: Books) -> bool:
    """Whether the database has the factory's rows; one that has no schema yet stays without, so that it can be given an older one."""
    return books.database.version() is not None and holds_rows(books.database, books.config.name)


def _chosen(place: Storage, name: str | None) -> Snapshot:
    there = snapshots(place)
    named = [each for each in there if name in (None, each.name)]
    if not named:
        known = ", ".join(each.name for each in there) or "none"
        raise StorageError(
            f"expected {'a snapshot' if name is None else f'the snapshot {name}'} in {place.path(SNAPSHOTS)}, found {known}; name the "
            "TARGET of `aifactory backup`, without the factory's name."
        )
    chosen = named[-1]
    if chosen.schema > SCHEMA_HEAD:
        raise StateError(
            f"expected a snapshot of a schema up to {SCHEMA_HEAD}, found {chosen.schema} in {chosen.name}; use the version of "
            "aifactory that took it."
        )
    return chosen


def _tables(place: Storage, chosen: Snapshot) -> dict[str, bytes]:
    """All of it is looked through before anything is written."""
    import hashlib

    tables = {}
    for table, told in chosen.tables.items():
        data = place.read_bytes(SNAPSHOTS, chosen.name, f"{table}.jsonl.gz")
        if data is None or hashlib.sha256(data).hexdigest() != told["sha256"]:
            raise StorageError(
                f"expected {place.path(SNAPSHOTS, chosen.name, table)}.jsonl.gz as it was written, found "
                f"{'none' if data is None else 'it changed'}; name an older snapshot with --snapshot."
            )
        tables[table] = data
    return tables


def _require_no_return(books: Books, place: Storage, chosen: Snapshot, has_rows: bool) -> None:
    """Refuse what would bring back rows that somebody asked to be forgotten."""
    known: dict[str, str] = {}
    for storage, where in ((books.storage, "the storage root"), (place, "the backup")):
        for name in storage.names("proofs"):
            known[name.removesuffix(".json")] = f"a proof in {where}"
    for noun in NOUNS:
        for fingerprint in books.storage.names(noun.kind):
            data = books.storage.read_bytes(noun.kind, fingerprint, ERASED_NAME)
            if data is not None:
                known[str(json.loads(data)["erasure"])] = f"what was erased of {noun.kind}/{fingerprint}"
    if has_rows:
        known |= {each.id: "the database" for each in books.erasures.all()}
    unknown = {erasure: where for erasure, where in known.items() if erasure not in chosen.erasures}
    if unknown:
        said = ", ".join(f"{erasure} ({where})" for erasure, where in sorted(unknown.items()))
        raise StateError(
            f"expected a snapshot without the rows that were erased, found {chosen.name}, which was taken before {said} had ended and "
            "would bring them back. Nothing was restored: name a snapshot that was taken after it; where there is none, what it holds "
            "must not be used."
        )


def _bring_artifacts(books: Books, place: Storage, chosen: Snapshot) -> tuple[int, int]:
    """Copy what is missing or damaged; how many were brought, and how many were there."""
    source = place_artifacts(place)
    kept = {artifact.id: artifact for artifact in all_artifacts(ArtifactStore(source))}
    missing = sorted(set(chosen.artifacts) - set(kept))
    if missing:
        raise StorageError(
            f"expected {', '.join(missing)} in {source.root}, found no such artifact; name an older snapshot with --snapshot."
        )
    brought = there = 0
    for artifact_id, digest in sorted(chosen.artifacts.items()):
        artifact = kept[artifact_id]
        if artifact.digest != digest:
            raise StorageError(
                f"expected {artifact_id} with the digest {digest} in {source.root}, found {artifact.digest}."
            )
        if _is_whole(books.storage, artifact):
            there += 1
            continue
        # A record whose files are gone says that there is something: it goes first.
        books.storage.delete_file(*books.artifacts.folder(artifact.kind, artifact.fingerprint), RECORD_NAME)
        copy_artifact(source, books.artifacts, artifact)
        brought += 1
    for noun in NOUNS:
        for fingerprint in place.names(ARTIFACTS, noun.kind):
            data = place.read_bytes(ARTIFACTS, noun.kind, fingerprint, ERASED_NAME)
            if data is not None:
                books.storage.write_bytes(data, noun.kind, fingerprint, ERASED_NAME)
    for path, told in chosen.beside.items():
        parts = path.split("/")
        if books.storage.size(*parts) != told["bytes"]:
            copied = books.storage.copy_from(place, parts, parts)
            if copied.sha256 != told["sha256"]:
                raise StorageError(f"expected {place.path(*parts)} as it was written, found it changed.")
    return brought, there


def _is_whole(storage: Storage, artifact: Artifact) -> bool:
    """Whether its record and files of the right size are there."""
    folder = ArtifactStore(storage).folder(artifact.kind, artifact.fingerprint)
    if storage.size(*folder, RECORD_NAME) is None:
        return False
    sizes = storage.sizes(*folder)
    return all(sizes.get(file.name) == file.num_bytes for file in artifact.record.files)

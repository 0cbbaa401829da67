"""`aifactory backup TARGET`: the database and the artifacts of a factory, consistent with one another, in another place.

    TARGET/<factory>/artifacts/<kind>/<fingerprint>/{files…, record.json}     what is there already is not copied again
                     files/  proofs/  listing/                               uploads, proofs of erasures, what the sources looked like
                     snapshots/<time>/{<table>.jsonl.gz}                      the database, as one moment saw it
                     snapshots/<time>.json                                    written last: without it there is no snapshot

The database is read first, then what it names is copied: an artifact's record is on disk before the books name it, so nothing that
a snapshot names can be missing. Not in a backup: parts and checkpoints, which are made again from the rest.

Erased rows. A snapshot that was taken before an erasure ended still has them. So as soon as a backup is taken after that, older
snapshots are deleted, with the artifacts that were erased; and none that knows less of erasures than the factory does is ever
restored. While an erasure is under way no backup is taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aifactory.errors import ConfigError, StateError, StorageError
from aifactory.observe.events import log_event
from aifactory.records.artifacts import ERASED_NAME, Artifact, ArtifactStore, Erased
from aifactory.records.books import Books
from aifactory.records.database import SCHEMA_HEAD
from aifactory.records.identity import canonical_json, hash_text
from aifactory.records.storage import RECORD_NAME, Storage
from aifactory.upkeep.collect import COLLECTED
from aifactory.upkeep.needs import BY_KIND, NOUNS
from aifactory.upkeep.snapshot import take

BACKED_UP = "backed_up"
"""Event: a backup was taken; the detail says where and which."""
VERSION = 1
SNAPSHOTS = "snapshots"
ARTIFACTS = "artifacts"
BESIDE = ("files", "proofs", "listing")
"""What is copied beside artifacts, file by file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What is known of a snapshot; the file that is written last."""

    factory: str
    name: str
    """Its time, UTC."""
    taken_at: float
    schema: str
    """Version of the database's schema."""
    tables: Mapping[str, Mapping[str, Any]]
    """By table: rows and sha256 of its file."""
    artifacts: Mapping[str, str]
    """By id the digest of every artifact that belongs to it."""
    beside: Mapping[str, Mapping[str, Any]]
    """By path the bytes and sha256 of every other file that belongs to it."""
    erasures: Sequence[str]
    """Erasures that had ended: rows that fell to them are not in it."""
    audit_head: str
    """The hash of the last line of the audit."""
    version: int = VERSION

    def to_json(self) -> str:
        """With its own digest."""
        document = asdict(self)
        return json.dumps({**document, "digest": hash_text(canonical_json(document))}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: bytes, *, origin: str) -> Snapshot:
        """Raises   StorageError where it is not as it was written."""
        try:
            document = json.loads(text)
            digest = document.pop("digest")
            if document["version"] != VERSION:
                raise StorageError(
                    f"expected a snapshot of version {VERSION} at {origin}, found {document['version']}; use the aifactory that "
                    "made it."
                )
            if digest != hash_text(canonical_json(document)):
                raise StorageError(f"expected {origin} as it was written, found it changed; take another snapshot.")
            return cls(**document)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StorageError(f"expected a snapshot at {origin}, found: {error}; take another one.") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class BackedUp:
    """What a backup has done."""

    snapshot: str
    where: str
    rows: int
    artifacts: int
    """In all."""
    copied: int
    """Of these artifacts, those that were not there before."""
    copied_bytes: int
    purged: Sequence[str]
    """Snapshots and artifacts that were deleted there: of before an erasure, or more than are kept."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as text."""
        lines = [
            f"Snapshot {self.snapshot} in {self.where}: {self.rows:,} rows, {self.artifacts} artifacts, of which {self.copied} were "
            f"copied now ({self.copied_bytes:,} bytes)."
        ]
        lines += [f"Deleted there: {each}" for each in self.purged]
        return [*lines, f"Bring it back: aifactory restore CONFIG --from {self.where.rpartition('/')[0]}"]


def back_up(books: Books, target: str, *, keep: int = 7) -> BackedUp:
    """Back a factory up.

    target   a folder or a URI; several factories may have the same one
    keep     so many of the newest snapshots stay
    Raises   StateError while an erasure is under way; ConfigError for a target inside the storage root; StorageError.
    """
    place = place_of(books, target)
    _require_no_erasure(books)
    began = len(books.erasures.all())
    journal, name = books.journal, _name(books.journal.clock(), place)
    taken_at = journal.clock()
    tables: dict[str, dict[str, Any]] = {}
    for file in take(books.database, books.config.name):
        place.write_bytes(file.data, SNAPSHOTS, name, f"{file.table}.jsonl.gz")
        tables[file.table] = {"rows": file.num_rows, "sha256": file.sha256}
    copied, copied_bytes, artifacts = 0, 0, {}
    for artifact in all_artifacts(books.artifacts):
        artifacts[artifact.id] = artifact.digest
        num_bytes = copy_artifact(books.storage, ArtifactStore(place_artifacts(place)), artifact)
        copied += num_bytes is not None
        copied_bytes += num_bytes or 0
    beside = {}
    for folder in BESIDE:
        for path, num_bytes in books.storage.sizes(folder).items():
            beside[f"{folder}/{path}"] = _copy_beside(books.storage, place, folder, path, num_bytes)
    for noun in NOUNS:
        for fingerprint in books.storage.names(noun.kind):
            data = books.storage.read_bytes(noun.kind, fingerprint, ERASED_NAME)
            if data is not None:
                place.write_bytes(data, ARTIFACTS, noun.kind, fingerprint, ERASED_NAME)
    _require_no_erasure(books, began)
    _require_whole(books, artifacts, name)
    snapshot = Snapshot(
        factory=books.config.name,
        name=name,
        taken_at=taken_at,
        schema=SCHEMA_HEAD,
        tables=tables,
        artifacts=artifacts,
        beside=beside,
        erasures=sorted(each.id for each in books.erasures.all()),
        audit_head=_audit_head(place, name),
    )
    place.write_bytes(snapshot.to_json().encode(), SNAPSHOTS, f"{name}.json")
    purged = _purge(place, snapshot, keep)
    detail = {"target": place.root, "snapshot": name, "artifacts": len(artifacts), "copied_bytes": copied_bytes}
    with books.database.write(serialize=True) as connection:
        journal.write_within(connection, BACKED_UP, subject=name, detail=detail)
        journal.audit_within(connection, "backup", subject=name, detail=detail)
    log_event(BACKED_UP, snapshot=name, copied=copied, bytes=copied_bytes)
    return BackedUp(
        snapshot=name,
        where=place.root,
        rows=sum(table["rows"] for table in tables.values()),
        artifacts=len(artifacts),
        copied=copied,
        copied_bytes=copied_bytes,
        purged=purged,
    )


# ── where ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def place_of(books: Books, target: str) -> Storage:
    """The factory's own part of a backup. Raises ConfigError where it would be lost with what it is of."""
    root = Storage(target)
    place = Storage(f"{root.root}/{books.config.name}")
    if root.is_local and books.storage.is_local:
        inside, outside = Path(place.path()).resolve(), Path(books.storage.path()).resolve()
        if inside == outside or outside in inside.parents or inside in outside.parents:
            raise ConfigError(
                f"expected a backup outside the storage root {books.storage.path()}, found {target}; name another place, best "
                "on another disk."
            )
    return place


def place_artifacts(place: Storage) -> Storage:
    """Where artifacts lie in a backup."""
    return Storage(f"{place.root}/{ARTIFACTS}")


def snapshots(place: Storage) -> list[Snapshot]:
    """The snapshots of a backup, oldest first."""
    found = []
    for name in place.names(SNAPSHOTS):
        if name.endswith(".json"):
            data = place.read_bytes(SNAPSHOTS, name)
            assert data is not None
            found.append(Snapshot.from_json(data, origin=place.path(SNAPSHOTS, name)))
    return sorted(found, key=lambda snapshot: snapshot.name)


def _name(at: float, place: Storage) -> str:
    """A name after all that are there."""
    name = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
    taken = {each.removesuffix(".json") for each in place.names(SNAPSHOTS)}
    number = 1
    unique = name
    while unique in taken:
        number += 1
        unique = f"{name}-{number}"
    return unique


# ── artifacts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def all_artifacts(store: ArtifactStore) -> list[Artifact]:
    """Every artifact that is there."""
    found = []
    for noun in NOUNS:
        for name in store.storage.names(noun.kind):
            artifact = store.find(noun, name)
            if artifact is not None:
                found.append(artifact)
    return found


def copy_artifact(source: Storage, target: ArtifactStore, artifact: Artifact) -> int | None:
    """Copy an artifact, its record last; the bytes that were copied, None where it is there already.

    Raises   StorageError where a file is not what its record says, on either side.
    """
    folder = target.folder(artifact.kind, artifact.fingerprint)
    there = target.find(BY_KIND[artifact.kind], artifact.fingerprint)
    if there is not None and there.digest == artifact.digest:
        return None
    num_bytes = 0
    for file in artifact.record.files:
        parts = (*folder, *file.name.split("/"))
        copied = target.storage.copy_from(source, parts, parts)
        if copied.sha256 != file.sha256:
            raise StorageError(
                f"expected {source.path(*parts)} as its record says (sha256 {file.sha256}), found {copied.sha256}; `aifactory "
                "verify` rebuilds what a release is made of."
            )
        num_bytes += copied.num_bytes
    target.storage.write_bytes(artifact.record.to_json().encode(), *folder, RECORD_NAME)
    return num_bytes


def _copy_beside(source: Storage, place: Storage, folder: str, path: str, num_bytes: int) -> dict[str, Any]:
    parts = (folder, *path.split("/"))
    # Uploads have random names and never change; what is small is copied again.
    if folder != "files" or place.size(*parts) != num_bytes:
        copied = place.copy_from(source, parts, parts)
        return {"bytes": copied.num_bytes, "sha256": copied.sha256}
    return {"bytes": num_bytes, "sha256": _sha256(place, parts)}


def _sha256(storage: Storage, parts: Sequence[str]) -> str:
    import hashlib

    digest = hashlib.sha256()
    with storage.open_file(*parts) as stream:
        while piece := stream.read(8 << 20):
            digest.update(piece)
    return digest.hexdigest()


# ── consistent ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _require_no_erasure(books: Books, before: int | None = None) -> None:
    found = books.erasures.all()
    open_ones = [each.id for each in found if each.state != "ended"]
    if open_ones or (before is not None and len(found) != before):
        named = open_ones or [each.id for each in found[before:]]
        raise StateError(
            f"expected that nothing is being erased while a backup is taken, found {', '.join(named)}; run `aifactory forget` to "
            "its end, then take the backup."
        )


def _require_whole(books: Books, artifacts: Mapping[str, str], name: str) -> None:
    """Whether all that the books named when they were read is in the backup, but for what nobody needs any more."""
    known = {
        str(event.subject)
        for kind in ("ingested", "tokenized", "trained", "evaluated")
        for event in books.journal.events(event=kind)
    }
    gone = {str(event.subject) for event in books.journal.events(event=COLLECTED)} | set(books.journal.erased())
    for release in books.registry.releases():
        known |= {release.model} if release.withdrawn is None else set()
    missing = sorted(each for each in known - gone - set(artifacts) if _is_missing(books, each))
    if missing:
        raise StorageError(
            f"expected every artifact that the books name in {books.storage.root}, found these missing: {', '.join(missing)}. The "
            f"snapshot {name} is not valid; bring them back from an older backup, then take another one."
        )


def _is_missing(books: Books, artifact_id: str) -> bool:
    """Not there even now: what was made while the backup was taken is for the next one."""
    kind, _, fingerprint = artifact_id.partition("/")
    return kind in BY_KIND and books.artifacts.find(BY_KIND[kind], fingerprint) is None


def _audit_head(place: Storage, name: str) -> str:
    """Of the rows of the snapshot itself."""
    from aifactory.records.audit import GENESIS
    from aifactory.upkeep.snapshot import rows_of

    data = place.read_bytes(SNAPSHOTS, name, "audit.jsonl.gz")
    assert data is not None
    lines = sorted(rows_of(data), key=lambda row: int(row["number"]))
    return str(lines[-1]["hash"]) if lines else GENESIS


# ── what goes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _purge(place: Storage, newest: Snapshot, keep: int) -> list[str]:
    """Delete snapshots that hold what was erased since, those beyond `keep`, and artifacts that none has any more."""
    purged = []
    there = snapshots(place)
    for number, snapshot in enumerate(there):
        holds_erased = set(newest.erasures) - set(snapshot.erasures)
        if snapshot.name != newest.name and (holds_erased or number < len(there) - keep):
            why = (
                f"it holds what {', '.join(sorted(holds_erased))} erased"
                if holds_erased
                else f"{keep} newer ones are kept"
            )
            place.delete_file(SNAPSHOTS, f"{snapshot.name}.json")
            purged.append(f"the snapshot {snapshot.name}: {why}")
    valid = {snapshot.name for snapshot in snapshots(place)}
    for name in place.names(SNAPSHOTS):
        if not name.endswith(".json") and name not in valid:
            place.delete(SNAPSHOTS, name)
    used = {artifact for snapshot in snapshots(place) for artifact in snapshot.artifacts}
    store = ArtifactStore(place_artifacts(place))
    for noun in NOUNS:
        for name in store.storage.names(noun.kind):
            artifact_id = f"{noun.kind}/{name}"
            if artifact_id not in used and store.storage.size(noun.kind, name, RECORD_NAME) is not None:
                erased = store.erased(artifact_id)
                if erased is None:
                    store.storage.delete(noun.kind, name)
                else:
                    store.erase(Erased(**asdict(erased)))
                purged.append(f"{artifact_id}: no snapshot has it any more")
    for folder in BESIDE:
        kept = {path for snapshot in snapshots(place) for path in snapshot.beside}
        for path in place.sizes(folder):
            if f"{folder}/{path}" not in kept:
                place.delete_file(folder, *path.split("/"))
    return purged

"""Artifacts: the typed nouns of the loop, each a directory and a record.

A record keeps what made the artifact (recipe, inputs, code version: its identity), what it is (files, digest, figures)
and how it was made (execution, time, joules). `ArtifactStore.find` is how a stage learns that there is nothing to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from aifactory.errors import ErasedError, StorageError
from aifactory.records.identity import canonical_json, hash_text
from aifactory.records.storage import RECORD_NAME, Storage, StoredFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is known of an artifact; written last, never changed."""

    kind: str
    fingerprint: str
    digest: str
    """SHA-256 over the names and the SHA-256 of the files."""
    code_version: int
    recipe: Mapping[str, Any]
    inputs: Sequence[str]
    """Ids of the artifacts that it was made from."""
    files: Sequence[StoredFile]
    figures: Mapping[str, Any]
    """What the stage counted."""
    execution: Mapping[str, Any] = field(default_factory=dict)
    """Workers, threads, instruction set, versions: under the same execution a rebuild gives the same digest."""
    seconds: float = 0.0
    joules: float = 0.0
    joules_source: str = "estimate"
    """rapl, nvml or estimate."""
    created_at: float = 0.0
    """Seconds since 1970, UTC."""

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.fingerprint[:16]}"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        data = json.loads(text)
        data["files"] = [StoredFile(**file) for file in data["files"]]
        return cls(**data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A published artifact: its record and where it lies."""

    kind: ClassVar[str]
    record: Record
    uri: str

    @property
    def id(self) -> str:
        """`<kind>/<first 16 digits of the fingerprint>`."""
        return self.record.id

    @property
    def fingerprint(self) -> str:
        return self.record.fingerprint

    @property
    def digest(self) -> str:
        return self.record.digest

    @property
    def figures(self) -> Mapping[str, Any]:
        return self.record.figures


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackBatch(Artifact):
    """Sealed feedback: `rows.parquet`, a source like any other."""

    kind = "batch"

    @property
    def num_rows(self) -> int:
        return int(self.figures["rows"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus(Artifact):
    """Clean rows with ids, and the ledger of the rejected."""

    kind = "corpus"

    @property
    def rows_in(self) -> int:
        return int(self.figures["rows_in"])

    @property
    def rows_kept(self) -> int:
        return int(self.figures["rows_kept"])

    @property
    def rows_rejected(self) -> int:
        return int(self.figures["rows_rejected"])

    @property
    def rows_holdout(self) -> int:
        """Kept rows that never train."""
        return int(self.figures["rows_holdout"])

    @property
    def report(self) -> str:
        """Where its page for people lies: a path, or a URI where the storage root is one."""
        return f"{self.uri}/report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSet(Artifact):
    """Packed rows of token ids, each with the ids of its source rows, and the tokenizer."""

    kind = "tokens"

    @property
    def num_rows(self) -> int:
        return int(self.figures["packed_rows"])

    @property
    def num_tokens(self) -> int:
        return int(self.figures["tokens"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Model(Artifact):
    """A folder in Hugging Face form with the tokenizer it was trained with."""

    kind = "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorecard(Artifact):
    """Scores of a model and of what it is compared with, per example, with intervals."""

    kind = "scorecard"


Noun = TypeVar("Noun", bound=Artifact)
ERASED_NAME = "erased.json"
"""Stands in the folder of an artifact that is gone, in the place of its record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Erased:
    """What is known of an artifact that was erased: no text, and nothing that was computed from any."""

    id: str
    digest: str
    erasure: str
    """The erasure that it fell to, which is also the name of its proof."""
    successor: str | None
    """Id of the artifact that holds what is left of it."""
    rows: Mapping[str, int]
    """How many rows were erased from it, by side: train, holdout, rejected."""


class ArtifactStore:
    """Artifacts in one storage root."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def folder(self, kind: str, fingerprint: str) -> tuple[str, str]:
        """The parts of the directory of an artifact, below the root."""
        return kind, fingerprint[:16]

    def find(self, noun: type[Noun], fingerprint: str) -> Noun | None:
        """The artifact with this fingerprint, or None: then there is none, whatever lies there."""
        parts = self.folder(noun.kind, fingerprint)
        text = self.storage.read_bytes(*parts, RECORD_NAME)
        if text is None:
            return None
        try:
            record = Record.from_json(text)
        except (ValueError, TypeError, KeyError) as error:
            raise StorageError(
                f"expected a record at {self.storage.path(*parts, RECORD_NAME)}, found: {error}. It was written by "
                "another version or damaged; move the directory away and run the same command again."
            ) from error
        if record.fingerprint != fingerprint and len(fingerprint) == 64:
            raise StorageError(
                f"expected the artifact {fingerprint} at {self.storage.path(*parts)}, found {record.fingerprint}."
            )
        return noun(record=record, uri=self.storage.path(*parts))

    def get(self, noun: type[Noun], artifact_id: str) -> Noun:
        """The artifact of this id. Raises StorageError if it is not there."""
        kind, _, prefix = artifact_id.partition("/")
        found = self.find(noun, prefix) if kind == noun.kind else None
        erased = self.erased(artifact_id) if found is None else None
        if erased is not None:
            left = "nothing is left of it" if erased.successor is None else f"what is left of it is {erased.successor}"
            raise ErasedError(
                f"expected {artifact_id} in {self.storage.root}, found it erased by {erased.erasure}; {left}."
            )
        if found is None:
            raise StorageError(f"expected {noun.kind} {artifact_id} in {self.storage.root}, found no record of it.")
        return found

    def erased(self, artifact_id: str) -> Erased | None:
        """What is known of an artifact that was erased; None where it was not."""
        kind, _, prefix = artifact_id.partition("/")
        data = self.storage.read_bytes(kind, prefix[:16], ERASED_NAME)
        return None if data is None else Erased(**json.loads(data))

    def left_of(self, noun: type[Noun], artifact_id: str) -> Noun:
        """The artifact of this id, or what is left of it. Raises StorageError where nothing is."""
        while (erased := self.erased(artifact_id)) is not None and erased.successor is not None:
            artifact_id = erased.successor
        return self.get(noun, artifact_id)

    def erase(self, erased: Erased) -> None:
        """Delete all files of an artifact, and say in their place that it was erased. Killed in it, do it again."""
        kind, _, prefix = erased.id.partition("/")
        self.storage.write_bytes(json.dumps(asdict(erased), sort_keys=True).encode(), kind, prefix, ERASED_NAME)
        self.storage.delete_file(kind, prefix, RECORD_NAME)
        for name in self.storage.names(kind, prefix, hidden=True):
            if name != ERASED_NAME:
                self.storage.delete_any(kind, prefix, name)

    def publish(self, noun: type[Noun], record: Record) -> Noun:
        """Write the record of an artifact whose files are already there; from then on it exists.

        The first record stays: under the same execution the second would say the same.
        """
        existing = self.find(noun, record.fingerprint)
        if existing is not None:
            return existing
        parts = self.folder(record.kind, record.fingerprint)
        self.storage.write_bytes(record.to_json().encode(), *parts, RECORD_NAME)
        return noun(record=record, uri=self.storage.path(*parts))

    def fetch(self, artifact: Artifact, names: Sequence[str] | None = None) -> Path:
        """A local folder with the artifact's files (all, or the named ones)."""
        wanted = list(names) if names is not None else [file.name for file in artifact.record.files]
        folder = self.folder(artifact.kind, artifact.fingerprint)
        return self.storage.fetch(wanted, *folder, version=artifact.digest)


def digest_of(files: Sequence[StoredFile]) -> str:
    """The digest of an artifact, from its files in any order."""
    return hash_text(canonical_json(sorted([file.name, file.sha256] for file in files)))

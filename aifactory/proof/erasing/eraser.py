"""The eraser: what it looks for and has found, and how an artifact becomes what is left of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import sqlalchemy as sa

from aifactory.proof.erasing.search import FEEDBACK, Found, Search
from aifactory.proof.where import Where
from aifactory.records.artifacts import Artifact, Corpus, Erased, Noun, Record, digest_of
from aifactory.records.books import Books
from aifactory.records.erasures import Erasure, Kind
from aifactory.records.journal import ERASED
from aifactory.records.rows import from_parquet
from aifactory.records.storage import StoredFile
from aifactory.records.tables import completions

_QUOTED_CHARS = 60
_MOST_QUOTED = 20_000


class Eraser:
    """Looks for rows in a factory, and erases what it finds unless it only looks; what goes through the places shares it."""

    def __init__(self, books: Books, where: Where, erasure: Erasure | None) -> None:
        """`erasure`: none where it only looks."""
        self.books = books
        self.storage = books.storage
        self.erasure = erasure
        self.found = Found()
        self.search = Search(where)
        self.quoted: set[str] = set()
        self.read_tombstones()

    def read_tombstones(self) -> None:
        if self.erasure is not None:
            self.search_for(self.erasure.id)

    def search_for(self, erasure_id: str) -> None:
        """Look for what lies under the tombstones of an erasure, too."""
        erasures = self.books.erasures
        self.search.keyed = erasures.keyed()
        self.search.rows = erasures.buried("row", erasure=erasure_id)
        self.search.said = erasures.buried("completion", erasure=erasure_id)

    def said_again(self) -> list[str]:
        """Completions in the log that lie under tombstones."""
        query = sa.select(completions.c.id).where(completions.c.factory == self.books.journal.factory)
        with self.books.database.read() as connection:
            return [each for each in connection.scalars(query) if self.search.is_said(each)]

    def quote(self, *texts: str) -> None:
        if len(self.quoted) < _MOST_QUOTED:
            self.quoted.update(cut for text in texts if len(cut := text.strip()[:_QUOTED_CHARS]) >= 16)

    def bury(self, rows: Sequence[dict[str, str]]) -> None:
        """Tombstones, before any file is changed."""
        if self.erasure is None or not rows:
            return
        with self.books.database.write(serialize=True) as connection:
            self.books.erasures.bury(connection, self.erasure.id, _tombstones(rows))
        self.read_tombstones()

    def replace(self, old: Artifact, successor: Artifact | None, rows: dict[str, int]) -> None:
        """Note that an artifact is erased and what is left of it; then delete it."""
        erasure = self.erasure
        assert erasure is not None
        left = None if successor is None else successor.id
        if successor is not None:
            self.books.lineage.add(successor)
        if old.id not in self.books.journal.erased():
            with self.books.database.write(serialize=True) as connection:
                told = {"digest": old.digest, "successor": left, "rows": rows}
                if successor is not None:
                    told["successor_digest"] = successor.digest
                    if isinstance(successor, Corpus):
                        self.books.journal.write_within(
                            connection, "ingested", subject=successor.id, detail=dict(successor.figures)
                        )
                self.books.erasures.note(connection, erasure.id, "artifacts", old.id, value=told)
                for place, things in self.found.places.items():
                    if old.id in things:
                        self.books.erasures.note(connection, erasure.id, "places", place, old.id, value=things[old.id])
                self.books.journal.write_within(
                    connection, ERASED, subject=old.id, detail={"erasure": erasure.id, "successor": left, "rows": rows}
                )
        self._erase(old, left, rows)

    def _erase(self, old: Artifact, successor: str | None, rows: dict[str, int]) -> None:
        """Delete an artifact that was noted, here and where this machine has fetched it."""
        assert self.erasure is not None
        self.books.artifacts.erase(
            Erased(id=old.id, digest=old.digest, erasure=self.erasure.id, successor=successor, rows=rows)
        )
        folder = self.books.artifacts.folder(old.kind, old.fingerprint)
        self.storage.drop_cache(*folder, version=old.digest)

    def taken(self, artifact: Artifact, name: str, target: tuple[str, str]) -> StoredFile:
        folder = self.books.artifacts.folder(artifact.kind, artifact.fingerprint)
        self.storage.duplicate([((*folder, name), (*target, name))])
        return next(file for file in artifact.record.files if file.name == name)

    def published(
        self,
        noun: type[Noun],
        old: Record,
        identity: str,
        recipe: dict[str, Any],
        inputs: Sequence[str],
        kept: Sequence[StoredFile],
        figures: Mapping[str, Any],
    ) -> Noun:
        record = Record(
            kind=noun.kind,
            fingerprint=identity,
            digest=digest_of(kept),
            code_version=old.code_version,
            recipe=recipe,
            inputs=inputs,
            files=kept,
            figures=figures,
            execution=old.execution,
            created_at=self.books.journal.clock(),
        )
        return self.books.artifacts.publish(noun, record)

    def every(self, noun: type[Noun]) -> Iterator[Noun]:
        """Every artifact of a kind that there is."""
        for name in self.storage.names(noun.kind):
            artifact = self.books.artifacts.find(noun, name)
            if artifact is not None:
                yield artifact

    def read(self, artifact: Artifact, name: str) -> pa.Table:
        data = self.storage.read_bytes(*self.books.artifacts.folder(artifact.kind, artifact.fingerprint), name)
        return pa.table({}) if data is None else from_parquet(data)


class Place:
    """A kind of place that holds rows, as an eraser comes to it."""

    def __init__(self, eraser: Eraser) -> None:
        self.eraser = eraser
        self.books = eraser.books
        self.storage = eraser.storage
        self.erasure = eraser.erasure
        self.found = eraser.found
        self.search = eraser.search


def _tombstones(rows: Sequence[dict[str, str]]) -> Iterator[tuple[Kind, str, str]]:
    for row in rows:
        outside = "" if row["source"] == FEEDBACK else row["source"]
        yield "row", row["id"], outside
        if row.get("key"):
            yield "key", row["key"], outside

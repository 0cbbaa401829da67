"""Erasures: what was erased because somebody asked to be forgotten, kept as hashes that say nothing without a key.

A tombstone is HMAC-SHA256 (RFC 2104) of the id of a completion or a row, or of a row's key, under a secret of the factory. The
secret lies in the state database alone, in no proof and not in the storage root. Whoever has both secret and id can tell that it was
erased, which is how the data plane keeps it from coming back; whoever has the hashes alone can't test a text that he guesses.
Law      A tombstone is written in the transaction that deletes, or before a file is; so whoever takes up an erasure that was
         killed finds by the tombstones what it had found by names that are gone.
"""

from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, RowMapping

from aifactory.records.identity import hash_parts
from aifactory.records.journal import Journal
from aifactory.records.tables import erasure_keys, erasures, tombstones

Kind = Literal["row", "key", "completion"]
State = Literal["erasing", "retraining", "ended"]
_AT_ONCE = 400
"""Values in one statement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Erasure:
    """One request to forget."""

    id: str
    where_hash: str
    state: State
    found: Mapping[str, Any]
    """What was erased so far."""
    begun_at: float
    ended_at: float | None


@dataclass(frozen=True, slots=True)
class KeyedHash:
    """Hashes of ids under the secret of a factory."""

    secret: bytes

    def of(self, kind: str, text: str) -> str:
        """64 hex digits."""
        return hmac.digest(self.secret, f"{kind}:{text}".encode("utf-8", "surrogatepass"), "sha256").hex()

    @property
    def id(self) -> str:
        """What tells this secret from others and gives nothing of it away."""
        return self.of("secret", "id")[:16]


class Erasures:
    """The erasures and the tombstones of one factory."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.database = journal.database
        self.factory = journal.factory

    # ── the key ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def keyed(self) -> KeyedHash | None:
        """The hashes of this factory; None where nothing was ever erased."""
        with self.database.read() as connection:
            secret = connection.scalar(sa.select(erasure_keys.c.secret).where(erasure_keys.c.factory == self.factory))
        return None if secret is None else KeyedHash(bytes.fromhex(secret))

    def _made_key(self, connection: Connection) -> KeyedHash:
        found = connection.scalar(sa.select(erasure_keys.c.secret).where(erasure_keys.c.factory == self.factory))
        if found is None:
            found = secrets.token_hex(32)
            connection.execute(
                erasure_keys.insert().values(factory=self.factory, secret=found, made_at=self.journal.clock())
            )
        return KeyedHash(bytes.fromhex(found))

    # ── erasures ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, where: str) -> Erasure:
        """The erasure of what `where` says that has not ended, or a new one."""
        with self.database.write(serialize=True) as connection:
            where_hash = self._made_key(connection).of("where", where)
            query = sa.select(erasures).where(
                erasures.c.factory == self.factory, erasures.c.where_hash == where_hash, erasures.c.state != "ended"
            )
            row = connection.execute(query).mappings().one_or_none()
            if row is not None:
                return _erasure(row)
            number = connection.scalar(
                sa.select(sa.func.count()).select_from(erasures).where(erasures.c.factory == self.factory)
            )
            erasure_id = f"forget-{hash_parts(self.factory, where_hash, str(number))[:16]}"
            values = {"id": erasure_id, "where_hash": where_hash, "state": "erasing", "begun_at": self.journal.clock()}
            connection.execute(erasures.insert().values(factory=self.factory, found="{}", **values))
            self.journal.write_within(connection, "forget_begun", subject=erasure_id)
            self.journal.audit_within(connection, "forget", subject=erasure_id, detail={"where_hash": where_hash})
        found = self.get(erasure_id)
        assert found is not None
        return found

    def open(self, where: str) -> Erasure | None:
        """The erasure of what `where` says that was begun and has not ended."""
        found = self.last(where)
        return None if found is None or found.state == "ended" else found

    def last(self, where: str) -> Erasure | None:
        """The last erasure of what `where` says."""
        keyed = self.keyed()
        if keyed is None:
            return None
        where_hash = keyed.of("where", where)
        return next((each for each in reversed(self.all()) if each.where_hash == where_hash), None)

    def get(self, erasure_id: str) -> Erasure | None:
        """The erasure of this id."""
        return next((each for each in self.all() if each.id == erasure_id), None)

    def all(self) -> list[Erasure]:
        """All erasures, oldest first."""
        query = sa.select(erasures).where(erasures.c.factory == self.factory).order_by(erasures.c.begun_at)
        with self.database.read() as connection:
            return [_erasure(row) for row in connection.execute(query).mappings()]

    def note(self, connection: Connection, erasure_id: str, *path: str, value: Any, add: bool = False) -> None:
        """Keep what was found under a path of names, within the caller's transaction; with `add` a number is added to."""
        mine = (erasures.c.factory == self.factory, erasures.c.id == erasure_id)
        found = json.loads(str(connection.scalar(sa.select(erasures.c.found).where(*mine).with_for_update())))
        at = found
        for name in path[:-1]:
            at = at.setdefault(name, {})
        at[path[-1]] = value + at.get(path[-1], 0) if add else value
        connection.execute(erasures.update().where(*mine).values(found=json.dumps(found, sort_keys=True)))

    def move(self, connection: Connection, erasure_id: str, state: State, *, ended_at: float | None = None) -> None:
        """Enter another state, within the caller's transaction."""
        mine = (erasures.c.factory == self.factory, erasures.c.id == erasure_id)
        connection.execute(erasures.update().where(*mine).values(state=state, ended_at=ended_at))

    # ── tombstones ────────────────────────────────────────────────────────────────────────────────────────────────────

    def bury(self, connection: Connection, erasure_id: str, found: Iterable[tuple[Kind, str, str]]) -> None:
        """Keep a tombstone for each kind, text and source, within the caller's transaction; one that is there stays."""
        keyed = self._made_key(connection)
        rows = {keyed.of(kind, text): (kind, source) for kind, text, source in found}
        hashes = list(rows)
        for start in range(0, len(hashes), _AT_ONCE):
            some = hashes[start : start + _AT_ONCE]
            query = sa.select(tombstones.c.hash).where(
                tombstones.c.factory == self.factory, tombstones.c.hash.in_(some)
            )
            known = set(connection.scalars(query))
            new = [
                {"factory": self.factory, "hash": h, "kind": rows[h][0], "source": rows[h][1], "erasure": erasure_id}
                for h in some
                if h not in known
            ]
            if new:
                connection.execute(tombstones.insert(), new)

    def buried(self, *kinds: Kind, erasure: str | None = None) -> frozenset[str]:
        """The hashes of all tombstones of these kinds, of one erasure or of all."""
        query = sa.select(tombstones.c.hash).where(tombstones.c.factory == self.factory, tombstones.c.kind.in_(kinds))
        if erasure is not None:
            query = query.where(tombstones.c.erasure == erasure)
        with self.database.read() as connection:
            return frozenset(connection.scalars(query))

    def by_source(self, *, by: float | None = None) -> dict[str, frozenset[str]]:
        """By source the hashes of what may not come back from it: keys of rows, ids of lines that never became one.

        by   only of erasures that had begun by then, seconds since 1970, UTC
        """
        query = sa.select(tombstones.c.source, tombstones.c.hash).where(
            tombstones.c.factory == self.factory, tombstones.c.kind.in_(("row", "key")), tombstones.c.source != ""
        )
        if by is not None:
            query = query.where(tombstones.c.erasure.in_([each.id for each in self.all() if each.begun_at <= by]))
        found: dict[str, set[str]] = {}
        with self.database.read() as connection:
            for source, hashed in connection.execute(query):
                found.setdefault(source, set()).add(hashed)
        return {source: frozenset(hashes) for source, hashes in sorted(found.items())}

    def tombstones(self, *, by: float | None = None) -> Tombstones | None:
        """What the data plane must not let in again, or what it must not `by` a time; None where nothing was erased from a source."""
        keyed, by_source = self.keyed(), self.by_source(by=by)
        return Tombstones(keyed, by_source) if keyed is not None and by_source else None

    def of_completion(self, completion_id: str) -> str | None:
        """The erasure that a completion fell to; None where it did not."""
        keyed = self.keyed()
        if keyed is None:
            return None
        query = sa.select(tombstones.c.erasure).where(
            tombstones.c.factory == self.factory, tombstones.c.hash == keyed.of("completion", completion_id)
        )
        with self.database.read() as connection:
            return connection.scalar(query)


def _erasure(row: RowMapping) -> Erasure:
    values = {name: row[name] for name in Erasure.__dataclass_fields__}
    return Erasure(**values | {"found": json.loads(row["found"])})


@dataclass(frozen=True, slots=True)
class Tombstones:
    """What may not come back from the sources, as the data plane is handed it; pickled into every task that reads."""

    keyed: KeyedHash
    by_source: Mapping[str, frozenset[str]]

    def digest(self, sources: Iterable[str]) -> str:
        """Tells what may not come back from these sources; empty where all may."""
        told = [(source, sorted(self.by_source[source])) for source in sorted(sources) if source in self.by_source]
        return hash_parts(*(each for source, hashes in told for each in (source, *hashes))) if told else ""

    def keep(self, kind: Kind, source: str, ids: Iterable[str]) -> list[bool]:
        """Which of these ids may come in."""
        erased = self.by_source.get(source, frozenset())
        return [not erased or self.keyed.of(kind, each) not in erased for each in ids]

"""API keys: who may ask what, known by salted hashes of secrets that are kept nowhere.

    aif_<id>_<secret>     what a client sends: 16 hex digits that name the key, 64 that nobody can guess

Of a secret the database holds a random salt and SHA-256 over the salt's digits and the secret's. A slow hash would protect what
people choose; a secret of 256 random bits is found by no trying. The same hash can be reckoned by a proxy in front.
A key that is rotated keeps its id, so what it has done stays in one place; its old secret is good for as long as was asked for.
Each change is a line of the audit, in the same transaction.
Raises   ConfigError, StateError.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import sqlalchemy as sa
from sqlalchemy.engine import Connection, RowMapping

from aifactory.errors import ConfigError
from aifactory.records.journal import ANONYMOUS, Journal
from aifactory.records.limits import NAMES, WINDOWS, Limits, Subject, SubjectKind, limits_of
from aifactory.records.tables import api_key_secrets, api_keys, limits

Scope = Literal["infer", "feedback", "operate"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""infer: ask models, upload files, have batches answered. feedback: say something of answers. operate: the factory's page, and
what it can do."""
_TOKEN = re.compile(r"aif_([0-9a-f]{16})_([0-9a-f]{64})")
_PREFIX = "aif_"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@-]{0,63}")
_ID = "key-"

KeyState = Literal["active", "expired", "revoked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key, without its secret."""

    id: str
    name: str
    team: str | None
    scopes: tuple[Scope, ...]
    created_at: float
    """Seconds since 1970, UTC, as all times here."""
    expires_at: float | None
    revoked_at: float | None

    def state(self, now: float) -> KeyState:
        """Whether it is good for anything."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and now >= self.expires_at else "active"


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedKey:
    """A key with its secret, which nobody is told again."""

    key: ApiKey
    token: str = field(repr=False)
    """What a client sends after `Authorization: Bearer`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    """What is kept of a secret."""

    salt: str
    hash: str
    ends_at: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownKey:
    """A key with what is needed to know it again."""

    key: ApiKey
    secrets: Sequence[Secret]
    """Newest first."""
    is_limited: bool
    """Whether limits hold for it or for its team."""

    def is_proved_by(self, secret: str, now: float) -> bool:
        """Whether this is a secret of it, in the same time whatever it is."""
        proofs = [
            hmac.compare_digest(hash_secret(each.salt, secret), each.hash)
            and (each.ends_at is None or now < each.ends_at)
            for each in self.secrets
        ]
        return any(proofs)


def _pseudo(key_id: str, *, is_limited: bool = False) -> KnownKey:
    key = ApiKey(id=key_id, name=key_id, team=None, scopes=SCOPES, created_at=0.0, expires_at=None, revoked_at=None)
    return KnownKey(key=key, secrets=[Secret(salt="0" * 32, hash="0" * 64, ends_at=None)], is_limited=is_limited)


NOBODY = _pseudo("nobody")
"""A key that nothing proves, for who must not tell by the time that it takes that there is no other."""


def hash_secret(salt: str, secret: str) -> str:
    """SHA-256 of the digits of both, 64 hex digits."""
    return hashlib.sha256((salt + secret).encode()).hexdigest()


def read_token(token: str) -> tuple[str, str] | None:
    """Id and secret of a token; None where it is none of ours, as it is written."""
    found = _TOKEN.fullmatch(token)
    return None if found is None else (_ID + found.group(1), found.group(2))


def is_ours(token: str) -> bool:
    """Whether a token is meant to be one of ours."""
    return token.startswith(_PREFIX)


class Keys:
    """The keys of one factory, and their limits."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.database = journal.database
        self.factory = journal.factory

    # ── changing ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def create(
        self,
        name: str,
        *,
        scopes: Collection[str] = ("infer", "feedback"),
        team: str | None = None,
        expires_in_s: float | None = None,
        limited: Limits | None = None,
    ) -> IssuedKey:
        """A new key; its token is told here and nowhere else. Names may be there twice."""
        for text, what in ((name, "a name"), *(() if team is None else ((team, "the name of a team"),))):
            _check_name(text, what)
        unknown = sorted(set(scopes) - set(SCOPES))
        if unknown or not scopes:
            raise ConfigError(
                f"expected scopes of {', '.join(SCOPES)}, found {', '.join(unknown) or 'none'}; name one of them."
            )
        if expires_in_s is not None and expires_in_s <= 0:
            raise ConfigError(f"expected a time in the future for its end, found {expires_in_s:g} s from now.")
        now, digits, secret = self.journal.clock(), secrets.token_hex(8), secrets.token_hex(32)
        key = ApiKey(
            id=_ID + digits,
            name=name,
            team=team,
            scopes=tuple(scope for scope in SCOPES if scope in scopes),
            created_at=now,
            expires_at=None if expires_in_s is None else now + expires_in_s,
            revoked_at=None,
        )
        with self.database.write(serialize=True) as connection:
            row = {name: getattr(key, name) for name in ApiKey.__dataclass_fields__}
            connection.execute(
                api_keys.insert().values(row | {"factory": self.factory, "scopes": ",".join(key.scopes)})
            )
            self._add_secret(connection, key.id, 1, secret)
            detail = {"name": name, "team": team, "scopes": list(key.scopes), "expires_at": key.expires_at}
            self.journal.audit_within(connection, "key_created", subject=key.id, detail=detail)
            if limited is not None and not limited.are_none:
                self._limit(connection, Subject("key", key.id), limited)
        return IssuedKey(key=key, token=_token(key.id, secret))

    def rotate(self, name: str, *, overlap_s: float = 0.0) -> IssuedKey:
        """A new secret for a key, by its id or its name; the one before is good for `overlap_s` seconds more."""
        if overlap_s < 0:
            raise ConfigError(f"expected an overlap of 0 or more seconds, found {overlap_s:g}.")
        secret = secrets.token_hex(32)
        with self.database.write(serialize=True) as connection:
            key = self._named(connection, name)
            now = self.journal.clock()
            self._require_active(key, now)
            mine = (api_key_secrets.c.factory == self.factory, api_key_secrets.c.key_id == key.id)
            last = connection.scalar(sa.select(sa.func.max(api_key_secrets.c.number)).where(*mine)) or 0
            ends_at = now + overlap_s
            # One that ends sooner already does so.
            later = sa.or_(api_key_secrets.c.ends_at.is_(None), api_key_secrets.c.ends_at > ends_at)
            connection.execute(api_key_secrets.update().where(*mine, later).values(ends_at=ends_at))
            self._add_secret(connection, key.id, last + 1, secret)
            detail = {"name": key.name, "secret": last + 1, "overlap_s": overlap_s}
            self.journal.audit_within(connection, "key_rotated", subject=key.id, detail=detail)
        return IssuedKey(key=key, token=_token(key.id, secret))

    def revoke(self, name: str, *, reason: str = "asked for") -> ApiKey:
        """End a key for good, by its id or its name. One that was revoked before stays as it is."""
        with self.database.write(serialize=True) as connection:
            key = self._named(connection, name, revoked_too=True)
            if key.revoked_at is not None:
                return key
            mine = (api_keys.c.factory == self.factory, api_keys.c.id == key.id)
            connection.execute(api_keys.update().where(*mine).values(revoked_at=self.journal.clock()))
            detail = {"name": key.name, "reason": reason}
            self.journal.audit_within(connection, "key_revoked", subject=key.id, detail=detail)
            return self._named(connection, key.id, revoked_too=True)

    def limit(self, kind: SubjectKind, name: str, limited: Limits) -> Subject:
        """From here on these limits hold for a key, by its id or its name, or for a team, and no others; `anonymous` is whoever
        asks without a key."""
        with self.database.write(serialize=True) as connection:
            if kind == "team":
                _check_name(name, "the name of a team")
            elif name != ANONYMOUS:
                name = self._named(connection, name).id
            subject = Subject(kind, name)
            self._limit(connection, subject, limited)
        return subject

    # ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def all(self) -> list[ApiKey]:
        """All keys, the oldest first."""
        with self.database.read() as connection:
            return self._keys(connection)

    def named(self, name: str) -> ApiKey:
        """The key of this id or name. Raises ConfigError where there is none, or several."""
        with self.database.read() as connection:
            return self._named(connection, name, revoked_too=True)

    def known(self, key_id: str) -> KnownKey | None:
        """The key of this id, as whoever checks it must know it; of `anonymous` whether limits hold for those without one."""
        with self.database.read() as connection:
            if key_id == ANONYMOUS:
                limited = self._limits(connection, [Subject("key", ANONYMOUS)])
                return _pseudo(ANONYMOUS, is_limited=bool(limited))
            found = self._keys(connection, api_keys.c.id == key_id)
            if not found:
                return None
            mine = (api_key_secrets.c.factory == self.factory, api_key_secrets.c.key_id == key_id)
            query = sa.select(api_key_secrets).where(*mine).order_by(api_key_secrets.c.number.desc())
            kept = [Secret(salt=row.salt, hash=row.hash, ends_at=row.ends_at) for row in connection.execute(query)]
            key = found[0]
            subjects = [Subject("key", key_id), *([] if key.team is None else [Subject("team", key.team)])]
            return KnownKey(key=key, secrets=kept, is_limited=bool(self._limits(connection, subjects)))

    def limits_of(self, *subjects: Subject) -> Mapping[Subject, Limits]:
        """The limits that hold for these, or for all; without those for whom none do."""
        with self.database.read() as connection:
            return self._limits(connection, subjects)

    def has_active(self) -> bool:
        """Whether anybody has a key that is good for something."""
        now = self.journal.clock()
        return any(key.state(now) == "active" for key in self.all())

    # ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _add_secret(self, connection: Connection, key_id: str, number: int, secret: str) -> None:
        salt = secrets.token_hex(16)
        values = {"salt": salt, "hash": hash_secret(salt, secret), "created_at": self.journal.clock(), "ends_at": None}
        connection.execute(
            api_key_secrets.insert().values(factory=self.factory, key_id=key_id, number=number, **values)
        )

    def _limit(self, connection: Connection, subject: Subject, limited: Limits) -> None:
        for name in NAMES:
            value = getattr(limited, name)
            if value is not None and value <= 0:
                raise ConfigError(f"expected {name} above 0, found {value:g}; revoke the key to let nothing through.")
        if limited.budget_window not in WINDOWS:
            raise ConfigError(f"expected a window of {', '.join(WINDOWS)}, found {limited.budget_window!r}.")
        mine = {"factory": self.factory, "kind": subject.kind, "name": subject.name}
        connection.execute(limits.delete().where(*(limits.c[name] == value for name, value in mine.items())))
        if not limited.are_none:
            values = {name: getattr(limited, name) for name in Limits.__dataclass_fields__}
            connection.execute(limits.insert().values(mine | values))
        self.journal.audit_within(connection, "limited", subject=str(subject), detail=limited.asked())

    def _limits(self, connection: Connection, subjects: Collection[Subject]) -> dict[Subject, Limits]:
        query = sa.select(limits).where(limits.c.factory == self.factory)
        if subjects:
            query = query.where(sa.tuple_(limits.c.kind, limits.c.name).in_([tuple(each) for each in subjects]))
        rows = connection.execute(query).mappings()
        return {Subject(row["kind"], row["name"]): limits_of(row) for row in rows}

    def _keys(self, connection: Connection, *conditions: sa.ColumnElement[bool]) -> list[ApiKey]:
        query = sa.select(api_keys).where(api_keys.c.factory == self.factory, *conditions)
        return [
            _key_of(row) for row in connection.execute(query.order_by(api_keys.c.created_at, api_keys.c.id)).mappings()
        ]

    def _named(self, connection: Connection, name: str, *, revoked_too: bool = False) -> ApiKey:
        found = self._keys(connection, sa.or_(api_keys.c.id == name, api_keys.c.name == name))
        if len(found) > 1:  # of a name that was used again, the one that is good is meant
            found = [key for key in found if key.revoked_at is None] or found
        if len(found) > 1:
            raise ConfigError(
                f"expected the id or the name of one key, found {len(found)} keys named {name!r}: "
                f"{', '.join(key.id for key in found)}; give the id."
            )
        if not found:
            raise ConfigError(f"expected the id or the name of a key, found {name!r}; `aifactory keys list` shows all.")
        if not revoked_too and found[0].revoked_at is not None:
            raise ConfigError(f"expected a key that is good, found that {name!r} was revoked; create another one.")
        return found[0]

    def _require_active(self, key: ApiKey, now: float) -> None:
        if key.state(now) != "active":
            raise ConfigError(
                f"expected a key that is good, found that {key.id} is {key.state(now)}; create another one."
            )


def _token(key_id: str, secret: str) -> str:
    return f"{_PREFIX}{key_id.removeprefix(_ID)}_{secret}"


def _check_name(text: str, what: str) -> None:
    if not _NAME.fullmatch(text) or text == ANONYMOUS or text.startswith((_ID, _PREFIX)):
        raise ConfigError(
            f"expected {what} of 1 to 64 letters, digits, spaces and ._@- that is not like an id, found {text[:80]!r}."
        )


def _key_of(row: RowMapping) -> ApiKey:
    values: dict[str, Any] = {name: row[name] for name in ApiKey.__dataclass_fields__}
    return ApiKey(**values | {"scopes": tuple(row["scopes"].split(","))})

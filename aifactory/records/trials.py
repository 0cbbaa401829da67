"""Trials: a release beside the one in production, before it takes production or is withdrawn.

shadow   it answers a share of the requests a second time; nobody sees what it says
canary   it answers a share of the keys, or of the requests, in production's place

At most one release is on trial. Entries are only added; the last one that begins or ends a trial holds. Here is what
they say; the registry writes them, each in the transaction that does what it tells of.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aifactory.records.database import Database
from aifactory.records.feedback import storable
from aifactory.records.identity import canonical_json, share_of
from aifactory.records.tables import completions, outcomes, shadow_answers, trials

TrialKind = Literal["shadow", "canary"]
ShareOf = Literal["key", "request"]
TrialAction = Literal["shadow", "canary", "withdraw", "promote", "quarantine", "lift"]
_ENDS = ("withdraw", "promote")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A release that is tried, and of how much."""

    factory: str
    number: int
    """Of the entry that holds: another one for each share."""
    begun: int
    """Of the entry with which the trial began."""
    release: int
    kind: TrialKind
    share: float
    """From 0 to 1."""
    by: ShareOf
    """What the share is one of."""
    at: float
    """Since when, seconds since 1970, UTC."""

    @property
    def name(self) -> str:
        """The release, as answers call it."""
        return f"{self.factory}-r{self.release}"

    def takes(self, subject: str) -> bool:
        """Whether a key or a request is one of the share. While the share rises, whoever is stays one of them.

        Another release is tried on other keys: no one is always the first.
        """
        return share_of(subject, salt=self.name) < self.share


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialEntry:
    """One line of the history of trials."""

    number: int
    release: int
    action: TrialAction
    share: float
    by: ShareOf
    begun: int
    quarantined: bool
    reason: Mapping[str, Any]
    at: float
    key_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a request went while a release was on trial."""

    trial: int
    """Number of the entry that held."""
    release: int
    """Who was asked: the one on trial, or the one in production."""
    failed: bool
    """There was no answer, by no fault of the client's."""
    seconds: float
    """From its turn to the last token."""
    first_s: float | None = None
    """From its turn to the first token; None: there was none."""
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowAnswer:
    """What a release in the shadow answered, which nobody saw."""

    completion: str
    """The answer that was given to the same request."""
    release: int
    answer: str
    finish_reason: str
    prompt_tokens: int
    answer_tokens: int


def current_trial(connection: Connection, factory: str) -> Trial | None:
    """The trial that is on; None where none is."""
    query = (
        sa.select(trials)
        .where(trials.c.factory == factory, trials.c.action.in_([*get_args(TrialKind), *_ENDS]))
        .order_by(trials.c.number.desc())
        .limit(1)
    )
    row = connection.execute(query).mappings().one_or_none()
    if row is None or row["action"] in _ENDS:
        return None
    values = {name: row[name] for name in ("factory", "number", "begun", "release", "share", "by", "at")}
    return Trial(kind=row["action"], **values)


def add_entry(
    connection: Connection,
    factory: str,
    action: TrialAction,
    release: int,
    *,
    at: float,
    key_id: str,
    reason: Mapping[str, Any],
    share: float = 0.0,
    by: ShareOf = "key",
    begun: int | None = None,
    quarantined: bool = False,
) -> int:
    """Write the next entry; its number. `begun` is that of a trial that goes on or ends; None: one begins."""
    last = connection.scalar(sa.select(sa.func.max(trials.c.number)).where(trials.c.factory == factory))
    number = (last or 0) + 1
    connection.execute(
        trials.insert().values(
            factory=factory,
            number=number,
            release=release,
            action=action,
            share=share,
            by=by,
            begun=number if begun is None else begun,
            quarantined=int(quarantined),
            reason=canonical_json(dict(reason)),
            at=at,
            key_id=key_id,
        )
    )
    return number


def read_entries(connection: Connection, factory: str) -> list[TrialEntry]:
    """All entries, oldest first."""
    rows = connection.execute(sa.select(trials).where(trials.c.factory == factory).order_by(trials.c.number)).mappings()
    return [
        TrialEntry(
            **{name: row[name] for name in ("number", "release", "action", "share", "by", "begun", "at", "key_id")},
            quarantined=bool(row["quarantined"]),
            reason=json.loads(row["reason"]),
        )
        for row in rows
    ]


def quarantined_releases(connection: Connection, factory: str) -> dict[int, Mapping[str, Any]]:
    """The releases in quarantine, each with the reason: those whose last entry says so."""
    last = {entry.release: entry for entry in read_entries(connection, factory)}
    return {release: entry.reason for release, entry in last.items() if entry.quarantined}


class TrialLog:
    """What came of trials: how requests went, and what shadows answered."""

    def __init__(self, database: Database, factory: str, clock: Callable[[], float]) -> None:
        self.database = database
        self.factory = factory
        self._clock = clock

    def add(self, entries: Sequence[Outcome]) -> None:
        """Keep how requests went."""
        if not entries:
            return
        rows = [
            {**asdict(each), "failed": int(each.failed), "factory": self.factory, "at": self._clock()}
            for each in entries
        ]
        with self.database.write() as connection:
            connection.execute(outcomes.insert(), rows)

    def add_shadows(self, answers: Sequence[ShadowAnswer]) -> None:
        """Keep what a shadow answered. One whose completion is gone, or was shadowed before, is left out."""
        with self.database.write(serialize=True) as connection:
            for each in answers:
                mine = (completions.c.factory == self.factory, completions.c.id == each.completion)
                there = connection.scalar(sa.select(completions.c.at).where(*mine))
                known = connection.scalar(
                    sa.select(shadow_answers.c.at).where(
                        shadow_answers.c.factory == self.factory,
                        shadow_answers.c.completion == each.completion,
                        shadow_answers.c.release == each.release,
                    )
                )
                if there is None or known is not None:
                    continue
                values = asdict(each) | {"factory": self.factory, "at": self._clock()}
                values["answer"] = storable(each.answer)
                connection.execute(shadow_answers.insert().values(values))

    def outcomes(self, *, since: int) -> list[Outcome]:
        """How requests went from an entry of the registry on, in their order."""
        names = Outcome.__dataclass_fields__
        query = (
            sa.select(*(outcomes.c[name] for name in names))
            .where(outcomes.c.factory == self.factory, outcomes.c.trial >= since)
            .order_by(outcomes.c.seq)
        )
        with self.database.read() as connection:
            rows = connection.execute(query).mappings()
            return [Outcome(**{**row, "failed": bool(row["failed"])}) for row in rows]

    def shadows(self, *, release: int) -> list[ShadowAnswer]:
        """What a release answered in the shadow, in the order of the completions' ids."""
        query = (
            sa.select(*(shadow_answers.c[name] for name in ShadowAnswer.__dataclass_fields__))
            .where(shadow_answers.c.factory == self.factory, shadow_answers.c.release == release)
            .order_by(shadow_answers.c.completion)
        )
        with self.database.read() as connection:
            return [ShadowAnswer(**row) for row in connection.execute(query).mappings()]

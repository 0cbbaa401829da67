"""Verdicts: what a judge says of answers that were given. They are monitoring: they may trigger, and promote nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from aifactory.records.journal import Journal
from aifactory.records.tables import completions, verdicts

JUDGE_MEASURED = "judge_measured"
"""Event: how far the judge that `subject` identifies agrees with people, in the detail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """On one answer."""

    completion: str
    release: int
    judge: str
    """What the judge is, as `config.Judge.measured_as` names it."""
    is_bad: bool | None
    """None where it said neither."""


class Verdicts:
    """The verdicts on the answers of one factory. Whoever erases an answer erases what was said of it."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.database = journal.database
        self.factory = journal.factory

    def add(self, entries: Sequence[Verdict]) -> None:
        """Keep them; one that is there already stays as it is, and one on an answer that is gone is dropped."""
        with self.database.write(serialize=True) as connection:
            mine = completions.c.factory == self.factory
            ids = [entry.completion for entry in entries]
            there = set(connection.scalars(sa.select(completions.c.id).where(mine, completions.c.id.in_(ids))))
            known = self._known(connection, ids)
            for entry in entries:
                if entry.completion in there - known:
                    connection.execute(
                        verdicts.insert().values(
                            factory=self.factory,
                            completion=entry.completion,
                            release=entry.release,
                            judge=entry.judge,
                            bad=None if entry.is_bad is None else int(entry.is_bad),
                            at=self.journal.clock(),
                        )
                    )

    def known(self, ids: Collection[str]) -> set[str]:
        """Which of these answers have a verdict."""
        with self.database.read() as connection:
            return self._known(connection, ids)

    def number_since(self, at: float) -> int:
        """Verdicts that were given since then."""
        query = sa.select(sa.func.count()).select_from(verdicts)
        with self.database.read() as connection:
            return int(connection.scalar(query.where(verdicts.c.factory == self.factory, verdicts.c.at >= at)) or 0)

    def of(self, release: int, *, judge: str, since: float) -> list[bool]:
        """Whether each answer of a release that was given after `since` is bad, by this judge, in the order of the answers; without
        those of which it says neither."""
        joined = verdicts.join(
            completions,
            sa.and_(completions.c.factory == verdicts.c.factory, completions.c.id == verdicts.c.completion),
        )
        query = (
            sa.select(verdicts.c.bad)
            .select_from(joined)
            .where(verdicts.c.factory == self.factory, verdicts.c.release == release, verdicts.c.judge == judge)
            .where(verdicts.c.bad.is_not(None), completions.c.at > since)
            .order_by(completions.c.at, completions.c.id)
        )
        with self.database.read() as connection:
            return [bool(bad) for bad in connection.scalars(query)]

    def _known(self, connection: sa.Connection, ids: Collection[str]) -> set[str]:
        query = sa.select(verdicts.c.completion).where(
            verdicts.c.factory == self.factory, verdicts.c.completion.in_(sorted(ids))
        )
        return set(connection.scalars(query))

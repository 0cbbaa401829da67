"""The registry: releases, and which of them a channel serves.

A promotion is a monotonic number; what holds is the highest. A rollback is a new entry. A promotion, the end of its
cycle, its journal line and its audit line are one transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aifactory.errors import StateError
from aifactory.records.identity import canonical_json
from aifactory.records.journal import Cycle, Journal
from aifactory.records.tables import promotions, releases

PRODUCTION = "production"
REFERENCE = "registry:"
"""Begins the name of a model that is a release: `registry:production`, or its name or number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A model that was found fit to serve."""

    factory: str
    number: int
    model: str
    """Id of the model artifact."""
    scorecard: str
    """Id of the scorecard on which it was promoted."""
    trigger: str
    """The cycle that made it."""
    created_at: float
    withdrawn: str | None = None
    """The erasure for which it may not be served any more, and its model is gone."""

    @property
    def name(self) -> str:
        """What answers call it (`model` in OpenAI's interface)."""
        return f"{self.factory}-r{self.number}"

    @property
    def fingerprint(self) -> str:
        """What answers carry as `system_fingerprint`: it changes if and only if the model does."""
        return "fp_" + self.model.partition("/")[2][:12]


class Registry:
    """The releases of one factory."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.database = journal.database
        self.factory = journal.factory

    def production(self, channel: str = PRODUCTION) -> Release | None:
        """The release that the channel serves; None before the first."""
        with self.database.read() as connection:
            current = self._current(connection, channel)
            return None if current is None else self._release(connection, current[1])

    def release(self, number: int) -> Release | None:
        """The release of this number."""
        with self.database.read() as connection:
            return self._release(connection, number)

    def releases(self) -> list[Release]:
        """All releases, oldest first."""
        with self.database.read() as connection:
            query = sa.select(releases).where(releases.c.factory == self.factory).order_by(releases.c.number)
            return [Release(**row) for row in connection.execute(query).mappings()]

    def bound_models(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """Of the names that begin with `registry:` each with the id of the model that it stands for now, in their order.

        Raises   StateError for a release that is not there.
        """
        return [(name, self.named(name).model) for name in names if name.startswith(REFERENCE)]

    def named(self, name: str) -> Release:
        """The release of this name or number, or the one in `production`; `registry:` may stand before it.

        Raises   StateError if there is none.
        """
        wanted = name.removeprefix(REFERENCE)
        if wanted == PRODUCTION:
            current = self.production()
            if current is None:
                raise StateError(
                    f"expected a release of the factory {self.factory} in production for {name}, found none yet; run a cycle "
                    "without the steps that ask for it first, or name a folder."
                )
            return current
        known = self.releases()
        for release in known:
            if wanted in (release.name, str(release.number)):
                return release
        raise StateError(
            f"expected a release of the factory {self.factory} for {name}, found "
            f"{', '.join(release.name for release in known) or 'none'}; name one of them, by its number or its name."
        )

    def promotions(self, channel: str = PRODUCTION) -> list[Mapping[str, Any]]:
        """The channel's history, oldest first."""
        with self.database.read() as connection:
            query = (
                sa.select(promotions)
                .where(promotions.c.factory == self.factory, promotions.c.channel == channel)
                .order_by(promotions.c.number)
            )
            return [dict(row) for row in connection.execute(query).mappings()]

    def promote(
        self, cycle: Cycle, *, model: str, scorecard: str, decision: Mapping[str, Any], channel: str = PRODUCTION
    ) -> Release:
        """Make the cycle's model a release and let the channel serve it: compare and swap.

        Raises   FencedError if a newer attempt has taken the cycle over; StateError if another release went into
                 production since the cycle began: the candidate was never compared with that one.
        """
        with self.database.write(serialize=True) as connection:
            self.journal.close_cycle(connection, cycle, "promoted", decision=decision)
            current = self._current(connection, channel)
            serving = None if current is None else current[1]
            expected = cycle.bound.replaces or cycle.bound.champion
            if serving != expected:
                raise StateError(
                    f"expected release {expected} on the channel {channel}, which the candidate was to follow, found "
                    f"{serving}. Begin a new cycle."
                )
            last = connection.scalar(
                sa.select(sa.func.max(releases.c.number)).where(releases.c.factory == self.factory)
            )
            release = Release(
                factory=self.factory,
                number=(last or 0) + 1,
                model=model,
                scorecard=scorecard,
                trigger=cycle.trigger,
                created_at=self.journal.clock(),
            )
            connection.execute(
                releases.insert().values(
                    factory=release.factory,
                    number=release.number,
                    model=model,
                    scorecard=scorecard,
                    trigger=cycle.trigger,
                    created_at=release.created_at,
                )
            )
            self._point(connection, channel, current, release.number, "promote", decision, cycle)
            return release

    def reject(self, cycle: Cycle, *, scorecard: str, decision: Mapping[str, Any]) -> None:
        """End the cycle without a release. Raises FencedError as `promote` does."""
        with self.database.write(serialize=True) as connection:
            self.journal.close_cycle(connection, cycle, "rejected", decision=decision)
            self.journal.write_within(
                connection,
                "rejected",
                cycle=cycle.trigger,
                attempt=cycle.attempt,
                subject=scorecard,
                detail=decision,
            )

    def rollback(self, *, to: int | None = None, reason: str, channel: str = PRODUCTION) -> Release:
        """Serve an older release again: the one before the current, or the one that is named.

        Raises   StateError if there is none.
        """
        with self.database.write(serialize=True) as connection:
            current = self._current(connection, channel)
            if current is None:
                raise StateError(f"expected a release on the channel {channel}, found none yet; run a cycle first.")
            target = to if to is not None else self._before(connection, channel, current[1])
            release = None if target is None else self._release(connection, target)
            if release is not None and release.withdrawn is not None:
                raise StateError(
                    f"expected a release that may be served, found {release.name}, whose model is gone: erased by "
                    f"{release.withdrawn}."
                )
            if release is None or release.number == current[1]:
                raise StateError(
                    f"expected an older release to go back to, found {target}; the channel {channel} serves "
                    f"{current[1]}. `aifactory status` lists the releases."
                )
            self._point(connection, channel, current, release.number, "rollback", {"reason": reason}, None)
            return release

    def withdraw(self, numbers: Iterable[int], *, erasure: str, channel: str = PRODUCTION) -> list[Release]:
        """Nobody serves these releases any more, nor goes back to them; those that were withdrawn by this call.

        Raises   StateError if one of them is what the channel serves.
        """
        wanted = sorted(set(numbers))
        with self.database.write(serialize=True) as connection:
            current = self._current(connection, channel)
            if current is not None and current[1] in wanted:
                raise StateError(
                    f"expected another release on the channel {channel} before {self.factory}-r{current[1]} is withdrawn, found "
                    "none; run the same command again."
                )
            withdrawn = []
            for number in wanted:
                release = self._release(connection, number)
                if release is None or release.withdrawn is not None:
                    continue
                mine = (releases.c.factory == self.factory, releases.c.number == number)
                connection.execute(releases.update().where(*mine).values(withdrawn=erasure))
                self.journal.write_within(connection, "withdrawn", subject=release.name, detail={"erasure": erasure})
                self.journal.audit_within(connection, "withdraw", subject=release.name, detail={"erasure": erasure})
                withdrawn.append(release)
            return withdrawn

    # ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _point(
        self,
        connection: Connection,
        channel: str,
        current: tuple[int, int] | None,
        release: int,
        action: str,
        reason: Mapping[str, Any],
        cycle: Cycle | None,
    ) -> None:
        connection.execute(
            promotions.insert().values(
                factory=self.factory,
                channel=channel,
                number=1 if current is None else current[0] + 1,
                release=release,
                previous=None if current is None else current[1],
                action=action,
                reason=canonical_json(dict(reason)),
                at=self.journal.clock(),
                key_id=self.journal.key_id,
            )
        )
        name = f"{self.factory}-r{release}"
        past_tense = {"promote": "promoted", "rollback": "rolled_back"}[action]
        self.journal.write_within(
            connection,
            past_tense,
            cycle=None if cycle is None else cycle.trigger,
            attempt=None if cycle is None else cycle.attempt,
            subject=name,
            detail=reason,
        )
        self.journal.audit_within(connection, action, subject=name, detail={"channel": channel, **reason})

    def _current(self, connection: Connection, channel: str) -> tuple[int, int] | None:
        row = connection.execute(
            sa.select(promotions.c.number, promotions.c.release)
            .where(promotions.c.factory == self.factory, promotions.c.channel == channel)
            .order_by(promotions.c.number.desc())
            .limit(1)
        ).one_or_none()
        return None if row is None else (row[0], row[1])

    def _before(self, connection: Connection, channel: str, current: int) -> int | None:
        # What served when the current release was promoted: another rollback then goes further back, never forward to
        # a release that was rolled back.
        before: int | None = current
        while before is not None:
            before = connection.scalar(
                sa.select(promotions.c.previous)
                .where(promotions.c.factory == self.factory, promotions.c.channel == channel)
                .where(promotions.c.release == before, promotions.c.action == "promote")
            )
            release = None if before is None else self._release(connection, before)
            if release is not None and release.withdrawn is None:
                break
        return before

    def _release(self, connection: Connection, number: int) -> Release | None:
        query = sa.select(releases).where(releases.c.factory == self.factory, releases.c.number == number)
        row = connection.execute(query).mappings().one_or_none()
        return None if row is None else Release(**row)

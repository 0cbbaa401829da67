"""The registry: releases, which of them a channel serves, and which one is on trial beside it.

A promotion is a monotonic number; what holds is the highest. A rollback is a new entry. A promotion, the end of its
cycle, its journal line and its audit line are one transaction.

A trial is of one release beside the one in production; when production moves, by whatever way, it ends. A release that was
withdrawn or rolled back for cause is in quarantine: it is neither tried nor served again unless whoever asks says that it
is to be, despite that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aifactory.errors import StateError
from aifactory.records.identity import canonical_json
from aifactory.records.journal import Cycle, Journal
from aifactory.records.tables import promotions, releases
from aifactory.records.trials import (
    ShareOf,
    Trial,
    TrialAction,
    TrialEntry,
    TrialKind,
    TrialLog,
    add_entry,
    current_trial,
    quarantined_releases,
    read_entries,
)

PRODUCTION = "production"
_PAST_TENSE: Mapping[TrialAction, str] = {
    "shadow": "shadowed",
    "canary": "tried",
    "withdraw": "withdrawn",
    "promote": "passed_trial",
    "quarantine": "quarantined",
    "lift": "quarantine_lifted",
}
"""What the journal calls the entries of trials."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What is to be served at one moment."""

    production: Release | None
    trial: Trial | None
    tried: Release | None
    """The release on trial."""


class Registry:
    """The releases of one factory."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.database = journal.database
        self.factory = journal.factory
        self.trial_log = TrialLog(self.database, self.factory, journal.clock)

    def production(self, channel: str = PRODUCTION) -> Release | None:
        """The release that the channel serves; None before the first."""
        with self.database.read() as connection:
            current = self._current(connection, channel)
            return None if current is None else self._release(connection, current[1])

    def standing(self) -> Standing:
        """The release in production and the one on trial, as they are at one moment."""
        with self.database.read() as connection:
            current = self._current(connection, PRODUCTION)
            trial = current_trial(connection, self.factory)
            return Standing(
                production=None if current is None else self._release(connection, current[1]),
                trial=trial,
                tried=None if trial is None else self._release(connection, trial.release),
            )

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

    def before_production(self, channel: str = PRODUCTION) -> Release | None:
        """The release that a rollback without a name would serve again; None where there is none."""
        with self.database.read() as connection:
            current = self._current(connection, channel)
            number = None if current is None else self._before(connection, channel, current[1])
            return None if number is None else self._release(connection, number)

    def promote(
        self, cycle: Cycle, *, model: str, scorecard: str, decision: Mapping[str, Any], channel: str = PRODUCTION
    ) -> Release:
        """Make the cycle's model a release and let the channel serve it: compare and swap. A trial that is on ends.

        Raises   FencedError if a newer attempt has taken the cycle over; StateError if another release went into
                 production since the cycle began: the candidate was never compared with that one.
        """
        with self.database.write(serialize=True) as connection:
            self.journal.close_cycle(connection, cycle, "promoted", decision=decision)
            current = self._compared_with(connection, cycle, channel)
            release = self._add(connection, cycle, model=model, scorecard=scorecard)
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

    def rollback(
        self,
        *,
        to: int | None = None,
        reason: str,
        quarantine: bool = False,
        despite_quarantine: bool = False,
        of: int | None = None,
        channel: str = PRODUCTION,
    ) -> Release:
        """Serve an older release again: the one before the current that is not in quarantine, or the one that is named.

        A trial that is on ends: it was beside another release.

        quarantine            the release that is served now is neither tried nor served again
        despite_quarantine    serve the one that is named though it is in quarantine, which ends
        of                    the number of the release that is to be replaced; another one by now is no reason to do anything
        Raises   StateError if there is none, if it is in quarantine, or if another release is served.
        """
        with self.database.write(serialize=True) as connection:
            current = self._current(connection, channel)
            if current is None:
                raise StateError(f"expected a release on the channel {channel}, found none yet; run a cycle first.")
            if of not in (None, current[1]):
                raise StateError(
                    f"expected {self.factory}-r{of} on the channel {channel}, which was to be replaced, found "
                    f"{self.factory}-r{current[1]}. `aifactory status` says what serves now."
                )
            target = to if to is not None else self._before(connection, channel, current[1])
            release = None if target is None else self._release(connection, target)
            if release is None or release.number == current[1]:
                raise StateError(
                    f"expected an older release to go back to, found {target}; the channel {channel} serves "
                    f"{current[1]}. `aifactory status` lists the releases."
                )
            was_quarantined = self._require_fit(connection, release.number, despite=despite_quarantine)
            detail = {"reason": reason, **({"despite_quarantine": True} if was_quarantined else {})}
            self._point(connection, channel, current, release.number, "rollback", detail, None)
            if was_quarantined:
                self._enter(connection, "lift", release.number, reason={"reason": reason})
            if quarantine:
                self._enter(connection, "quarantine", current[1], reason={"reason": reason}, quarantined=True)
            return release

    # ── trials ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def trial(self) -> Trial | None:
        """The trial that is on; None where none is."""
        with self.database.read() as connection:
            return current_trial(connection, self.factory)

    def trial_entries(self) -> list[TrialEntry]:
        """The history of trials and quarantines, oldest first."""
        with self.database.read() as connection:
            return read_entries(connection, self.factory)

    def quarantined(self) -> dict[int, Mapping[str, Any]]:
        """The numbers of the releases in quarantine, each with the reason."""
        with self.database.read() as connection:
            return quarantined_releases(connection, self.factory)

    def try_out(
        self,
        release: int,
        kind: TrialKind,
        *,
        share: float,
        by: ShareOf | None = None,
        reason: Mapping[str, Any],
        despite_quarantine: bool = False,
        of: int | None = None,
    ) -> Trial:
        """Put a release on trial beside production, or give the one that is on trial another share or kind.

        by                    of what a canary takes a share; None: as the trial goes by already, else keys
        despite_quarantine    try it though it is in quarantine, which ends
        of                    the entry that was decided about; another one by now is no reason to do anything
        Raises   StateError if it is in production or in quarantine, if another one is on trial, or if keys would change
                 sides.
        """
        if not 0 <= share <= 1:
            raise StateError(f"expected a share from 0 to 1, found {share:g}.")
        with self.database.write(serialize=True) as connection:
            found, current = self._release(connection, release), self._current(connection, PRODUCTION)
            if found is None or current is None or current[1] == release:
                what = "one that is in production" if found is not None and current is not None else "none"
                raise StateError(
                    f"expected a release beside the one in production to try, found {what}: {self.factory}-r{release}. "
                    "`aifactory status` lists the releases."
                )
            trial = current_trial(connection, self.factory) if of is None else self._trial_that_holds(connection, of)
            if trial is not None and trial.release != release:
                raise StateError(
                    f"expected no other release on trial, found {trial.name}; `aifactory withdraw` ends its trial, "
                    "`aifactory promote --trial` puts it into production."
                )
            if trial is not None and trial.kind == "canary" and by not in (None, trial.by):
                raise StateError(
                    f"expected the share of {trial.name} to go by {trial.by}, as it did, found {by}: those who ask would "
                    "change sides. Withdraw it first."
                )
            lifted = self._require_fit(connection, release, despite=despite_quarantine)
            detail = {**reason, **({"despite_quarantine": True} if lifted else {})}
            return self._try(connection, release, kind, share=share, by=by, trial=trial, reason=detail)

    def begin_trial(
        self,
        cycle: Cycle,
        kind: TrialKind,
        *,
        share: float,
        by: ShareOf,
        model: str,
        scorecard: str,
        decision: Mapping[str, Any],
    ) -> Release:
        """Make the cycle's model a release and put it on trial; the cycle ends with the trial.

        Raises   FencedError as `promote`; StateError as that, and if another release is on trial.
        """
        with self.database.write(serialize=True) as connection:
            self.journal.close_cycle(connection, cycle, "trial", decision=decision)
            self._compared_with(connection, cycle, PRODUCTION)
            other = current_trial(connection, self.factory)
            if other is not None:
                raise StateError(
                    f"expected no release on trial, found {other.name}; `aifactory withdraw` ends its trial."
                )
            release = self._add(connection, cycle, model=model, scorecard=scorecard)
            self._try(connection, release.number, kind, share=share, by=by, trial=None, reason=decision, cycle=cycle)
            return release

    def promote_trial(self, *, reason: Mapping[str, Any], of: int | None = None) -> Release:
        """Let production serve the release on trial.

        of       the entry that was decided about; another one by now is no reason to do anything
        Raises   StateError if none is on trial, or if that is not the entry that holds.
        """
        with self.database.write(serialize=True) as connection:
            trial = self._trial_that_holds(connection, of)
            current = self._current(connection, PRODUCTION)
            self._enter(connection, "promote", trial.release, reason=reason, trial=trial)
            cycle = self._end_cycle(connection, trial.release, "promoted", reason)
            self._point(connection, PRODUCTION, current, trial.release, "promote", reason, cycle)
            release = self._release(connection, trial.release)
            assert release is not None, trial
            return release

    def withdraw(self, *, reason: Mapping[str, Any], quarantine: bool = False, of: int | None = None) -> Release:
        """End the trial; production takes all again. `of` and errors are those of `promote_trial`."""
        with self.database.write(serialize=True) as connection:
            trial = self._trial_that_holds(connection, of)
            self._withdraw(connection, trial, reason=reason, quarantine=quarantine)
            release = self._release(connection, trial.release)
            assert release is not None, trial
            return release

    def retire(self, numbers: Iterable[int], *, erasure: str, channel: str = PRODUCTION) -> list[Release]:
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
            trial = current_trial(connection, self.factory)
            if trial is not None and trial.release in wanted:
                self._withdraw(connection, trial, reason={"reason": f"its model is gone: erased by {erasure}"})
            withdrawn = []
            for number in wanted:
                release = self._release(connection, number)
                if release is None or release.withdrawn is not None:
                    continue
                mine = (releases.c.factory == self.factory, releases.c.number == number)
                connection.execute(releases.update().where(*mine).values(withdrawn=erasure))
                self.journal.write_within(connection, "retired", subject=release.name, detail={"erasure": erasure})
                self.journal.audit_within(connection, "retire", subject=release.name, detail={"erasure": erasure})
                withdrawn.append(release)
            return withdrawn

    # ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _compared_with(self, connection: Connection, cycle: Cycle, channel: str) -> tuple[int, int] | None:
        """What the channel serves. Raises StateError if that is not what the cycle's candidate is to follow."""
        current = self._current(connection, channel)
        serving = None if current is None else current[1]
        expected = cycle.bound.replaces or cycle.bound.champion
        if serving != expected:
            raise StateError(
                f"expected release {expected} on the channel {channel}, which the candidate was to follow, found "
                f"{serving}. Begin a new cycle."
            )
        return current

    def _add(self, connection: Connection, cycle: Cycle, *, model: str, scorecard: str) -> Release:
        last = connection.scalar(sa.select(sa.func.max(releases.c.number)).where(releases.c.factory == self.factory))
        values: dict[str, Any] = {
            "factory": self.factory,
            "number": (last or 0) + 1,
            "model": model,
            "scorecard": scorecard,
            "trigger": cycle.trigger,
            "created_at": self.journal.clock(),
        }
        connection.execute(releases.insert().values(**values))
        return Release(**values)

    def _try(
        self,
        connection: Connection,
        release: int,
        kind: TrialKind,
        *,
        share: float,
        by: ShareOf | None,
        trial: Trial | None,
        reason: Mapping[str, Any],
        cycle: Cycle | None = None,
    ) -> Trial:
        by = by or (trial.by if trial is not None and trial.kind == "canary" else "key")
        by = "request" if kind == "shadow" else by
        self._enter(connection, kind, release, reason=reason, trial=trial, share=share, by=by, cycle=cycle)
        begun = current_trial(connection, self.factory)
        assert begun is not None, release
        return begun

    def _enter(
        self,
        connection: Connection,
        action: TrialAction,
        release: int,
        *,
        reason: Mapping[str, Any],
        trial: Trial | None = None,
        share: float = 0.0,
        by: ShareOf | None = None,
        quarantined: bool = False,
        cycle: Cycle | None = None,
    ) -> None:
        """An entry of a trial, with its line in the journal and, where no promotion writes one, in the audit."""
        by = by or ("key" if trial is None else trial.by)
        add_entry(
            connection,
            self.factory,
            action,
            release,
            at=self.journal.clock(),
            key_id=self.journal.key_id,
            reason=reason,
            share=share,
            by=by,
            begun=None if trial is None else trial.begun,
            quarantined=quarantined,
        )
        name = f"{self.factory}-r{release}"
        told: dict[str, Any] = {"share": share, "by": by} if action in ("shadow", "canary") else {}
        if action in ("withdraw", "quarantine"):
            told = {"quarantined": quarantined}
        detail = {**reason, **told}
        trigger, attempt = (None, None) if cycle is None else (cycle.trigger, cycle.attempt)
        event = _PAST_TENSE[action]
        self.journal.write_within(connection, event, cycle=trigger, attempt=attempt, subject=name, detail=detail)
        if action != "promote":
            self.journal.audit_within(connection, action, subject=name, detail=detail)

    def _trial_that_holds(self, connection: Connection, number: int | None) -> Trial:
        trial = current_trial(connection, self.factory)
        if trial is None or number not in (None, trial.number):
            found = "none" if trial is None else f"{trial.kind} {trial.name}, entry {trial.number}"
            raise StateError(
                f"expected a release on trial{'' if number is None else f' by the entry {number}'}, found {found}; "
                "`aifactory status` says what is on trial."
            )
        return trial

    def _withdraw(
        self, connection: Connection, trial: Trial, *, reason: Mapping[str, Any], quarantine: bool = False
    ) -> None:
        cycle = self._end_cycle(connection, trial.release, "rejected", reason)
        self._enter(
            connection, "withdraw", trial.release, reason=reason, trial=trial, quarantined=quarantine, cycle=cycle
        )

    def _end_cycle(
        self,
        connection: Connection,
        release: int,
        state: Literal["promoted", "rejected"],
        reason: Mapping[str, Any],
    ) -> Cycle | None:
        """End the cycle that made the release on trial, where that is still on trial with it."""
        found = self._release(connection, release)
        cycle = None if found is None else self.journal.cycle_within(connection, found.trigger)
        if cycle is None or cycle.state != "trial":
            return None
        said = [*(cycle.decision or {}).get("reasons", []), *reason.get("reasons", [reason.get("reason", "")])]
        decision = {"decision": {"promoted": "promote", "rejected": "reject"}[state], "reasons": said}
        self.journal.close_cycle(connection, cycle, state, decision=decision, of="trial")
        return cycle

    def _require_fit(self, connection: Connection, release: int, *, despite: bool) -> bool:
        """Whether it is in quarantine, despite which it is wanted. Raises StateError if it is not, or if its model is gone."""
        found = self._release(connection, release)
        if found is not None and found.withdrawn is not None:
            raise StateError(
                f"expected a release that may be served, found {found.name}, whose model is gone: erased by {found.withdrawn}."
            )
        why = quarantined_releases(connection, self.factory).get(release)
        if why is not None and not despite:
            reasons = "; ".join(why.get("reasons", [why.get("reason", "no reason was given")]))
            raise StateError(
                f"expected a release that is not in quarantine, found {self.factory}-r{release}, which is: {reasons}. "
                "Add --despite-quarantine (despite_quarantine=True) if it is to be served nevertheless."
            )
        return why is not None

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
        trial = current_trial(connection, self.factory)
        if trial is not None and channel == PRODUCTION:
            # It was compared with what production served until now.
            moved = f"{self.factory}-r{release} took production, beside which {trial.name} was not tried"
            self._withdraw(connection, trial, reason={"reason": moved})
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
        # a release that was rolled back. What is in quarantine or erased is passed over.
        erased = sa.select(releases.c.number).where(
            releases.c.factory == self.factory, releases.c.withdrawn.is_not(None)
        )
        passed = {current, *quarantined_releases(connection, self.factory), *connection.scalars(erased)}
        seen: set[int] = set()
        value: int | None = current
        while value is not None and value in passed and value not in seen:
            seen.add(value)
            value = connection.scalar(
                sa.select(promotions.c.previous)
                .where(promotions.c.factory == self.factory, promotions.c.channel == channel)
                .where(promotions.c.release == value, promotions.c.action == "promote")
                .order_by(promotions.c.number.desc())
                .limit(1)
            )
        return None if value is None or value in passed else int(value)

    def _release(self, connection: Connection, number: int) -> Release | None:
        query = sa.select(releases).where(releases.c.factory == self.factory, releases.c.number == number)
        row = connection.execute(query).mappings().one_or_none()
        return None if row is None else Release(**row)

"""Releases: what serves, what is tried, what each was found to be worth, and what may be done with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aifactory.page.events import about, cycle_numbers
from aifactory.records.books import Books
from aifactory.records.lineage import LineageNode
from aifactory.records.registry import Release
from aifactory.records.trials import Trial
from aifactory.report import lineage_of

SETS = {
    "holdout": "rows of the sources that never trained",
    "target": "corrections that never trained",
    "known": "rows that it was taught: the standard for its live answers",
}
Role = Literal["production", "shadow", "canary", "quarantined", "erased", "earlier"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Bits per byte on a set of tasks; less is better. Intervals have estimate, low, high, confidence."""

    set: str
    meaning: str
    candidate: Mapping[str, Any]
    champion: Mapping[str, Any] | None
    change: Mapping[str, Any] | None
    """Candidate minus the release before, task by task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseLine:
    """A release as it stands."""

    number: int
    name: str
    model: str
    cycle: int | None
    created_at: float
    role: Role
    why: Sequence[str]
    """Of one in quarantine: the reasons; of one that was erased: by what."""
    findings: Sequence[Finding]
    baselines: Mapping[str, float]
    """Bits per byte of other things on the holdout: unigram, gzip."""
    compared_with: str | None
    """The release before, which `champion` and `change` are of."""
    answers: int

    @property
    def can_serve(self) -> bool:
        """Whether a rollback to it is allowed."""
        return self.role in ("earlier", "shadow", "canary")


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """One entry of the history of production."""

    number: int
    release: str
    previous: str | None
    action: str
    reasons: Sequence[str]
    at: float
    key_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Releases:
    """All of them, newest first."""

    production: str | None
    trial: Trial | None
    back_to: str | None
    """The release that a rollback without a name would serve again."""
    lines: Sequence[ReleaseLine]
    history: Sequence[Moved]


def releases(books: Books, *, history: int = 20) -> Releases:
    """The releases, and how production moved."""
    registry = books.registry
    standing, quarantined, every = registry.standing(), registry.quarantined(), registry.releases()
    numbers, cards = cycle_numbers(books), about(books, "evaluated", (each.scorecard for each in every))
    champions = {cycle.trigger: cycle.bound.champion for cycle in books.journal.cycles()}
    answers = books.feedback.completions_by_release()
    production = standing.production
    lines = [
        _line(
            release,
            role=_role(release, production, standing.trial, quarantined),
            why=_reasons(quarantined.get(release.number, {})),
            cycle=numbers.get(release.trigger),
            figures=cards[release.scorecard].detail if release.scorecard in cards else {},
            champion=champions.get(release.trigger),
            answers=answers.get(release.number, 0),
        )
        for release in reversed(every)
    ]
    moved, back_to = registry.promotions(), registry.before_production()
    return Releases(
        production=None if production is None else production.name,
        trial=standing.trial,
        back_to=None if back_to is None else back_to.name,
        lines=lines,
        history=[_moved(books, entry) for entry in reversed(moved[-history:])],
    )


def lineage(books: Books, release: str) -> LineageNode:
    """What a release was made from.

    Raises   StateError if there is none of that name.
    """
    return lineage_of(books, release)


def _role(
    release: Release, production: Release | None, trial: Trial | None, quarantined: Mapping[int, Mapping[str, Any]]
) -> Role:
    if release.withdrawn is not None:
        return "erased"
    if production is not None and release.number == production.number:
        return "production"
    if trial is not None and trial.release == release.number:
        return trial.kind
    return "quarantined" if release.number in quarantined else "earlier"


def _line(
    release: Release,
    *,
    role: Role,
    why: Sequence[str],
    cycle: int | None,
    figures: Mapping[str, Any],
    champion: int | None,
    answers: int,
) -> ReleaseLine:
    findings = [
        Finding(
            set=name,
            meaning=meaning,
            candidate=found["candidate"],
            champion=found.get("champion"),
            change=found.get("over_champion"),
        )
        for name, meaning in SETS.items()
        if (found := figures.get(name))
    ]
    baselines = {name: figures.get(f"{name}_bits_per_byte") for name in ("unigram", "gzip")}
    return ReleaseLine(
        number=release.number,
        name=release.name,
        model=release.model,
        cycle=cycle,
        created_at=release.created_at,
        role=role,
        why=[f"its model was erased by {release.withdrawn}"] if release.withdrawn is not None else why,
        findings=findings,
        baselines={name: value for name, value in baselines.items() if value is not None},
        compared_with=None if champion is None else f"{release.factory}-r{champion}",
        answers=answers,
    )


def _moved(books: Books, entry: Mapping[str, Any]) -> Moved:
    return Moved(
        number=entry["number"],
        release=f"{books.config.name}-r{entry['release']}",
        previous=_named(books, entry["previous"]),
        action=entry["action"],
        reasons=_reasons(json.loads(entry["reason"])),
        at=entry["at"],
        key_id=entry["key_id"],
    )


def _reasons(detail: Mapping[str, Any]) -> list[str]:
    said = detail.get("reasons") or [detail.get("reason", "")]
    return [str(each) for each in said if each]


def _named(books: Books, number: int | None) -> str | None:
    return None if number is None else f"{books.config.name}-r{number}"

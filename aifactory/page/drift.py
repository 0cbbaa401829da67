"""Drift: live answers of the release in production beside its standard, what watches have established, what was decided of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aifactory.errors import AIFactoryError
from aifactory.evaluate.sequential import mean_exceeds
from aifactory.improve.evaluation import BITS
from aifactory.page.events import about, newest
from aifactory.records.artifacts import FeedbackBatch
from aifactory.records.books import Books
from aifactory.records.feedback import Score
from aifactory.records.registry import Release
from aifactory.records.retrain_requests import RetrainRequest

GROUPS = 24
"""Points that the live answers are drawn as, at most."""
WATCHES = ("drifted", "guard_broken", "judged_bad", "unscored", "unjudged", "tick_failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a watch has said."""

    event: str
    release: str | None
    said: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """What the evaluation actor decided. It is written where it is another decision than the one before."""

    decision: str
    awaited: str | None
    reasons: Sequence[str]
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveAnswers:
    """How the answers of one release stand to its standard."""

    release: str
    standard: float | None
    """Bits per byte that it needs for answers that it was taught."""
    limit: float | None
    """The standard and what is tolerated above it."""
    num_scored: int
    live: float | None
    """Bits per byte of all answers that were scored, by their length."""
    groups: Sequence[tuple[int, float]]
    """Answers in the order of their feedback: how many up to there, and the mean of those since the group before."""
    evidence: float
    """What a stake of 1 against "live answers keep to the limit" has come to at most."""
    needed: float
    """What establishes that they don't."""
    established_at: int | None
    """After which answer, from 1; None: it is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """How releases stand to their standards, and what was decided of it."""

    least_scored: int
    """Answers that must be scored before anything is decided by them."""
    production: LiveAnswers | None
    before: LiveAnswers | None
    """The release that was in production before, if answers of it were scored."""
    decisions: Sequence[Decided]
    found: Sequence[Found]
    requests: Sequence[RetrainRequest]
    """For a retrain, that no cycle has taken up."""


def drift(books: Books, *, limit: int = 12) -> Drift:
    """How the release in production stands to its standard, by the statistics that the evaluation actor decides by."""
    release = books.registry.production()
    moved = [entry["previous"] for entry in books.registry.promotions()[-1:]]
    earlier = books.registry.release(moved[0]) if moved and moved[0] is not None else None
    before = (
        None if earlier is None else _live(books, earlier, books.feedback.scores(metric=BITS, release=earlier.number))
    )
    return Drift(
        least_scored=books.config.improve.min_scored,
        production=None if release is None else _live(books, release, _counted(books, release)),
        before=before if before is not None and before.num_scored else None,
        decisions=decisions(books, limit=limit),
        found=watches(books, limit=limit),
        requests=books.retrain_requests.open(),
    )


def _live(books: Books, release: Release, kept: Sequence[Score]) -> LiveAnswers:
    policy, standard = books.config.improve, _standard(books, release)
    tolerated = None if standard is None else standard * (1 + policy.tolerance)
    scores = [score for score in kept if score.weight > 0]
    values, weights = [score.value for score in scores], [score.weight for score in scores]
    seen = mean_exceeds(values, weights, tolerated or 0.0, confidence=policy.confidence)
    return LiveAnswers(
        release=release.name,
        standard=standard,
        limit=tolerated,
        num_scored=len(scores),
        live=_mean(scores) if scores else None,
        groups=_groups(scores),
        evidence=seen.won,
        needed=seen.needed,
        established_at=seen.at,
    )


def decisions(books: Books, *, limit: int) -> list[Decided]:
    """The newest decisions, newest first."""
    return [
        Decided(
            decision=event.detail["decision"],
            awaited=event.detail.get("awaited"),
            reasons=event.detail["reasons"],
            at=event.at,
        )
        for event in newest(books, of=["decided"], limit=limit)
    ]


def watches(books: Books, *, limit: int) -> list[Found]:
    """What watches have said lately, newest first."""
    return [
        Found(
            event=event.event,
            release=event.subject,
            said=str(event.detail.get("said") or event.detail.get("error") or ""),
            at=event.at,
        )
        for event in newest(books, of=WATCHES, limit=limit)
    ]


def _standard(books: Books, release: Release) -> float | None:
    card = about(books, "evaluated", [release.scorecard]).get(release.scorecard)
    known = None if card is None else card.detail.get("known")
    return None if not known else float(known["candidate"]["estimate"])


def _counted(books: Books, release: Release) -> list[Score]:
    """Those that count: what a retrain of this release that has ended has read was reason for that one."""
    ended = [
        cycle
        for cycle in books.journal.cycles()
        if cycle.bound.is_retrain and cycle.bound.champion == release.number and cycle.closed_at is not None
    ]
    read = books.journal.left_of(dict.fromkeys(batch for cycle in ended for batch in cycle.bound.batches))
    without = []
    for batch in read:
        try:
            without.append(int(books.artifacts.get(FeedbackBatch, batch).figures["number"]))
        except AIFactoryError:
            continue  # it is gone, and its rows with it
    return books.feedback.scores(metric=BITS, release=release.number, without=without)


def _groups(scores: Sequence[Score]) -> list[tuple[int, float]]:
    width = max(1, -(-len(scores) // GROUPS))
    starts = range(0, len(scores), width)
    return [(min(at + width, len(scores)), _mean(scores[at : at + width])) for at in starts]


def _mean(scores: Sequence[Score]) -> float:
    return sum(score.value * score.weight for score in scores) / sum(score.weight for score in scores)

"""Feedback: how much of it there is, what it says of each release, and which batches learn from it. No text of a user is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from aifactory.improve.evaluation import BITS, SIMILARITY
from aifactory.page.events import newest
from aifactory.records.books import Books
from aifactory.records.tables import batches, completions, feedback, scores


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseFeedback:
    """What people said of the answers of one release."""

    release: str
    answers: int
    feedback: int
    corrections: int
    rated: int
    """With a score."""
    mean_score: float | None
    """0 is worst, 1 is best."""
    similarity: float | None
    """Of answers to their corrections, 0 to 1, weighed by length."""
    bits_per_byte: float | None
    """That the corrections cost the release."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLine:
    """Corrections that were sealed together."""

    number: int
    rows: int
    sealed_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackView:
    """All of it."""

    counts: Mapping[str, int]
    """completions, feedback, waiting (corrections that no batch holds yet), batches."""
    batch_rows: int
    """Corrections that make a batch."""
    by_release: Sequence[ReleaseFeedback]
    batches: Sequence[BatchLine]
    """Newest first."""
    attacks: Sequence[str]
    """What of the newest batches was not believed, in words."""
    last_at: float | None


def feedback_view(books: Books, *, limit: int = 20) -> FeedbackView:
    """What was said of the factory's answers."""
    name = books.config.name
    newest_batches = (
        sa.select(batches.c.number, batches.c.rows, batches.c.sealed_at)
        .where(batches.c.factory == name)
        .order_by(batches.c.number.desc())
        .limit(limit)
    )
    with books.database.read() as connection:
        lines = [BatchLine(**row) for row in connection.execute(newest_batches).mappings()]
        last = connection.scalar(
            sa.select(feedback.c.at).where(feedback.c.factory == name).order_by(feedback.c.seq.desc()).limit(1)
        )
    attacks = [
        str(attack)
        for event in newest(books, of=["ingested"], limit=limit)
        for attack in event.detail.get("trust", {}).get("attacks", ())
    ]
    return FeedbackView(
        counts=books.feedback.counts(),
        batch_rows=books.config.improve.batch_rows,
        by_release=_by_release(books),
        batches=lines,
        attacks=attacks,
        last_at=last,
    )


def _by_release(books: Books) -> list[ReleaseFeedback]:
    name = books.config.name
    said = (
        sa.select(
            completions.c.release,
            sa.func.count().label("feedback"),
            sa.func.count(feedback.c.correction).label("corrections"),
            sa.func.count(feedback.c.score).label("rated"),
            sa.func.avg(feedback.c.score).label("mean"),
        )
        .join(
            completions, sa.and_(completions.c.factory == feedback.c.factory, completions.c.id == feedback.c.completion)
        )
        .where(feedback.c.factory == name)
        .group_by(completions.c.release)
    )
    kept = (
        sa.select(
            scores.c.release,
            scores.c.metric,
            (sa.func.sum(scores.c.value * scores.c.weight) / sa.func.sum(scores.c.weight)).label("mean"),
        )
        .where(scores.c.factory == name, scores.c.weight > 0, scores.c.metric.in_([BITS, SIMILARITY]))
        .group_by(scores.c.release, scores.c.metric)
    )
    with books.database.read() as connection:
        by_release = {row.release: row for row in connection.execute(said)}
        means = {(row.release, row.metric): float(row.mean) for row in connection.execute(kept)}
    answers = books.feedback.completions_by_release()
    return [
        ReleaseFeedback(
            release=f"{name}-r{number}",
            answers=answers[number],
            feedback=row.feedback if row is not None else 0,
            corrections=row.corrections if row is not None else 0,
            rated=row.rated if row is not None else 0,
            mean_score=None if row is None or row.mean is None else float(row.mean),
            similarity=means.get((number, SIMILARITY)),
            bits_per_byte=means.get((number, BITS)),
        )
        for number in sorted(answers, reverse=True)
        for row in [by_release.get(number)]
    ]

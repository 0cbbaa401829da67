"""Evaluation: one look at what is served, tick by tick. It knows no Ray and keeps nothing but what is in the books.

unscored corrections ─score─▶ scores        waiting corrections ─seal─▶ batches
scores, batches, cycles ─observe─▶ Observation ─decide─▶ Wait | Retrain ─▶ a cycle that is seen through
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Protocol

from aifactory.errors import FencedError
from aifactory.evaluate.statistics import Interval, confidence_sequence
from aifactory.improve.decision import Decision, Observation, Retrain, decide
from aifactory.observe.events import log_event
from aifactory.records.artifacts import ArtifactStore, FeedbackBatch, Model, Scorecard
from aifactory.records.books import Books
from aifactory.records.feedback import Correction, Score
from aifactory.records.identity import fingerprint
from aifactory.records.journal import Bound, Cycle
from aifactory.text.tasks import Task

BITS = "bits_per_byte"
SIMILARITY = "similarity"
_SCORED_AT_ONCE = 64

ScoreTasks = Callable[[ArtifactStore, Model, Sequence[Task]], list[float]]


class Launcher(Protocol):
    """Turns cycles somewhere else."""

    def is_turning(self, cycle: Cycle) -> bool:
        """Whether an attempt that this launcher knows of is still at work."""

    def turn(self, cycle: Cycle) -> None:
        """Start the next attempt at the cycle; returns at once."""


class Evaluation:
    """Scores, seals, decides, and sees to it that the cycles which it began are turned."""

    def __init__(self, books: Books, *, score: ScoreTasks, launcher: Launcher) -> None:
        self.books = books
        self._policy = books.config.improve
        self._score = score
        self._launcher = launcher
        self._said: tuple[str, ...] = ()

    def tick(self) -> Decision:
        """One look. Killed anywhere in it, the next one does what is left to do, and nothing twice."""
        self._score_corrections()
        self._seal_batches()
        decision = decide(self._policy, observe(self.books))
        if isinstance(decision, Retrain):
            self._begin(decision)
        self._say(decision)
        self._see_through()
        return decision

    def _score_corrections(self) -> None:
        waiting = self.books.feedback.corrections(unscored_by=BITS, limit=_SCORED_AT_ONCE)
        for number in sorted({correction.release for correction in waiting}):
            release = self.books.registry.release(number)
            assert release is not None, number
            model = self.books.artifacts.get(Model, release.model)
            mine = [correction for correction in waiting if correction.release == number]
            bits = self._score(self.books.artifacts, model, [Task(c.prompt, c.correction) for c in mine])
            self.books.feedback.add_scores(
                [score for c, found in zip(mine, bits, strict=True) for score in _scores_of(c, found)]
            )

    def _seal_batches(self) -> None:
        while True:
            number = self.books.feedback.seal(
                batch_rows=self._policy.batch_rows, batch_after_s=self._policy.batch_after_s
            )
            if number is None:
                return
            log_event("sealed", batch=number)

    def _begin(self, decision: Retrain) -> None:
        """Bind the cycle to what it reads. The same decision about the same things names the same cycle."""
        production = self.books.registry.production()
        assert production is not None
        batches = sorted({batch.id for batch in published_batches(self.books)})
        identity = fingerprint(stage="drift", code_version=1, recipe={}, inputs=[production.model, *batches])
        config = self.books.config
        cycle = self.books.journal.open_cycle(
            f"drift-{identity[:16]}",
            recipe=config.recipe("evaluate", "promote", "train", "improve", "tokenize", "ingest"),
            bound=Bound(
                kind="drift",
                sources_digest="",
                batches=batches,
                parent=production.model,
                champion=production.number,
            ),
        )
        log_event("triggered", cycle=cycle.number, trigger=cycle.trigger, because="; ".join(decision.reasons))

    def _see_through(self) -> None:
        for cycle in self.books.journal.cycles():
            if cycle.state != "running" or cycle.bound.kind != "drift" or self._launcher.is_turning(cycle):
                continue
            if cycle.attempt < self._policy.max_attempts:
                self._launcher.turn(cycle)
                continue
            reasons = [f"{cycle.attempt} attempts ended without a result; the journal and Ray's logs say why"]
            try:
                with self.books.database.write(serialize=True) as connection:
                    self.books.journal.close_cycle(
                        connection, cycle, "failed", decision={"decision": "fail", "reasons": reasons}
                    )
            except FencedError:
                continue  # it has ended, or somebody else took it up, since it was read
            log_event("failed", cycle=cycle.number, reasons=reasons[0])

    def _say(self, decision: Decision) -> None:
        """Write the decision down where it differs in kind from the one before."""
        said = (type(decision).__name__, *(reason.split(" ")[-1] for reason in decision.reasons[-1:]))
        if said != self._said:
            self._said = said
            self.books.journal.write("decided", detail=decision.to_json())


def observe(books: Books) -> Observation:
    """What is known now."""
    policy = books.config.improve
    release = books.registry.production()
    cycles = books.journal.cycles()
    running = next((cycle.trigger for cycle in cycles if cycle.state == "running"), None)
    ended = [cycle.closed_at for cycle in cycles if cycle.closed_at is not None and cycle.bound.kind == "drift"]
    read = {batch for cycle in cycles for batch in cycle.bound.batches}
    batches = published_batches(books)
    standard = None if release is None else standard_of(books.artifacts.get(Scorecard, release.scorecard))
    scores = [] if release is None else books.feedback.scores(metric=BITS, release=release.number)
    limit = (standard or 0.0) * (1 + policy.tolerance)
    num_bytes = sum(score.weight for score in scores)
    excess = excess_over(scores, limit, confidence=policy.confidence, tightest_at=policy.min_scored)
    return Observation(
        release=None if release is None else release.name,
        standard=standard,
        num_scored=len(scores),
        live=sum(score.value * score.weight for score in scores) / num_bytes if scores else 0.0,
        excess_low=excess.low,
        new_batches=tuple(dict.fromkeys(batch.id for batch in batches if batch.id not in read)),
        running=running,
        seconds_since_cycle=books.journal.clock() - max(ended) if ended else float("inf"),
    )


def decide_now(books: Books) -> Decision:
    """What would be decided now; nothing is changed."""
    return decide(books.config.improve, observe(books))


def published_batches(books: Books) -> list[FeedbackBatch]:
    """Every sealed batch as an artifact, oldest first."""
    found = []
    for number in books.feedback.sealed():
        batch = books.feedback.publish(number, books.artifacts)
        books.lineage.add(batch)
        found.append(batch)
    return found


def standard_of(scorecard: Scorecard) -> float | None:
    """The release's standard for live answers: what it needs for answers about rows that it was taught."""
    known = scorecard.figures.get("known")
    return None if known is None else float(known["candidate"]["estimate"])


def excess_over(scores: Sequence[Score], limit: float, *, confidence: float, tightest_at: int) -> Interval:
    """What live answers need above `limit`, bits per byte, with an interval that holds at every look."""
    mean_bytes = sum(score.weight for score in scores) / len(scores) if scores else 1.0
    excess = [(score.value - limit) * score.weight / mean_bytes for score in scores]
    return confidence_sequence(excess, confidence=confidence, tightest_at=tightest_at)


def _scores_of(correction: Correction, bits: float) -> list[Score]:
    wanted = correction.correction
    num_bytes = len(wanted.encode())
    likeness = difflib.SequenceMatcher(None, correction.answer, wanted[: len(correction.answer)], autojunk=False)
    shared = {"feedback": correction.feedback, "release": correction.release, "weight": float(num_bytes)}
    return [
        Score(metric=BITS, value=bits / num_bytes, **shared),  # type: ignore[arg-type]
        Score(metric=SIMILARITY, value=likeness.ratio(), **shared),  # type: ignore[arg-type]
    ]

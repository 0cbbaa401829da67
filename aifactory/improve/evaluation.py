"""Evaluation: one look at what is served, tick by tick. It knows no Ray and keeps nothing but what is in the books.

unscored corrections ─score─▶ scores        waiting corrections ─seal─▶ batches
scores, batches, cycles ─observe─▶ Observation ─decide─▶ Wait | Retrain ─▶ a cycle that is seen through
a trial that a cycle began ─▶ trials.py
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from aifactory.errors import FencedError, StateError
from aifactory.evaluate.sequential import mean_exceeds
from aifactory.improve.answer_watch import AnswerWatch, CheckAnswers
from aifactory.improve.decision import Decision, Observation, Retrain, Wait, decide
from aifactory.improve.judge_watch import Grade, JudgeWatch, judged_bad
from aifactory.improve.prompts import PromptSequence
from aifactory.improve.schedule import Slot, due
from aifactory.improve.spending import spending
from aifactory.improve.trials import Trials
from aifactory.observe import metrics
from aifactory.observe.events import log_event
from aifactory.records.artifacts import ArtifactStore, FeedbackBatch, Model, Scorecard
from aifactory.records.books import Books
from aifactory.records.feedback import Correction, Score
from aifactory.records.identity import fingerprint
from aifactory.records.journal import Bound, Cycle
from aifactory.records.registry import Release
from aifactory.text.tasks import Task

BITS = "bits_per_byte"
SIMILARITY = "similarity"
_SCORED_AT_ONCE = 64
_COMPARED_CHARS = 200
_PROMPTS_AT_ONCE = 2000
_SETTLED_S = 5.0
"""Age at which no answer is still to come that was given earlier: replicas write at their own pace."""
_DAY_S = 86_400.0
_ANOTHER_CHOICE = re.compile(r"-.+-[1-9]\d*$")
"""An answer beside the first one to the same request."""
DRIFTED = "drifted"
"""Event: what users ask of the release `subject` is established to be something else than it was since the detail's `since`."""
_TRY_AGAIN_AFTER_S = 30.0
"""Rest of a release that could not be scored."""
LONGEST_ERROR = 2000
"""Characters of an error that are kept in the journal: its end, where the cause stands."""

ScoreTasks = Callable[[ArtifactStore, Model, Sequence[Task]], list[float]]

IdentifyLanguages = Callable[[Sequence[str]], Sequence[str | None]]
"""The code of the language of each text."""


class Launcher(Protocol):
    """Turns cycles somewhere else."""

    def is_turning(self, cycle: Cycle) -> bool:
        """Whether an attempt that this launcher knows of is still at work."""

    def turn(self, cycle: Cycle) -> None:
        """Start the next attempt at the cycle; returns at once."""

    def ending(self, cycle: Cycle) -> str:
        """How the last attempt ended, in words; empty where that is not known."""


class Evaluation:
    """Scores, seals, decides, and sees to it that the cycles which it began are turned."""

    def __init__(
        self,
        books: Books,
        *,
        score: ScoreTasks,
        launcher: Launcher,
        check: CheckAnswers | None = None,
        grade: Grade | None = None,
        identify: IdentifyLanguages | None = None,
    ) -> None:
        """`check` says which guards answers break, `grade` which a judge finds bad; without them, or where neither is configured, none
        is looked through. `identify` names the language of each text; without it languages of prompts are not watched."""
        self.books = books
        self._policy = books.config.improve
        self._score = score
        self._launcher = launcher
        self._trials = Trials(books, bits_of=self._bits_of)
        # All of this can be found in the books again, or is found out again.
        self._batches: dict[int, FeedbackBatch] = {}
        self._left_until: dict[int, float] = {}
        self._at_work: set[str] = set()
        self._said: tuple[str | None, str, str] | None = None
        self._prompts: tuple[tuple[int, float], PromptSequence] | None = None
        self._last_prompt = (0.0, "")
        self._guards = None if check is None else AnswerWatch(books, check)
        self._identify = identify
        self._judge = None if grade is None else JudgeWatch(books, grade)

    def tick(self) -> Decision:
        """One look. Killed anywhere in it, the next one does what is left to do, and nothing twice."""
        self._see_through()  # first: nothing that is wrong with what is watched stops a cycle that runs
        self._score_corrections()
        self._trials.look()
        self._watch_prompts()
        if self._guards is not None:
            self._guards.look()
        if self._judge is not None and (release := self.books.registry.production()) is not None:
            self._judge.look(release, _watched_since(self.books, release))
        self._seal_batches()
        batches, seen, decision = self._decide()
        if seen.is_asked_for and (isinstance(decision, Retrain) or decision.awaited == "feedback"):
            # Nothing else holds it up: it learns from all that was said until now, however little that is.
            self._seal_batches(whatever_waits=True)
            batches, seen, decision = self._decide()
        self._say(decision, seen)
        metrics.IMPROVE_DECISIONS.add(decision=str(decision.to_json()["decision"]))
        metrics.IMPROVE_WAITING.set(self.books.feedback.counts()["waiting"])
        if isinstance(decision, Retrain):
            self._begin(decision, seen, batches)
            self._see_through()
        return decision

    def _score_corrections(self) -> None:
        """Score some of the answers that wait for it, each by the release that gave it."""
        waiting = self._waiting()
        for number in sorted({correction.release for correction in waiting}):
            mine = [correction for correction in waiting if correction.release == number]
            try:
                bits = self._bits_of(number, mine)
            except Exception as error:  # whatever is wrong with one release must not end the watch over the others
                self._leave(number, error)
                continue
            self._left_until.pop(number, None)
            self.books.feedback.add_scores(
                [score for c, found in zip(mine, bits, strict=True) for score in _scores_of(c, found)]
            )

    def _waiting(self) -> list[Correction]:
        now = self.books.journal.clock()
        left = {number for number, until in self._left_until.items() if now < until}
        if not left:
            return self.books.feedback.corrections(unscored_by=BITS, limit=_SCORED_AT_ONCE)
        for release in reversed(self.books.registry.releases()):
            if release.number not in left:
                waiting = self.books.feedback.corrections(
                    unscored_by=BITS, release=release.number, limit=_SCORED_AT_ONCE
                )
                if waiting:
                    return waiting
        return []

    def _bits_of(self, number: int, corrections: Sequence[Correction]) -> list[float]:
        """Bits of each correction; not a number where just this one can't be scored.

        Raises   what the scorer raises if it can score none of them: then it is not the corrections that are wrong.
        """
        release = self.books.registry.release(number)
        if release is None:
            raise StateError(f"expected the release {number}, which gave answers, in the registry, found none.")
        store = self.books.artifacts
        model = store.get(Model, release.model)
        tasks = [Task(c.prompt, c.correction, c.messages) for c in corrections]
        try:
            return self._score(store, model, tasks)
        except Exception:
            if len(tasks) == 1:
                raise
        bits: list[float] = []
        errors: list[Exception] = []
        for correction, task in zip(corrections, tasks, strict=True):
            try:
                bits += self._score(store, model, [task])
            except Exception as error:
                bits.append(math.nan)
                errors.append(error)
                if len(errors) == len(tasks):
                    raise
                log_event("unscored", feedback=correction.feedback, error=_text_of(error))
        return bits

    def _leave(self, number: int, error: Exception) -> None:
        """Leave a release that can't be scored alone for a while, and say so once."""
        if number not in self._left_until:
            detail = {"error": _text_of(error)}
            self.books.journal.write("unscored", subject=f"{self.books.config.name}-r{number}", detail=detail)
            log_event("unscored", release=number, error=_text_of(error))
        self._left_until[number] = self.books.journal.clock() + _TRY_AGAIN_AFTER_S

    def _watch_prompts(self) -> None:
        """See the prompts that are new, and write it down, once, when they are established to be others than at first."""
        policy, release = self._policy.prompts, self.books.registry.production()
        if policy is None or release is None:
            return
        since = _watched_since(self.books, release)
        if _drift_of_prompts(self.books, release, since) is not None:
            return
        of = (release.number, since)
        if self._prompts is None or self._prompts[0] != of:
            sequence = PromptSequence(reference=policy.reference, confidence=policy.confidence, of=policy.of)
            self._prompts = (of, sequence)
            self._last_prompt = (since, "")
        sequence = self._prompts[1]
        asked = self.books.feedback.given(
            release=release.number,
            since=since,
            until=self.books.journal.clock() - _SETTLED_S,
            after=self._last_prompt,
            limit=_PROMPTS_AT_ONCE,
        )
        identify = self._identify if "language" in policy.of else None
        languages = [None] * len(asked) if identify is None else identify([prompt for _, _, prompt, _ in asked])
        for (at, name, prompt, _), language in zip(asked, languages, strict=True):
            self._last_prompt = (at, name)
            if not _ANOTHER_CHOICE.search(name):
                sequence.add(name, prompt, language)
        if sequence.drift is not None:
            detail = {"of": "prompts", "since": since, **sequence.drift.to_json(), "said": str(sequence.drift)}
            self.books.journal.write(DRIFTED, subject=release.name, detail=detail)
            log_event("drifted", release=release.name, of="prompts", because=str(sequence.drift))

    def _decide(self) -> tuple[list[FeedbackBatch], Observation, Decision]:
        batches = self._published_batches()
        seen = observe(self.books, batches)
        _measure(seen)
        return batches, seen, decide(self._policy, seen)

    def _seal_batches(self, *, whatever_waits: bool = False) -> None:
        after_s = 0.0 if whatever_waits else self._policy.batch_after_s
        while True:
            number = self.books.feedback.seal(batch_rows=self._policy.batch_rows, batch_after_s=after_s)
            if number is None:
                return
            log_event("sealed", batch=number)

    def _published_batches(self) -> list[FeedbackBatch]:
        """As `published_batches`; what is sealed never changes unless rows of it are erased, so each is read once."""
        sealed, erased = self.books.feedback.sealed(), self.books.journal.erased()
        for number in sealed:
            if number not in self._batches or self._batches[number].id in erased:
                self._batches[number] = _publish(self.books, number)
        return [self._batches[number] for number in sealed]

    def _begin(self, decision: Retrain, seen: Observation, batches: Sequence[FeedbackBatch]) -> None:
        """Bind the cycle to what it reads. The same decision about the same things names the same cycle."""
        production = self.books.registry.production()
        if production is None or production.name != seen.release:
            return  # another one was put into production meanwhile: the decision was not about it
        ids = sorted({batch.id for batch in batches} - self.books.journal.refused_batches())
        kind, inputs = _stands_for(decision, reads=[production.model, *ids])
        identity = fingerprint(stage=kind, code_version=1, recipe={}, inputs=inputs)
        config = self.books.config
        cycle = self.books.journal.open_cycle(
            f"{kind}-{identity[:16]}",
            recipe=config.recipe("evaluate", "promote", "train", "improve", "tokenize", "ingest"),
            bound=Bound(
                kind=kind,
                sources_digest="",
                batches=ids,
                parent=production.model,
                champion=production.number,
                holdouts=self.books.journal.corpora(),
                models=self.books.registry.bound_models(config.ingest.models),
                max_steps=decision.max_steps,
                requests=tuple(decision.requests),
            ),
        )
        log_event("triggered", cycle=cycle.number, trigger=cycle.trigger, because="; ".join(decision.reasons))

    def _see_through(self) -> None:
        for listed in self.books.journal.cycles():
            if listed.state != "running" or not listed.bound.is_retrain:
                continue
            if self._launcher.is_turning(listed):
                self._at_work.add(listed.trigger)
                continue
            # Read again: what was at work may have ended it after it was listed.
            cycle = self.books.journal.cycle(listed.trigger)
            if cycle is None or cycle.state != "running":
                continue
            failed = self._failed_attempts(cycle)
            if len(failed) >= self._policy.max_attempts:
                self._give_up(cycle, failed)
                continue
            self._launcher.turn(cycle)
            self._at_work.add(cycle.trigger)

    def _failed_attempts(self, cycle: Cycle) -> list[str]:
        """How each attempt ended that was seen at work and is no more. One that ended with its actor is not among them."""
        journal = self.books.journal
        if cycle.trigger in self._at_work:
            error = self._launcher.ending(cycle)[-LONGEST_ERROR:] or "it ended without a word"
            journal.write("attempt_failed", cycle=cycle.trigger, attempt=cycle.attempt, detail={"error": error})
            self._at_work.remove(cycle.trigger)
            log_event("attempt_failed", cycle=cycle.number, attempt=cycle.attempt, error=error)
        return [event.detail["error"] for event in journal.events(event="attempt_failed", cycle=cycle.trigger)]

    def _give_up(self, cycle: Cycle, failed: Sequence[str]) -> None:
        reasons = [f"{len(failed)} attempts ended without a result", f"the last: {failed[-1]}"]
        try:
            with self.books.database.write(serialize=True) as connection:
                self.books.journal.close_cycle(
                    connection, cycle, "failed", decision={"decision": "fail", "reasons": reasons}
                )
        except FencedError:
            return  # it has ended, or somebody else took it up, since it was read
        log_event("failed", cycle=cycle.number, reasons="; ".join(reasons))

    def _say(self, decision: Decision, seen: Observation) -> None:
        """Write the decision down where it is another one than that which was written last."""
        journal = self.books.journal
        if self._said is None:
            self._said = next((_kind(e.subject, e.detail) for e in reversed(journal.events(event="decided"))), None)
        kind = _kind(seen.release, decision.to_json())
        if kind != self._said:
            journal.write("decided", subject=seen.release, detail=decision.to_json())
            self._said = kind


def _measure(seen: Observation) -> None:
    metrics.IMPROVE_SCORED.set(seen.num_scored)
    metrics.IMPROVE_LIVE.set(seen.live)
    metrics.IMPROVE_STANDARD.set(seen.standard or 0.0)
    metrics.IMPROVE_BATCHES.set(len(seen.new_batches))
    metrics.IMPROVE_DRIFT.set(seen.prompts is not None)
    metrics.IMPROVE_RUNNING.set(seen.running is not None)


def _stands_for(
    decision: Retrain, *, reads: Sequence[str]
) -> tuple[Literal["drift", "request", "schedule"], Sequence[str]]:
    """What a retrain is begun for, and what names its cycle: the same request, or moment, begins the same one and no other."""
    if decision.requests:
        return "request", [decision.requests[0]]
    if decision.slot is not None:
        return "schedule", [f"{decision.slot!r}"]
    return "drift", reads


def observe(books: Books, batches: Sequence[FeedbackBatch]) -> Observation:
    """What is known now; `batches` are all that are sealed, as artifacts."""
    policy = books.config.improve
    release = books.registry.production()
    cycles = books.journal.cycles()
    running = next((cycle.trigger for cycle in cycles if _is_awaited(cycle, release)), None)
    ended = [cycle.closed_at for cycle in cycles if cycle.closed_at is not None and cycle.bound.is_retrain]
    withdrawn = [entry.at for entry in books.registry.trial_entries() if entry.quarantined]
    read = _read_by(books, cycles) | books.journal.refused_batches()
    standard = None if release is None else standard_of(books.artifacts.left_of(Scorecard, release.scorecard))
    scores: list[Score] = []
    if release is not None:
        # What a retrain of it has read was reason for that one: another one needs evidence of its own.
        tried = _read_by(books, [cycle for cycle in _retrains_of(release, cycles) if cycle.closed_at is not None])
        without = [n for n, batch in zip(books.feedback.sealed(), batches, strict=False) if batch.id in tried]
        kept = books.feedback.scores(metric=BITS, release=release.number, without=without)
        scores = [score for score in kept if score.weight > 0]
    limit = (standard or 0.0) * (1 + policy.tolerance)
    values, weights = [score.value for score in scores], [score.weight for score in scores]
    now = books.journal.clock()
    since = math.inf if release is None else _watched_since(books, release)
    drift = None if release is None else _drift_of_prompts(books, release, since)
    judged = None if release is None else judged_bad(books, release, since)
    return Observation(
        release=None if release is None else release.name,
        standard=standard,
        num_scored=len(scores),
        live=sum(map(math.prod, zip(values, weights, strict=True))) / sum(weights) if scores else 0.0,
        below=mean_exceeds(values, weights, limit, confidence=policy.confidence),
        new_batches=tuple(dict.fromkeys(batch.id for batch in batches if batch.id not in read)),
        running=running,
        seconds_since_cycle=now - max(ended) if ended else float("inf"),
        seconds_since_withdrawal=now - max(withdrawn, default=-math.inf),
        retrains_today=sum(c.bound.is_retrain and now - c.opened_at < _DAY_S for c in cycles),
        spending=None if policy.budget is None else spending(books, policy.budget),
        prompts=None if drift is None else drift["said"],
        judged=None if judged is None else judged["said"],
        requests=books.retrain_requests.open(),
        slot=_slot(books, cycles, now),
    )


def _slot(books: Books, cycles: Sequence[Cycle], now: float) -> Slot | None:
    """The moment of the schedule that has come; it counts from when there first was a release."""
    schedule, promotions = books.config.improve.schedule, books.registry.promotions()
    if schedule is None or not promotions:
        return None
    begun = [cycle.opened_at for cycle in cycles if cycle.bound.is_retrain]
    return due(schedule, now, since=float(promotions[0]["at"]), last_begun=max(begun, default=None))


def _read_by(books: Books, cycles: Sequence[Cycle]) -> set[str]:
    """The feedback batches that cycles were bound to, and what is left of those of which rows were erased."""
    bound = {batch for cycle in cycles for batch in cycle.bound.batches}
    return bound | set(books.journal.left_of(bound))


def _retrains_of(release: Release, cycles: Sequence[Cycle]) -> list[Cycle]:
    return [cycle for cycle in cycles if cycle.bound.is_retrain and cycle.bound.champion == release.number]


def _watched_since(books: Books, release: Release) -> float:
    """When it took production, or the last retrain of it ended: what was asked before has had its answer."""
    ended = [cycle.closed_at for cycle in _retrains_of(release, books.journal.cycles()) if cycle.closed_at is not None]
    return max([float(entry["at"]) for entry in books.registry.promotions()[-1:]] + ended)


def _drift_of_prompts(books: Books, release: Release, since: float) -> Mapping[str, Any] | None:
    events = books.journal.events(event=DRIFTED)
    found = (event.detail for event in events if event.subject == release.name)
    return next((detail for detail in found if detail["since"] == since), None)


def decide_now(books: Books) -> Decision:
    """What would be decided now. No cycle is begun and nothing is said; sealed batches are published, as in a tick."""
    return decide(books.config.improve, observe(books, published_batches(books)))


def is_settled(books: Books) -> bool:
    """Whether all feedback was scored and sealed and gives no reason for a retrain."""
    policy = books.config.improve
    waiting = books.feedback.counts()["waiting"]
    if waiting >= policy.batch_rows or (waiting and policy.batch_after_s is not None):
        return False
    unscored = books.feedback.corrections(unscored_by=BITS, limit=1)
    return not unscored and isinstance(decide_now(books), Wait)


def published_batches(books: Books) -> list[FeedbackBatch]:
    """Every sealed batch as an artifact, oldest first."""
    return [_publish(books, number) for number in books.feedback.sealed()]


def _publish(books: Books, number: int) -> FeedbackBatch:
    batch = books.feedback.publish(number, books.artifacts, objective=books.config.train.objective)
    books.lineage.add(batch)
    return batch


def _is_awaited(cycle: Cycle, production: Release | None) -> bool:
    """Whether a cycle may still put a model into production.

    One that a driver began and nobody has taken up, or that must beat another release than the one in production, may
    be left as it is for ever.
    """
    if cycle.state != "running" or cycle.bound.is_retrain:
        return cycle.state in ("running", "trial")
    serves = cycle.bound.replaces or cycle.bound.champion
    return cycle.attempt > 0 and serves == (None if production is None else production.number)


def _kind(release: str | None, decision: Mapping[str, Any]) -> tuple[str | None, str, str]:
    # Of two retrains one after the other each is said where they stand for something else.
    stands_for = decision.get("awaited") or decision.get("requests") or decision.get("slot") or ""
    return release, decision["decision"], str(stands_for)


def _text_of(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def standard_of(scorecard: Scorecard) -> float | None:
    """The release's standard for live answers: what it needs for answers about rows that it was taught."""
    known = scorecard.figures.get("known")
    return None if known is None else float(known["candidate"]["estimate"])


def _scores_of(correction: Correction, bits: float) -> list[Score]:
    """What is kept of a correction. One that can't be scored weighs nothing: it was looked at and counts for nothing."""
    wanted = correction.correction
    num_bytes = len(wanted.encode()) if math.isfinite(bits) else 0
    # Beginnings alone: the time grows with up to the cube of their length (10 s for some texts of 1000 characters).
    answer = correction.answer[:_COMPARED_CHARS]
    likeness = difflib.SequenceMatcher(None, answer, wanted[: max(1, len(answer))], autojunk=False)
    shared = {"feedback": correction.feedback, "release": correction.release, "weight": float(num_bytes)}
    return [
        Score(metric=BITS, value=bits / num_bytes if num_bytes else 0.0, **shared),  # type: ignore[arg-type]
        Score(metric=SIMILARITY, value=likeness.ratio(), **shared),  # type: ignore[arg-type]
    ]

"""Trials that cycles began: seen to their ends, tick by tick. What is known of one is in the books, and nowhere else.

outcomes, corrections under both ─observe─▶ TrialSeen ─decide─▶ goes on | takes more | takes production | is withdrawn
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from aifactory.config import ReleaseTrial
from aifactory.errors import StateError
from aifactory.improve.trial_decision import (
    KeepTrying,
    NextStep,
    Side,
    TakeProduction,
    TrialDecision,
    TrialSeen,
    Withdraw,
    decide_trial,
)
from aifactory.observe.events import log_event
from aifactory.records.books import Books
from aifactory.records.feedback import Correction, Score
from aifactory.records.trials import Outcome, Trial

BitsOf = Callable[[int, Sequence[Correction]], list[float]]
"""Bits of each correction under the release of a number; not a number where just that one can't be scored."""
_SCORED_AT_ONCE = 32
_SHORTEST_S = 1e-6


class Trials:
    """Looks at the trial that is on, and does what is decided about it."""

    def __init__(self, books: Books, *, bits_of: BitsOf) -> None:
        self.books = books
        self._bits_of = bits_of

    def look(self) -> TrialDecision | None:
        """One look; None where no cycle's release is on trial. Somebody's own trial is left to them.

        Killed anywhere in it, the next one decides the same and does it once.
        """
        policy, trial = self.books.config.improve.trial, self.books.registry.trial()
        if policy is None or trial is None or not self._is_of_a_cycle(trial):
            return None
        self._score(trial)
        decision = decide_trial(policy, self._observe(trial, policy))
        try:
            self._apply(decision, trial, policy)
        except StateError as error:  # somebody has ended or changed it since it was read
            log_event("warned", of=f"what was decided of the trial of {trial.name} is not done: {error}")
        return decision

    def _is_of_a_cycle(self, trial: Trial) -> bool:
        release = self.books.registry.release(trial.release)
        cycle = None if release is None else self.books.journal.cycle(release.trigger)
        return cycle is not None and cycle.state == "trial"

    def _score(self, trial: Trial) -> None:
        """Score some of the corrections that came since it began under both releases; neither has trained on them."""
        production = self.books.registry.production()
        assert production is not None, trial
        waiting = self.books.feedback.corrections(
            unscored_by=_metric(trial), since=self._begun_at(trial), limit=_SCORED_AT_ONCE
        )
        if not waiting:
            return
        try:
            both = [self._bits_of(number, waiting) for number in (trial.release, production.number)]
        except Exception as error:  # whatever is wrong with the scores, errors and times are still looked at
            log_event("unscored", release=trial.name, error=f"{type(error).__name__}: {error}")
            return
        entries = []
        for correction, mine, other in zip(waiting, *both, strict=True):
            # What can't be scored under one of them weighs nothing.
            weight = len(correction.correction.encode()) if math.isfinite(mine + other) else 0
            for number, bits in ((trial.release, mine), (production.number, other)):
                entries.append(
                    Score(
                        feedback=correction.feedback,
                        metric=_metric(trial),
                        release=number,
                        value=bits / weight if weight else 0.0,
                        weight=float(weight),
                    )
                )
        self.books.feedback.add_scores(entries)

    def _observe(self, trial: Trial, policy: ReleaseTrial) -> TrialSeen:
        registry, journal = self.books.registry, self.books.journal
        production = registry.production()
        assert production is not None, trial
        found = registry.trial_log.outcomes(since=trial.begun)
        mine = [outcome for outcome in found if outcome.release == trial.release]
        events = {
            name: [e.detail for e in journal.events(event=name) if e.detail.get("trial") == trial.begun]
            for name in ("load_failed", "trial_loaded")
        }
        return TrialSeen(
            release=trial.name,
            kind=trial.kind,
            share=trial.share,
            candidate=_side(mine),
            production=_side([outcome for outcome in found if outcome.release == production.number]),
            asked_in_step=sum(outcome.trial == trial.number for outcome in mine),
            seconds_in_step=journal.clock() - trial.at,
            excess=self._excess(trial, production.number),
            refused=[detail["reason"] for detail in events["load_failed"]],
            loaded=bool(events["trial_loaded"]),
        )

    def _excess(self, trial: Trial, production: int) -> list[float]:
        of = {
            number: {
                score.feedback: score
                for score in self.books.feedback.scores(metric=_metric(trial), release=number)
                if score.weight > 0
            }
            for number in (trial.release, production)
        }
        pairs = [(score, of[production][feedback]) for feedback, score in of[trial.release].items()]
        mean_bytes = sum(score.weight for score, _ in pairs) / len(pairs) if pairs else 1.0
        return [(mine.value - other.value) * mine.weight / mean_bytes for mine, other in pairs]

    def _apply(self, decision: TrialDecision, trial: Trial, policy: ReleaseTrial) -> None:
        registry, reason = self.books.registry, decision.to_json()
        match decision:
            case KeepTrying():
                return
            case NextStep(kind=kind, share=share):
                by = policy.by if trial.kind == "shadow" else None
                registry.try_out(trial.release, kind, share=share, by=by, reason=reason, of=trial.number)
            case TakeProduction():
                registry.promote_trial(reason=reason, of=trial.number)
            case Withdraw(quarantine=quarantine):
                registry.withdraw(reason=reason, quarantine=quarantine, of=trial.number)
        log_event("trial_decided", release=trial.name, **{**reason, "reasons": "; ".join(decision.reasons)})

    def _begun_at(self, trial: Trial) -> float:
        return next(entry.at for entry in self.books.registry.trial_entries() if entry.number == trial.begun)


def _metric(trial: Trial) -> str:
    """The name of the scores by which the two are compared: no measure of the one in production alone."""
    return f"trial_{trial.begun}"


def _side(outcomes: Sequence[Outcome]) -> Side:
    return Side(
        asked=len(outcomes),
        failed=sum(outcome.failed for outcome in outcomes),
        log_seconds=[
            math.log(max(outcome.seconds, _SHORTEST_S) / outcome.tokens)
            for outcome in outcomes
            if not outcome.failed and outcome.tokens
        ],
    )

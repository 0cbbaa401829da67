"""Decisions: from what was observed to `Wait` or `Retrain`, with reasons. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from aifactory.evaluate.sequential import Found
from aifactory.improve.budget import Spending, afford

if TYPE_CHECKING:
    from aifactory.config import Improve
    from aifactory.improve.schedule import Slot
    from aifactory.records.retrain_requests import RetrainRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What is known when it is decided."""

    release: str | None
    """The release in production."""
    standard: float | None
    """What it needs for answers about rows that it was taught, bits per byte; none if that is not known."""
    num_scored: int
    """Its answers of which it is known what they should have been."""
    live: float
    """What it needs for those, bits per byte."""
    below: Found
    """The bets that they are within the tolerated standard."""
    new_batches: Sequence[str]
    """Sealed feedback batches on which no cycle has trained yet."""
    running: str | None
    """The cycle that runs now, or whose release is on trial, and may still change what is in production."""
    seconds_since_cycle: float = math.inf
    """Since the last cycle ended."""
    seconds_since_withdrawal: float = math.inf
    """Since the last release was withdrawn, or rolled back, for cause."""
    retrains_today: int = 0
    """That were begun in the 24 hours until now."""
    spending: Spending | None = None
    """What retrains have cost and brought; none where no budget is set."""
    prompts: str | None = None
    """What has established that prompts are others than they were; none where nothing has."""
    judged: str | None = None
    """What has established that a judge finds too many answers bad; none where nothing has."""
    requests: Sequence[RetrainRequest] = ()
    """For a retrain, that no cycle has taken up, oldest first."""
    slot: Slot | None = None
    """Of the schedule, that has come and for which nothing was begun."""

    @property
    def is_asked_for(self) -> bool:
        """Whether a retrain is due whatever is found."""
        return bool(self.requests) or self.slot is not None


Awaited = Literal["release", "cycle", "standard", "scores", "drift", "feedback", "cooldown", "budget"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Nothing is to be done now."""

    awaited: Awaited
    """What must come before anything is done; the same for as long as the reasons differ in their numbers alone."""
    reasons: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        return {"decision": "wait", "awaited": self.awaited, "reasons": list(self.reasons)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrain:
    """A cycle is to begin, on these batches beside what its parent was trained on."""

    batches: Sequence[str]
    reasons: Sequence[str]
    max_steps: int | None = None
    """Optimiser steps, where the budget has no room for those of the configuration."""
    requests: Sequence[str] = ()
    """Ids of the requests that it takes up: all that are open, since one retrain is what each of them asked for."""
    slot: float | None = None
    """The moment of the schedule that it stands for."""

    def to_json(self) -> dict[str, Any]:
        told = {"max_steps": self.max_steps, "requests": list(self.requests) or None, "slot": self.slot}
        told = {name: value for name, value in told.items() if value is not None}
        return {"decision": "retrain", "reasons": list(self.reasons), "batches": list(self.batches), **told}


Decision = Wait | Retrain


def decide(policy: Improve, seen: Observation) -> Decision:
    """Retrain if answers are below the standard, beyond doubt, or its time has come, and there is new feedback to learn from; or if
    somebody has asked for it."""
    if seen.release is None:
        return Wait(awaited="release", reasons=("there is no release in production",))
    if seen.running is not None:
        return Wait(awaited="cycle", reasons=(f"the cycle {seen.running} is running",))
    scores = _scores(policy, seen)
    moved = [f"prompts are others than they were at first: {seen.prompts}"] if seen.prompts is not None else []
    counts = bool(moved) and policy.prompts is not None and policy.prompts.retrain
    if seen.judged is not None:
        moved.append(f"the judge finds too many answers bad: {seen.judged}")
        counts = counts or (policy.live_judge is not None and policy.live_judge.retrain)
    if isinstance(scores, Wait) and not counts and not seen.is_asked_for:
        return Wait(awaited=scores.awaited, reasons=(*moved, *scores.reasons))
    asked = [_asked(request) for request in seen.requests] + ([seen.slot.said] if seen.slot is not None else [])
    found = (*asked, *moved, *(scores.reasons if isinstance(scores, Wait) else (scores,)))
    held_up = _held_up(policy, seen, found)
    if isinstance(held_up, Wait):
        return held_up
    learns = f"{len(seen.new_batches)} new feedback batch(es) to learn from"
    found = (*found, *held_up, learns if seen.new_batches else "no new feedback: it learns from what was there before")
    retrain = Retrain(
        batches=tuple(seen.new_batches),
        reasons=found,
        requests=tuple(request.id for request in seen.requests),
        slot=None if seen.slot is None else seen.slot.at,
    )
    if policy.budget is None or seen.spending is None:
        return retrain
    lost = seen.live - seen.standard if seen.standard is not None and seen.num_scored else None
    afforded = afford(policy.budget, seen.spending, max_steps=policy.retrain.max_steps, lost=lost)
    reasons = (*found, *afforded.reasons)
    if not afforded.steps:
        return Wait(awaited="budget", reasons=reasons)
    steps = None if afforded.steps == policy.retrain.max_steps else afforded.steps
    return replace(retrain, reasons=reasons, max_steps=steps)


def _asked(request: RetrainRequest) -> str:
    despite = ", whatever cool-down there is" if request.despite_cooldown else ""
    return f"request: {request.id} asks for a retrain{despite}: {request.reason}"


def _scores(policy: Improve, seen: Observation) -> Wait | str:
    """What scores establish, or what must come before they do."""
    if seen.standard is None:
        return Wait(awaited="standard", reasons=(f"the scorecard of {seen.release} states no standard",))
    if seen.num_scored < policy.min_scored:
        return Wait(
            awaited="scores",
            reasons=(
                f"{seen.num_scored} answers of {seen.release} were scored, at least {policy.min_scored} are needed",
            ),
        )
    limit = seen.standard * (1 + policy.tolerance)
    found = (
        f"live answers of {seen.release} need {seen.live:.3f} bits per byte over {seen.num_scored} answers; the standard "
        f"is {seen.standard:.3f}, tolerated {limit:.3f}; the evidence that they exceed that came to {seen.below.won:.3g} to 1, "
        f"{seen.below.needed:.3g} to 1 establishes it at {policy.confidence:.0%}"
    )
    if not seen.below.is_established:
        return Wait(awaited="drift", reasons=(found, "that is not established to be below the standard"))
    return f"{found}, which was so after {seen.below.at} answers, most of it since answer {seen.below.since}"


def _held_up(policy: Improve, seen: Observation, found: Sequence[str]) -> Wait | list[str]:
    """Why a retrain for which there is reason must wait; or the cool-downs that a request has it not wait for."""
    despite = [request.id for request in seen.requests if request.despite_cooldown]
    cooldowns = []
    if seen.seconds_since_cycle < policy.cooldown_s:
        cooldowns.append(
            f"the last cycle ended {seen.seconds_since_cycle:.0f} s ago, cool-down {policy.cooldown_s:g} s"
        )
    if policy.trial is not None and seen.seconds_since_withdrawal < policy.trial.cooldown_s:
        cooldowns.append(
            f"a release was taken back for cause {seen.seconds_since_withdrawal:.0f} s ago, cool-down "
            f"{policy.trial.cooldown_s:g} s"
        )
    if cooldowns and not despite:
        return Wait(awaited="cooldown", reasons=(*found, *cooldowns))
    if seen.retrains_today >= policy.max_retrains_per_day:
        today = f"{seen.retrains_today} retrains began in the last 24 hours, {policy.max_retrains_per_day} are the most"
        return Wait(awaited="cooldown", reasons=(*found, today))
    if not seen.new_batches and not seen.requests:
        return Wait(awaited="feedback", reasons=(*found, "no feedback batch is sealed that no cycle has read"))
    return [f"{cooldown}: not waited for, as {despite[0]} asks" for cooldown in cooldowns]
